"""The stages of `python -m tests.gpu`: what is measured of a GPU, each within its own time."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from shutil import which
from statistics import median
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from blocksight.engine.catalog.composition import parameters_of, parse_method
from blocksight.engine.catalog.forward_setting import Backend, ForwardSetting, Precision
from blocksight.engine.errors import ModelError
from blocksight.engine.explainers import make_explainer
from blocksight.engine.explainers.explainer import Explainer
from blocksight.engine.metrics import MASKED
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.device_errors import DeviceTrouble, device_trouble
from blocksight.engine.model.loading import load_model
from blocksight.engine.model.resample import grid_of, upsampling
from blocksight.engine.scoring.forward import Forward, make_forward
from blocksight.engine.scoring.setting_choice import (
    ForwardRequest,
    choose,
    drawn_pictures,
    measured_seconds,
    rate,
    repeated_inputs,
)
from tests.gpu.cases import CASES, adapter_of, difference, explained, measured
from tests.gpu.figures import Figures

FIDELITIES: Mapping[str, Mapping[str, Any]] = {
    "full": {},
    "mu 0.3": {"mu": 0.3},
    "balanced": {"budget": 0.1},
    "preview": {"budget": 0},
}
OTHERS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "gradcam": ({}, {}),
    "scorecam": ({}, {}),
    "ablationcam": ({}, {}),
    "rise": ({"num_masks": 4000}, {"num_masks": 16, "grid": 4}),
    "occlusion": ({}, {"window": 16, "stride": 16}),
}
"""Methods other than SISE, with their parameters on a GPU and in a smoke test."""
MODELS = ("efficientnet_lite0", "torchvision:resnet50")
SMOKE_MODEL = "deep"
NUM_SMOKE_CASES = 3


@dataclass(frozen=True)
class Sizes:
    """What fits the device."""

    images: int
    """Of one pass."""
    batch: int
    """Masked inputs of one forward."""

    @classmethod
    def of(cls, run: Figures) -> "Sizes":
        return cls(2, 8) if run.is_smoke else cls(32, 256)


def models(run: Figures) -> Iterator[ModelAdapter]:
    """The models to measure, on the device; one that cannot be loaded is a line."""
    if run.is_smoke:
        yield adapter_of(SMOKE_MODEL).to(run.device)
        return
    for name in MODELS:
        try:
            yield load_model(name, weights="random" if ":" in name else None).to(run.device)
        except Exception as error:  # noqa: BLE001 - the other model is measured all the same
            run.say(model=name, error=_said(error))


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def pictures(adapter: ModelAdapter, count: int) -> Tensor:
    """Photographs of scikit-image as model inputs, repeated; random pictures if it is not installed."""
    if find_spec("skimage") is None or adapter.name == SMOKE_MODEL:
        return repeated_inputs(drawn_pictures(adapter), count)
    from skimage import data, transform

    found = [
        np.rint(255 * transform.resize(one, adapter.input_size, anti_aliasing=True)).astype(np.uint8)
        for one in (data.astronaut(), data.coffee(), data.chelsea(), data.rocket())
    ]
    return repeated_inputs(adapter.normalise(torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)), count)


def _seconds(run: Figures, work: Callable[[], object]) -> float:
    return measured_seconds(work, on_gpu=run.device == "cuda")


@contextmanager
def _lines_for_errors(run: Figures, **names: Any) -> Iterator[None]:
    """An error of the body becomes a line; a lost device ends the stage."""
    try:
        yield
    except Exception as error:
        if device_trouble(error) is DeviceTrouble.LOST:
            raise
        run.say(**names, error=_said(error), told=_told(error))


def _told(error: BaseException) -> str | None:
    found = device_trouble(error)
    return None if found is None else found.name


def facts(run: Figures) -> None:
    """Device, driver, versions, and what a launch, a copy and a wait cost."""
    run.say(
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        device=torch.cuda.get_device_name() if run.device == "cuda" else "cpu",
        capability=torch.cuda.get_device_capability() if run.device == "cuda" else None,
        driver=_driver(),
        gcc=which("gcc") is not None,
        triton=find_spec("triton") is not None,
    )
    values = torch.ones(1 << (20 if run.is_smoke else 28), device=run.device)
    copied, one = torch.empty_like(values), values[:1]
    seconds = min(_seconds(run, lambda: copied.copy_(values)) for _ in range(5))
    run.say(what="copy on the device", gigabytes_per_second=2 * values.numel() * 4 / seconds / 1e9)
    drawn = torch.ones(224, 224, dtype=torch.float64, device=run.device)
    for what, work in {
        "launch": lambda: one.add_(1),
        "item()": one.item,
        "float64 map of 224 x 224 to the host": drawn.cpu,
        "torch.tensor of 256 numbers": lambda: torch.tensor([1] * 256, device=run.device),
    }.items():
        run.say(what=what, microseconds=_each(run, work) * 1e6)


def _each(run: Figures, work: Callable[[], object], count: int = 500) -> float:
    """Seconds of one call."""
    return _seconds(run, lambda: [work() for _ in range(count)]) / count


def _driver() -> str | None:
    """The driver's version, as its own program says it."""
    if which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()


