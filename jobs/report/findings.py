"""The audit's part of a report: shortcuts, gates, measures, groups, clusters and oddities."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from blocksight.jobs.audit.examples import Example, Place
from blocksight.jobs.audit.examples import place_of as shortcut_place
from blocksight.jobs.audit.result import (
    GATES,
    MEASURES,
    Audit,
    Cluster,
    Effect,
    Grid,
    Group,
    Scale,
    Shortcut,
    Spread,
    Standing,
)
from blocksight.jobs.report.facts import Fact, Share
from blocksight.jobs.report.galleries import Ref, data_uri, jpeg, members
from blocksight.storage.outputs.pictures import colours, resized

MAX_GROUPS, MAX_PAIRS, MAX_CLUSTERED, MAX_SHORTCUTS, MAX_ODDITIES, MAX_NOTES = 12, 8, 8, 12, 8, 20
CHANGE_SIDE, MAX_CHANGE_BYTES = 128, 3_000
"""Longer side of a crop in pixels, and the most bytes of its JPEG."""
MEAN_MAP_SIDE = 96
"""Pixels of a group's small picture."""


@dataclass(frozen=True)
class Change:
    """The crop of an image before and after a trial changed it, without a map over it."""

    text: str
    """What was done to which record."""
    before: str
    """data: URI of a JPEG, as `after`."""
    after: str
    width: int
    height: int
    score_before: float
    score_after: float


@dataclass(frozen=True)
class Pictured:
    """An item of the audit with its small picture and the numbers of its maps in the galleries."""

    about: Any
    picture: str | None
    items: tuple[int, ...] = ()
    changes: tuple[Change, ...] = ()
    """Of a finding: crops of some images before and after its trial changed them."""


@dataclass(frozen=True)
class Findings:
    """The audit's results as the report shows them."""

    audit: Audit
    shortcuts: Mapping[Standing, tuple[Pictured, ...]]
    """By standing, at most `MAX_SHORTCUTS` each; items are `Shortcut`."""
    reach: float
    """The largest absolute effect: the end of the axis."""
    scale: Scale
    """Of the effects."""
    gates: tuple[Share, ...]
    measures: tuple[tuple[str, str, Spread], ...]
    """Name, meaning and spread over all maps, of each measure."""
    everything: tuple[Fact, ...]
    """Small pictures of all maps together: name, data: URI and meaning."""
    groups: tuple[Pictured, ...]
    """Items are `Group`, of labels or predictions."""
    pairs: tuple[Pictured, ...]
    """Items are `Group`, of wrong predictions of a label."""
    clusters: tuple[tuple[str, tuple[Pictured, ...]], ...]
    """Class names with items that are `Cluster`."""
    oddities: tuple[Pictured, ...]
    """Items are `Oddity`."""
    notes: tuple[str, ...]


def class_name(name: str | None, index: int) -> str:
    """A class's name, or its index if the model knows no name."""
    return name or f"class {index}"


def findings_of(audit: Audit, places: Mapping[Ref, int], examples: Mapping[Place, Sequence[Example]]) -> Findings:
    """The audit's part of the page. `places`: numbers of the maps on it. `examples`: as of `read_examples`."""

    def items_of(refs: Sequence[Ref]) -> tuple[int, ...]:
        return tuple(places[ref] for ref in refs if ref in places)

    by_kind = {kind: list(own) for kind, own in groupby(audit.groups, lambda group: group.kind)}
    everything = by_kind.get("all", [])[:1]
    predicted = {group.predicted: group for group in by_kind.get("predicted", [])}
    classes = (by_kind.get("class") or by_kind.get("predicted") or [])[:MAX_GROUPS]
    shortcuts = {standing: shortcuts_of(audit, standing)[:MAX_SHORTCUTS] for standing in get_args(Standing)}
    return Findings(
        audit=audit,
        shortcuts={
            standing: tuple(
                Pictured(
                    one,
                    _class_map(one, predicted, audit.clusters),
                    items_of(members(one)),
                    tuple(map(_change, examples.get(shortcut_place(one), ()))),
                )
                for one in own
            )
            for standing, own in shortcuts.items()
        },
        reach=_reach([one for own in shortcuts.values() for one in own]),
        scale=_scale(audit.shortcuts),
        gates=tuple(
            Share(name, audit.gates[name], audit.gates[name] / max(1, audit.num_maps), meaning)
            for name, meaning in GATES.items()
            if name in audit.gates
        ),
        measures=tuple(
            (name, meaning, everything[0].spreads[name])
            for name, meaning in MEASURES.items()
            if everything and name in everything[0].spreads
        ),
        everything=tuple(fact for group in everything for fact in _overall(group)),
        groups=tuple(Pictured(group, map_picture(group.mean_map)) for group in classes),
        pairs=tuple(Pictured(group, map_picture(group.mean_map)) for group in by_kind.get("pair", [])[:MAX_PAIRS]),
        clusters=tuple(_clusters(audit.clusters, items_of)),
        oddities=tuple(
            Pictured(one, None, items_of([Ref(one.key, str(one.target_index))]))
            for one in audit.oddities[:MAX_ODDITIES]
        ),
        notes=audit.notes[:MAX_NOTES],
    )


