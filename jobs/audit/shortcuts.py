"""Shortcuts: candidates with the pictures they are tried on, and the verdict, finding or suspicion, with its reason."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from blocksight.jobs.audit.candidates import Candidate
from blocksight.jobs.audit.result import Effect, Shortcut
from blocksight.jobs.audit.samples import Sample
from blocksight.jobs.audit.trial import Box, Court, Pictures
from blocksight.jobs.plan.bootstrap import holm, key_hashes
from blocksight.storage.outputs.pictures import Pixels

MEMBERS, OTHERS = 32, 32
"""Images a region is taken out of, and put into."""
POOL = 96
"""Images of all classes from which the others are taken, so that the same serve all candidates."""
FEWEST = 8
"""Of either that can still be read, for a trial."""
LEAST_RECURRENCE = 0.85
MOST_ON_OBJECT = 0.25
"""Share of the region that objects may cover, for it not to be the object."""
ATTENDED, LEAST_CONTRAST = 1.5, 2.0
"""Where other classes' maps lie more densely than this (1: an even map), the class's own must lie so many times as
densely as they do, as long as no ground truth tells objects: objects stand where all classes look."""

Seen = Mapping[str, Pixels]
"""Pixels [H, W, 3] at the model's input size by record key."""
RegionOf = Callable[[str, int, str], NDArray[np.bool_] | None]
"""Where the objects of a target (index, name) are in a record, bool [H, W]; None where nobody has said."""


@dataclass(frozen=True, eq=False)
class Suspect:
    """A candidate and the records that it is to be tried on."""

    candidate: Candidate
    members: tuple[str, ...]
    others: tuple[str, ...]


def suspects_of(candidates: Sequence[Candidate], samples: Iterable[Sample], seed: int) -> list[Suspect]:
    """The candidates with a fair draw of members, and of others that are explained for other classes alone."""
    pool = _pool(samples, seed)
    return [_suspect(one, pool) for one in candidates]


def _pool(samples: Iterable[Sample], seed: int) -> list[tuple[str, int]]:
    """Key and class of some records, class by class in turn, in an order that the seed decides."""
    turns = []
    for sample in samples:
        order = key_hashes([f"{seed}/{key}" for key in sample.keys]).argsort(kind="stable")[:POOL]
        turns += [(turn, sample.target_index, sample.keys[place]) for turn, place in enumerate(order)]
    return [(key, target) for _, target, key in sorted(turns)[:POOL]]


def _suspect(candidate: Candidate, pool: Sequence[tuple[str, int]]) -> Suspect:
    sample = candidate.model.sample
    members = tuple(sample.keys[place] for place in candidate.members[:MEMBERS])  # in random order
    own = set(sample.keys)
    others = dict.fromkeys(key for key, target in pool if target != sample.target_index and key not in own)
    return Suspect(candidate, members, tuple(others)[:OTHERS])


def tried(suspect: Suspect, court: Court | None, seen: Seen, region_of: RegionOf) -> Shortcut:
    """The candidate after its trial, p-values not corrected yet; without a court it stays a suspicion."""
    candidate = suspect.candidate
    sample = candidate.model.sample
    members, others = (_pictures(keys, seen) for keys in (suspect.members, suspect.others))
    verdicts = None
    if court is not None and min(len(members.keys), len(others.keys)) >= FEWEST:
        box = _pixels(candidate, members.pixels.shape[1:3])
        verdicts = court.try_region(sample.target_index, box, members, others)
    return Shortcut(
        target_index=sample.target_index,
        target_name=sample.target_name,
        source=candidate.source,
        box=candidate.shares,
        share=candidate.share,
        recurrence=verdicts.recurrence if verdicts is not None else None,
        density=candidate.density,
        elsewhere_density=candidate.elsewhere_density,
        on_object=_on_object(candidate, members.keys, region_of),
        blanked=verdicts and verdicts.blanked,
        pasted=verdicts and verdicts.pasted,
        is_confirmed=False,
        why=_untried(court, members, others),
        members=suspect.members,
    )


