"""The benchmark: an explainer's rate on this machine compared with the bare model's, and the cost of a data set."""

import json
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from blocksight.cluster.cores import usable_cores
from blocksight.engine.catalog.forward_setting import ForwardSetting
from blocksight.engine.catalog.parameters import OcclusionParameters
from blocksight.engine.explainers.explainer import State
from blocksight.engine.judging.efficiency import ROUNDS, Efficiency, bare_rates, measure
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.scoring.forward import Forward
from blocksight.engine.scoring.setting_choice import MeasuredSetting, choose, eager_setting, repeated_inputs
from blocksight.jobs.bench.charts import curve_chart
from blocksight.jobs.bench.curve import CURVE, CurveRequest, measure_curve, pictures, summarise
from blocksight.jobs.bench.peers import REPEATS, contenders, race
from blocksight.jobs.bench.photographs import photographs
from blocksight.jobs.evaluate.evaluation import read_class_map
from blocksight.jobs.explain.forward_pass import forward_request
from blocksight.jobs.explain.learned import num_learning_images
from blocksight.jobs.explain.preflight import load_examined
from blocksight.jobs.explain.step import make_explainer, model_facts
from blocksight.jobs.explain.target_names import target_of_pictures
from blocksight.jobs.plan.config import ConfigError, JobConfig
from blocksight.jobs.plan.context import sha256_of, weights_bytes
from blocksight.jobs.plan.estimate import ROW_BYTES
from blocksight.jobs.plan.machine_rates import MeasuredCost, remember
from blocksight.jobs.plan.model_input import with_model_file
from blocksight.jobs.plan.plan import Plan, make_plan
from blocksight.jobs.plan.text import counted, printable
from blocksight.jobs.plan.units import Workforce
from blocksight.storage.images.decode import decode, fit
from blocksight.storage.inputs.annotations import open_truth
from blocksight.storage.outputs.map_codec import encode_map

TURNS = "bare model and explainer, in turns"
CHART = "curve.png"

RECORDS = 1_000_000
"""Records that the cost is given for if no data set is named."""


@dataclass(frozen=True)
class Cost:
    """The cost of a data set on a number of equal workers."""

    records: int
    workers: int
    hours: float
    """Wall time at the measured rate, without start-up, reading and writing."""
    worker_hours: float
    """Core-hours, or GPU-hours."""
    num_bytes: int
    """Bytes of the output."""
    money: float | None
    """In the currency of the price."""


@dataclass(frozen=True)
class Benchmark:
    """The figures of one model, explainer and device."""

    device: str
    hardware: str
    setting: ForwardSetting
    """The forward setting by which masks are scored."""
    probed: tuple[MeasuredSetting, ...]
    """All settings that were tried."""
    efficiency: Efficiency
    bytes_per_map: int
    """Bytes of a stored map, without the rest of its row."""
    cost: Cost
    race: tuple[dict[str, str | float], ...] = ()
    """The figures of each implementation, ours and the peers'; empty without a race."""


def run_benchmark(
    config: JobConfig,
    *,
    has_data: bool,
    device: str,
    batch_size: int | None,
    workers: int | None,
    price: float | None,
    with_peers: bool,
    console: Console,
) -> Benchmark:
    """Chooses the forward setting, measures the rates and computes the cost.

    The images are the first of the data set, or the demo's photographs. Raises ConfigError, ModelError and StoreError.
    """
    if device == "cpu":
        torch.set_num_threads(1)  # as in an actor
    config = with_model_file(config)
    weights = weights_bytes(config)
    adapter = load_examined(config, weights, device, console)
    blocks = [block["name"] for block in model_facts(adapter, config).blocks]
    plan = _plan(config, weights) if has_data else None
    inputs = _inputs(adapter, plan, config, make_explainer(adapter, config, blocks).images_per_pass)
    raced: tuple[dict[str, str | float], ...] = ()
    with _steps(console, 2.0 if with_peers else 1.0) as step:
        step("choosing the forward setting", 0.0)
        forward, probed = choose(adapter, forward_request(config, batch_size, is_timed=device == "cuda"))
        setting = probed[0].setting
        state = _learned(adapter, config, blocks, inputs)
        explainer = make_explainer(adapter, config, blocks, setting.batch_size, forward, state=state)
        step(f"the bare model at each batch size, {setting.backend} {setting.precision}", 0.1)
        rates = dict(bare_rates(adapter, setting))
        step(f"{TURNS}, {ROUNDS} times", 0.2)
        target = target_of_pictures(config, adapter, inputs)
        measured, explained = measure(explainer, inputs, setting, rates, lambda: step(TURNS, 0.7 / ROUNDS), target)
        if with_peers:
            plain = eager_setting(device, batch_size)
            raced = _race(adapter, {setting: forward, plain: adapter.logits}, inputs[:1], step)
    maps = [encode_map(one.saliency_hw.astype(np.float32)) for own in explained for one in own]
    num_bytes = round(sum(len(one.data) for one in maps) / len(maps))
    maps_per_record = len(maps) // len(explained)
    per_row = ROW_BYTES * config.target_choice.most_targets
    num_records = plan.num_records if plan is not None else RECORDS
    record_bytes = num_bytes * maps_per_record + per_row
    cost = _cost(measured, record_bytes, num_records, _workers(device, workers), price)
    per_record = MeasuredCost(
        measured.seconds_per_image, measured.forwards_per_image, record_bytes, str(datetime.now(UTC).date())
    )
    try:
        remember(config, device, per_record)
    except ConfigError as error:  # the figures are worth more
        console.print(f"WARNING: {printable(error)}")
    return Benchmark(device, _hardware(device), setting, tuple(probed), measured, num_bytes, cost, raced)


