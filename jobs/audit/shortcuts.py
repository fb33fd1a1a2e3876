"""Turns candidates into shortcuts: chooses the images for the trial, and decides between finding and suspicion."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from blocksight.jobs.audit.candidates import Candidate
from blocksight.jobs.audit.examples import Example
from blocksight.jobs.audit.result import Effect, Shortcut, Standing
from blocksight.jobs.audit.samples import Sample
from blocksight.jobs.audit.trial import Box, Pictures, Trial
from blocksight.jobs.audit.words import comparison
from blocksight.jobs.evaluate.bootstrap import holm, key_hashes
from blocksight.storage.outputs.pictures import Pixels

MEMBERS, OTHERS = 32, 32
"""Most images that a region is removed from, and pasted into."""
POOL = 96
"""Images of all classes that the others are taken from, so that all candidates share them."""
MIN_IMAGES = 8
"""Fewest readable members, and others, for a trial."""
MIN_RECURRENCE = 0.85
"""Least recurrence of a finding without ground truth."""
MAX_ON_OBJECT = 0.25
"""Largest share of a finding's region that objects may cover."""
ATTENDED, MIN_CONTRAST = 1.5, 2.0
"""Without ground truth: if other classes' density in the region exceeds `ATTENDED` (1: an even map), the class's must
be `MIN_CONTRAST` times theirs. Where all classes' maps point, there may be objects."""

Seen = Mapping[str, Pixels]
"""Pixels [H, W, 3] at the model's input size, by record key."""
RegionOf = Callable[[str, int, str], NDArray[np.bool_] | None]
"""Returns the region of a target's objects in a record (key, index, name), bool [H, W]; None without ground truth."""


@dataclass(frozen=True, eq=False)
class Suspect:
    """A candidate and the keys of the records for its trial."""

    candidate: Candidate
    members: tuple[str, ...]
    others: tuple[str, ...]
    other_classes: Mapping[str, str]
    """Name of the class that each of the others was explained for."""


def suspects_of(candidates: Sequence[Candidate], samples: Iterable[Sample], seed: int) -> list[Suspect]:
    """The candidates, each with a random sample of members, and of records explained for other classes only."""
    drawn = list(samples)
    pool, names = _pool(drawn, seed), {sample.target_index: sample.target_name for sample in drawn}
    return [_suspect(one, pool, names) for one in candidates]


def _pool(samples: Iterable[Sample], seed: int) -> list[tuple[str, int]]:
    """Key and class of up to `POOL` records: one of each class in turn, in an order that `seed` decides."""
    turns = []
    for sample in samples:
        order = key_hashes([f"{seed}/{key}" for key in sample.keys]).argsort(kind="stable")[:POOL]
        turns += [(turn, sample.target_index, sample.keys[place]) for turn, place in enumerate(order)]
    return [(key, target) for _, target, key in sorted(turns)[:POOL]]


def _suspect(candidate: Candidate, pool: Sequence[tuple[str, int]], names: Mapping[int, str]) -> Suspect:
    sample = candidate.model.sample
    members = tuple(sample.keys[place] for place in candidate.members[:MEMBERS])  # in random order
    own = set(sample.keys)
    others: dict[str, str] = {}
    for key, target in pool:
        if target != sample.target_index and key not in own and len(others) < OTHERS:
            others.setdefault(key, names[target] or f"class {target}")
    return Suspect(candidate, members, tuple(others), others)


def tried(
    suspect: Suspect, trial: Trial | None, seen: Seen, region_of: RegionOf
) -> tuple[Shortcut, tuple[Example, ...]]:
    """The shortcut after its trial, p-values not corrected yet, and examples. Without a trial it stays a suspicion."""
    candidate = suspect.candidate
    sample = candidate.model.sample
    members, others = (_pictures(keys, seen) for keys in (suspect.members, suspect.others))
    result = None
    if trial is not None and min(len(members.keys), len(others.keys)) >= MIN_IMAGES:
        box = _pixels(candidate, members.pixels.shape[1:3])
        result = trial.try_region(sample.target_index, box, members, others)
    shortcut = Shortcut(
        target_index=sample.target_index,
        target_name=sample.target_name,
        source=candidate.source,
        box=candidate.shares,
        share=candidate.share,
        recurrence=result.recurrence if result is not None else None,
        density=candidate.density,
        elsewhere_density=candidate.elsewhere_density,
        on_object=_on_object(candidate, members.keys, region_of),
        blanked=result and result.blanked,
        pasted=result and result.pasted,
        is_confirmed=False,
        why=_untried(trial, members, others),
        members=suspect.members,
        other_classes=tuple(dict.fromkeys(suspect.other_classes[key] for key in others.keys)) if result else (),
    )
    return shortcut, result.examples if result else ()


