"""The class map: which of the model's classes a label means, as the user says it in a JSON file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ClassMap = tuple[tuple[str, tuple[int, ...]], ...]
"""Labels, each with the model's classes; empty: labels are class names."""


def class_map_file(file: Path) -> dict[str, Any]:
    """A JSON file of the form {"dog": [151, 152], "cat": 281}. Raises ValueError in one sentence."""
    try:
        read = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"the class map {file} cannot be read: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f'the class map {file} must be an object such as {{"dog": [151, 152]}}')  # noqa: TRY004
    return read


def class_map_of(read: Mapping[str, Any], where: str) -> ClassMap:
    """The class map of a table of labels. Raises ValueError if a label has other than class numbers."""
    return tuple(sorted((label, _classes(label, given, where)) for label, given in read.items()))


def _classes(label: str, given: Any, where: str) -> tuple[int, ...]:
    numbers = given if isinstance(given, list) else [given]
    if not numbers or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{where} gives {label!r} {given!r}; wanted class numbers")
    return tuple(sorted(set(numbers)))