def correctness(run: Figures) -> None:
    """Every explainer and metric on small models: the CPU against the device, and the device twice."""
    worst: list[tuple[float, float, str]] = []
    for case in CASES[:NUM_SMOKE_CASES] if run.is_smoke else CASES:
        if not run.has(3):
            break
        with _lines_for_errors(run, case=str(case)):
            wanted = explained(case, adapter_of(case.net))
            found, again = (explained(case, adapter_of(case.net).to(run.device)) for _ in range(2))
            worst.append((difference(found, wanted), difference(found, again), str(case)))
    for name in list(MASKED)[:1] if run.is_smoke else MASKED:
        with _lines_for_errors(run, metric=name):
            wanted, found = (_values(name, adapter_of("cnn").to(device)) for device in ("cpu", run.device))
            run.say(metric=name, largest_difference=float(np.nanmax(np.abs(found - wanted))))
    run.say(
        cases=len(worst),
        largest_differences=[(own, case) for own, _, case in sorted(worst, reverse=True)[:12]],
        not_repeated=[(own, case) for _, own, case in sorted(worst, key=lambda one: -one[1]) if own > 0],
    )


def _values(name: str, adapter: ModelAdapter) -> np.ndarray:
    values = [value.value for own in measured(name, "zero", adapter) for one in own for value in one.values()]
    return np.array([np.nan if value is None else float(value) for value in values])


def ladder(run: Figures) -> None:
    """Rate, score error and seconds to make of every backend and precision, at one batch size."""
    for adapter in models(run):
        with adapter.borrowed(), torch.inference_mode():
            masked = _masked(adapter, Sizes.of(run).batch)
            wanted = adapter.scores(adapter.logits(masked))
            for setting in _settings(run):
                if not run.has(1 if run.is_smoke else 20):
                    return
                with _lines_for_errors(run, model=adapter.name, setting=str(setting)):
                    _rung(run, adapter, setting, masked, wanted)


def _settings(run: Figures) -> Iterator[ForwardSetting]:
    """Eager PyTorch in every precision first; the other backends in those that a job would take."""
    plain = ForwardSetting("eager", "float32", Sizes.of(run).batch)
    halves = [replace(plain, precision=precision) for precision in get_args(Precision) if precision != "float32"]
    eager = [plain, *halves, *(replace(half, is_autocast=True) for half in halves)]
    yield from eager
    for backend in () if run.is_smoke else get_args(Backend):
        if backend not in ("eager", "openvino"):
            yield from (replace(one, backend=backend) for one in eager if one.precision != "bfloat16")


def _rung(run: Figures, adapter: ModelAdapter, setting: ForwardSetting, masked: Tensor, wanted: Tensor) -> None:
    _forget_peak(run)
    start = time.perf_counter()
    try:
        forward = make_forward(adapter, setting)
    except ModelError as error:
        run.say(model=adapter.name, setting=str(setting), refused=str(error)[:200])
        return
    seconds = time.perf_counter() - start
    run.say(
        model=adapter.name,
        setting=str(setting),
        forwards_per_second=rate(forward, masked, setting.batch_size),
        score_error=_error(adapter.scores(forward(masked)), wanted),
        seconds_to_make=seconds,
        gigabytes=_peak(run),
    )


def _masked(adapter: ModelAdapter, count: int) -> Tensor:
    """Pictures under smooth random masks."""
    inputs = pictures(adapter, count)
    native = torch.rand(count, 7, 7, generator=torch.Generator().manual_seed(0)).to(inputs.device)
    masks = upsampling((7, 7), grid_of(inputs), inputs.device)(native)
    return (inputs * masks[:, None]).contiguous(memory_format=torch.channels_last)


def _error(scores: Tensor, wanted: Tensor) -> float:
    """The median relative error of the top class's score."""
    top = wanted.argmax(1, keepdim=True)
    return float(((scores.gather(1, top) / wanted.gather(1, top)) - 1).abs().median())


def _forget_peak(run: Figures) -> None:
    if run.device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(run: Figures) -> float | None:
    """Gigabytes of the device's memory that were used at once."""
    return torch.cuda.max_memory_allocated() / 1e9 if run.device == "cuda" else None


