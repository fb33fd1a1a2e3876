"""Selects and draws a report's maps: best and worst by a metric, a random sample, some of each class, the audit's."""

import base64
import heapq
import io
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from blocksight.engine.catalog.entries import METRICS
from blocksight.jobs.audit.result import Audit, Shortcut
from blocksight.jobs.evaluate.bootstrap import key_hashes
from blocksight.jobs.evaluate.compare import Column
from blocksight.jobs.evaluate.evaluation import evaluation_folders, value_tables
from blocksight.jobs.ledger.accuracy import is_right
from blocksight.jobs.ledger.output import fragment_of
from blocksight.jobs.plan.labels import is_class_number
from blocksight.jobs.plan.plan import Plan
from blocksight.jobs.report.products import Sizes, parts_of, products_of
from blocksight.jobs.worker.rows import Output, images_of, rows_with, shown
from blocksight.storage.inputs.ground_truth import Truth
from blocksight.storage.outputs.pictures import Pixels, Tile
from blocksight.storage.outputs.schema import OK, REJECTED
from blocksight.storage.stores.store import ObjectStore

NUM_RANKED, NUM_RANDOM, NUM_CLASSES, NUM_PER_CLASS = 8, 24, 12, 3
NUM_SHORTCUTS, NUM_MEMBERS, NUM_ODDITIES, NUM_CLUSTERS, NUM_EXAMPLES = 12, 4, 24, 12, 3
NUM_REJECTED, NUM_WRONG = 12, 24
RANKING = ("drop", "insertion", "ebpg")
"""The metrics that rank maps from best to worst, if they were measured."""

MAX_PICTURES = 160
SIDE = 224
"""Longer side of a picture in pixels."""
MAX_BYTES = {"image": 14_000, "overlay": 14_000, "saliency": 4_000}
"""Most bytes of each JPEG: in base64, `MAX_PICTURES` of them take less than 7 MB."""
QUALITIES = (80, 65, 45, 25, 8)
"""Qualities of a JPEG, tried until it is small enough; the last one is taken at any size."""

NUM_WITH_PRODUCTS, MAX_SINGLE_BYTES, MAX_FILM_BYTES = 6, 16_000, 4_000
PRODUCT_SIZES = Sizes(film=144, single=288, most=12)
"""Maps whose side products are drawn, the most bytes of their JPEGs, and their sizes."""

SELECTED_COLUMNS = [
    *("key", "status", "reject_code", "reject_stage", "error", "target", "target_index", "target_name", "metrics"),
    *("label", "label_rank", "target_rank", "score", "selected_by"),
]
JUDGED_COLUMNS = ["label", "label_rank", "target_index", "target_rank", "score"]
WRONG = (
    "Maps of records whose prediction is not the label, the most confident first; a map of the label shows what the "
    "model saw of it."
)
SALT = "report"
"""Part of the hashes for the random order, so that it differs from that of `evaluate`."""

Value = TypeVar("Value")


class Ref(NamedTuple):
    """A reference to a map: a record's key and what is explained."""

    key: str
    target: str


@dataclass(frozen=True)
class Gallery:
    """Maps that are shown for one reason."""

    name: str
    """Unique on the page: letters and hyphens."""
    title: str
    meaning: str
    refs: tuple[Ref, ...]
    """The most important first."""
    metric: str | None = None
    """The metric that ranks them, if any."""
    values: Mapping[Ref, float] = field(default_factory=dict)
    """Values of that metric."""


@dataclass(frozen=True)
class Rejected:
    """A rejected record, which has no map."""

    key: str
    code: str
    stage: str
    error: str


@dataclass(frozen=True)
class Picture:
    """A map and its image as data: URIs of JPEGs, at most `SIDE` pixels on each side."""

    image: str
    overlay: str
    saliency: str
    width: int
    height: int
    is_gone: bool
    """Whether the image can no longer be read; it is drawn in grey."""


@dataclass(frozen=True)
class Frame:
    """One picture of a map's side product."""

    picture: str
    """data: URI of a JPEG."""
    width: int
    height: int
    caption: tuple[str, ...]
    """One or two lines."""


@dataclass(frozen=True)
class ProductPictures:
    """The pictures of one kind of a map's side products."""

    title: str
    summary: str
    meaning: str
    frames: tuple[Frame, ...]
    is_film: bool
    """Whether it is several maps, not one picture."""


