"""The files of a folder that OpenCLIP wrote; imports nothing that they are read with."""

from collections.abc import Mapping
from typing import Any

from blocksight.engine.errors import ModelError
from blocksight.engine.model.sources import hugging_face_files
from blocksight.engine.model.sources.hugging_face_files import object_of, refuse_code

CONFIG = "open_clip_config.json"
WEIGHTS_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
"""The first of these that is there holds the weights; the last one is read without its code."""
SETTINGS = (CONFIG, *hugging_face_files.TOKENIZER_SETTINGS)
"""The files that are read besides the weights."""


def settings_of(files: Mapping[str, memoryview]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's configuration, and how pictures are prepared.

    Raises ModelError for another form, and for what would reach a hub or run code.
    """
    refuse_code(files)
    stored = object_of(bytes(files[CONFIG]), CONFIG)
    model, feeding = stored.get("model_cfg"), stored.get("preprocess_cfg") or {}
    towers = [model.get(name) for name in ("vision_cfg", "text_cfg")] if isinstance(model, dict) else []
    if not isinstance(model, dict) or not isinstance(feeding, dict) or not all(isinstance(own, dict) for own in towers):
        raise ModelError(f"{CONFIG} describes no model; wanted model_cfg with vision_cfg and text_cfg")
    vision, text = model["vision_cfg"], model["text_cfg"]
    if ":" in str(vision.get("timm_model_name", "")):
        raise ModelError(f"{CONFIG} takes its picture tower from {vision['timm_model_name']}, and no hub is reached")
    if "trust_remote_code" in (text.get("tokenizer_kwargs") or {}):
        raise ModelError(f"{CONFIG} asks for code that comes with the tokenizer, and code of a folder is never run")
    return model, feeding
