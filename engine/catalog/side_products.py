"""Side products: what an explainer returns beside its map, one field per column of the output."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Crop:
    """A part of the input that UCAG explained alone."""

    top: int
    """In pixels of the model's input, like the next three."""
    left: int
    height: int
    width: int
    score: float
    """The target's value on the crop."""
    weight: float
    """Weight of the crop's map, at most 1."""


@dataclass(frozen=True)
class Fixation:
    """A fixation of FovEx."""

    row: float
    """From -1 (top) to 1 (bottom)."""
    column: float
    """From -1 (left) to 1 (right)."""
    loss: float
    """Cross entropy of the target with this place sharp, at least 0."""


@dataclass(frozen=True)
class GridMap:
    """A map at its native grid, linear and unscaled."""

    name: str
    """The map's block (DAAM), or its baseline's family (BEE)."""
    values_hw: NDArray[np.float32]
    """[h, w]."""
    value: float | None = None
    """Of the selection metric (BEE)."""


@dataclass(frozen=True)
class SideProducts:
    """Results beside a map; None if the method has none."""

    channel_importance: NDArray[np.float32] | None = None
    """A-FMI: the importance of every feature map of the block, [K]."""
    crops: tuple[Crop, ...] | None = None
    """UCAG: row by row."""
    scan_path: tuple[Fixation, ...] | None = None
    """FovEx: the fixations in order."""
    accumulated_maps: tuple[GridMap, ...] | None = None
    """DAAM: the sum of the blocks' maps up to each block, shallow to deep."""
    map_family: tuple[GridMap, ...] | None = None
    """BEE: all candidates, in the order of their draws."""
    selected_by: str | None = None
    """The metric that selected the map; it does not measure the map's quality."""
    edge_detector: str | None = None
    """Feature CAM: hed or scharr."""

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
