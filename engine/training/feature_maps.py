"""Where a head's feature maps come from: taps of the explained model, or of a second, frozen network."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from blocksight.engine.errors import ModelError
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.attention import Attention, explicit_attention
from blocksight.engine.model.blocks import Place
from blocksight.engine.model.resample import grid_of
from blocksight.engine.model.taps import MapRecorder, Taps
from blocksight.engine.training.attention_head import TapShape

NUM_TAPS = 3
"""T-TAME reads the three deepest blocks."""


class FeatureMaps(Protocol):
    """Computes logits of the explained model and the feature maps for the head, in as few passes as it takes."""

    shapes: tuple[TapShape, ...]
    """Shallow to deep."""
    num_forwards: int
    """Forward passes per image beside that of the explained model."""

    def __call__(self, inputs_nchw: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits [N, K] and the maps [N, C_l, h_l, w_l] of the taps, without gradient, for model inputs."""
        ...


class OwnFeatures:
    """Taps of the explained model itself: T-TAME."""

    num_forwards = 0

    def __init__(self, adapter: ModelAdapter, names: Sequence[str] = ()) -> None:
        """`names` are the taps' places; empty: those of `default_taps`. Raises ModelError."""
        places = adapter.network.blocks(names) if names else default_taps(adapter)
        self.taps = adapter.network.taps(places)
        self.shapes = _shapes(places)

    def __call__(self, inputs_nchw: Tensor) -> tuple[Tensor, list[Tensor]]:
        """As `FeatureMaps`."""
        return _read(self.taps, inputs_nchw)


class AuxiliaryFeatures:
    """Taps of a second network, which sees the same picture: P-TAME. The explained model is a function of pixels."""

    num_forwards = 1

    def __init__(self, adapter: ModelAdapter, auxiliary: ModelAdapter, names: Sequence[str] = ()) -> None:
        """`names` are the taps' places in the auxiliary network; empty: all blocks that the rule finds."""
        self.adapter, self.auxiliary = adapter, auxiliary
        self.taps = auxiliary.network.taps(auxiliary.network.blocks(names))
        self.shapes = _shapes(self.taps.places)

    def __call__(self, inputs_nchw: Tensor) -> tuple[Tensor, list[Tensor]]:
        """As `FeatureMaps`."""
        with torch.no_grad():
            logits = self.adapter.logits(inputs_nchw)
            pixels = self.adapter.pixels_of(inputs_nchw)
            if grid_of(pixels) != self.auxiliary.input_size:
                pixels = functional.interpolate(pixels, self.auxiliary.input_size, mode="bilinear", antialias=True)
        with self.auxiliary.borrowed():
            _, maps = _read(self.taps, self.auxiliary.normalise_shares(pixels))
        return logits, maps


def default_taps(adapter: ModelAdapter) -> tuple[Place, ...]:
    """The three deepest blocks that the rule finds; in a transformer of one grid what enters the last three attentions.

    Raises ModelError if there are none.
    """
    blocks = adapter.network.blocks()
    return blocks[-NUM_TAPS:] if len(blocks) > 1 else _entered(adapter) or blocks


def _entered(adapter: ModelAdapter) -> tuple[Place, ...]:
    """The tensors of tokens that the last attentions begin from, shallow to deep; empty: the model has none."""
    tokens = [place for place in adapter.network.places if _is_tokens(place) and place.is_unavoidable]
    before: list[str] = []
    latest: list[str] = []

    def note(name: str, value: object) -> object:
        latest[:] = [name]
        return value

    def attend(_: Attention) -> None:
        before.extend(name for name in latest if name not in before)

    with adapter.borrowed(), torch.no_grad(), explicit_attention(adapter.module, attend):
        adapter.network.taps(tokens).run(adapter.network.example.to(adapter.device), note)
    chosen = before[-NUM_TAPS:]
    return tuple(place for place in tokens if place.name in chosen)


def _is_tokens(place: Place) -> bool:
    return place.layout is not None and place.layout.kind == "tokens"


def _shapes(places: Sequence[Place]) -> tuple[TapShape, ...]:
    shapes = []
    for place in places:
        if place.grid is None:
            raise ModelError(f"{place.name} holds no feature maps, and a head has nothing to read there: {place.fault}")
        shapes.append(TapShape(place.name, place.channels, place.grid))
    return tuple(shapes)


@torch.no_grad()
def _read(taps: Taps, inputs_nchw: Tensor) -> tuple[Tensor, list[Tensor]]:
    recorder = MapRecorder(taps.places)
    logits = taps.run(inputs_nchw, recorder)
    return logits, [_evened(recorder.recorded[place.name], place) for place in taps.places]


def _evened(maps_nchw: Tensor, place: Place) -> Tensor:
    """Tokens with mean 0 and variance 1 over their channels, as the norm in front of an attention makes them.

    In the sums between a transformer's blocks a few channels are hundreds of times as large as the others.
    """
    if not _is_tokens(place):
        return maps_nchw
    return functional.layer_norm(maps_nchw.movedim(1, -1), (maps_nchw.shape[1],)).movedim(-1, 1).contiguous()
