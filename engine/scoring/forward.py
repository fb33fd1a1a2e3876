"""Makes the forward pass that scores masks: one function of one fixed shape, for each backend and precision."""

import copy
import gc
import sys
from collections.abc import Callable, Mapping
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


def _eager(adapter: "ModelAdapter", setting: ForwardSetting) -> Forward:
    """Plain PyTorch."""
    if setting.precision == "float32":
        return adapter.logits
    return _in_precision(_own_copy(adapter, setting), setting)


def _compiled(adapter: "ModelAdapter", setting: ForwardSetting) -> Forward:
    """`torch.compile` with the weights as constants."""
    return _in_precision(_inductor(_own_copy(adapter, setting), freezing=True), setting)


def _graphed(adapter: "ModelAdapter", setting: ForwardSetting) -> Forward:
    """The same, with its kernels launched as one CUDA graph."""
    if adapter.device.type != "cuda":
        raise ModelError("CUDA graphs need a CUDA device")
    run = _inductor(_own_copy(adapter, setting), **{"freezing": True, "triton.cudagraphs": True})
    return _in_precision(lambda inputs: run(inputs).clone(), setting)  # the next call overwrites what a graph returns


def _inductor(module: torch.nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
    torch._dynamo.config.recompile_limit = max(COMPILED_SETTINGS, torch._dynamo.config.recompile_limit)
    return torch.compile(module, dynamic=False, options=options)


def frozen_copy(adapter: "ModelAdapter") -> torch.nn.Module:
    """A copy of the module for inference, without hooks."""
    module = copy.deepcopy(adapter.module).eval().requires_grad_(False)
    for child in module.modules():
        child._forward_pre_hooks.clear()
        child._forward_hooks.clear()
    return module


def _own_copy(adapter: "ModelAdapter", setting: ForwardSetting) -> torch.nn.Module:
    """A copy in the setting's precision."""
    dtype = getattr(torch, setting.precision)
    return frozen_copy(adapter).to(dtype=dtype, memory_format=torch.channels_last)  # pyright: ignore


def _in_precision(run: Callable[[Tensor], Tensor], setting: ForwardSetting) -> Forward:
    dtype = getattr(torch, setting.precision)

    def forward(inputs_nchw: Tensor) -> Tensor:
        with torch.no_grad():
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
    _KEPT_MODELS.append(request)

    def forward(inputs_nchw: Tensor) -> Tensor:
        logits = request.infer([inputs_nchw.contiguous().numpy()], share_inputs=True)[0]
        return torch.from_numpy(logits.astype("float32"))

    return forward


COMPILED_SETTINGS = 64
"""Settings of one architecture in one process. Beyond its default, 8, torch runs uncompiled without a warning."""

BACKENDS: Mapping[Backend, Callable[["ModelAdapter", ForwardSetting], Forward]] = {
    "eager": _eager,
    "openvino": _openvino,
    "compiled": _compiled,
    "graphed": _graphed,
}


def make_forward(adapter: "ModelAdapter", setting: ForwardSetting) -> Forward:
    """The adapter's forward pass in this setting; call it inside `adapter.borrowed()`.

    Raises ModelError if the backend cannot run this model here, and OutOfMemoryError if memory is too short for it,
    in any library's words.
    """
    try:
        example = torch.zeros(setting.batch_size, 3, *adapter.input_size, device=adapter.device)
        with busy():
            forward = BACKENDS[setting.backend](adapter, setting)
            with torch.inference_mode():
                forward(example)  # compilers run, and fail, at the first call
    except Exception as error:  # a compiler may raise anything for a user's model
        if isinstance(error, ModelError) or device_trouble(error) is DeviceTrouble.LOST:
            raise
        if is_short_of_memory(error):
            raise torch.OutOfMemoryError(first_line_of(error)) from error
        raise ModelError(f"{setting.backend} cannot run {adapter.name}: {first_line_of(error)}") from error
    return forward


def release_memory(adapter: "ModelAdapter") -> None:
    """Gives back what forward passes that nobody holds any more have left: compiled code, graphs, cached memory."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if adapter.device.type == "cuda":
        torch.cuda.empty_cache()
