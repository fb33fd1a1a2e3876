"""The files of a Hugging Face folder that are read; imports nothing that they are read with."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blocksight.engine.errors import ModelError

CONFIG = "config.json"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
"""Files of which a tokenizer needs one."""
TOKENIZER_SETTINGS = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", *TOKENIZERS),
)
SETTINGS = (CONFIG, *PROCESSORS, WEIGHTS_INDEX, *TOKENIZER_SETTINGS)
"""The files of a folder that are read besides its weights; others may lie there."""


def weight_files(index: bytes | None) -> tuple[str, ...]:
    """The weight files of a folder, by the bytes of its index; None: it has no index. Raises ModelError."""
    if index is None:
        return (WEIGHTS_FILE,)
    names = sorted(set(object_of(index, WEIGHTS_INDEX).get("weight_map", {}).values()))
    if not names or not all(_is_weight_file(name) for name in names):
        raise ModelError(f"{WEIGHTS_INDEX} names files other than safetensors beside it: they are not read")
    return tuple(names)


def _is_weight_file(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def object_of(body: bytes, name: str) -> dict[str, Any]:
    """The object of a JSON file. Raises ModelError with the file's name."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{name} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{name} holds a {type(found).__name__}; wanted an object")
    return found


def refuse_code(files: Mapping[str, memoryview]) -> None:
    """Raises ModelError if a setting asks for code of the folder."""
    for name, body in files.items():
        if name.endswith(".json") and name not in ("tokenizer.json", "vocab.json", WEIGHTS_INDEX):
            settings = object_of(bytes(body), name)
            if any("auto_map" in one for one in (settings, *(v for v in settings.values() if isinstance(v, dict)))):
                raise ModelError(
                    f"{name} asks for code that comes with the model (auto_map), and code of a folder is never run: "
                    "make the model in a factory of yours, --model package.module:factory"
                )
