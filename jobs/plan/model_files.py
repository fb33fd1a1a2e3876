"""Reads the files of a model that is named by its folder, on this machine or in a bucket, as one value."""

from blocksight.engine.model.sources import hugging_face_files as hugging_face
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
    files = _settings(store)
    if hugging_face.CONFIG not in files:
        raise ConfigError(f"model {source}:{place} is no folder of a model: {hugging_face.CONFIG} is missing there")
    if weights is not None:
        files[WEIGHTS] = weights
    elif not drawn:
        files |= _weights(store, files.get(hugging_face.WEIGHTS_INDEX))
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


def _settings(store: ObjectStore) -> dict[str, bytes]:
    found = {}
    for name in hugging_face.SETTINGS:
        try:
            body = store.read(name, length=MAX_MODEL_SETTING_BYTES + 1)
        except MissingError:
            continue
        if len(body) > MAX_MODEL_SETTING_BYTES:
            raise ConfigError(f"{name} of the model is larger than {MAX_MODEL_SETTING_BYTES:,} bytes")
        found[name] = body
    return found


def _weights(store: ObjectStore, index: bytes | None) -> dict[str, bytes]:
    try:
        return {name: store.read(name) for name in hugging_face.weight_files(index)}
    except MissingError as error:
        raise ConfigError(
            f"the model's folder {store.uri} lacks safetensors ({error}): pickled weights (.bin) are not read; save "
            "it with `save_pretrained`. An adapter (LoRA) is merged first, with `merge_and_unload`"
        ) from error
