"""Reads an output's JSON documents; refuses one that is too large or has another shape, in one sentence."""

import json
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from blocksight.jobs.plan.records import UnreconciledError
from blocksight.storage.limits import MAX_DOCUMENT_BYTES
from blocksight.storage.stores.store import ObjectStore

T = TypeVar("T")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

MAX_PATH = 100
"""Characters of a field's path in a message; the path may come from a stranger."""

REPAIRS = {
    "data/": "`blocksight verify` says more",
    "evaluations/": "remove it, and the same `evaluate` makes it again",
    "audit/_measured/": "delete it, and the same `audit` measures it again",
    "audit/": "`blocksight audit` makes it again",
    "_measured/": "delete it, and the same `versus` measures it again",
    "_job/final/": "delete it, and `blocksight finalize` writes it again",
    "_job/dead/": "delete it, and the next `explain` tries the unit again",
}
"""How to repair a damaged object, by its folder."""


def read_document(store: ObjectStore, key: str, kind: type[T], max_bytes: int = MAX_DOCUMENT_BYTES) -> T:
    """The JSON object at `key` as a dataclass or TypedDict of this kind; reads at most `max_bytes`.

    Raises MissingError if it does not exist, StoreError, and UnreconciledError if it has another shape.
    """
    body = store.read(key, length=max_bytes + 1)
    try:
        return parsed(body, kind, max_bytes)
    except ValueError as error:
        raise damaged(store.uri, key, error) from error


def parsed(body: bytes, kind: type[T], max_bytes: int = MAX_DOCUMENT_BYTES) -> T:
    """The bytes as a value of this kind: each field once, of its type, and no other field.

    Raises ValueError in one sentence.
    """
    if len(body) > max_bytes:
        raise ValueError(f"it is larger than {max_bytes:,} bytes")
    try:
        found = json.loads(body.decode(), object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"it holds a JSON {_name(found)}, wanted an object")  # noqa: TRY004 - the bytes are wrong
    del found
    try:
        return _adapter(kind).validate_json(body, strict=True, extra="forbid")
    except ValidationError as error:
        raise ValueError(_sentence(error)) from error


def damaged(uri: str, key: str, reason: object) -> UnreconciledError:
    """The error for a damaged object `key` below `uri`."""
    repair = next((way for folder, way in REPAIRS.items() if key.startswith(folder)), "put it back from a copy")
    return UnreconciledError(f"{uri}/{key} is damaged, {repair}: {reason}")


@cache
def _adapter(kind: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(kind)


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The object. Raises ValueError if a field occurs twice: JSON readers disagree on which one counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the field {twice[:MAX_PATH]!r} is there twice")
    return found


def _name(value: Any) -> str:
    kinds = {list: "list", str: "text", bool: "truth value", type(None): "null"}
    return kinds.get(type(value), "number")


def _sentence(error: ValidationError) -> str:
    """The first error, without the value, which may be long and a stranger's."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    path = ".".join(map(str, first["loc"]))[:MAX_PATH]
    text = f"{first['msg'][0].lower()}{first['msg'][1:]}"
    return f"{path}: {text}" if path else text
