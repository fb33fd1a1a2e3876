"""Reads the files of a model that is named by its folder, on this machine or in a bucket, as one value."""

from collections.abc import Iterable

from blocksight.engine.model.sources import hugging_face_files as hugging_face
from blocksight.engine.model.sources import open_clip_files as open_clip
from blocksight.engine.model.sources.files import WEIGHTS, pack
from blocksight.jobs.plan.config import ConfigError
from blocksight.storage.limits import MAX_MODEL_SETTING_BYTES
from blocksight.storage.stores.opening import open_file, open_store
from blocksight.storage.stores.retrying import SHORT_PATIENCE_SECONDS, PatientStore
from blocksight.storage.stores.s3_endpoints import endpoint_for
from blocksight.storage.stores.store import MissingError, ObjectStore


def packed_model(source: str, place: str, endpoint_url: str | None, weights: bytes | None, *, drawn: bool) -> bytes:
    """The files of a model at this place, and the file of `--weights` among them, packed.

    `drawn`: its own weights are not read, because others take their place. Raises ConfigError, ModelError and
    StoreError.
    """
    if source == "onnx":
        return pack({**_onnx_files(place, endpoint_url), **({} if weights is None else {WEIGHTS: weights})})
    store = PatientStore(open_store(place, endpoint_for(place, endpoint_url)), SHORT_PATIENCE_SECONDS)
    is_open_clip = source == "open_clip"
    files = _settings(store, open_clip.SETTINGS if is_open_clip else hugging_face.SETTINGS)
    config = open_clip.CONFIG if is_open_clip else hugging_face.CONFIG
    if config not in files:
        other = not is_open_clip and store.head(open_clip.CONFIG) is not None
        told = f"; it is one of OpenCLIP: --model open_clip:{place}" if other else ""
        raise ConfigError(f"model {source}:{place} is no folder of a model: {config} is missing there{told}")
    if weights is not None:
        files[WEIGHTS] = weights
    elif not drawn:
        files |= _open_clip_weights(store) if is_open_clip else _weights(store, files.get(hugging_face.WEIGHTS_INDEX))
    return pack(files)


def _onnx_files(place: str, endpoint_url: str | None) -> dict[str, bytes]:
    """The file, and those in its folder that hold its tensors."""
    from blocksight.engine.model.sources.onnx_models import MODEL_FILE, external_files

    store, name = open_file(place, endpoint_url)
    try:
        body = store.read(name)
        return {MODEL_FILE: body, **{beside: store.read(beside) for beside in external_files(body)}}
    except MissingError as error:
        raise ConfigError(f"model onnx:{place} is not there, or a file that it names: {error}") from error


def _settings(store: ObjectStore, names: Iterable[str]) -> dict[str, bytes]:
    """Those of these files that are there."""
    found = {}
    for name in names:
        try:
            body = store.read(name, length=MAX_MODEL_SETTING_BYTES + 1)
        except MissingError:
            continue
        if len(body) > MAX_MODEL_SETTING_BYTES:
            raise ConfigError(f"{name} of the model is larger than {MAX_MODEL_SETTING_BYTES:,} bytes")
        found[name] = body
    return found


def _open_clip_weights(store: ObjectStore) -> dict[str, bytes]:
    for name in open_clip.WEIGHTS_FILES:
        if store.head(name) is not None:
            return {name: store.read(name)}
    raise ConfigError(
        f"the model's folder {store.uri} holds no weights; wanted one of {', '.join(open_clip.WEIGHTS_FILES)}"
    )


def _weights(store: ObjectStore, index: bytes | None) -> dict[str, bytes]:
    try:
        return {name: store.read(name) for name in hugging_face.weight_files(index)}
    except MissingError as error:
        raise ConfigError(
            f"the model's folder {store.uri} lacks safetensors ({error}): pickled weights (.bin) are not read; save "
            "it with `save_pretrained`. An adapter (LoRA) is merged first, with `merge_and_unload`"
        ) from error
