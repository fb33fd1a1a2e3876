"""The forward pass that masks are scored with: one function of one fixed shape, as fast as the machine allows."""

import copy
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from blocksight.engine.catalog.forward_setting import Backend, ForwardSetting
from blocksight.engine.errors import ModelError

if TYPE_CHECKING:
    from blocksight.engine.model.adapter import ModelAdapter

Forward = Callable[[Tensor], Tensor]
"""Logits [B, K] (float32, on the inputs' device) of normalised inputs [B, 3, H, W], for one B and no gradient."""


def _eager(adapter: "ModelAdapter", setting: ForwardSetting) -> Forward:
    """PyTorch as it is."""
    if setting.precision == "float32":
        return adapter.logits
    return _in_precision(_own_copy(adapter, setting), setting)


def _compiled(adapter: "ModelAdapter", setting: ForwardSetting) -> Forward:
    """`torch.compile` with the weights as constants."""
    return _in_precision(_inductor(_own_copy(adapter, setting), freezing=True), setting)


def _graphed(adapter: "ModelAdapter", setting: ForwardSetting) -> Forward:
    """The same, and its kernels launched as one CUDA graph."""
    if adapter.device.type != "cuda":
        raise ModelError("CUDA graphs need a CUDA device")
    run = _inductor(_own_copy(adapter, setting), **{"freezing": True, "triton.cudagraphs": True})
    return _in_precision(lambda inputs: run(inputs).clone(), setting)  # the next call overwrites what a graph returns


def _inductor(module: torch.nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
    torch._dynamo.config.recompile_limit = max(COMPILED_SETTINGS, torch._dynamo.config.recompile_limit)
    return torch.compile(module, dynamic=False, options=options)


def frozen_copy(adapter: "ModelAdapter") -> torch.nn.Module:
    """The module once more, for inference alone, without the hooks that somebody hung on it."""
    module = copy.deepcopy(adapter.module).eval().requires_grad_(False)
    for child in module.modules():
        child._forward_pre_hooks.clear()
        child._forward_hooks.clear()
    return module


def _own_copy(adapter: "ModelAdapter", setting: ForwardSetting) -> torch.nn.Module:
    """A copy in a precision of its own."""
    dtype = getattr(torch, setting.precision)
    return frozen_copy(adapter).to(dtype=dtype, memory_format=torch.channels_last)  # pyright: ignore


def _in_precision(run: Callable[[Tensor], Tensor], setting: ForwardSetting) -> Forward:
    dtype = getattr(torch, setting.precision)

    def forward(inputs_nchw: Tensor) -> Tensor:
        with torch.no_grad():
            return run(inputs_nchw.to(dtype=dtype, memory_format=torch.channels_last)).float()

    return forward


_KEPT: list[Any] = []
"""OpenVINO's compiled models, kept for as long as the process lives: in a process that has freed one (2026.4.1), the
next signal is a segmentation fault, and a job must be stoppable."""


def _openvino(adapter: "ModelAdapter", setting: ForwardSetting) -> Forward:
    """OpenVINO's CPU plugin, with as many threads as torch has here.

    Threads are not pinned to cores: every actor of a machine would pin to the same ones.
    """
    if adapter.device.type != "cpu" or find_spec("openvino") is None:
        raise ModelError("OpenVINO runs on the CPU, and comes with pip install 'blocksight[cpu]'")
    sys.modules.setdefault("openvino_telemetry", None)  # pyright: ignore # its import would report itself to its makers
    import openvino

    example = torch.zeros(setting.batch_size, 3, *adapter.input_size)
    with adapter.borrowed(), torch.no_grad():
        model = openvino.convert_model(torch.export.export(adapter.module, (example,)))
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[setting.precision],
    }
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    _KEPT.append(request)

    def forward(inputs_nchw: Tensor) -> Tensor:
        logits = request.infer([inputs_nchw.contiguous().numpy()], share_inputs=True)[0]
        return torch.from_numpy(logits.astype("float32"))

    return forward


COMPILED_SETTINGS = 64
"""Of one architecture in one process: beyond its own limit, 8, torch would run further ones uncompiled, in silence."""

BACKENDS: Mapping[Backend, Callable[["ModelAdapter", ForwardSetting], Forward]] = {
    "eager": _eager,
    "openvino": _openvino,
    "compiled": _compiled,
    "graphed": _graphed,
}


def make_forward(adapter: "ModelAdapter", setting: ForwardSetting) -> Forward:
    """The adapter's forward pass in this setting; call it inside `adapter.borrowed()`.

    Raises ModelError where the backend cannot run this model here.
    """
    example = torch.zeros(setting.batch_size, 3, *adapter.input_size, device=adapter.device)
    try:
        forward = BACKENDS[setting.backend](adapter, setting)
        with torch.inference_mode():
            forward(example)  # compilers work at the first call, and fail there
    except (torch.OutOfMemoryError, ModelError):
        raise
    except Exception as error:  # whatever a compiler may say of a stranger's model
        raise ModelError(f"{setting.backend} cannot run {adapter.name}: {first_line(error)}") from error
    return forward


def use_ieee_float32() -> None:
    """Has float32 mean IEEE float32 in this process: no TF32 or bfloat16 products inside, on any device.

    torch allows TF32 in cuDNN's convolutions by default, and a user's model factory may allow more.
    """
    torch.set_float32_matmul_precision("highest")  # the older settings too, or torch refuses to read them
    torch.backends.cudnn.allow_tf32 = False
    cuda, cpu = torch.backends.cudnn, torch.backends.mkldnn
    for products in (torch.backends.cuda.matmul, cuda.conv, cuda.rnn, cpu.matmul, cpu.conv, cpu.rnn):
        products.fp32_precision = "ieee"  # pyright: ignore[reportAttributeAccessIssue]


def first_line(error: Exception) -> str:
    """What an exception says in one line, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
