"""The files that targets name: pictures to be similar to, and directions of features."""

import hashlib

from blocksight.jobs.plan.config import ConfigError, JobConfig
from blocksight.jobs.plan.plan import stored_vectors
from blocksight.jobs.plan.records import StoredVectors
from blocksight.storage.limits import MAX_IMAGE_BYTES
from blocksight.storage.stores.opening import open_file
from blocksight.storage.stores.store import MissingError, ObjectStore, StoreError


def with_target_files(config: JobConfig) -> JobConfig:
    """The configuration with the hashes of the files that its targets name, so that a resume with others is refused.

    Raises ConfigError if one cannot be read.
    """
    files = config.target_choice.files
    if not files or config.target_files:
        return config
    known = {name: hashlib.sha256(file_bytes(name, config)).hexdigest() for name in files}
    return config.model_copy(update={"target_files": known})


def vectors_of_output(output: ObjectStore, config: JobConfig) -> StoredVectors:
    """What was computed for the targets of an output that exists; its plan cannot have other files read.

    Raises ConfigError if it was begun and has no vectors yet.
    """
    found = stored_vectors(output)
    if config.target_choice.has_features and found.features is None:
        raise ConfigError(
            f"{output.uri} holds no vectors of its targets yet, such as {config.target}: run `blocksight explain` first"
        )
    return found


def file_bytes(name: str, config: JobConfig) -> bytes:
    """The content of a file that a target names. Raises ConfigError."""
    try:
        store, key = open_file(name, config.endpoint_url)
        body = store.read(key, length=MAX_IMAGE_BYTES + 1)
    except MissingError as error:
        raise ConfigError(f"target: there is no file {name}") from error
    except StoreError as error:
        raise ConfigError(f"target: the file {name} cannot be read: {error}") from error
    if len(body) > MAX_IMAGE_BYTES:
        raise ConfigError(f"target: the file {name} is larger than {MAX_IMAGE_BYTES:,} bytes")
    return body
