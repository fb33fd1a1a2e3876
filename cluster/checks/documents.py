"""Reads YAML and JSON as plain data: bounded, without tags, and no key twice."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

MAX_FILE_BYTES = 4 << 20
MAX_VALUES = 100_000
"""Of a file, once its aliases are followed: a few lines of aliases could stand for billions."""


class DocumentError(Exception):
    """A file cannot be read; the message says why."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses a key that stands twice in a mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node. Raises an error of YAML for a key that stands twice."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice, and one of the two would be lost", node.start_mark
                )
        return super().construct_mapping(node, deep)


def yaml_documents(text: str) -> list[Any]:
    """The documents of a YAML text, empty ones left out. Raises DocumentError."""
    try:
        found = [document for document in yaml.load_all(text, _Loader) if document is not None]
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise DocumentError(f"it is no YAML: {error}") from error
    return [plain(document) for document in found]


def json_document(text: str) -> Any:
    """The value of a JSON text. Raises DocumentError."""
    try:
        return plain(json.loads(text, object_pairs_hook=_without_twins))
    except (RecursionError, ValueError) as error:
        raise DocumentError(f"it is no JSON: {error}") from error


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the key {key!r} stands twice, and one of the two would be lost")
    return dict(pairs)


def plain(value: Any) -> Any:
    """A copy in which no two places share a value. Raises DocumentError for too many values."""
    left = iter(range(MAX_VALUES))
    try:
        return _copy(value, left)
    except (RecursionError, StopIteration) as error:
        raise DocumentError(f"it has more than {MAX_VALUES:,} values, or refers to itself") from error


def _copy(value: Any, left: Iterator[int]) -> Any:
    next(left)
    match value:
        case Mapping():
            return {_key(key): _copy(one, left) for key, one in value.items()}
        case list() | tuple() | set():
            return [_copy(one, left) for one in value]
        case str() | bool() | int() | float() | None:
            return value
    return str(value)  # a date, which Kubernetes reads as a text


def _key(key: Any) -> str:
    """YAML 1.1 reads the keys on and off as true and false."""
    return {True: "on", False: "off"}.get(key, str(key)) if isinstance(key, bool) else str(key)
