"""The start-up probe: how fast and how exact each setting of the forward pass is, and which one is taken."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from engine.errors import ModelError
from engine.forward import Forward, ForwardSetting, Precision, first_line, make_forward
from engine.models import ModelAdapter
from engine.resample import grid_of, upsampling

NUM_MASKED = 64
"""Masked images on which score errors are measured."""
CELLS = 7
"""Side of the random masks' grid."""
EXACT_ERROR = 1e-4
"""Median relative score error that a float32 setting may have: more is a wrong conversion, not rounding."""
FAST_ERROR = 0.015
"""The same for half precision."""
WORTH = 1.1
"""A less plain setting must be so many times as fast."""
REPEATS = 5

CPU_BATCH_SIZES = (8, 4, 16)
"""Tried with the compiler, the likeliest first."""
EAGER_CPU_BATCH_SIZE = 4
"""EfficientNet-Lite0 on one thread: 4 at a time ran faster than 8 without a compiler."""
GPU_BATCH_SIZES = (64, 128, 256, 512)
"""Tried with eager float16, or float32; the compilers get the fastest."""


@dataclass(frozen=True)
class Measured:
    """What the probe found of one setting."""

    setting: ForwardSetting
    forwards_per_second: float = 0.0
    """Of CPU time on a CPU, of wall time on a GPU."""
    score_error: float = 0.0
    """Median relative error of the top class's probability on masked images, to eager float32."""
    refused: str | None = None
    """Why it does not run here."""

    def figures(self) -> dict[str, Any]:
        """As plain values; an error that is not finite is None."""
        error = self.score_error if isfinite(self.score_error) else None
        return {**asdict(self), "score_error": error}

    @property
    def is_sound(self) -> bool:
        """It runs, and its scores may be used."""
        most = EXACT_ERROR if self.setting.precision == "float32" else FAST_ERROR
        return self.refused is None and self.score_error <= most


def probe(
    adapter: ModelAdapter, inputs_nchw: Tensor, *, exact: bool, batch_size: int | None = None
) -> tuple[Forward, list[Measured]]:
    """The forward pass to take, and what was measured; the first of the list is the one that was taken.

    `inputs_nchw` are real images as the adapter normalises them, at least one. `exact` leaves float32 alone.
    The fastest sound setting wins, but a later candidate only where it is `WORTH` times as fast.
    """
    with adapter.borrowed(), torch.inference_mode():
        masked = _masked(inputs_nchw)
        wanted = _scores(adapter.logits, masked, EAGER_CPU_BATCH_SIZE)
        found: list[Measured] = []
        best, forward = None, None
        for setting in _candidates(adapter, masked, exact=exact, batch_size=batch_size):
            try:
                tried = make_forward(adapter, setting)
                error = _error(_scores(tried, masked, setting.batch_size), wanted)
                measured = Measured(setting, rate(tried, masked, setting.batch_size), error)
            except (ModelError, torch.OutOfMemoryError) as failure:
                found.append(Measured(setting, refused=first_line(failure)))
                continue
            found.append(measured)
            if measured.is_sound and (best is None or measured.forwards_per_second > WORTH * best.forwards_per_second):
                best, forward = measured, tried
    if best is None or forward is None:  # nothing fits, or nothing is finite: as plain and as small as can be
        best, forward = Measured(ForwardSetting(batch_size=batch_size or EAGER_CPU_BATCH_SIZE)), adapter.logits
    return forward, [best, *(one for one in found if one is not best)]


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


def _candidates(
    adapter: ModelAdapter, masked: Tensor, *, exact: bool, batch_size: int | None
) -> Iterator[ForwardSetting]:
    """The settings to try, plainest first."""
    if adapter.device.type == "cpu":
        yield ForwardSetting(batch_size=batch_size or EAGER_CPU_BATCH_SIZE)
        has_openvino = find_spec("openvino") is not None
        compiler = "openvino" if has_openvino else "compiled"
        sizes = CPU_BATCH_SIZES if has_openvino else CPU_BATCH_SIZES[:1]  # torch.compile takes half a minute for each
        for precision in ("float32", *_cpu_halves(exact)):
            for size in (batch_size,) if batch_size else sizes:
                yield ForwardSetting(compiler, precision, size)
        return
    halves = () if exact else ("float16", "bfloat16")
    size = batch_size or _best_batch_size(adapter, masked, (*halves, "float32")[0])
    yield ForwardSetting(batch_size=size)
    for precision in halves or ("float32",):
        for backend in ("compiled", "graphed"):
            yield ForwardSetting(backend, precision, size)


def _cpu_halves(exact: bool) -> tuple[Precision, ...]:
    """Half precisions that this CPU computes in: elsewhere they are emulated, and slower than float32."""
    supported: tuple[tuple[Precision, bool], ...] = (
        ("float16", torch.ops.mkldnn._is_mkldnn_fp16_supported()),
        ("bfloat16", torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    )
    return () if exact else tuple(precision for precision, is_native in supported if is_native)


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