def batches(run: Figures) -> None:
    """The rate of a lower precision at growing batch sizes."""
    precision: Precision = "float32" if run.is_smoke else "float16"
    for adapter in models(run):
        with adapter.borrowed(), torch.inference_mode():
            for size in (2, 4) if run.is_smoke else (64, 128, 256, 512, 1024):
                if not run.has(1 if run.is_smoke else 4):
                    return
                with _lines_for_errors(run, model=adapter.name, batch=size):
                    _forget_peak(run)
                    forward = make_forward(adapter, ForwardSetting("eager", precision, size))
                    speed = rate(forward, _masked(adapter, size), size)
                    run.say(model=adapter.name, batch=size, forwards_per_second=speed, gigabytes=_peak(run))


def _eager(run: Figures, adapter: ModelAdapter) -> Forward:
    """The fast forward pass of the stages that measure what is around it."""
    setting = ForwardSetting("eager", "float32" if run.is_smoke else "float16", Sizes.of(run).batch)
    with adapter.borrowed():
        return make_forward(adapter, setting)


def _explainer(
    name: str, parameters: Mapping[str, Any], adapter: ModelAdapter, run: Figures, **options: Any
) -> Explainer:
    sizes = Sizes.of(run)
    asked = parameters_of(parse_method(name), parameters)
    return make_explainer(name, adapter, asked, batch_size=sizes.batch, images_per_pass=sizes.images, **options)


def _explaining(explainer: Explainer, run: Figures) -> Callable[[], list[Any]]:
    """One pass of images, each explained for its top class."""
    inputs = pictures(explainer.adapter, Sizes.of(run).images)
    with explainer.adapter.borrowed(), torch.inference_mode():
        target = explainer.adapter.target(explainer.adapter.logits(inputs).argmax(1, keepdim=True))
    return lambda: explainer.explain(inputs, target)


def passes(run: Figures) -> None:
    """Full SISE and its cheaper levels: efficiency, how busy the GPU is, launches and waits per image."""
    sizes = Sizes.of(run)
    for adapter in models(run):
        forward = _eager(run, adapter)
        with adapter.borrowed(), torch.inference_mode():
            bare = rate(forward, _masked(adapter, sizes.batch), sizes.batch)
        for name, parameters in FIDELITIES.items():
            if not run.has(1 if run.is_smoke else 12):
                return
            with _lines_for_errors(run, model=adapter.name, fidelity=name):
                work = _explaining(_explainer("sise", parameters, adapter, run, forward=forward), run)
                made = work()
                seconds = median(_seconds(run, work) for _ in range(3))
                forwards = sum(own[0].num_forwards for own in made)
                run.say(
                    model=adapter.name,
                    fidelity=name,
                    bare_forwards_per_second=bare,
                    images_per_second=sizes.images / seconds,
                    forwards_per_image=forwards / sizes.images,
                    efficiency=forwards / bare / seconds,
                    **_profiled(run, work, seconds),
                )


CALLS = {
    "launches_per_image": ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"),
    "copies_per_image": ("cudaMemcpyAsync",),
    "waits_per_image": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
}
"""The driver's functions that the profiler counts."""


def _profiled(run: Figures, work: Callable[[], object], seconds: float) -> dict[str, float]:
    """The share of the time in which the GPU computes, and calls per image; nothing without a GPU."""
    if run.device != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        work()
        torch.cuda.synchronize()
    events = profiled.key_averages()
    busy = sum(event.self_device_time_total for event in events) / 1e6 / seconds
    counts = {event.key: event.count for event in events}
    images = Sizes.of(run).images
    return {"busy": busy, **{name: sum(counts.get(one, 0) for one in own) / images for name, own in CALLS.items()}}


def others(run: Figures) -> None:
    """Images per second of other methods, which the host bounds."""
    for adapter in models(run):
        for name, (parameters, quick) in OTHERS.items():
            if not run.has(1 if run.is_smoke else 5):
                return
            with _lines_for_errors(run, model=adapter.name, method=name):
                work = _explaining(_explainer(name, quick if run.is_smoke else parameters, adapter, run), run)
                work()
                speed = Sizes.of(run).images / _seconds(run, work)
                run.say(model=adapter.name, method=name, images_per_second=speed)


@dataclass(frozen=True)
class Provoked:
    """A trouble of the device that a process of its own provokes."""

    expected: DeviceTrouble
    code: str
    """Python; `D` is the device."""


