"""Chooses a job's forward setting, writes it into the plan, and makes the forward pass of a worker."""

import json
from dataclasses import asdict, replace

import torch

from blocksight.engine.catalog.composition import leaves_tokens_out
from blocksight.engine.catalog.forward_setting import ForwardSetting
from blocksight.engine.errors import ModelError
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.device_errors import device_trouble, is_short_of_memory
from blocksight.engine.model.failures import first_line_of
from blocksight.engine.model.threads import one_thread
from blocksight.engine.scoring.forward import Forward, make_forward
from blocksight.engine.scoring.setting_choice import (
    MAX_FAST_ERROR,
    ForwardRequest,
    MeasuredSetting,
    choose,
    drawn_pictures,
    eager_setting,
    max_score_error,
    rate,
)
from blocksight.jobs.plan.config import JobConfig
from blocksight.jobs.plan.forward_setting import FORWARD_KEY, PlannedForward, planned_forward
from blocksight.storage.stores.store import AlreadyExistsError, ObjectStore


def forward_request(config: JobConfig, batch_size: int | None, *, is_timed: bool) -> ForwardRequest:
    """What a job asks of its forward setting; the preset `paper` means float32.

    A pass that leaves tokens out is of the model itself: no other backend takes pictures of several sizes.
    """
    if leaves_tokens_out(config.parameters):
        return ForwardRequest("float32", batch_size, is_eager=True)
    precision = "float32" if config.preset == "paper" else config.precision
    return ForwardRequest(None if precision == "auto" else precision, batch_size, is_timed)


def choose_forward(adapter: ModelAdapter, request: ForwardRequest) -> PlannedForward:
    """The forward setting for a job on the model's device; on a GPU with its rate.

    Raises ModelError if the precision asked for is unusable, and what a device raises that cannot go on.
    """
    return chosen_forward(adapter, request)[1]


def chosen_forward(adapter: ModelAdapter, request: ForwardRequest) -> tuple[Forward, PlannedForward]:
    """As `choose_forward`, with the forward pass itself."""
    with one_thread():  # as on the workers: eager scores' last bits depend on the number of threads
        forward, found = choose(adapter, request)
        if adapter.device.type == "cuda":
            return forward, _on_gpu(_planned([_with_rate(adapter, forward, found[0]), *found[1:]], request))
    return forward, _planned(found, request)


def eager_forward(adapter: ModelAdapter, request: ForwardRequest) -> tuple[Forward, PlannedForward]:
    """The model itself, for one picture and a method that scores no masks: converting the model would take longer."""
    setting = eager_setting(adapter.device.type, request.batch_size)
    return adapter.logits, _planned([MeasuredSetting(setting)], request)


def stored_forward(
    output: ObjectStore, adapter: ModelAdapter, most_inputs: int | None = None
) -> tuple[Forward, ForwardSetting] | None:
    """The plan's forward pass and setting, if any. `most_inputs` bounds the batch, where memory is short.

    Raises ModelError if this machine cannot run it.
    """
    planned = planned_forward(output)
    if planned is None:
        return None
    setting = bounded(planned.setting, most_inputs)
    return _forward_with(adapter, setting), setting


def bounded(setting: ForwardSetting, most_inputs: int | None) -> ForwardSetting:
    """The setting with at most so many inputs in a batch; None: with its own."""
    return setting if most_inputs is None else replace(setting, batch_size=min(setting.batch_size, most_inputs))


def write_forward(output: ObjectStore, planned: PlannedForward) -> PlannedForward:
    """Writes the setting into the plan once; returns the stored one, which may be another driver's."""
    try:
        output.create(FORWARD_KEY, json.dumps(asdict(planned), indent=1).encode())
    except AlreadyExistsError:
        return planned_forward(output) or planned
    return planned


def precision_warning(planned: PlannedForward) -> str | None:
    """A warning if a lower precision changes scores too much; None otherwise."""
    error = planned.score_error
    if planned.setting.precision == "float32" or error is None or error <= MAX_FAST_ERROR:
        return None
    return (
        f"WARNING: {planned.setting.precision} changes this model's scores by {error:.1%} in the median "
        f"(`auto` allows {MAX_FAST_ERROR:.1%}): maps will differ visibly from float32's"
    )


def _planned(found: list[MeasuredSetting], request: ForwardRequest) -> PlannedForward:
    chosen = found[0]
    figures = tuple(one.figures() for one in found)
    return PlannedForward(
        setting=chosen.setting,
        chosen="timing" if request.is_timed else "rule",
        score_error=figures[0]["score_error"],
        bound=max_score_error(chosen.setting, request),
        probe=figures,
        forwards_per_second=chosen.forwards_per_second,
    )


def _on_gpu(planned: PlannedForward) -> PlannedForward:
    """With the name of this process's GPU."""
    major, minor = torch.cuda.get_device_capability()
    return replace(planned, hardware=torch.cuda.get_device_name(), compute_capability=f"{major}.{minor}")


def _with_rate(adapter: ModelAdapter, forward: Forward, chosen: MeasuredSetting) -> MeasuredSetting:
    """The setting with its rate, which a choice by rule does not know. Too little memory is left to the units.

    Raises ModelError if the model does not run on its device: it was examined on the driver's CPU.
    """
    if chosen.forwards_per_second is not None:
        return chosen
    try:
        with adapter.borrowed(), torch.inference_mode():
            speed = rate(forward, drawn_pictures(adapter), chosen.setting.batch_size)
    except Exception as error:
        if is_short_of_memory(error):
            return chosen
        if device_trouble(error) is not None:
            raise
        raise ModelError(f"{adapter.name} does not run on {adapter.device}: {first_line_of(error)}") from error
    return replace(chosen, forwards_per_second=speed)


def _forward_with(adapter: ModelAdapter, setting: ForwardSetting) -> Forward:
    try:
        with adapter.borrowed():
            return make_forward(adapter, setting)
    except ModelError as error:
        raise ModelError(
            f"this job scores masks by {setting}, and this machine cannot ({error}): run it on a machine like the "
            "first one, or choose a new output"
        ) from error
