"""Makes the forward pass that scores masks: one function of one fixed shape, for each backend and precision."""

import copy
import gc
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from blocksight.engine.catalog.forward_setting import Backend, ForwardSetting
from blocksight.engine.errors import ModelError
from blocksight.engine.model.device_errors import DeviceTrouble, device_trouble, is_short_of_memory
from blocksight.engine.model.failures import first_line_of
from blocksight.engine.model.liveness import busy

if TYPE_CHECKING:
    from blocksight.engine.model.adapter import ModelAdapter

Forward = Callable[[Tensor], Tensor]
"""Logits [B, K] (float32, on the inputs' device) of normalised inputs [B, 3, H, W], for one B and no gradient."""


@dataclass(frozen=True)
class BufferedForward:
    """A forward pass that reads its inputs from one buffer, in the precision and layout of its first layer.

    Masked inputs that are written there need no copy, no conversion and no new memory.
    """

    buffer_nchw: Tensor
    """[B, 3, H, W]."""
    run: Forward
    """The logits of the buffer."""

    @torch.inference_mode()
    def __call__(self, inputs_nchw: Tensor) -> Tensor:
        """The logits; inputs that are not the buffer are copied into it. Raises ValueError for another shape."""
        if inputs_nchw.shape != self.buffer_nchw.shape:
            raise ValueError(f"a batch is {tuple(self.buffer_nchw.shape)}, and this one {tuple(inputs_nchw.shape)}")
        if inputs_nchw is not self.buffer_nchw:
            self.buffer_nchw.copy_(inputs_nchw)
        return self.run(self.buffer_nchw)


def _eager(adapter: "ModelAdapter", setting: ForwardSetting) -> Forward:
    """Plain PyTorch."""
    if setting.precision == "float32":
        return adapter.logits
    return BufferedForward(_buffer(adapter, setting), _in_precision(_own_copy(adapter, setting), setting))


def in_place(forward: Forward, inputs_nchw: Tensor) -> Tensor:
    """A batch where the pass reads it: in its own buffer, if it has one. No call with it copies anything."""
    if not isinstance(forward, BufferedForward):
        return inputs_nchw.contiguous()
    with torch.inference_mode():
        return forward.buffer_nchw.copy_(inputs_nchw)


def _captured(adapter: "ModelAdapter", setting: ForwardSetting) -> Forward:
    """Plain PyTorch, with its kernels launched as one CUDA graph: needs no compiler."""
    _refuse_without_cuda(adapter)
    return _recorded(_in_precision(_own_copy(adapter, setting), setting), _buffer(adapter, setting))


def _compiled(adapter: "ModelAdapter", setting: ForwardSetting) -> Forward:
    """`torch.compile`, on a CPU with the weights as constants: batch norms are folded into convolutions.

    On a GPU that saves neither a launch nor a byte. The setting is read while the first pass is compiled; as an option
    of `torch.compile` it comes too late and freezes nothing.
    """
    import torch._inductor.config as inductor

    torch._dynamo.config.recompile_limit = max(COMPILED_SETTINGS, torch._dynamo.config.recompile_limit)
    forward = _in_precision(torch.compile(_own_copy(adapter, setting), dynamic=False), setting)
    buffer = _buffer(adapter, setting)
    with inductor.patch(freezing=adapter.device.type == "cpu"), torch.inference_mode():
        forward(buffer)
    return forward if setting.precision == "float32" else BufferedForward(buffer, forward)


def _graphed(adapter: "ModelAdapter", setting: ForwardSetting) -> Forward:
    """`torch.compile`, with its kernels launched as one CUDA graph."""
    _refuse_without_cuda(adapter)
    return _recorded(_compiled(adapter, setting), _buffer(adapter, setting))


def _refuse_without_cuda(adapter: "ModelAdapter") -> None:
    if adapter.device.type != "cuda":
        raise ModelError("CUDA graphs need a CUDA device")


def _recorded(forward: Forward, buffer_nchw: Tensor) -> Forward:
    """A pass whose kernels are recorded once, on one buffer, and then launched together."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode():
        with torch.cuda.stream(aside):  # libraries set up what must not be recorded
            for _ in range(NUM_WARM_UPS):
                forward(buffer_nchw)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = forward(buffer_nchw)

    def replayed(_buffer_nchw: Tensor) -> Tensor:
        graph.replay()
        return logits.clone()  # the next replay overwrites them

    return BufferedForward(buffer_nchw, replayed)


def frozen_copy(adapter: "ModelAdapter") -> torch.nn.Module:
    """A copy of the module for inference, without hooks."""
    module = copy.deepcopy(adapter.module).eval().requires_grad_(False)
    for child in module.modules():
        child._forward_pre_hooks.clear()
        child._forward_hooks.clear()
    return module


def _own_copy(adapter: "ModelAdapter", setting: ForwardSetting) -> torch.nn.Module:
    """A copy whose weights have the setting's precision."""
    return frozen_copy(adapter).to(dtype=_dtype(setting), memory_format=torch.channels_last)  # pyright: ignore


