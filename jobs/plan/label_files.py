"""The user's file of labels: read once by the driver, stored beside the plan, read there by the workers."""

from contextlib import suppress

from blocksight.jobs.plan.config import DIGEST, NO_LABELS, ConfigError, JobConfig
from blocksight.jobs.plan.plan import PLAN_FOLDER
from blocksight.storage.inputs.label_file import LabelFile, read_label_file
from blocksight.storage.stores.opening import open_file
from blocksight.storage.stores.store import AlreadyExistsError, ObjectStore


def with_label_file(config: JobConfig) -> tuple[JobConfig, LabelFile | None]:
    """The configuration with the content's hash instead of the file's name, and the labels; None: there is no file.

    Raises ConfigError if no row has a label, and StoreError if the file cannot be read.
    """
    if config.labels is None or config.labels == NO_LABELS or DIGEST.fullmatch(config.labels):
        return config, None
    found = read_label_file(*open_file(config.labels, config.endpoint_url))
    if not found.labels:
        raise ConfigError(f"no row of {config.labels} has a label")
    return config.model_copy(update={"labels": found.digest}), found


def ensure_label_file(output: ObjectStore, labels: LabelFile) -> None:
    """Writes the labels beside the plan, once."""
    with suppress(AlreadyExistsError):
        output.create(_key(labels.digest), labels.as_parquet())


def stored_label_file(output: ObjectStore, config: JobConfig) -> LabelFile | None:
    """The labels that the job was planned with; None if it has no file. Raises StoreError."""
    if config.labels is None or config.labels == NO_LABELS:
        return None
    return read_label_file(output, _key(config.labels))


def _key(digest: str) -> str:
    return f"{PLAN_FOLDER}labels-{digest[:16]}.parquet"
