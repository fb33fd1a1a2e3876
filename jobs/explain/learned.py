"""What a method learned in a first pass: a small file beside the plan, written once before the first unit."""

import hashlib
from typing import TYPE_CHECKING

from blocksight.engine.catalog.composition import images_to_learn_from
from blocksight.engine.errors import ModelError
from blocksight.jobs.plan.config import JobConfig
from blocksight.jobs.plan.documents import damaged
from blocksight.jobs.plan.plan import PLAN_FOLDER
from blocksight.storage.limits import MAX_LEARNED_BYTES
from blocksight.storage.stores.store import MissingError, ObjectStore

if TYPE_CHECKING:
    from blocksight.engine.explainers.explainer import State

LEARNED_KEY = f"{PLAN_FOLDER}learned.safetensors"


def wanted_images(config: JobConfig) -> int:
    """How many images the job's method learns from before it explains; 0: it learns nothing."""
    return images_to_learn_from(config.method, config.explainer_parameters())


def stored_state(output: ObjectStore, config: JobConfig) -> "tuple[State, str] | None":
    """What the job's method learned, and the sha256 of its file; None: it learns nothing, or has not yet.

    Raises StoreError, and UnreconciledError where the file is damaged.
    """
    if not wanted_images(config):
        return None
    from blocksight.engine.model.tensors import read_tensors

    try:
        body = output.read(LEARNED_KEY, length=MAX_LEARNED_BYTES + 1)
    except MissingError:
        return None
    if len(body) > MAX_LEARNED_BYTES:
        raise damaged(output.uri, LEARNED_KEY, f"it has more than the {MAX_LEARNED_BYTES:,} bytes that are read")
    try:
        return read_tensors(body), hashlib.sha256(body).hexdigest()
    except ModelError as error:
        raise damaged(output.uri, LEARNED_KEY, error) from error
