"""Proofs of a place in a network: how its axes follow the picture, and whether the logits depend on it alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from blocksight.engine.model.layouts import Layout, readings
from blocksight.engine.model.resample import Grid

PATCHES = ((0.20, 0.10), (0.20, 0.90), (0.80, 0.22), (0.92, 0.90), (0.45, 0.60))
"""Centres of the changed patches, as shares of height and width: in all quarters, two in the same rows, two in the same
columns, so that neither axis can be missing."""
PATCH = 1 / 7
"""A patch's side, as a share of the picture's."""
BRIGHTNESS = 10.0
"""A patch's value, relative to the picture's largest: what is local outgrows gates and means over the picture."""
LEAST_ODDS = 1.5
"""A true reading has 2 and more in torchvision's networks, a false one 1."""
SILENT = 1e-5
"""Changes up to this, relative to a tensor's values, may be float32's rounding."""
ROUNDING = 1e-4
"""Outputs that differ by less, relative to their values, are equal."""
MAX_SHIFT = 0.06
"""How far, as a share of the picture, patches may show from where they are, besides a cell; CNNs are below 0.03."""
MAX_SPREAD = 1 / 8
"""Largest share of the cells in which a patch shows clearly; beyond it a layer hears too much to say where."""
MANY = 16
"""Channels in which it is looked for."""

LEAKS = "the output still depends on the picture when it is set to its mean"
NOT_THE_BATCH = "its first axis does not follow the pictures of a batch"
NO_PICTURE = "it does not depend on the picture"
NO_PLACES = "it has no axes of height and width"
UNUSED = "what follows does not read its cells"
ELSEWHERE = "the picture lies elsewhere in it: cut, padded, turned, or with its axes exchanged"
POOLED = "it holds one row of numbers for each picture"
NO_READING = "no reading of its axes follows a patch of the picture that is changed"


def probe_pictures(example_nchw: Tensor) -> Tensor:
    """Seven inputs [7, C, H, W]: a picture, the same with one bright patch each, and the picture again.

    The picture is the example's first. Each patch changes it as much as the others do.
    """
    pictures = example_nchw[:1].repeat(len(PATCHES) + 2, 1, 1, 1)
    size = (pictures.shape[2], pictures.shape[3])
    for picture, centre in zip(pictures[1:-1], PATCHES, strict=True):
        picture[:, *_region(centre, size)] = BRIGHTNESS * example_nchw.max()
    return pictures


@dataclass(frozen=True)
class Reading:
    """What was found out about the axes of a tensor."""

    layout: Layout | None
    fault: str = ""
    """Why there is none, as a clause."""
    is_assumed: bool = False
    """No patch shows in cells of its own, as where each cell sees the whole picture; the shape has one reading."""
    is_seen: bool = False
    """Patches show clearly in few cells, and where they are in the picture."""


def proved_reading(value: Any, full: Grid, grids: Sequence[Grid]) -> Reading:
    """How to read a tensor that a network computed of the probe pictures of the size `full`.

    `grids` are those of the tensors before it. A reading is proved if the cells at the changed patches move with
    their own patch, and not if the same picture stands elsewhere in the batch.
    """
    is_dense = isinstance(value, Tensor) and value.is_floating_point() and value.layout is torch.strided
    if is_dense and value.dim() == 2 and len(value) == len(PATCHES) + 2:
        return Reading(None, POOLED)
    if not is_dense or value.dim() < 3 or not value.numel():
        return Reading(None, NO_PLACES)
    if value.shape[:1] != (len(PATCHES) + 2,):
        return Reading(None, NOT_THE_BATCH)
    value, layouts = value.detach(), list(readings(value.shape, full, grids))
    changes = _Changes(value)
    odds, layout = max(((_odds(changes, one), one) for one in layouts), key=lambda pair: pair[0], default=(0.0, None))
    if layout is not None and odds >= LEAST_ODDS:
        return _placed(changes, layout)
    is_silent = not changes.tell().any()
    if value.dim() == 4 and len(layouts) == 1:
        found = _placed(changes, layouts[0], is_assumed=True)
        if found.fault or is_silent or _goes_on(value, layouts[0].grid, grids):
            return found
    if is_silent:
        return Reading(None, NO_PICTURE)
    return Reading(None, NO_READING if layouts else NO_PLACES)