def _dtype(setting: ForwardSetting) -> torch.dtype:
    """The precision of weights and inputs."""
    return torch.float32 if setting.is_autocast else getattr(torch, setting.precision)


def _in_precision(run: Callable[[Tensor], Tensor], setting: ForwardSetting) -> Forward:
    dtype, half = _dtype(setting), getattr(torch, setting.precision)

    def forward(inputs_nchw: Tensor) -> Tensor:
        kind = inputs_nchw.device.type  # a cache of half weights would lie in a CUDA graph's memory
        with torch.no_grad(), torch.autocast(kind, half, enabled=setting.is_autocast, cache_enabled=False):
            return run(inputs_nchw.to(dtype=dtype, memory_format=torch.channels_last)).float()

    return forward


_KEPT_MODELS: list[Any] = []
"""OpenVINO's compiled models, kept until the process ends: after one is freed (2026.4.1), the next signal is a
segmentation fault, and a job must be stoppable."""


def _openvino(adapter: "ModelAdapter", setting: ForwardSetting) -> Forward:
    """OpenVINO's CPU plugin, with as many threads as torch has.

    Threads are not pinned to cores: every actor of a host would pin to the same ones.
    """
    if adapter.device.type != "cpu" or find_spec("openvino") is None:
        raise ModelError("OpenVINO runs on the CPU; install it with pip install '.[cpu]'")
    sys.modules.setdefault("openvino_telemetry", None)  # pyright: ignore # its import sends usage data
    import openvino

    with adapter.borrowed(), torch.no_grad():
        model = openvino.convert_model(torch.export.export(adapter.module, (_example(adapter, setting),)))
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[setting.precision],
    }
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    _KEPT_MODELS.append(request)

    def forward(inputs_nchw: Tensor) -> Tensor:
        logits = request.infer([inputs_nchw.contiguous().numpy()], share_inputs=True)[0]
        return torch.from_numpy(logits.astype("float32"))

    return forward


NUM_WARM_UPS = 3
"""Passes before a CUDA graph is recorded."""
COMPILED_SETTINGS = 64
"""Settings of one architecture in one process. Beyond its default, 8, torch runs uncompiled without a warning."""

BACKENDS: Mapping[Backend, Callable[["ModelAdapter", ForwardSetting], Forward]] = {
    "eager": _eager,
    "openvino": _openvino,
    "captured": _captured,
    "compiled": _compiled,
    "graphed": _graphed,
}


def _example(adapter: "ModelAdapter", setting: ForwardSetting) -> Tensor:
    """A batch of the setting's shape, [B, 3, H, W] zeros."""
    return torch.zeros(setting.batch_size, 3, *adapter.input_size, device=adapter.device)


def _buffer(adapter: "ModelAdapter", setting: ForwardSetting) -> Tensor:
    """An empty batch as the first layer takes it."""
    return _example(adapter, setting).to(dtype=_dtype(setting), memory_format=torch.channels_last)


def make_forward(adapter: "ModelAdapter", setting: ForwardSetting) -> Forward:
    """The adapter's forward pass in this setting; call it inside `adapter.borrowed()`.

    Raises ModelError if the backend cannot run this model here, and OutOfMemoryError if memory is too short for it,
    in any library's words.
    """
    try:
        with busy():
            forward = BACKENDS[setting.backend](adapter, setting)
            with torch.inference_mode():
                forward(_example(adapter, setting))  # compilers run, and fail, at the first call
    except Exception as error:  # a compiler may raise anything for a user's model
        if isinstance(error, ModelError) or device_trouble(error) is DeviceTrouble.LOST:
            raise
        if is_short_of_memory(error):
            raise torch.OutOfMemoryError(first_line_of(error)) from error
        raise ModelError(f"{setting.backend} cannot run {adapter.name}: {first_line_of(error)}") from error
    return forward


def release_memory(adapter: "ModelAdapter") -> None:
    """Drops all compiled code, and gives back the memory of forward passes that nobody holds any more."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    empty_caches(adapter)


def empty_caches(adapter: "ModelAdapter") -> None:
    """Gives back the memory of forward passes that nobody holds any more, CUDA graphs among them.

    Compiled code goes with its module. `torch._dynamo.reset` would drop that of the passes in use as well, which then
    compile again: 13 s for a network of two layers.
    """
    gc.collect()
    if adapter.device.type == "cuda":
        torch.cuda.empty_cache()
