"""The probe of `plan --probe`: explains the first images of the data set for about ten seconds, and counts."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice

import numpy as np
import torch
from rich.console import Console

from blocksight.engine.explainers.explanation import Explanation
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.scoring.setting_choice import choose
from blocksight.jobs.bench.curve import pictures
from blocksight.jobs.explain.forward_pass import forward_request
from blocksight.jobs.explain.learned import num_learning_images
from blocksight.jobs.explain.preflight import load_examined
from blocksight.jobs.explain.step import make_explainer, model_facts
from blocksight.jobs.explain.target_names import target_of_pictures
from blocksight.jobs.plan.config import ConfigError, JobConfig
from blocksight.jobs.plan.context import weights_bytes
from blocksight.jobs.plan.estimate import ROW_BYTES
from blocksight.jobs.plan.machine_rates import MeasuredCost, remember
from blocksight.jobs.plan.plan import Plan
from blocksight.jobs.run.workers import device_here
from blocksight.storage.outputs.map_codec import encode_map

PROBE_SECONDS = 10.0
MAX_IMAGES = 64


def probe_cost(config: JobConfig, plan: Plan, device: str, console: Console) -> MeasuredCost:
    """The cost of a record of this data set on one worker of this machine, which later plans find.

    Explains images until `PROBE_SECONDS` are over, at least one; the first of several does not count, as it warms up.
    Raises ConfigError if no image can be decoded, the method learns first, or the workers have GPUs and this machine
    none, ModelError and StoreError.
    """
    if device == "cuda" and device_here("auto") == "cpu":
        raise ConfigError(
            "--probe measures on this machine, where torch can use no GPU, and the job's workers have GPUs: leave "
            "--probe out, as a new job measures one of them first, or choose --device cpu"
        )
    if num_learning_images(config):
        raise ConfigError(f"{config.explainer} learns before it explains: `blocksight bench` measures it")
    if device == "cpu":
        torch.set_num_threads(1)  # as in an actor
    adapter = load_examined(config, weights_bytes(config), device, console)
    with console.status("probing this model on this machine"):
        found = list(_explained(config, plan, adapter))
    if not found:
        raise ConfigError(f"no image of {config.data} can be decoded")
    counted = found[1:] or found
    maps = [one for _, own in counted for one in own]
    num_bytes = sum(len(encode_map(one.saliency_hw.astype(np.float32)).data) for one in maps)
    cost = MeasuredCost(
        seconds_per_record=sum(seconds for seconds, _ in counted) / len(counted),
        forwards_per_record=sum(own[0].num_forwards for _, own in counted) / len(counted),
        bytes_per_record=round(num_bytes / len(counted)) + ROW_BYTES * config.target_choice.most_targets,
        day=str(datetime.now(UTC).date()),
    )
    remember(config, device, cost)
    return cost


def _explained(config: JobConfig, plan: Plan, adapter: ModelAdapter) -> Iterator[tuple[float, list[Explanation]]]:
    """Seconds and explanations of one image after another, until the time is over."""
    blocks = [block["name"] for block in model_facts(adapter, config).blocks]
    forward, measured = choose(adapter, forward_request(config, None, is_timed=False))
    explainer = make_explainer(adapter, config, blocks, measured[0].setting.batch_size, forward)
    end = time.monotonic() + PROBE_SECONDS
    for number, picture in enumerate(islice(pictures(plan, config, adapter.input_size), MAX_IMAGES)):
        start = time.monotonic()
        inputs = adapter.normalise(torch.from_numpy(np.array(picture.pixels[None])).permute(0, 3, 1, 2))
        (own,) = explainer.explain(inputs, target_of_pictures(config, adapter, inputs), [number])
        yield time.monotonic() - start, own
        if time.monotonic() > end:
            return
