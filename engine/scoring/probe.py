"""The choice of a forward setting: by rule, or by speed among the sound ones; and how exact each of them is."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from blocksight.engine.catalog.forward_setting import Backend, ForwardSetting, Precision
from blocksight.engine.errors import ModelError
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.resample import grid_of, upsampling
from blocksight.engine.scoring.forward import Forward, first_line, make_forward

NUM_PICTURES = 8
"""Drawn pictures that the error is measured on: from a fixed seed, so that it depends on no data."""
PICTURE_CELLS = (2, 4, 8, 16, 32)
"""Sides of the grids of random colours that make up a picture, coarse to fine."""
NUM_MASKED = 32
"""Masked pictures on which score errors are measured."""
CELLS = 7
"""Side of the random masks' grid."""
EXACT_ERROR = 1e-4
"""Median relative score error that a float32 setting may have: more is a wrong conversion, not rounding (some 2e-6)."""
FAST_ERROR = 0.015
"""The same for a lower precision that is taken because it is fast."""
ASKED_ERROR = 0.25
"""The same for a lower precision that the user asked for: beyond it the order of the scores is lost."""
WORTH = 1.1
"""A less plain setting must be so many times as fast."""
REPEATS = 5

PLAIN_BATCH_SIZES: Mapping[str, int] = {"cpu": 4, "cuda": 256}
"""Of the model as it is. On a CPU larger batches fall out of the second-level cache."""
OPENVINO_BATCH_SIZE = 8
TUNED_CPU_BATCH_SIZES = (8, 4, 16)
"""Tried with the compiler, the likeliest first."""
GPU_BATCH_SIZES = (64, 128, 256, 512)
"""Tried with eager float16, or float32; the compilers get the fastest."""


@dataclass(frozen=True)
class Wish:
    """What a job asks of its forward passes."""

    precision: Precision | None = None
    """None: float32, or what is fast and sound on a GPU whose passes are timed."""
    batch_size: int | None = None
    """None: by rule, or the fastest where passes are timed."""
    is_timed: bool = False
    """Whether timings may choose: two fresh jobs may then choose differently."""


@dataclass(frozen=True)
class Measured:
    """What is known of one setting."""

    setting: ForwardSetting
    score_error: float = 0.0
    """Median relative error of the top class's probability on masked pictures, to eager float32."""
    forwards_per_second: float | None = None
    """Of CPU time on a CPU, of wall time on a GPU; None: not timed."""
    refused: str | None = None
    """Why it does not run here."""

    def figures(self) -> dict[str, Any]:
        """As plain values; an error that is not finite is None."""
        error = float(f"{self.score_error:.3g}") if isfinite(self.score_error) else None
        return {**asdict(self), "score_error": error}

    def is_sound(self, wish: Wish) -> bool:
        """It runs, and its scores may be used."""
        return self.refused is None and self.score_error <= bound_of(self.setting, wish)


def bound_of(setting: ForwardSetting, wish: Wish) -> float:
    """The largest score error that the setting may have."""
    if setting.precision == "float32":
        return EXACT_ERROR
    return FAST_ERROR if wish.precision is None else ASKED_ERROR


def plain_setting(device: str, batch_size: int | None = None, precision: Precision = "float32") -> ForwardSetting:
    """The model as it is."""
    return ForwardSetting("eager", precision, batch_size or PLAIN_BATCH_SIZES[device])


