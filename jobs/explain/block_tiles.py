"""Pictures of how SISE's block maps fuse into one map."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from blocksight.engine.catalog.composition import parse_method
from blocksight.engine.catalog.entries import EXPLAINERS
from blocksight.engine.catalog.parameters import SiseParameters
from blocksight.engine.saliency import Map, minmax
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.text import counted
from blocksight.storage.outputs.pictures import Pixels, Tile, overlay, resized

if TYPE_CHECKING:
    from blocksight.engine.explainers.explanation import Explanation  # which needs torch


def refuse_without_blocks(explainer: str, option: str, output: str) -> None:
    """Raises ConfigError if the explainer has no block maps that an option asks for."""
    if not issubclass(parse_method(explainer).entry.parameters, SiseParameters):
        family = " and ".join(name for name, one in EXPLAINERS.items() if issubclass(one.parameters, SiseParameters))
        raise ConfigError(
            f"{option} draws the block maps that {family} fuse, and {output} was made by {explainer}, which has "
            "none: leave it out, or explain with sise"
        )


def block_tiles(pixels: Pixels, explanation: "Explanation", parameters: Mapping[str, Any]) -> Iterator[Tile]:
    """Yields each block's map and the fused map up to that block; `parameters` are the explainer's."""
    from blocksight.engine.explainers.fusion import GATES, stages

    gate = parameters.get("gate", SiseParameters.gate)
    present = [block.saliency_hw for block in explanation.blocks if block.saliency_hw is not None]
    fused = iter(stages(present, GATES[gate]) if present else ())
    for block in explanation.blocks:
        facts = f"{block.name}\nkept {len(block.kept):,} of {counted(block.candidates, 'map')}"
        if block.saliency_hw is None:
            yield Tile(pixels, f"{facts}: left out")
            continue
        stage = next(fused)
        yield Tile(overlay_of(pixels, block.saliency_hw), facts)
        yield Tile(
            overlay_of(pixels, stage), f"fused up to {block.name}\nabove 0 on {(stage > 0).mean():.0%} of the picture"
        )


def overlay_of(pixels: Pixels, saliency_hw: Map) -> Pixels:
    """A map of any range over a picture."""
    return overlay(pixels, resized(minmax(saliency_hw), pixels.shape[:2]))