def _scale(shortcuts: Sequence[Shortcut]) -> Scale:
    """The scale of all effects of an audit; they are of one model."""
    for one in shortcuts:
        if one.blanked is not None:
            return one.blanked.scale
    return "log-odds"


def _change(one: Example) -> Change:
    height, width = one.before.shape[:2]
    scale = CHANGE_SIDE / max(height, width)
    size = (max(1, round(scale * width)), max(1, round(scale * height)))
    before, after = (
        data_uri(jpeg(np.asarray(Image.fromarray(own).resize(size)), MAX_CHANGE_BYTES), "image/jpeg")
        for own in (one.before, one.after)
    )
    name, donor = PurePosixPath(one.key).name, one.donor and PurePosixPath(one.donor).name
    text = f"painted out in {name}" if donor is None else f"pasted from {donor} into {name}"
    return Change(text, before, after, *size, one.probability_before, one.probability_after)


def shortcuts_of(audit: Audit, standing: Standing) -> tuple[Shortcut, ...]:
    """The audit's shortcuts of one standing, the strongest first."""
    return tuple(one for one in audit.shortcuts if one.standing == standing)


def _overall(group: Group) -> Iterator[Fact]:
    yield Fact("mean", map_picture(group.mean_map), "where the maps look on average")
    yield Fact("variance", map_picture(group.variance_map), "where they differ from each other")


def _class_map(one: Shortcut, predicted: Mapping[str | None, Group], clusters: Sequence[Cluster]) -> str | None:
    """The small picture of the mean map that the shortcut was found in."""
    for cluster in clusters:
        if cluster.target_index == one.target_index and one.source == f"cluster {cluster.number}":
            return map_picture(cluster.mean_map)
    group = predicted.get(one.target_name)
    return map_picture(group.mean_map) if group else None


def _reach(shortcuts: Sequence[Shortcut]) -> float:
    effects: list[Effect | None] = [effect for one in shortcuts for effect in (one.blanked, one.pasted)]
    ends = [abs(end) for effect in effects if effect for end in (effect.low, effect.high, effect.mean)]
    return max(ends, default=0.0) or 1.0


def _clusters(
    clusters: Sequence[Cluster], items_of: Callable[[Sequence[Ref]], tuple[int, ...]]
) -> Iterator[tuple[str, tuple[Pictured, ...]]]:
    for number, ((index, target), own) in enumerate(
        groupby(clusters, lambda cluster: (cluster.target_index, cluster.join_key))
    ):
        if number == MAX_CLUSTERED:
            return
        found = list(own)
        drawn = (
            Pictured(one, map_picture(one.mean_map), items_of([Ref(key, target) for key in one.examples]))
            for one in found
        )
        yield class_name(found[0].target_name, index) if index is not None else target, tuple(drawn)


def colour_scale() -> str:
    """The colours of a map from 0 on the left to 1 on the right, as a data: URI of a PNG of 256 x 1 pixels."""
    buffer = io.BytesIO()
    Image.fromarray(colours(np.linspace(0, 1, 256)[None])).save(buffer, "PNG")
    return data_uri(buffer.getvalue(), "image/png")


def map_picture(grid: Grid) -> str:
    """A pooled map as a data: URI of a PNG of `MEAN_MAP_SIDE` pixels, scaled from its least to its greatest value."""
    low, high = float(grid.min()), float(grid.max())
    scaled: NDArray[np.floating] = (grid - low) / (high - low) if high > low else np.zeros_like(grid)
    buffer = io.BytesIO()
    Image.fromarray(colours(resized(scaled, (MEAN_MAP_SIDE, MEAN_MAP_SIDE)))).quantize(64).save(buffer, "PNG")
    return data_uri(buffer.getvalue(), "image/png")


def place_of(box: Sequence[float]) -> str:
    """A region in words: `top left`, `middle`, `most of the picture`."""
    left, top, right, bottom = box
    if (right - left) * (bottom - top) > 0.6:
        return "most of the picture"
    across = _third((left + right) / 2, ("left", "", "right"))
    down = _third((top + bottom) / 2, ("top", "", "bottom"))
    return f"{down} {across}".strip() or "middle"


def _third(value: float, names: Sequence[str]) -> str:
    return names[min(2, int(3 * value))]
