"""Chooses a forward setting, by rule or as the fastest valid one, and measures the score error of each."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from blocksight.engine.catalog.forward_setting import Backend, ForwardSetting, Precision
from blocksight.engine.errors import ModelError
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.device_errors import DeviceTrouble, device_trouble, while_it_fits
from blocksight.engine.model.failures import first_line_of
from blocksight.engine.model.resample import grid_of, upsampling
from blocksight.engine.scoring.forward import Forward, empty_caches, in_place, make_forward

NUM_PICTURES = 8
"""Random pictures that the error is measured on: from a fixed seed, so that it depends on no data."""
PICTURE_CELLS = (2, 4, 8, 16, 32)
"""Sides of the grids of random colours that make up a picture, coarse to fine."""
NUM_MASKED_PICTURES = 32
"""Masked pictures on which score errors are measured."""
MASK_CELLS = 7
"""Side of the random masks' grid."""
MAX_FLOAT32_ERROR = 1e-4
"""Largest median relative score error of a float32 setting: more is a wrong conversion, not rounding (about 2e-6)."""
MAX_FAST_ERROR = 0.015
"""The same for a lower precision that is chosen for speed."""
MAX_REQUESTED_ERROR = 0.25
"""The same for a lower precision that the user requested: beyond it the order of the scores is lost."""
MIN_SPEEDUP = 1.1
"""A later setting must be so many times as fast."""
NUM_REPEATS = 5

EAGER_BATCH_SIZES: Mapping[str, int] = {"cpu": 4, "cuda": 256}
"""For eager PyTorch. On a CPU larger batches do not fit into the second-level cache."""
OPENVINO_BATCH_SIZE = 8
TUNED_CPU_BATCH_SIZES = (8, 4, 16)
"""Tried with the compiler, the most likely first."""
GPU_BATCH_SIZES = (64, 128, 256, 512)
"""Tried with eager PyTorch; the compilers get the fastest."""


@dataclass(frozen=True)
class ForwardRequest:
    """What a job requests of its forward passes."""

    precision: Precision | None = None
    """None: float32; on a GPU float16 where it is sound."""
    batch_size: int | None = None
    """None: by rule, or the fastest if passes are timed."""
    is_timed: bool = False
    """Timings may choose: two new jobs may then choose differently."""
    is_eager: bool = False
    """Nothing but PyTorch itself is tried."""


@dataclass(frozen=True)
class MeasuredSetting:
    """The score error and speed of one setting."""

    setting: ForwardSetting
    score_error: float = 0.0
    """Median relative error of the top class's probability on masked pictures, to eager float32."""
    forwards_per_second: float | None = None
    """Per second of CPU time on a CPU, of wall time on a GPU; None: not timed."""
    refused: str | None = None
    """The reason if it does not run here."""

    def figures(self) -> dict[str, Any]:
        """Plain values; an error that is not finite is None."""
        error = float(f"{self.score_error:.3g}") if isfinite(self.score_error) else None
        return {**asdict(self), "score_error": error}

    def is_sound(self, request: ForwardRequest) -> bool:
        """True if it runs and its score error is within the bound."""
        return self.refused is None and self.score_error <= max_score_error(self.setting, request)


def max_score_error(setting: ForwardSetting, request: ForwardRequest) -> float:
    """The largest score error that the setting may have."""
    if setting.precision == "float32":
        return MAX_FLOAT32_ERROR
    return MAX_FAST_ERROR if request.precision is None else MAX_REQUESTED_ERROR


def eager_setting(device: str, batch_size: int | None = None, precision: Precision = "float32") -> ForwardSetting:
    """Eager PyTorch on a device, such as `cuda:0`."""
    return ForwardSetting("eager", precision, batch_size or EAGER_BATCH_SIZES[torch.device(device).type])