def _pictures(keys: Sequence[str], seen: Seen) -> Pictures:
    known = [key for key in keys if key in seen]
    return Pictures(known, np.stack([seen[key] for key in known]) if known else np.zeros((0, 1, 1, 3), np.uint8))


def _pixels(candidate: Candidate, size: Sequence[int]) -> Box:
    height, width = size
    left, top, right, bottom = candidate.shares
    return round(left * width), round(top * height), round(right * width), round(bottom * height)


def _on_object(candidate: Candidate, keys: Sequence[str], region_of: RegionOf) -> float | None:
    """The share of the box that the target's objects cover, on average over the members that are annotated."""
    sample = candidate.model.sample
    regions = [
        region for key in keys if (region := region_of(key, sample.target_index, sample.target_name)) is not None
    ]
    shares = []
    for region in regions:
        left, top, right, bottom = _pixels(candidate, region.shape)
        shares.append(region[top:bottom, left:right].mean())
    return float(np.mean(shares)) if shares else None


def _untried(court: Court | None, members: Pictures, others: Pictures) -> str:
    if court is None:
        return "not put to the test: the audit was told to do without"
    return (
        f"not put to the test: of {FEWEST} images of either kind {len(members.keys)} and {len(others.keys)} can be read"
    )


def judged(shortcuts: Sequence[Shortcut]) -> tuple[Shortcut, ...]:
    """All of them with p-values corrected over all trials, findings first, each with its reason."""
    values = [effect and effect.p_value for one in shortcuts for effect in (one.blanked, one.pasted)]
    corrected = iter(holm(values))
    found = []
    for one in shortcuts:
        effects = {name: _corrected(getattr(one, name), next(corrected)) for name in ("blanked", "pasted")}
        found.append(_verdict(replace(one, **effects)))
    return tuple(sorted(found, key=lambda one: (not one.is_confirmed, -_strength(one), one.target_index, one.box)))


def _corrected(effect: Effect | None, p_value: float | None) -> Effect | None:
    return effect and replace(effect, p_value=p_value)


def _strength(one: Shortcut) -> float:
    """The lesser of the two effects: both must be there."""
    return min(one.blanked.mean, one.pasted.mean) if one.blanked is not None and one.pasted is not None else -np.inf


def _verdict(one: Shortcut) -> Shortcut:
    if one.blanked is None or one.pasted is None:
        return one
    doubt = _doubt(one, one.blanked, one.pasted)
    if doubt is not None:
        return replace(one, why=doubt)
    alike = "it looks alike in all members; other classes look elsewhere"
    off = "objects lie elsewhere" if one.on_object is not None else alike
    why = f"inpainted, its log-odds fall by {_said(one.blanked)} more than with a random region; " + (
        f"pasted into other images, they rise by {_said(one.pasted)} more than with one; {off}"
    )
    return replace(one, is_confirmed=True, why=why)


def _said(effect: Effect) -> str:
    return f"{effect.mean:.1f} [{effect.low:.1f}, {effect.high:.1f}]"


def _doubt(one: Shortcut, blanked: Effect, pasted: Effect) -> str | None:
    """What keeps a candidate from being a finding, the most telling first; None: nothing."""
    if not blanked.is_real:
        return f"inpainted, its log-odds fall by {_said(blanked)} more than with a random region: not enough"
    if not pasted.is_real:
        return (
            f"pasted into other images, its log-odds rise by {_said(pasted)} more than with a random region: not enough"
        )
    if one.on_object is not None:
        return (
            f"objects cover {one.on_object:.0%} of it: it may be the object" if one.on_object > MOST_ON_OBJECT else None
        )
    if one.elsewhere_density > ATTENDED and one.density < LEAST_CONTRAST * one.elsewhere_density:
        return "other classes' maps look there too: it may be where objects stand; --truth would tell"
    if one.recurrence is not None and one.recurrence < LEAST_RECURRENCE:
        return "what stands there differs from member to member: it may be the object; --truth would tell"
    return None