class _Changes:
    """A tensor of the probe pictures, and what of it each patch changes: found once for all layouts."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        inner = tuple(range(2, value.dim()))
        self._largest = (value[1:-1] - value[:1]).abs_().amax(inner)  # [patches, length of the second axis]
        self._size = torch.maximum(value.amax(inner), -value.amin(inner)).amax(0)

    def tell(self, prefix: int = 0) -> Tensor:
        """Of each patch, if it changes what lies behind a prefix by more than rounding."""
        moved = self._largest[:, prefix:].amax(1)
        return ~(moved.isfinite() & (moved <= SILENT * self._size[prefix:].max()))


def _goes_on(value: Tensor, grid: Grid, grids: Sequence[Grid]) -> bool:
    """True if the tensor has a row for each picture, and its grid is no finer than that of the tensor before it.

    A matrix of attention is finer: it has a side for all the cells of the grid.
    """
    is_of_pictures = bool((value[-1] - value[0]).abs().max() <= ROUNDING * value.abs().max())
    return is_of_pictures and bool(grids) and all(own <= before for own, before in zip(grid, grids[-1], strict=True))


def _placed(changes: _Changes, layout: Layout, *, is_assumed: bool = False) -> Reading:
    """The reading, if the picture lies in it as it is, or if that is not seen."""
    shift = _shift(layout.maps(changes.value), changes.tell(layout.prefix))
    if shift is None:
        return Reading(layout, is_assumed=is_assumed)
    if any(own > MAX_SHIFT + 1 / side for own, side in zip(shift, layout.grid, strict=True)):
        return Reading(None, ELSEWHERE)
    return Reading(layout, is_assumed=is_assumed, is_seen=max(shift) <= MAX_SHIFT)


def _shift(maps: Tensor, tells: Tensor) -> tuple[float, float] | None:
    """How far down and across patches show from where they are, as shares of the picture, root mean square.

    The cells of a patch are those that it changes much, and more than all others together. None: some patch has none,
    or too many.
    """
    some = maps[:, :: max(1, maps.shape[1] // MANY)].double()
    moved = (some[1:-1] - some[:1]).square().mean(1)[tells]  # [patches, h, w]
    own = moved * ((moved > 0.1 * moved.amax((1, 2), keepdim=True)) & (moved > 0.5 * moved.sum(0)))
    num_own = (own > 0).sum((1, 2))
    if not len(own) or not num_own.all() or bool((num_own > MAX_SPREAD * own[0].numel()).any()):
        return None
    down, across = (
        (own.sum(3 - axis) @ _middles(own.shape[axis], own) / own.sum((1, 2)) - centres).square().mean().sqrt()
        for axis, centres in enumerate(torch.tensor(PATCHES).to(own)[tells].T, 1)
    )
    return float(down), float(across)


def _middles(side: int, like: Tensor) -> Tensor:
    """Where the cells of a side are, as shares of it."""
    return (torch.arange(side).to(like) + 0.5) / side


def _odds(changes: _Changes, layout: Layout) -> float:
    """How clearly the cells at the patches move with their own patch; 0: a cell does not move, or the batch is mixed.

    The least odds ratio of two patches: what both move in their own cells, by what both move in the other's. A patch
    that moves all cells much, or a cell that moves with all patches, does not change it. A patch that moves no cell
    at all, as where a network looks at a part of the picture, tells nothing. Two that tell must be left, and one of
    them off the diagonal, or height and width could be exchanged.
    """
    maps, (regions, apart, sided) = layout.maps(changes.value), _regions(layout.grid)
    cells = [maps[:, :, rows, columns].flatten(1).float() for rows, columns in regions]
    moved = torch.stack([(own[1:] - own[:1]).square().mean(1) for own in cells], 1).double()
    patched, again = moved[:-1], moved[-1]  # [patches, regions]
    own, tells = patched.diagonal(), changes.tell(layout.prefix)
    is_other = torch.tensor(apart, device=own.device) & tells[:, None] & tells
    silent = SILENT**2 * torch.cat(cells, 1).square().mean()
    is_still = (own <= silent) | (again > ROUNDING * own)
    is_sided = torch.tensor(sided, device=own.device)
    if not is_other.any() or not is_sided[tells].any() or not moved.isfinite().all() or is_still[tells].any():
        return 0.0
    crossed = (patched * patched.T).clamp_min(torch.finfo(own.dtype).tiny)
    return float((own[:, None] * own / crossed)[is_other].min())


Region = tuple[slice, slice]


@cache
def _regions(grid: Grid) -> tuple[list[Region], list[list[bool]], list[bool]]:
    """The patches' cells on a grid, which of them are apart from which, and which lie off the diagonal."""
    regions = [_region(centre, grid) for centre in PATCHES]
    apart = [[_are_apart(one, other) for one in regions] for other in regions]
    return regions, apart, [_are_apart(one, (one[1], one[0])) for one in regions]


def _region(centre: tuple[float, float], grid: Grid) -> Region:
    """The cells of a grid that the patch covers, also in part."""
    down, right = (
        slice(int(max(0.0, at - PATCH / 2) * size), math.ceil(min(1.0, at + PATCH / 2) * size))
        for at, size in zip(centre, grid, strict=True)
    )
    return down, right


def _are_apart(one: Region, other: Region) -> bool:
    return any(mine.stop <= theirs.start or theirs.stop <= mine.start for mine, theirs in zip(one, other, strict=True))


Run = Callable[[Tensor, Callable[[str, Any], Any]], Any]
"""A network with a hook on one place: from inputs to the output."""


def leaks(run: Run, example_nchw: Tensor) -> bool:
    """True if the output depends on the picture [2, C, H, W] also while the place holds its mean over the batch.

    A gradient shows a path also where its weights are zeros, as new layers often begin; the two pictures' outputs
    show one that has no gradient. Outputs that change from call to call show nothing; the examination refuses them.
    """

    def outputs() -> Tensor:
        with torch.enable_grad():
            return run(example_nchw.detach().requires_grad_(True), lambda _, value: _mean(value))

    first = outputs()
    if first.requires_grad:
        return True
    return _differ(first[0], first[1]) and not _differ(first, outputs())


def _differ(one: Tensor, other: Tensor) -> bool:
    """True if two outputs are not equal within rounding."""
    apart, size = (one - other).detach().double().abs().max(), torch.maximum(one.abs().max(), other.abs().max())
    return bool(apart > ROUNDING * size)


def _mean(value: Tensor) -> Tensor:
    """The value's mean over its first axis, in the value's shape and without its history."""
    return value.detach().mean(0, keepdim=True).expand_as(value).clone()