class Least(Generic[Value]):
    """Keeps the values with the lowest ranks, at most `size`. The result does not depend on the order of offers."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._heap: list[tuple[float, int, Any]] = []
        """A heap whose first entry has the highest rank: negated rank, negated tie, value."""

    def offer(self, ranks: NDArray[np.float64], ties: NDArray[np.uint64], value_at: Callable[[int], Value]) -> None:
        """Offers n values with ranks [n] and, for equal ranks, ties [n]. A value with rank NaN is skipped."""
        order = np.lexsort((ties, ranks))[: self.size]  # NaN comes last
        for place in map(int, order):
            if not np.isnan(ranks[place]):
                heapq.heappush(self._heap, (-float(ranks[place]), -int(ties[place]), value_at(place)))
        while len(self._heap) > self.size:
            heapq.heappop(self._heap)

    @property
    def values(self) -> tuple[Value, ...]:
        """The values, the lowest rank first."""
        return tuple(value for value, _ in self.ranked)

    @property
    def ranked(self) -> tuple[tuple[Value, float], ...]:
        """The values with their ranks, the lowest first."""
        return tuple((value, -rank) for rank, _, value in sorted(self._heap, reverse=True))


@dataclass
class Selection:
    """The maps that one pass over an output selects. Its memory grows with the model's classes, not with the output."""

    random: Least[Ref] = field(default_factory=lambda: Least(NUM_RANDOM))
    wrong: Least[Ref] = field(default_factory=lambda: Least(NUM_WRONG))
    """Maps of wrong predictions, the most confident first; then maps of labels that were not predicted."""
    best: dict[Column, Least[Ref]] = field(default_factory=dict)
    worst: dict[Column, Least[Ref]] = field(default_factory=dict)
    by_class: dict[str, Least[Ref]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    """Number of maps by target."""
    names: dict[str, str] = field(default_factory=dict)
    """Names of the targets."""
    rejected: Least[Rejected] = field(default_factory=lambda: Least(NUM_REJECTED))
    selected_by: Counter[str] = field(default_factory=Counter)
    """Number of maps by the metric that chose them among several."""

    def add_rows(self, rows: pa.Table, drop: Column | None) -> None:
        """Adds a fragment's rows; `drop` is the column of the metric that `explain` measured."""
        explained = rows.filter(pc.field("status") == OK)
        refs = list(map(Ref, explained["key"].to_pylist(), explained["target"].to_pylist()))
        ties = _ties(refs)
        self.random.offer(np.zeros(len(refs)), ties, refs.__getitem__)
        self.wrong.offer(_how_wrong(explained.select(JUDGED_COLUMNS).to_pylist()), ties, refs.__getitem__)
        if drop is not None and refs:
            values = explained["metrics"].combine_chunks().field("drop")
            self.add_values(drop, values.to_numpy(zero_copy_only=False), refs, ties)
        self._add_classes(explained, refs, ties)
        self.selected_by.update(name for name in explained["selected_by"].to_pylist() if name in METRICS)
        self._add_rejected(rows.filter(pc.field("status") == REJECTED).to_pylist())

    def add_values(
        self, column: Column, values: NDArray[np.float64], refs: Sequence[Ref], ties: NDArray[np.uint64]
    ) -> None:
        """Adds the values [n] of a metric for n maps."""
        sign = 1.0 if METRICS[column.metric].better == "lower" else -1.0
        for picks, direction in ((self.best, sign), (self.worst, -sign)):
            picks.setdefault(column, Least(NUM_RANKED)).offer(direction * values, ties, refs.__getitem__)

    def _add_classes(self, explained: pa.Table, refs: Sequence[Ref], ties: NDArray[np.uint64]) -> None:
        targets = np.array(explained["target"].to_pylist(), dtype=np.str_)
        for target in map(str, np.unique(targets)):
            places = np.flatnonzero(targets == target)
            own = [refs[place] for place in places.tolist()]
            self.by_class.setdefault(target, Least(NUM_PER_CLASS)).offer(
                np.zeros(len(own)), ties[places], own.__getitem__
            )
            self.counts[target] += len(own)
            self.names[target] = explained["target_name"][int(places[0])].as_py()

    def _add_rejected(self, rows: Sequence[Mapping[str, Any]]) -> None:
        found = [Rejected(row["key"], row["reject_code"], row["reject_stage"], row["error"]) for row in rows]
        ties = key_hashes([f"{SALT} {own.code} {own.key}" for own in found])
        self.rejected.offer(np.zeros(len(found)), ties, found.__getitem__)


def _how_wrong(rows: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """[n] ranks of maps by confidence in a wrong answer, the most confident least; NaN where the answer is right.

    A wrong prediction comes before every label that another class was predicted for. NaN also for unknown labels and
    for further targets.
    """
    ranks = np.full(len(rows), np.nan)
    for place, row in enumerate(rows):
        if is_right([row]) is False and 1 in (row["target_rank"], row["target_index"] == row["label"]):
            ranks[place] = -row["score"] if row["target_rank"] == 1 else row["score"]
    return ranks


def _ties(refs: Sequence[Ref]) -> NDArray[np.uint64]:
    """[n] hashes of the maps, as a random order."""
    return key_hashes([f"{SALT} {ref.target} {ref.key}" for ref in refs])


def select(store: ObjectStore, plan: Plan, ranked: Sequence[Column], update: Callable[[], None]) -> Selection:
    """Reads the fragments and the evaluations' values once and selects maps; one object is in memory at a time.

    `ranked`: the metrics that rank maps. `update` is called after every planned unit.
    """
    selection = Selection()
    drop = next((column for column in ranked if column.metric == "drop"), None)
    committed = {info.key for info in store.list("data/")}
    for unit in plan.units:
        if unit.fragment_key in committed:
            selection.add_rows(fragment_of(store, unit.fragment_key, SELECTED_COLUMNS), drop)
        update()
    measured = [column for column in ranked if column.metric != "drop"]
    for folder in evaluation_folders(store) if measured else ():
        for table in value_tables(store, folder):
            for column in measured:
                _add_evaluated(selection, table, column, plan.identity["explainer"])
    return selection


def _add_evaluated(selection: Selection, table: pa.Table, column: Column, explainer: str) -> None:
    own = table.filter(
        (pc.field("explainer") == explainer)
        & (pc.field("metric") == column.metric)
        & (pc.field("protocol") == column.protocol)
        & pc.field("value").is_valid()
    )
    refs = list(map(Ref, own["key"].to_pylist(), own["target"].to_pylist()))
    selection.add_values(column, own["value"].to_numpy(), refs, _ties(refs))


def galleries(selection: Selection, audit: Audit | None) -> list[Gallery]:
    """The galleries, with at most `MAX_PICTURES` maps in all and without empty ones."""
    found = [
        Gallery("random", "Random", "A random sample: every map had the same chance.", selection.random.values),
        Gallery("wrong", "Wrong", WRONG, selection.wrong.values),
        *_of_audit(audit),
        *_ranked(selection),
        Gallery("class", "By class", "Some maps of each of the most frequent explained classes.", _classes(selection)),
    ]
    room, kept = MAX_PICTURES, []
    taken: set[Ref] = set()
    for gallery in found:
        new = set(islice((ref for ref in dict.fromkeys(gallery.refs) if ref not in taken), room))
        refs = tuple(ref for ref in dict.fromkeys(gallery.refs) if ref in taken | new)
        taken |= new
        room -= len(new)
        if refs:
            kept.append(replace(gallery, refs=refs))
    return kept


def _ranked(selection: Selection) -> Iterator[Gallery]:
    for column in selection.best:
        metric, better = column.metric, METRICS[column.metric].better
        for word, picks, side in (("Best", selection.best, better), ("Worst", selection.worst, _other(better))):
            meaning = f"The maps with the {side[:-2]}est {metric}: {METRICS[metric].meaning}."
            sign = 1.0 if side == "lower" else -1.0
            values = {ref: sign * rank for ref, rank in picks[column].ranked}
            yield Gallery(f"{word.lower()}-{metric}", f"{word} by {metric}", meaning, tuple(values), metric, values)


def _other(better: str) -> str:
    return "higher" if better == "lower" else "lower"


def _classes(selection: Selection) -> tuple[Ref, ...]:
    frequent = sorted(selection.counts, key=lambda target: (-selection.counts[target], _order(target)))[:NUM_CLASSES]
    return tuple(ref for target in frequent for ref in selection.by_class[target].values)


def _order(target: str) -> tuple[bool, int, str]:
    """Classes by their number, then sums by their text."""
    is_class = is_class_number(target)
    return not is_class, int(target) if is_class else 0, target


def _of_audit(audit: Audit | None) -> Iterator[Gallery]:
    """The galleries of an audit: findings, suspicions, oddities, clusters, and what was not confirmed."""
    if audit is None:
        return
    yield _of_shortcuts("findings", "Findings", "a finding", audit.findings)
    yield _of_shortcuts("suspicions", "Suspicions", "a suspicion", audit.suspicions)
    odd = tuple(Ref(one.key, str(one.target_index)) for one in audit.oddities[:NUM_ODDITIES])
    yield Gallery("oddities", "Oddities", "Maps that are unlike those of their class.", odd)
    typical = tuple(
        Ref(key, one.join_key) for one in audit.clusters[:NUM_CLUSTERS] for key in one.examples[:NUM_EXAMPLES]
    )
    yield Gallery("clusters", "Clusters", "Typical maps of each cluster of a class.", typical)
    one = "a region that was tested and not confirmed"
    yield _of_shortcuts("not-confirmed", "Not confirmed", one, audit.not_confirmed)


def _of_shortcuts(name: str, title: str, one: str, shortcuts: Sequence[Shortcut]) -> Gallery:
    refs = tuple(ref for own in shortcuts[:NUM_SHORTCUTS] for ref in members(own))
    return Gallery(name, title, f"Maps that point at {one}.", refs)


def members(shortcut: Shortcut) -> tuple[Ref, ...]:
    """The maps that are shown for a shortcut."""
    return tuple(Ref(key, str(shortcut.target_index)) for key in shortcut.members[:NUM_MEMBERS])


@dataclass(frozen=True)
class Drawn:
    """A map's row and its pictures."""

    row: dict[str, Any]
    picture: Picture
    products: tuple[ProductPictures, ...]
    """Pictures of its side products, for the first maps only."""


def drawn(
    output: Output,
    endpoint_url: str | None,
    refs: Sequence[Ref],
    update: Callable[[], None],
    truth: Truth | None = None,
) -> Iterator[tuple[Ref, Drawn]]:
    """Yields each map's row and pictures, in any order; a map that is gone is left out.

    The first `NUM_WITH_PRODUCTS` maps have pictures of their side products too. In memory are one image and the wanted
    rows. Boxes of `truth` are drawn. `update` is called after every map.
    """
    wanted, first = set(refs), set(refs[:NUM_WITH_PRODUCTS])
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in rows_with(output.store, output.plan, {ref.key for ref in wanted}):
        if row["status"] == OK and Ref(row["key"], row["target"]) in wanted:
            rows.setdefault(row["key"], []).append(row)
    for key, image in _images(output.plan, endpoint_url, rows):
        for row in rows[key]:
            ref = Ref(key, row["target"])
            products = tuple(_product_pictures(output.plan, row, image)) if ref in first else ()
            yield ref, Drawn(row, _picture(output.plan, row, image, truth), products)
            update()


def _images(plan: Plan, endpoint_url: str | None, keys: Collection[str]) -> Iterator[tuple[str, Pixels | None]]:
    """Yields each key with its image; keys whose image cannot be read come last, with None."""
    missing = dict.fromkeys(keys)
    for key, image in images_of(plan, endpoint_url, set(keys)):
        del missing[key]
        yield key, image
    yield from missing.items()


def _picture(plan: Plan, row: dict[str, Any], image: Pixels | None, truth: Truth | None) -> Picture:
    own = shown(plan, row, image, SIDE, truth)
    sides = {"image": own.image, "overlay": own.overlay, "saliency": own.colours}
    height, width = own.saliency_hw.shape
    jpegs = {name: data_uri(jpeg(pixels, MAX_BYTES[name]), "image/jpeg") for name, pixels in sides.items()}
    return Picture(**jpegs, width=width, height=height, is_gone=image is None)


def _product_pictures(plan: Plan, row: dict[str, Any], image: Pixels | None) -> Iterator[ProductPictures]:
    """Yields the pictures of each kind of side product of a map."""
    size = (row["map_height"], row["map_width"])
    for part in parts_of(products_of(row), size, lambda side: shown(plan, row, image, side).pixels, PRODUCT_SIZES):
        most_bytes = MAX_FILM_BYTES if part.is_film else MAX_SINGLE_BYTES
        frames = tuple(_frame(tile, most_bytes) for tile in part.tiles)
        yield ProductPictures(part.title, part.summary, part.meaning, frames, part.is_film)


def _frame(tile: Tile, most_bytes: int) -> Frame:
    height, width = tile.pixels.shape[:2]
    address = data_uri(jpeg(tile.pixels, most_bytes), "image/jpeg")
    return Frame(address, width, height, tuple(tile.caption.split("\n")))


def jpeg(pixels: Pixels, most_bytes: int) -> bytes:
    """A JPEG of at most `most_bytes`, with the best of `QUALITIES` that allows it."""
    body = b""
    for quality in QUALITIES:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, optimize=True)
        body = buffer.getvalue()
        if len(body) <= most_bytes:
            break
    return body


def data_uri(body: bytes, kind: str) -> str:
    """A data: URI of bytes of this media type."""
    return f"data:{kind};base64,{base64.b64encode(body).decode()}"
