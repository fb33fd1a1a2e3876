"""Examples of a finding: the crop of some images before and after the trial changed them, without any map over it."""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa
from PIL import Image

from blocksight.jobs.audit.result import FOLDER, Shortcut
from blocksight.jobs.ledger.output import table_of
from blocksight.jobs.plan.documents import damaged
from blocksight.storage.images.decode import decode
from blocksight.storage.outputs.pictures import Pixels
from blocksight.storage.parquet.rows import parquet_of_rows
from blocksight.storage.rejects import Reject
from blocksight.storage.stores.store import MissingError, ObjectStore

EXAMPLES_KEY = f"{FOLDER}examples.parquet"
NUM_EXAMPLES = 2
"""Images of each kind that are kept of a finding."""

Place = tuple[int, str, tuple[float, ...]]
"""A shortcut's target index, source and box, which name it within an audit."""


@dataclass(frozen=True, eq=False)
class Example:
    """One image of a trial."""

    what: Literal["inpainted", "pasted"]
    key: str
    donor: str | None
    """The record that the pasted region is from."""
    before: Pixels
    """[H, W, 3]: the region with a margin, at the model's input size."""
    after: Pixels
    probability_before: float
    """Of the target, 0 to 1; with `--readout identity` its output."""
    probability_after: float


EXAMPLES = pa.schema(
    [
        ("target_index", pa.int32()),
        ("source", pa.string()),
        ("box", pa.list_(pa.float64())),
        ("what", pa.string()),
        ("key", pa.string()),
        ("donor", pa.string()),
        ("before", pa.binary()),
        ("after", pa.binary()),
        ("probability_before", pa.float64()),
        ("probability_after", pa.float64()),
    ]
)
"""Schema of the examples; `before` and `after` are PNG files."""


def place_of(shortcut: Shortcut) -> Place:
    """What names the shortcut within its audit."""
    return shortcut.target_index, shortcut.source, tuple(shortcut.box)


def write_examples(store: ObjectStore, examples: Mapping[Place, Sequence[Example]]) -> None:
    """Writes the examples of an audit's findings, over those of an earlier audit. Raises StoreError."""
    rows = [_row(place, one) for place, own in examples.items() for one in own]
    store.put(EXAMPLES_KEY, parquet_of_rows(rows, EXAMPLES))


def _row(place: Place, one: Example) -> Mapping[str, object]:
    target_index, source, box = place
    pictures = {name: _png(getattr(one, name)) for name in ("before", "after")}
    return {**asdict(one), **pictures, "target_index": target_index, "source": source, "box": list(box)}


def _png(pixels: Pixels) -> bytes:
    body = io.BytesIO()
    Image.fromarray(pixels).save(body, "PNG", optimize=True)
    return body.getvalue()


def read_examples(store: ObjectStore, shortcuts: Iterable[Shortcut]) -> Mapping[Place, Sequence[Example]]:
    """The examples of these shortcuts; empty for an audit that kept none.

    Raises StoreError, and UnreconciledError if they are damaged.
    """
    try:
        rows = table_of(store, EXAMPLES_KEY, EXAMPLES).to_pylist()
    except MissingError:  # an older audit
        return {}
    found: dict[Place, list[Example]] = {place_of(one): [] for one in shortcuts}
    for row in rows:
        try:
            place = (row["target_index"], row["source"], tuple(row["box"]))
            if place in found:
                found[place].append(_example(row))
        except (Reject, TypeError, ValueError) as error:
            raise damaged(store.uri, EXAMPLES_KEY, error) from error
    return found


def _example(row: Mapping[str, Any]) -> Example:
    """Raises Reject for a damaged picture, and ValueError for a null."""
    pictures = {name: decode(row[name] or b"").pixels for name in ("before", "after")}
    fields = {name: row[name] for name in ("what", "key", "probability_before", "probability_after")}
    if None in fields.values():
        raise ValueError("a row lacks one of its values")
    return Example(donor=row["donor"], **pictures, **fields)
