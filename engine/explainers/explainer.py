"""What all explainers share: a few images per pass, of one fixed shape, through a borrowed model."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from engine.explanation import Explanation
from engine.forward import Forward
from engine.models import ModelAdapter
from engine.perturb import perturbation
from engine.scorer import Scorer
from engine.targets import Target

Item = TypeVar("Item")


class Explainer(ABC):
    """Explains images of one model; `explain` is the door, `_explain_pass` the method."""

    def __init__(
        self,
        adapter: ModelAdapter,
        parameters: Any,
        *,
        blocks: Sequence[str] = (),
        batch_size: int = 8,
        images_per_pass: int = 4,
        forward: Forward | None = None,
    ) -> None:
        """`parameters` are of the catalogue's kind; `blocks` are places named by hand (none: the rule finds them).

        `batch_size` perturbed inputs go into one forward, and those of `images_per_pass` images are packed
        together: both set memory and speed alone. `forward` scores masks in place of the adapter's own pass, for
        batches of this size. Raises ModelError where the model lacks what the method
        needs, or a block that is named.
        """
        self.adapter = adapter
        self.parameters = parameters
        removed = perturbation(adapter, getattr(parameters, "baseline", "zero"))
        self.scorer = Scorer(adapter, removed, batch_size, forward)
        self.images_per_pass = images_per_pass
        self._prepare(blocks)

    def _prepare(self, blocks: Sequence[str]) -> None:  # noqa: B027 - not every method has something to do
        """What the method makes ready once, before any image."""

    def explain(
        self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int] | None = None
    ) -> list[list[Explanation]]:
        """One Explanation per image and target, for inputs [N, 3, H, W] as `adapter.normalise` gives them.

        `seeds` holds a number per image, from which all that is random about its maps is drawn; None: 0.
        """
        drawn = [0] * len(inputs_nchw) if seeds is None else seeds
        explanations = []
        with self.adapter.borrowed():
            for start in range(0, len(inputs_nchw), self.images_per_pass):
                images = slice(start, start + self.images_per_pass)
                explanations += self._explain_pass(inputs_nchw[images], target.of(images), drawn[images])
        return explanations

    @abstractmethod
    def _explain_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Explanation]]:
        """As `explain`, for at most `images_per_pass` images."""

    def _scores(self, inputs_nchw: Tensor, target: Target) -> list[list[float]]:
        """The target's values [N][T] on the whole images."""
        padded = pad(inputs_nchw, self.images_per_pass)
        with torch.inference_mode():
            logits = self.adapter.logits(padded)[: len(inputs_nchw)]
        return target.score(logits, torch.arange(len(inputs_nchw), device=logits.device)).tolist()


def pad(inputs_nchw: Tensor, size: int) -> Tensor:
    """The inputs, filled up to a fixed number with copies of the last: rounding must not depend on how many."""
    return torch.cat([inputs_nchw, inputs_nchw[-1:].expand(size - len(inputs_nchw), -1, -1, -1)])


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of this size; the last may be shorter."""
    left = iter(items)
    while chunk := list(islice(left, size)):
        yield chunk