def choose(adapter: ModelAdapter, request: ForwardRequest) -> tuple[Forward, list[MeasuredSetting]]:
    """The chosen forward pass, and the measurements of all tried settings, the chosen one first.

    By rule the first valid setting; if passes are timed the fastest valid one, but a later one must be `MIN_SPEEDUP`
    times as fast. Nothing depends on data: errors are measured on random pictures. Without timing the same model,
    packages and threads give the same choice on one machine. Raises ModelError if a requested precision does not run
    here, or if its error is above `MAX_REQUESTED_ERROR`.
    """
    with adapter.borrowed(), torch.inference_mode():
        masked = _masked_pictures(drawn_pictures(adapter))
        found: list[MeasuredSetting] = []
        best, forward = None, None
        for measured, tried in _measured_candidates(adapter, masked, request, found):
            if measured.is_sound(request) and (best is None or _is_faster(measured, best)):
                best, forward = measured, tried
            if best is not None and not request.is_timed:
                break
        tried = None  # the losers' memory is wanted for the work
        empty_caches(adapter)
    if best is None or forward is None:  # nothing fits, or nothing is finite: eager, with the smallest batches
        _refuse_requested(adapter, request, found)
        plain = eager_setting("cpu", request.batch_size)
        best, forward = MeasuredSetting(plain), adapter.logits
    return forward, [best, *(one for one in found if one is not best)]


def _measured_candidates(
    adapter: ModelAdapter, masked: Tensor, request: ForwardRequest, found: list[MeasuredSetting]
) -> Iterator[tuple[MeasuredSetting, Forward | None]]:
    """Every candidate setting with its forward pass, None if it does not run here; extends `found`."""
    wanted = None
    for setting in _candidates(adapter.device.type, request, found):
        if setting == eager_setting(adapter.device.type, setting.batch_size) and not request.is_timed:
            measured, forward = MeasuredSetting(setting), adapter.logits  # the reference of the errors
        else:
            wanted = _reference_scores(adapter, masked) if wanted is None else wanted
            measured, forward = _measured(adapter, setting, masked, wanted, request)
        found.append(measured)
        yield measured, forward


def _measured(
    adapter: ModelAdapter, setting: ForwardSetting, masked: Tensor, wanted: Tensor, request: ForwardRequest
) -> tuple[MeasuredSetting, Forward | None]:
    """One setting's error and speed, with its forward pass. Whatever fails refuses this setting alone."""
    try:
        forward = make_forward(adapter, setting)
        error = _score_error(_scores(adapter, forward, masked, setting.batch_size), wanted)
        speed = rate(forward, masked, setting.batch_size) if request.is_timed else None
    except Exception as failure:  # a compiler, a driver or a user's model may raise anything
        if device_trouble(failure) is DeviceTrouble.LOST:  # no other setting can be measured in this process
            raise
        return MeasuredSetting(setting, refused=first_line_of(failure)), None
    return MeasuredSetting(setting, error, speed), forward


def _reference_scores(adapter: ModelAdapter, masked: Tensor) -> Tensor:
    """The scores in eager float32, in the largest small batches that fit.

    Raises what says so if not even one image fits, and ModelError if the model fails.
    """
    size = EAGER_BATCH_SIZES["cpu"]
    while size > 1:
        with while_it_fits():
            return _scores(adapter, make_forward(adapter, eager_setting("cpu", size)), masked, size)
        size //= 2
    return _scores(adapter, make_forward(adapter, eager_setting("cpu", 1)), masked, 1)


def _is_faster(measured: MeasuredSetting, best: MeasuredSetting) -> bool:
    return _speed(measured) > MIN_SPEEDUP * _speed(best)


def _refuse_requested(adapter: ModelAdapter, request: ForwardRequest, found: list[MeasuredSetting]) -> None:
    """Raises ModelError if the user requested a lower precision in which this model does not work here."""
    if request.precision in (None, "float32"):
        return
    reasons = "; ".join(f"{one.setting}: {one.refused or f'a score error of {one.score_error:.2g}'}" for one in found)
    raise ModelError(
        f"{adapter.name} does not work in {request.precision} here ({reasons}; the limit is {MAX_REQUESTED_ERROR}): "
        "choose another --precision, or leave it out"
    )