def run_curve(
    config: JobConfig,
    folder: Path,
    device: str,
    batch_size: int | None,
    truth: str | None,
    class_map: Path | None,
    console: Console,
) -> list[dict[str, Any]]:
    """Measures the fidelity curve, and writes its figures and its chart into the folder. Raises as `measure_curve`."""
    annotations = None if truth is None else open_truth(truth, config.endpoint_url)
    asked = CurveRequest(with_model_file(config), device, batch_size, annotations, read_class_map(class_map))
    lines = measure_curve(asked, folder, console)
    rows = summarise(lines)
    (folder / CURVE).write_text(json.dumps(rows, indent=1))
    curve_chart(rows, f"{config.model}, {counted(rows[0]['images'], 'image')}", folder / CHART)
    console.print(f"figures: {printable(folder / CURVE)}, picture: {printable(folder / CHART)}")
    return rows


def facts(config: JobConfig, found: Benchmark) -> dict[str, Any]:
    """All figures of the benchmark as plain values."""
    return {
        "model": config.model,
        "explainer": config.explainer,
        "parameters": asdict(config.explainer_parameters()),
        **asdict(found),
        "probed": [one.figures() for one in found.probed],
        "forwards_per_second": found.efficiency.forward_rate,
        "images_per_second": 1 / found.efficiency.seconds_per_image,
    }


def _race(
    adapter: ModelAdapter,
    forwards: dict[ForwardSetting, Forward],
    image: torch.Tensor,
    step: Callable[[str, float], None],
) -> tuple[dict[str, str | float], ...]:
    """Races ours, with the job's forward setting and with the plain model, against each peer as shipped and helped."""
    step("the peers' best batch sizes", 0.0)
    side = min(adapter.input_size)
    racing = contenders(
        adapter, list(forwards.items()), OcclusionParameters(window=max(2, side // 7), stride=max(1, side // 14))
    )
    share = 1.0 / (REPEATS * len(racing))
    found = race(racing, image, REPEATS, lambda one: step(f"race: {one.name} {one.job}, {one.how}", share))
    return tuple(row.figures() for row in found.rows)


def _plan(config: JobConfig, state: bytes | None) -> Plan:
    return make_plan(config, weights_sha256=sha256_of(state), workforce=Workforce(1, on_gpu=False))


def _inputs(adapter: ModelAdapter, plan: Plan | None, config: JobConfig, count: int) -> torch.Tensor:
    """`count` normalised images [N, 3, H, W]: the first that can be decoded, repeated if they are fewer."""
    if plan is None:
        files = photographs().values()
        found = [fit(decode(body).pixels, adapter.input_size, config.resize) for body in files]
    else:
        found = [one.pixels for one in islice(pictures(plan, config, adapter.input_size), count)]
    if not found:
        raise ConfigError(f"no image of {config.data} can be decoded")
    pixels = torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)
    return repeated_inputs(adapter.normalise(pixels), count)


def _learned(
    adapter: ModelAdapter, config: JobConfig, blocks: Sequence[str], inputs_nchw: torch.Tensor
) -> State | None:
    """The method's learned state from these few images, which is enough to measure its cost; None without learning."""
    if not num_learning_images(config):
        return None
    with adapter.borrowed(), torch.inference_mode():
        target = adapter.target(adapter.of_classes(adapter.logits(inputs_nchw)).argmax(1, keepdim=True))
    learner = make_explainer(adapter, config, blocks).learner()
    learner.see(inputs_nchw, target, range(len(inputs_nchw)))
    return learner.state()


def _workers(device: str, asked: int | None) -> int:
    if asked is not None:
        return asked
    return usable_cores() if device == "cpu" else torch.cuda.device_count()


def _hardware(device: str) -> str:
    """The name of the GPU, or of the processor."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, one core"


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []


def _cost(measured: Efficiency, record_bytes: int, records: int, workers: int, price: float | None) -> Cost:
    worker_hours = records * measured.seconds_per_image / 3600
    return Cost(
        records,
        workers,
        hours=worker_hours / workers,
        worker_hours=worker_hours,
        num_bytes=records * record_bytes,
        money=None if price is None else price * worker_hours,
    )


@contextmanager
def _steps(console: Console, whole: float) -> Iterator[Callable[[str, float], None]]:
    """Yields a function that shows a step's name and advances the progress by a share of `whole`."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=console, transient=True
    ) as bar:
        task = bar.add_task("", total=whole)

        def step(what: str, share: float) -> None:
            bar.update(task, description=what, advance=share)
            if not console.is_terminal:
                console.print(what)

        yield step
