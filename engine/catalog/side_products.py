"""Side products: what an explainer finds beside its map and is worth keeping, one field per column of the output."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Crop:
    """A part of the input that was explained by itself (UCAG)."""

    top: int
    """Pixels of the model's input, as the next three."""
    left: int
    height: int
    width: int
    score: float
    """The target's value on the crop."""
    weight: float
    """What the crop's map counts, at most 1."""


@dataclass(frozen=True)
class Fixation:
    """A place that was looked at (FovEx), in order."""

    row: float
    """From -1 (top) to 1 (bottom)."""
    column: float
    """From -1 (left) to 1 (right)."""
    loss: float
    """Cross entropy of the target when this place was seen sharply, from 0."""


@dataclass(frozen=True)
class GridMap:
    """A map at its native grid, linear and unscaled."""

    name: str
    """The block that it is of (DAAM), or the family of baselines that it came from (BEE)."""
    values_hw: NDArray[np.float32]
    """[h, w]."""
    value: float | None = None
    """Of the metric that picked among the maps (BEE)."""


@dataclass(frozen=True)
class SideProducts:
    """What stands beside a map; None where the method has no such thing."""

    channel_importance: NDArray[np.float32] | None = None
    """A-FMI: the importance of every feature map of the block, [K]."""
    crops: tuple[Crop, ...] | None = None
    """UCAG: row by row."""
    scan_path: tuple[Fixation, ...] | None = None
    """FovEx: in the order in which they were looked at."""
    accumulated_maps: tuple[GridMap, ...] | None = None
    """DAAM: the sum of the blocks' maps up to each block, shallow to deep."""
    map_family: tuple[GridMap, ...] | None = None
    """BEE: all candidates, in the order of their draws."""
    selected_by: str | None = None
    """The metric that picked the map among several, which says nothing of its quality therefore."""
    edge_detector: str | None = None
    """Feature CAM: hed or scharr, whichever made the edges."""

    def as_columns(self) -> dict[str, Any]:
        """Plain values by column."""
        grids = {name: getattr(self, name) for name in ("accumulated_maps", "map_family")}
        lists = {name: getattr(self, name) for name in ("crops", "scan_path")}
        importance = self.channel_importance
        return {
            "channel_importance": None if importance is None else importance.tolist(),
            **{name: None if own is None else [asdict(one) for one in own] for name, own in lists.items()},
            **{name: None if own is None else [_grid(one) for one in own] for name, own in grids.items()},
            "selected_by": self.selected_by,
            "edge_detector": self.edge_detector,
        }


def _grid(one: GridMap) -> dict[str, Any]:
    height, width = one.values_hw.shape
    return {
        "name": one.name,
        "value": one.value,
        "height": height,
        "width": width,
        "values": one.values_hw.ravel().tolist(),
    }