def rate(forward: Forward, inputs_nchw: Tensor, batch_size: int, repeats: int = NUM_REPEATS) -> float:
    """Forward passes per second, the best of some repeats: of CPU time on a CPU, which a busy machine affects less.

    Every pass takes a full batch; the inputs are repeated if they are fewer. The first is not timed: it may compile.
    """
    batch = in_place(forward, repeated_inputs(inputs_nchw, batch_size))
    forward(batch)
    on_gpu = batch.device.type == "cuda"
    seconds = [measured_seconds(lambda: forward(batch), on_gpu=on_gpu) for _ in range(repeats)]
    return batch_size / max(min(seconds), 1e-9)


def measured_seconds(work: Callable[[], object], *, on_gpu: bool) -> float:
    """Seconds that it takes: CPU time of this process, or wall time until the GPU is done."""
    clock = time.perf_counter if on_gpu else time.process_time
    _wait(on_gpu)
    start = clock()
    work()
    _wait(on_gpu)
    return clock() - start


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def _candidates(device: str, request: ForwardRequest, found: Sequence[MeasuredSetting]) -> Iterator[ForwardSetting]:
    """The settings to try: by rule the preferred first, with timing the simplest first.

    `found` holds the measurements of those before: a setting that cannot win is not tried.
    """
    if request.is_eager:
        yield eager_setting(device, request.batch_size)
    elif device == "cpu":
        yield from _timed_on_cpu(request, found) if request.is_timed else _ruled_on_cpu(request)
    elif request.is_timed:
        yield from _timed_on_gpu(request, found)
    else:
        precisions: tuple[Precision, ...] = ("float16", "float32")
        for precision in (request.precision,) if request.precision else precisions:
            yield from _eager_settings(eager_setting(device, request.batch_size, precision))


def _eager_settings(plain: ForwardSetting) -> Sequence[ForwardSetting]:
    """Eager PyTorch, and for a half precision also by autocast: some models do not run with half weights."""
    return (plain,) if plain.precision == "float32" else (plain, replace(plain, is_autocast=True))


def _ruled_on_cpu(request: ForwardRequest) -> Iterator[ForwardSetting]:
    plain = eager_setting("cpu", request.batch_size, request.precision or "float32")
    compiler = _cpu_compiler(plain.precision)
    if compiler is not None:
        yield ForwardSetting(compiler, plain.precision, request.batch_size or OPENVINO_BATCH_SIZE)
    yield from _eager_settings(plain)


def _timed_on_cpu(request: ForwardRequest, found: Sequence[MeasuredSetting]) -> Iterator[ForwardSetting]:
    plain = eager_setting("cpu", request.batch_size, request.precision or "float32")
    for setting in _eager_settings(plain):
        yield setting
        if found[-1].is_sound(request):
            break
    compiler = _cpu_compiler(plain.precision)
    tuned = replace(plain, backend=compiler) if compiler else replace(found[-1].setting, backend="compiled")
    sizes = TUNED_CPU_BATCH_SIZES if compiler else TUNED_CPU_BATCH_SIZES[:1]  # torch.compile takes half a minute each
    for size in (request.batch_size,) if request.batch_size else sizes:
        yield replace(tuned, batch_size=size)
        if not found[-1].is_sound(request):
            return  # the other sizes would not be either


def _cpu_compiler(precision: Precision) -> Backend | None:
    """`openvino` if installed and native in this precision: it would silently replace float16 by float32."""
    is_native = precision != "float16" or torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return "openvino" if is_native and find_spec("openvino") is not None else None