def _pictures(keys: Sequence[str], seen: Seen) -> Pictures:
    known = [key for key in keys if key in seen]
    return Pictures(known, np.stack([seen[key] for key in known]) if known else np.zeros((0, 1, 1, 3), np.uint8))


def _pixels(candidate: Candidate, size: Sequence[int]) -> Box:
    height, width = size
    left, top, right, bottom = candidate.shares
    return round(left * width), round(top * height), round(right * width), round(bottom * height)


def _on_object(candidate: Candidate, keys: Sequence[str], region_of: RegionOf) -> float | None:
    """The mean share of the box that the target's objects cover in annotated members; None without any."""
    sample = candidate.model.sample
    regions = [
        region for key in keys if (region := region_of(key, sample.target_index, sample.target_name)) is not None
    ]
    shares = []
    for region in regions:
        left, top, right, bottom = _pixels(candidate, region.shape)
        shares.append(region[top:bottom, left:right].mean())
    return float(np.mean(shares)) if shares else None


def _untried(trial: Trial | None, members: Pictures, others: Pictures) -> str:
    if trial is None:
        return "not put to the test: the audit was told to do without"
    readable = f"{len(members.keys)} and {len(others.keys)}"
    return f"not put to the test: of {MIN_IMAGES} images of either kind {readable} can be read"


def judged(shortcuts: Sequence[Shortcut]) -> tuple[Shortcut, ...]:
    """The shortcuts with p-values corrected over all trials and their reasons, in the order of `Standing`."""
    values = [effect and effect.p_value for one in shortcuts for effect in (one.blanked, one.pasted)]
    corrected = iter(holm(values))
    found = []
    for one in shortcuts:
        effects = {name: _corrected(getattr(one, name), next(corrected)) for name in ("blanked", "pasted")}
        found.append(_verdict(replace(one, **effects)))
    order = get_args(Standing)
    return tuple(sorted(found, key=lambda one: (order.index(one.standing), -_strength(one), one.target_index, one.box)))


def _corrected(effect: Effect | None, p_value: float | None) -> Effect | None:
    return effect and replace(effect, p_value=p_value)


def _strength(one: Shortcut) -> float:
    """The smaller of the two effects, because a finding needs both."""
    return min(one.blanked.mean, one.pasted.mean) if one.blanked is not None and one.pasted is not None else -np.inf


def _verdict(one: Shortcut) -> Shortcut:
    if one.blanked is None or one.pasted is None:
        return one
    doubt = _doubt(one, one.blanked, one.pasted)
    if doubt is not None:
        return replace(one, why=doubt)
    alike = "it looks alike in all members; other classes look elsewhere"
    off = "objects lie elsewhere" if one.on_object is not None else alike
    return replace(one, is_confirmed=True, why=f"{_removed(one.blanked)}; {_pasted(one.pasted)}; {off}")


def _removed(effect: Effect) -> str:
    return f"inpainted, {comparison(effect, 'fall')}"


def _pasted(effect: Effect) -> str:
    return f"pasted into other images, {comparison(effect, 'rise')}"


def _doubt(one: Shortcut, blanked: Effect, pasted: Effect) -> str | None:
    """The first reason why a candidate is no finding; None if it is one."""
    if not blanked.is_real:
        return _removed(blanked)
    if not pasted.is_real:
        return _pasted(pasted)
    if one.on_object is not None:
        return (
            f"objects cover {one.on_object:.0%} of it: it may be the object" if one.on_object > MAX_ON_OBJECT else None
        )
    if one.elsewhere_density > ATTENDED and one.density < MIN_CONTRAST * one.elsewhere_density:
        return "other classes' maps look there too: objects may lie there; --truth decides"
    if one.recurrence is not None and one.recurrence < MIN_RECURRENCE:
        return "its pixels differ from member to member: it may be the object; --truth decides"
    return None
