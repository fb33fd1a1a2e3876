"""The state that a method learned in its first pass: a small file beside the plan, written before the first unit."""

import hashlib
from typing import TYPE_CHECKING

from blocksight.engine.catalog import composition
from blocksight.engine.errors import ModelError
from blocksight.jobs.plan.config import JobConfig
from blocksight.jobs.plan.documents import damaged
from blocksight.jobs.plan.plan import PLAN_FOLDER
from blocksight.storage.limits import MAX_LEARNED_BYTES
from blocksight.storage.stores.store import MissingError, ObjectStore

if TYPE_CHECKING:
    from blocksight.engine.explainers.explainer import State

LEARNED_KEY = f"{PLAN_FOLDER}learned.safetensors"


def num_learning_images(config: JobConfig) -> int:
    """The number of images that the job's method learns from; 0 if it learns nothing."""
    return composition.num_learning_images(config.method, config.explainer_parameters())


def stored_state(output: ObjectStore, config: JobConfig) -> "tuple[State, str] | None":
    """The state that the job's method learned, and the sha256 of its file; None if nothing is learned or stored.

    Raises StoreError, and UnreconciledError if the file is damaged.
    """
    if not num_learning_images(config):
        return None
    from blocksight.engine.model.tensors import read_tensors

    try:
        body = output.read(LEARNED_KEY, length=MAX_LEARNED_BYTES + 1)
    except MissingError:
        return None
    if len(body) > MAX_LEARNED_BYTES:
        raise damaged(output.uri, LEARNED_KEY, f"it is larger than {MAX_LEARNED_BYTES:,} bytes")
    try:
        return read_tensors(body), hashlib.sha256(body).hexdigest()
    except ModelError as error:
        raise damaged(output.uri, LEARNED_KEY, error) from error
