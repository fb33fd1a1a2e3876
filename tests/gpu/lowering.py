"""Lets Inductor write, and Triton compile, the kernels of a model for GPUs that are not there.

`python -m tests.gpu.lowering` prints one JSON line per compute capability. It needs torch's CUDA build
with Triton, and no driver. It changes what torch believes of CUDA, so it runs in a process of its own.
"""

import importlib.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from tests.gpu.cases import NETS, SIZE

CAPABILITIES = ((7, 5), (8, 0), (9, 0))
"""Of a T4, an A100 and an H100 or H200."""
NET, DTYPE = "depthwise", torch.float16
BATCH_SIZE = 8
SOURCE = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)'''", re.DOTALL)
"""A kernel in Inductor's code: its name and its source."""


def reason_to_skip() -> str | None:
    """Why nothing can be lowered here; None if it can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: Inductor lowers nothing for a GPU"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: it compiles Inductor's kernels"
    return None


@dataclass(frozen=True)
class Lowered:
    """The kernels of one model for one kind of GPU."""

    capability: str
    kernels: int
    """That Inductor wrote."""
    machine_code_bytes: int
    """Of all of them, as Triton's assembler made them."""
    library_calls: int
    """To cuDNN and cuBLAS."""


class _LoweredError(Exception):
    """Ends a compilation once its code is written."""


def _properties(major: int, minor: int) -> SimpleNamespace:
    """An H200's, except for the compute capability."""
    return SimpleNamespace(
        name=f"compute capability {major}.{minor}",
        major=major,
        minor=minor,
        total_memory=141 << 30,
        multi_processor_count=132,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        L2_cache_size=50 << 20,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=65536,
        shared_memory_per_multiprocessor=65536,
        gcnArchName="",
        is_integrated=0,
        clock_rate=1_980_000,
        memory_clock_rate=2_619_000,
        memory_bus_width=6144,
        uuid="0",
    )


def _facts(capability: tuple[int, int]) -> Mapping[str, Any]:
    """What torch's functions return of the GPU, by name."""
    found = _properties(*capability)
    answers = {
        "get_device_properties": found,
        "get_device_capability": capability,
        "get_compute_capability": 10 * capability[0] + capability[1],
        "get_device_name": found.name,
        "device_count": 1,
        "is_available": True,
        "is_initialized": True,
        **dict.fromkeys(("current_device", "exchange_device", "maybe_exchange_device", "get_raw_stream"), 0),
        **dict.fromkeys(("_exchange_device", "_maybe_exchange_device"), 0),
        **dict.fromkeys(("set_device", "synchronize", "_lazy_init"), None),
    }
    return {name: partial(_answer, value) for name, value in answers.items()}


def _answer(value: Any, *_: Any) -> Any:
    return value


def _target(capability: tuple[int, int]) -> SimpleNamespace:
    """Triton's driver for the GPU."""
    from triton.backends.compiler import GPUTarget

    major, minor = capability
    return SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 10 * major + minor, 32),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
        get_device_interface=lambda: torch.cuda,
        get_device_capability=lambda *_: capability,
        is_active=lambda: True,
    )


@contextmanager
def believed_gpu(capability: tuple[int, int]) -> Iterator[None]:
    """While the body runs, torch and Triton believe in a GPU of this compute capability."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime.hints import DeviceProperties
    from triton.runtime import driver

    DeviceProperties.create.cache_clear()
    torch._C._ensureCUDADeviceGuardSet()
    driver.set_active(_target(capability))
    with ExitStack() as stack:
        for name, answer in _facts(capability).items():
            for place in (CudaInterface, CudaInterface.Worker, torch.cuda):
                if hasattr(place, name):
                    value = answer if place is torch.cuda else staticmethod(answer)
                    stack.enter_context(mock.patch.object(place, name, value))
        stack.enter_context(mock.patch("torch._subclasses.fake_tensor.init_gpu_context"))
        stack.enter_context(mock.patch("torch._dynamo.utils.preserve_rng_state", nullcontext))
        yield


def inductor_code(net: nn.Module) -> str:
    """The Python code that Inductor writes for the network in float16 on the GPU; nothing is run."""
    from torch._inductor import config, graph
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V
    from torch._subclasses import FakeTensorMode
    from torch.func import functional_call
    from torch.fx.experimental.proxy_tensor import make_fx

    codes: list[str] = []

    def write(lowering: Any) -> None:
        made = lowering.codegen()[0]
        codes.append(getattr(made, "value", made))
        raise _LoweredError

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, torch.no_grad(), config.patch(compile_threads=1, force_disable_caches=True):
        own = {name: _fake(value) for name, value in net.state_dict().items()}

        def forward(inputs: Tensor, *values: Tensor) -> tuple[Tensor]:
            return (functional_call(net, dict(zip(own, values, strict=True)), (inputs,)),)

        inputs = torch.empty(BATCH_SIZE, 3, *SIZE, device="cuda", dtype=DTYPE, memory_format=torch.channels_last)
        given = (inputs, *own.values())
        traced = make_fx(forward, decomposition_table=select_decomp_table(), tracing_mode="real")(*given)
        with mock.patch.object(graph.GraphLowering, "compile_to_module", write), V.set_fake_mode(fake):
            try:
                compile_fx_inner(traced, list(given))
            except Exception as error:  # Inductor wraps what its lowering raises
                if not codes or "_LoweredError" not in repr(error):
                    raise
    return codes[0]


def _fake(value: Tensor) -> Tensor:
    """A weight on the GPU that has no memory."""
    layout = torch.channels_last if value.dim() == 4 else torch.contiguous_format
    wanted = DTYPE if value.is_floating_point() else value.dtype
    return torch.empty(value.shape, device="cuda", dtype=wanted, memory_format=layout)


def machine_code(source: str, name: str, folder: Path) -> bytes:
    """What Triton's assembler makes of a kernel that Inductor wrote, for the believed GPU."""
    import triton
    from triton.compiler import ASTSource

    target = triton.runtime.driver.active.get_current_target()
    heads: list[Mapping[str, Any]] = []

    def heuristics(*_: Any, **options: Any) -> Callable[[Any], Any]:
        heads.append(options)
        return lambda kernel: kernel

    path = folder / f"{name}-{target.arch}.py"
    path.write_text(source)
    kinds = ("pointwise", "reduction", "persistent_reduction", "cooperative_reduction")
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(mock.patch(f"torch._inductor.runtime.triton_heuristics.{kind}", heuristics))
        stack.enter_context(mock.patch("torch._inductor.runtime.triton_helpers.set_driver_to_gpu"))
        kernel = getattr(_imported(path), name)
    meta, hints = heads[0]["triton_meta"], heads[0]["size_hints"]
    blocks = {f"{axis.upper()}BLOCK": min(32, hints[axis]) for axis in hints}
    blocks = {one: size for one, size in blocks.items() if one in kernel.arg_names}
    signature = {**meta["signature"], **dict.fromkeys(blocks, "constexpr")}
    constants = {(kernel.arg_names.index(one),): size for one, size in {**meta["constants"], **blocks}.items()}
    made = triton.compile(ASTSource(kernel, signature, constants), target=target)
    return made.asm["cubin"]


def _imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lowered(capability: tuple[int, int], folder: Path) -> Lowered:
    """Lowers the small network for one kind of GPU, and compiles its kernels; files go into the folder."""
    net = NETS[NET]()
    with believed_gpu(capability):
        code = inductor_code(net)
        assert f"cc={capability[0]}{capability[1]}" in code, "Inductor lowered for another GPU"
        kernels = [machine_code(source, name, folder) for name, source in SOURCE.findall(code)]
    calls = re.findall(r"extern_kernels\.\w+\(|torch\.ops\.aten\.\w+\.\w+\(", code)
    return Lowered("{}.{}".format(*capability), len(kernels), sum(map(len, kernels)), len(calls))


def main() -> None:
    """Prints a line for each capability; exit code 2 with the reason if nothing can be lowered."""
    reason = reason_to_skip()
    if reason is not None:
        print(reason, file=sys.stderr)
        sys.exit(2)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(TORCHINDUCTOR_CACHE_DIR=folder, TRITON_CACHE_DIR=folder)
        for capability in CAPABILITIES:
            print(json.dumps(asdict(lowered(capability, Path(folder)))), flush=True)


if __name__ == "__main__":
    main()