def choose(adapter: ModelAdapter, wish: Wish) -> tuple[Forward, list[Measured]]:
    """The forward pass to take, and what is known of each setting that was tried; the first is the one taken.

    By rule the first sound setting; where passes are timed the fastest sound one, but a later one only where it is
    `WORTH` times as fast. Nothing depends on data: errors are measured on drawn pictures. Without timing the same
    model, packages and threads give the same answer on one machine. Raises ModelError where a precision that is
    asked for does not run here, or its error is beyond `ASKED_ERROR`.
    """
    with adapter.borrowed(), torch.inference_mode():
        masked = _masked(_pictures(adapter))
        found: list[Measured] = []
        best, forward = None, None
        for measured, tried in _tried(adapter, masked, wish):
            found.append(measured)
            if measured.is_sound(wish) and (best is None or _is_worth(measured, best)):
                best, forward = measured, tried
            if best is not None and not wish.is_timed:
                break
    if best is None or forward is None:  # nothing fits, or nothing is finite: as plain and as small as can be
        _refuse_asked(adapter, wish, found)
        plain = plain_setting("cpu", wish.batch_size)
        best, forward = Measured(plain), adapter.logits
    return forward, [best, *(one for one in found if one is not best)]


def _tried(adapter: ModelAdapter, masked: Tensor, wish: Wish) -> Iterator[tuple[Measured, Forward | None]]:
    """Every setting that comes into question with its forward pass, where it runs here."""
    wanted = None
    for setting in _candidates(adapter, masked, wish):
        if setting == plain_setting(adapter.device.type, setting.batch_size) and not wish.is_timed:
            yield Measured(setting), adapter.logits  # what errors are measured against
            continue
        if wanted is None:
            wanted = _scores(adapter.logits, masked, PLAIN_BATCH_SIZES["cpu"])
        try:
            tried = make_forward(adapter, setting)
            error = _error(_scores(tried, masked, setting.batch_size), wanted)
            speed = rate(tried, cycled(masked, setting.batch_size), setting.batch_size) if wish.is_timed else None
        except (ModelError, torch.OutOfMemoryError) as failure:
            yield Measured(setting, refused=first_line(failure)), None
        else:
            yield Measured(setting, error, speed), tried


def _is_worth(measured: Measured, best: Measured) -> bool:
    return (measured.forwards_per_second or 0.0) > WORTH * (best.forwards_per_second or 0.0)


def _refuse_asked(adapter: ModelAdapter, wish: Wish, found: list[Measured]) -> None:
    """Raises ModelError where the user asked for a lower precision, and this model has no use for it here."""
    if wish.precision in (None, "float32"):
        return
    said = "; ".join(f"{one.setting}: {one.refused or f'a score error of {one.score_error:.2g}'}" for one in found)
    raise ModelError(
        f"{adapter.name} is of no use in {wish.precision} here ({said}; at most {ASKED_ERROR} is let pass): ask for "
        "another --precision, or leave it out"
    )


def rate(forward: Forward, inputs_nchw: Tensor, batch_size: int, repeats: int = REPEATS) -> float:
    """Forward passes per second, the best of some repeats: of CPU time on a CPU, so that a busy machine counts less.

    `inputs_nchw` holds at least `batch_size` inputs. The first call is not timed: it may compile.
    """
    batch = inputs_nchw[:batch_size].contiguous()
    forward(batch)
    on_gpu = batch.device.type == "cuda"
    seconds = [seconds_of(lambda: forward(batch), on_gpu=on_gpu) for _ in range(repeats)]
    return batch_size / max(min(seconds), 1e-9)


def seconds_of(work: Callable[[], object], *, on_gpu: bool) -> float:
    """How long it takes: CPU time of this process, or wall time until the GPU is done."""
    clock = time.perf_counter if on_gpu else time.process_time
    _wait(on_gpu)
    start = clock()
    work()
    _wait(on_gpu)
    return clock() - start


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def _candidates(adapter: ModelAdapter, masked: Tensor, wish: Wish) -> Iterator[ForwardSetting]:
    """The settings to try: by rule the preferred first, to be timed the plainest first."""
    device, precision = adapter.device.type, wish.precision or "float32"
    plain = plain_setting(device, wish.batch_size, precision)
    if device == "cuda":
        yield from _gpu_candidates(adapter, masked, wish) if wish.is_timed else (plain,)
        return
    compiler = _cpu_compiler(precision)
    if not wish.is_timed:
        if compiler is not None:
            yield ForwardSetting(compiler, precision, wish.batch_size or OPENVINO_BATCH_SIZE)
        yield plain
        return
    yield plain
    sizes = TUNED_CPU_BATCH_SIZES if compiler else TUNED_CPU_BATCH_SIZES[:1]  # torch.compile takes half a minute each
    for size in (wish.batch_size,) if wish.batch_size else sizes:
        yield ForwardSetting(compiler or "compiled", precision, size)


