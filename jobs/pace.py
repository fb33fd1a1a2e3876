"""How a job's masked forward passes run: probed by the first worker that has images, and the same for all after it."""

import json
from dataclasses import asdict
from typing import Any

from torch import Tensor
from typing_extensions import TypedDict

from engine.errors import ModelError
from engine.forward import Forward, ForwardSetting, make_forward
from engine.models import ModelAdapter
from engine.probe import probe
from jobs.config import JobConfig
from jobs.documents import damaged, read_document
from jobs.plan import PLAN_FOLDER
from storage.store import AlreadyExistsError, MissingError, ObjectStore


class ForwardDocument(TypedDict):
    """What `forward.json` holds."""

    setting: ForwardSetting
    probe: list[dict[str, Any]]
    """What was measured, for people."""


FORWARD_KEY = f"{PLAN_FOLDER}forward.json"
IMAGES_TO_PROBE = 8
MAX_BATCH_SIZE = 1 << 16


def settled(output: ObjectStore) -> ForwardSetting | None:
    """The job's setting, if a worker has chosen one. Raises UnreconciledError where it is damaged."""
    try:
        setting = read_document(output, FORWARD_KEY, ForwardDocument)["setting"]
    except MissingError:
        return None
    if not 1 <= setting.batch_size <= MAX_BATCH_SIZE:
        raise damaged(output.uri, FORWARD_KEY, f"{setting.batch_size} per pass is no batch size")
    return setting


def standing_forward(output: ObjectStore, adapter: ModelAdapter) -> tuple[Forward, ForwardSetting] | None:
    """The job's forward pass, if it was chosen. Raises ModelError where this machine cannot run it."""
    setting = settled(output)
    return None if setting is None else (_made(adapter, setting), setting)


def settle(
    output: ObjectStore, adapter: ModelAdapter, inputs_nchw: Tensor, config: JobConfig, batch_size: int | None
) -> tuple[Forward, ForwardSetting]:
    """The job's forward pass, where none stands yet: the one that the probe finds here, written once.

    `inputs_nchw` are images of the job, at least one. Another worker's counts where it was written first: raises
    ModelError where this machine cannot run that.
    """
    forward, found = probe(adapter, inputs_nchw, exact=config.preset == "paper", batch_size=batch_size)
    chosen = found[0].setting
    facts: dict[str, Any] = {"setting": asdict(chosen), "probe": [one.figures() for one in found]}
    try:
        output.create(FORWARD_KEY, json.dumps(facts, indent=1).encode())
    except AlreadyExistsError:  # another worker was first, and all go its way
        standing = settled(output)
        if standing is not None and standing != chosen:
            return _made(adapter, standing), standing
    return forward, chosen


def _made(adapter: ModelAdapter, setting: ForwardSetting) -> Forward:
    try:
        with adapter.borrowed():
            return make_forward(adapter, setting)
    except ModelError as error:
        raise ModelError(
            f"this job's masks are scored by {setting}, and this machine cannot do that ({error}): run it on a machine "
            "like the one that it began on, or into a new output"
        ) from error