def _timed_on_gpu(request: ForwardRequest, found: Sequence[MeasuredSetting]) -> Iterator[ForwardSetting]:
    """Eager at each batch size that fits, then the faster backends at the fastest.

    Compilers take a minute, so that they get a precision only if eager PyTorch is sound in it. bfloat16 is less exact
    than float16 and no faster, so that it comes second.
    """
    if request.precision is None:
        yield eager_setting("cuda", request.batch_size)
    precisions: tuple[Precision, ...] = ("float16", "bfloat16", "float32")
    for precision in (request.precision,) if request.precision else precisions:
        for plain in _eager_settings(eager_setting("cuda", request.batch_size, precision)):
            yield from _sizes(plain, request, found)
            sound = [one for one in found if replace(one.setting, batch_size=plain.batch_size) == plain]
            sound = [one for one in sound if one.is_sound(request)]
            if sound:
                yield from _faster_backends(max(sound, key=_speed).setting, found)
                return


def _sizes(
    plain: ForwardSetting, request: ForwardRequest, found: Sequence[MeasuredSetting]
) -> Iterator[ForwardSetting]:
    """The setting at growing batch sizes, until one does not fit or is not sound."""
    for size in (request.batch_size,) if request.batch_size else GPU_BATCH_SIZES:
        setting = replace(plain, batch_size=size)
        if setting not in [one.setting for one in found]:
            yield setting
        if not next(one for one in found if one.setting == setting).is_sound(request):
            return


def _faster_backends(eager: ForwardSetting, found: Sequence[MeasuredSetting]) -> Iterator[ForwardSetting]:
    """The backends to try after eager PyTorch: one compilation alone, unless a CUDA graph of it fails."""
    yield replace(eager, backend="captured")
    if found[-1].refused is None:
        yield replace(eager, backend="graphed")
        if found[-1].refused is None:
            return  # without a graph it would be no faster
    yield replace(eager, backend="compiled")


def _speed(measured: MeasuredSetting) -> float:
    return measured.forwards_per_second or 0.0


def drawn_pictures(adapter: ModelAdapter) -> Tensor:
    """Random pictures as model inputs [NUM_PICTURES, 3, H, W]: smooth colours, the same for every job."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.zeros(NUM_PICTURES, 3, *adapter.input_size)
    for cells in PICTURE_CELLS:
        colours = torch.randn(NUM_PICTURES, 3, cells, cells, generator=generator)
        drawn += interpolate(colours, adapter.input_size, mode="bilinear")
    low, high = drawn.amin((1, 2, 3), keepdim=True), drawn.amax((1, 2, 3), keepdim=True)
    return adapter.normalise(((drawn - low) / (high - low) * 255).round().to(torch.uint8))


def _masked_pictures(inputs_nchw: Tensor) -> Tensor:
    """The images, repeated, each under another smooth random mask [NUM_MASKED_PICTURES, 3, H, W]."""
    generator = torch.Generator().manual_seed(0)
    native = torch.rand(NUM_MASKED_PICTURES, MASK_CELLS, MASK_CELLS, generator=generator).to(inputs_nchw)
    full = grid_of(inputs_nchw)
    masks = upsampling((MASK_CELLS, MASK_CELLS), full, inputs_nchw.device)(native)
    return repeated_inputs(inputs_nchw, NUM_MASKED_PICTURES) * masks[:, None]


def repeated_inputs(inputs_nchw: Tensor, count: int) -> Tensor:
    """The inputs, repeated in order up to this count."""
    return inputs_nchw[torch.arange(count, device=inputs_nchw.device) % len(inputs_nchw)]


def _scores(adapter: ModelAdapter, forward: Forward, inputs_nchw: Tensor, batch_size: int) -> Tensor:
    """Scores [N, K] (float64), in full batches."""
    count = len(inputs_nchw)
    filled = repeated_inputs(inputs_nchw, count + -count % batch_size)
    logits = torch.cat([forward(batch) for batch in filled.split(batch_size)])
    return adapter.scores(logits[:count])


def _score_error(scores: Tensor, wanted: Tensor) -> float:
    """The median over images of the top class's relative error; infinite if a score is not finite."""
    if not scores.isfinite().all():
        return inf
    top = wanted.argmax(1, keepdim=True)
    return float(((scores.gather(1, top) / wanted.gather(1, top)) - 1).abs().median())