TROUBLES: Mapping[str, Provoked] = {
    "device assert": Provoked(
        DeviceTrouble.LOST, "torch.zeros(3, device=D)[torch.tensor([7], device=D)]; torch.cuda.synchronize()"
    ),
    "any call after a device assert": Provoked(
        DeviceTrouble.LOST,
        "try: torch.zeros(3, device=D)[torch.tensor([7], device=D)]; torch.cuda.synchronize()\n"
        "except Exception: pass\n"
        "torch.ones(9, device=D) + 1",
    ),
    "a compiled call after a device assert": Provoked(
        DeviceTrouble.LOST,
        "run = torch.compile(lambda values: values * 2 + 1)\n"
        "run(torch.ones(9, device=D))\n"
        "try: torch.zeros(3, device=D)[torch.tensor([7], device=D)]; torch.cuda.synchronize()\n"
        "except Exception: pass\n"
        "run(torch.ones(9, device=D)); torch.cuda.synchronize()",
    ),
    "no memory": Provoked(
        DeviceTrouble.MEMORY, "torch.cuda.set_per_process_memory_fraction(0.01); torch.empty(2**31, device=D)"
    ),
    "no memory for cuBLAS": Provoked(
        DeviceTrouble.MEMORY,
        "small = torch.ones(64, 64, device=D)\nfilled = _filled()\n(small @ small).sum().item()",
    ),
    "no memory for cuDNN": Provoked(
        DeviceTrouble.MEMORY,
        "net, inputs = torch.nn.Conv2d(64, 64, 3).to(D), torch.ones(8, 64, 128, 128, device=D)\n"
        "filled = _filled()\n"
        "net(inputs).sum().item()",
    ),
    "no such device": Provoked(DeviceTrouble.UNFIT, "torch.ones(1, device='cuda:99')"),
}
PRELUDE = """
import json, torch
from blocksight.engine.model.device_errors import device_trouble
D = 'cuda'
def _filled():
    parts, size = [], 2**30
    while size >= 2**20:
        try: parts.append(torch.empty(size, dtype=torch.uint8, device=D))
        except torch.OutOfMemoryError: size //= 4
    return parts
def provoke():
"""
EPILOGUE = """
try: provoke()
except BaseException as error:
    told = device_trouble(error)
    print(json.dumps({"type": type(error).__name__, "words": str(error)[:200], "told": told and told.name}))
"""


def errors(run: Figures) -> None:
    """What each trouble of a device raises here, and whether the table of device errors tells it."""
    for what, provoked in TROUBLES.items():
        if not run.has(1 if run.is_smoke else 10):
            return
        if run.device != "cuda":
            run.say(what=what, skipped="needs a GPU")
            continue
        body = "\n".join(f"    {line}" for line in provoked.code.splitlines())
        with _lines_for_errors(run, what=what):
            program = [sys.executable, "-c", PRELUDE + body + EPILOGUE]
            ran = subprocess.run(program, capture_output=True, text=True, timeout=max(run.left, 1), check=False)
            last = ran.stdout.strip().splitlines()[-1:] or ["{}"]
            raised = json.loads(last[0])
            agrees = raised.get("told") == provoked.expected.name
            run.say(what=what, expected=provoked.expected.name, agrees=agrees, exit_code=ran.returncode, **raised)


def processes(run: Figures) -> None:
    """Images per second of one, two and three processes that share the GPU."""
    for count in (1,) if run.is_smoke else (1, 2, 3):
        if not run.has(1 if run.is_smoke else 18):
            return
        command = [
            sys.executable,
            "-m",
            "tests.gpu",
            "--output",
            os.devnull,
            "--worker-seconds",
            "0.5" if run.is_smoke else "6",
        ]
        command += ["--smoke"] if run.is_smoke else []
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
        try:
            said = [one.communicate(timeout=max(run.left, 1))[0] for one in running]
        finally:
            for one in running:
                one.kill()
        rates = [float(text.splitlines()[-1]) for text in said if text.strip()]
        run.say(processes=count, images_per_second=sum(rates), each=rates)


def worker(run: Figures, seconds: float) -> float:
    """Images per second of full SISE in this process."""
    adapter = next(models(run))
    work = _explaining(_explainer("sise", {}, adapter, run, forward=_eager(run, adapter)), run)
    work()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        work()
        count += Sizes.of(run).images
    return count / (time.perf_counter() - start)


def probing(run: Figures) -> None:
    """What a job's own choice of a forward setting takes, tries and chooses."""
    for adapter in models(run):
        if not run.has(1 if run.is_smoke else 30):
            return
        start = time.perf_counter()
        with _lines_for_errors(run, model=adapter.name):
            _, found = choose(adapter, ForwardRequest(is_timed=not run.is_smoke))
            run.say(
                model=adapter.name,
                seconds=time.perf_counter() - start,
                chosen=str(found[0].setting),
                tried=[one.figures() for one in found],
            )


@dataclass(frozen=True)
class Stage:
    """One stage and its time."""

    name: str
    seconds: float
    measure: Callable[[Figures], None]


STAGES: Sequence[Stage] = (
    Stage("facts", 15, facts),
    Stage("correctness", 75, correctness),
    Stage("ladder", 150, ladder),
    Stage("batches", 30, batches),
    Stage("passes", 90, passes),
    Stage("others", 40, others),
    Stage("errors", 50, errors),
    Stage("processes", 60, processes),
    Stage("probing", 60, probing),
)
"""In order of worth: a cut loses the last."""