def _cpu_compiler(precision: Precision) -> Backend | None:
    """`openvino` where it is installed and computes in this precision: float16 it would replace by float32, unsaid."""
    is_native = precision != "float16" or torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return "openvino" if is_native and find_spec("openvino") is not None else None


def _gpu_candidates(adapter: ModelAdapter, masked: Tensor, wish: Wish) -> Iterator[ForwardSetting]:
    """The model as it is, then compiled in each precision that may be taken."""
    precisions: tuple[Precision, ...] = (wish.precision,) if wish.precision else ("float16", "bfloat16")
    size = wish.batch_size or _best_batch_size(adapter, masked, precisions[0])
    yield plain_setting("cuda", size, wish.precision or "float32")
    for precision in precisions:
        yield ForwardSetting("compiled", precision, size)
        yield ForwardSetting("graphed", precision, size)


def _best_batch_size(adapter: ModelAdapter, masked: Tensor, precision: Precision) -> int:
    """The size at which the model as it is runs fastest on the GPU, of those that fit."""
    rates: dict[int, float] = {}
    for size in GPU_BATCH_SIZES:
        try:
            forward = make_forward(adapter, ForwardSetting("eager", precision, size))
            rates[size] = rate(forward, cycled(masked, size), size)
        except torch.OutOfMemoryError:
            break
    return max(rates, key=rates.__getitem__, default=GPU_BATCH_SIZES[0])


def _pictures(adapter: ModelAdapter) -> Tensor:
    """Drawn pictures as the model takes them [NUM_PICTURES, 3, H, W]: smooth colours, the same for every job."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.zeros(NUM_PICTURES, 3, *adapter.input_size)
    for cells in PICTURE_CELLS:
        colours = torch.randn(NUM_PICTURES, 3, cells, cells, generator=generator)
        drawn += interpolate(colours, adapter.input_size, mode="bilinear")
    low, high = drawn.amin((1, 2, 3), keepdim=True), drawn.amax((1, 2, 3), keepdim=True)
    return adapter.normalise(((drawn - low) / (high - low) * 255).round().to(torch.uint8))


def _masked(inputs_nchw: Tensor) -> Tensor:
    """The images, again and again, each under another smooth random mask [NUM_MASKED, 3, H, W]."""
    generator = torch.Generator().manual_seed(0)
    native = torch.rand(NUM_MASKED, CELLS, CELLS, generator=generator).to(inputs_nchw)
    full = grid_of(inputs_nchw)
    masks = upsampling((CELLS, CELLS), full, inputs_nchw.device)(native)
    return cycled(inputs_nchw, NUM_MASKED) * masks[:, None]


def cycled(inputs_nchw: Tensor, count: int) -> Tensor:
    """So many inputs: these, again and again."""
    return inputs_nchw[torch.arange(count, device=inputs_nchw.device) % len(inputs_nchw)]


def _scores(forward: Forward, inputs_nchw: Tensor, batch_size: int) -> Tensor:
    """Probabilities [N, K] (float64), in full batches."""
    count = len(inputs_nchw)
    filled = cycled(inputs_nchw, count + -count % batch_size)
    logits = torch.cat([forward(batch) for batch in filled.split(batch_size)])
    return logits[:count].double().softmax(1)


def _error(scores: Tensor, wanted: Tensor) -> float:
    """The median over images of the top class's relative error; infinite where a score is not finite."""
    if not scores.isfinite().all():
        return inf
    top = wanted.argmax(1, keepdim=True)
    return float(((scores.gather(1, top) / wanted.gather(1, top)) - 1).abs().median())
