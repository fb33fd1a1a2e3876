"""The values that say how a model is fed, from options, TOML or a plan: input size, normalisation, class names."""

import json
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator

from blocksight.jobs.plan.text import counted
from blocksight.storage.limits import MAX_CLASSES, MAX_MAP_SIDE, MAX_MODEL_FILE_BYTES
from blocksight.storage.stores.opening import open_file

MAX_NAME = 500
"""Characters of a class name."""


def _sides(value: Any) -> Any:
    """Height and width of 224, `224`, `192x256` or [192, 256]."""
    parts = re.split(r"\s*[x,]\s*", value.strip()) if isinstance(value, str) else value
    parts = parts if isinstance(parts, list | tuple) else [parts]
    numbers = [_whole(part) for part in parts]
    sides = [number for number in numbers if number is not None and 1 <= number <= MAX_MAP_SIDE]
    if len(sides) != len(parts) or len(sides) not in (1, 2):
        raise ValueError(
            f"wanted pixels from 1 to {MAX_MAP_SIDE}, such as 224, or 192x256 (height, width), got {value!r}"
        )
    return (sides[0], sides[-1])


def _whole(value: Any) -> int | None:
    if isinstance(value, str):
        return int(value) if value.isascii() and value.isdecimal() and len(value) < 10 else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _of_channels(value: Any, lowest: float, highest: float, what: str) -> tuple[float, ...]:
    """Red, green and blue of 0.5, `0.5`, `0.485,0.456,0.406` or a list."""
    parts = value.split(",") if isinstance(value, str) else value
    parts = parts if isinstance(parts, list | tuple) else [parts]
    try:
        numbers = [float(part) for part in parts if not isinstance(part, bool)]
    except (TypeError, ValueError):
        numbers = []
    is_sound = len(numbers) == len(parts) and all(lowest <= number <= highest for number in numbers)
    if not is_sound or len(numbers) not in (1, 3):
        hint = "; values of 0..255 are divided by 255" if any(map(_is_of_bytes, numbers)) else ""
        raise ValueError(f"wanted {what} of RGB in 0..1, such as 0.485,0.456,0.406, got {value!r}{hint}")
    return tuple(numbers * 3) if len(numbers) == 1 else tuple(numbers)


def _is_of_bytes(number: float) -> bool:
    return math.isfinite(number) and number > 1


def _mean(value: Any) -> Any:
    return None if value is None else _of_channels(value, -1.0, 1.0, "the mean")


def _std(value: Any) -> Any:
    return None if value is None else _of_channels(value, 1e-6, 10.0, "the standard deviation")


def _names(value: Any) -> Any:
    is_sound = isinstance(value, list | tuple) and 2 <= len(value) <= MAX_CLASSES
    if not is_sound or not all(isinstance(name, str) and 0 < len(name) <= MAX_NAME for name in value):
        raise ValueError(f"wanted a list of 2 or more names by class number, each of 1 to {MAX_NAME} characters")
    return tuple(value)


InputSize = Annotated[tuple[int, int], BeforeValidator(_sides)]
Mean = Annotated[tuple[float, float, float], BeforeValidator(_mean)]
Std = Annotated[tuple[float, float, float], BeforeValidator(_std)]
ClassNames = Annotated[tuple[str, ...], BeforeValidator(_names)]


def read_class_names(file: str, endpoint_url: str | None) -> Sequence[str]:
    """The names of a file, by class number: one a line, a JSON list, or a JSON object of numbers and names.

    The object may be `{"0": "cat"}`, `{"0": ["n02121808", "cat"]}` or `{"cat": 0}`. Raises ValueError in one sentence,
    and StoreError if there is no such file.
    """
    store, name = open_file(file, endpoint_url)
    body = store.read(name, length=MAX_MODEL_FILE_BYTES + 1)
    if len(body) > MAX_MODEL_FILE_BYTES:
        raise ValueError(f"{file} is larger than {MAX_MODEL_FILE_BYTES:,} bytes")
    try:
        text = body.decode("utf-8-sig")
        if text.lstrip()[:1] in ("[", "{"):
            return _listed(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _listed(found: Any) -> Sequence[str]:
    """Raises ValueError if the classes are not numbered 0, 1, 2 and so on."""
    if not isinstance(found, dict):
        return found
    names = dict(_numbered(key, value) for key, value in found.items())
    if sorted(names) != list(range(len(found))):
        raise ValueError(f"its {counted(len(found), 'class')} are not numbered 0 to {len(found) - 1}, each once")
    return [names[number] for number in range(len(found))]


def _numbered(key: str, value: Any) -> tuple[int, str]:
    """The number and name of `"0": "cat"`, `"0": ["n02121808", "cat"]` or `"cat": 0`."""
    if _whole(value) is not None and not isinstance(value, str):
        return value, key
    number, name = _whole(key), value[-1] if isinstance(value, list) and value else value
    if number is None or not isinstance(name, str):
        raise ValueError(f"{key!r} is neither the number nor the name of a class")
    return number, name
