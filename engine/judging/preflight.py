"""Tries an explainer on a few images before any work, so that what would fail every record fails before the first."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blocksight.engine.catalog.composition import Method
from blocksight.engine.errors import ModelError
from blocksight.engine.explainers.ablationcam import AblationCam
from blocksight.engine.explainers.afmi import AFmi
from blocksight.engine.explainers.explainer import Explainer
from blocksight.engine.explainers.gradients import IntegratedGradients
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.device_errors import device_trouble
from blocksight.engine.model.failures import first_line_of
from blocksight.engine.model.taps import Tail
from blocksight.engine.model.targets import Target
from blocksight.engine.scoring.forward import Forward

QUICK: Mapping[str, Mapping[str, Any]] = {
    "rise": {"num_masks": 4},
    "integrated_gradients": {"steps": 2},
    "smoothgrad": {"samples": 1},
    "extremal_perturbation": {"iterations": 1},
    "fovex": {"fixations": 1, "steps": 1},
    "bee": {"draws": 1, "choice": "even", "families": ("normal",), "steps": 1, "noise_steps": 1},
}
"""Parameters that make a trial short; no other step of the method is left out."""

WITHOUT_GRADIENTS = "take scorecam, rise or occlusion, which need none"


def quick(method: Method, parameters: Any) -> Any:
    """The method's parameters with those of `QUICK`; the wrapped method's too."""
    own = replace(parameters, **QUICK.get(method.name, {}))
    return own if method.base is None else replace(own, base=quick(method.base, parameters.base))


LOUD_GAP, GROSS_GAP = 0.1, 0.9
"""Of `Balance.gap`: the first is said, the second refused."""
NUM_BALANCED = 2
"""Images that are tried until one has no gross gap; each costs as much as its explanation."""


def check_balance(explainer: IntegratedGradients, inputs_nchw: Tensor, target: Target) -> tuple[str, ...]:
    """A sentence if the attributions do not sum to the change of the logit.

    `explainer` has the job's own number of steps. Raises ModelError if the sums are grossly wrong for every image
    that is tried.
    """
    steps, sentence = explainer.num_forwards, ""
    for image in range(min(NUM_BALANCED, len(inputs_nchw))):
        one = slice(image, image + 1)
        own = explainer.balance(inputs_nchw[one], target.of(one))
        sentence = (
            f"integrated_gradients sums to {own.found:.4g} in {steps} steps, and the logit changes by {own.wanted:.4g} "
            f"from the baseline to the image ({min(own.gap, 99):.0%} of the largest change of a logit are missing or "
            f"too much)"
        )
        if own.gap <= LOUD_GAP:
            return ()
        if own.gap < GROSS_GAP:
            return (f"{sentence}: take more, such as -p steps={4 * steps}",)
    raise ModelError(
        f"{sentence}: take more steps, or smoothgrad, or scorecam; if the gap stays, something in "
        f"{explainer.adapter.name} has no gradient, such as rounding, or a part of its forward under torch.no_grad"
    )


def scored_once(adapter: ModelAdapter) -> Forward:
    """A forward pass that computes its first batch alone and repeats those logits: enough to see whether it fails."""
    found: list[Tensor] = []

    def forward(inputs_nchw: Tensor) -> Tensor:
        if not found:
            found.append(adapter.logits(inputs_nchw))
        return found[0][:1].expand(len(inputs_nchw), -1)

    return forward


def run_tails_once(explainer: Explainer) -> None:
    """Lets the part behind the block compute its first batch alone and repeat those logits, as `scored_once` does.

    Ablation-CAM and A-FMI run it once per feature map, which takes minutes in a large transformer.
    """
    base = getattr(explainer, "base", None)
    if base is not None:
        run_tails_once(base)
    elif isinstance(explainer, AblationCam | AFmi):
        explainer.tail = _once(explainer.tail)


def _once(tail: Tail) -> Tail:
    found: list[Tensor] = []

    def repeated(inputs_nchw: Tensor, maps_nchw: Tensor) -> Tensor:
        if not found:
            found.append(tail(inputs_nchw, maps_nchw))
            return found[0]
        return found[0][:1].expand(len(maps_nchw), -1)

    return repeated


def try_explainer(
    explainer: Explainer, method: Method, blocks: Sequence[str], inputs_nchw: Tensor, target: Target
) -> tuple[str, ...]:
    """Explains the target of normalised inputs, one after the other until nothing is odd; returns findings.

    Raises ModelError if no image can be explained, or if no gradient reaches a block that the method reads.
    """
    findings: tuple[str, ...] | None = None
    trouble: Exception | None = None
    for image in range(len(inputs_nchw)):
        one = slice(image, image + 1)
        try:
            found = _try_image(explainer, method, blocks, inputs_nchw[one], target.of(one))
        except Exception as error:  # a user's model may raise anything
            if device_trouble(error) is not None:
                raise
            trouble = error
        else:
            if not found:
                return ()
            findings = findings or found
    if findings is not None:
        return findings
    if isinstance(trouble, ModelError):
        raise trouble
    raise ModelError(
        f"{method} fails with {explainer.adapter.name} on every image it was tried on ({type(trouble).__name__}: "
        f"{first_line_of(trouble) if trouble else 'none'}); no record was begun, take another explainer or change the "
        "model's forward"
    ) from trouble


def refuse_without_gradients(
    adapter: ModelAdapter, method: Method, blocks: Sequence[str], image_nchw: Tensor, target: Target
) -> None:
    """Raises ModelError if the method needs gradients, and none reaches a block that it reads, or the input."""
    if "gradients" in method.innermost.entry.needs:
        for _ in _check_gradients(adapter, str(method), blocks, image_nchw, target):
            pass


def _try_image(
    explainer: Explainer, method: Method, blocks: Sequence[str], image_nchw: Tensor, target: Target
) -> tuple[str, ...]:
    """Explains one image; returns findings. Raises ModelError, and what the model raises."""
    adapter = explainer.adapter
    if "gradients" in method.innermost.entry.needs:
        findings = tuple(_check_gradients(adapter, str(method), blocks, image_nchw, target))
    else:
        findings = ()
    (made,) = explainer.explain(image_nchw, target, [0])
    if not all(np.isfinite(one.saliency_hw).all() for one in made):
        raise ModelError(
            f"{method} gives NaN or infinity with {adapter.name} for every image it was tried on: gradients or feature "
            f"maps are not finite; {WITHOUT_GRADIENTS}"
        )
    return findings


def _check_gradients(
    adapter: ModelAdapter, method: str, blocks: Sequence[str], image_nchw: Tensor, target: Target
) -> Iterator[str]:
    """Yields a sentence for each block at which the gradient is zero. Raises ModelError if one has no gradient."""
    logits, places = _traced_gradients(adapter, blocks, image_nchw)
    if not logits.requires_grad:
        raise ModelError(
            f"{method} needs gradients, and none reaches the output of {adapter.name}: its forward runs under "
            "torch.no_grad or inference_mode, detaches its maps, or is quantised; let gradients flow, or "
            f"{WITHOUT_GRADIENTS}"
        )
    direction = target.direction(logits.detach(), 0).to(logits.dtype)
    slopes = torch.autograd.grad(logits, list(places.values()), direction, allow_unused=True)
    for name, slope in zip(places, slopes, strict=True):
        if slope is None:
            raise ModelError(
                f"{method} needs gradients, and none reaches {name} of {adapter.name}: the forward detaches what "
                f"follows, or does not use it; name other blocks with --blocks, or {WITHOUT_GRADIENTS}"
            )
        if not slope.any():
            yield f"the gradient at {name} is zero on every image it was tried on: maps will be flat"


def _traced_gradients(
    adapter: ModelAdapter, blocks: Sequence[str], inputs_nchw: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and the tensors whose gradients the method needs: the blocks' maps, or the input."""
    with adapter.borrowed(), torch.enable_grad():
        if blocks:
            logits, maps = adapter.network.taps(adapter.network.blocks(blocks))(inputs_nchw)
            return logits, {f"block {name!r}": own for name, own in zip(blocks, maps, strict=True)}
        inputs = inputs_nchw.detach().requires_grad_(True)
        return adapter.logits(inputs), {"the input": inputs}
