"""How a fast explanation is compared with the slow twin's, and with another fast one."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from blocksight.engine.catalog.parameters import SiseParameters
from blocksight.engine.explainers.explanation import Explanation
from blocksight.engine.explainers.sise import Sise
from blocksight.engine.model.adapter import IMAGENET_MEAN, IMAGENET_STD, ModelAdapter
from blocksight.engine.model.targets import ClassProbability
from tests.engine import oracles

FLIPPED_SHARE = 0.001
"""Hard Otsu turns rounding into whole pixels: the fused map is compared by the share that differs."""


def written_out(model: nn.Module, image: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The capture of a network that has its own second writing."""
    return model.written_out(image)


def by_modules(names: Sequence[str]) -> oracles.Capture:
    """A capture by forward hooks on sub-modules."""

    def capture(model: nn.Module, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        kept = {}
        handles = [
            model.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: kept.update({name: out}))
            for name in names
        ]
        logits = model(image)
        for handle in handles:
            handle.remove()
        return logits, [kept[name] for name in names]

    return capture


def explained(
    adapter: ModelAdapter, inputs: Tensor, classes: list[list[int]], parameters: SiseParameters | None = None, **options
) -> list[list[Explanation]]:
    """The engine's explanations of some classes of each image."""
    target = ClassProbability(torch.tensor(classes))
    return Sise(adapter, parameters or SiseParameters(), **options).explain(inputs, target)


def slowly(
    net: nn.Module, capture: oracles.Capture, image: Tensor, target: int, parameters: SiseParameters
) -> oracles.Slow:
    """The slow twin's explanation of one image [3, H, W] under the same parameters."""
    black = -torch.tensor(IMAGENET_MEAN, dtype=torch.float64) / torch.tensor(IMAGENET_STD, dtype=torch.float64)
    return oracles.sise(
        net,
        capture,
        image[None],
        target,
        mu=parameters.mu,
        selection=parameters.selection,
        gate=parameters.gate,
        baseline=black.view(1, 3, 1, 1) if parameters.baseline == "black" else 0.0,
    )


def assert_equals_slow(
    fast: Explanation, slow: oracles.Slow, *, tolerance: float = 1e-4, score_tolerance: float = 1e-5
) -> None:
    """The same channels, the same score, the same block maps, and nearly every pixel of the fused map."""
    assert [list(block.kept) for block in fast.blocks] == slow.kept
    assert [block.candidates for block in fast.blocks] == [len(alpha) for alpha in slow.alphas]
    assert fast.num_forwards == sum(slow.num_masks)
    assert fast.score == pytest.approx(slow.score, rel=score_tolerance)
    for block, wanted in zip(fast.blocks, slow.block_maps, strict=True):
        assert (block.saliency_hw is None) == (wanted is None)
        if wanted is not None:
            assert np.abs(block.saliency_hw - wanted).max() <= tolerance
    assert_few_flipped(fast.saliency_hw, slow.fused)


def assert_few_flipped(one: np.ndarray, other: np.ndarray) -> None:
    assert one.shape == other.shape
    assert (np.abs(one - other) > 1e-3).mean() <= FLIPPED_SHARE


def assert_close(one: Explanation, other: Explanation, *, tolerance: float = 1e-5) -> None:
    """Two explanations that only rounding may part."""
    assert [block.kept for block in one.blocks] == [block.kept for block in other.blocks]
    assert one.score == pytest.approx(other.score, rel=1e-5)
    for left, right in zip(one.blocks, other.blocks, strict=True):
        assert (left.saliency_hw is None) == (right.saliency_hw is None)
        if left.saliency_hw is not None:
            assert np.abs(left.saliency_hw - right.saliency_hw).max() <= tolerance
    assert_few_flipped(one.saliency_hw, other.saliency_hw)


def assert_same_bits(one: Explanation, other: Explanation) -> None:
    assert one.score == other.score
    assert one.num_forwards == other.num_forwards
    for left, right in zip(one.blocks, other.blocks, strict=True):
        assert left.kept == right.kept
        assert np.array_equal(left.saliency_hw, right.saliency_hw)
    assert np.array_equal(one.saliency_hw, other.saliency_hw)
