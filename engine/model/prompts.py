"""Prompts as classes: the similarities of a picture's feature to texts are logits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from blocksight.engine.catalog.readouts import ReadoutName
from blocksight.engine.errors import ModelError


@dataclass(frozen=True)
class Texts:
    """The text side of a model that compares pictures with texts."""

    encode: Callable[[str], Tensor]
    """The feature [D] of a text, in float32. Raises ModelError for one that is too long, or without a tokenizer."""
    scale: float
    """A logit is this times the cosine, plus the bias."""
    bias: float
    are_alone: bool
    """True if each text is right or wrong by itself (SigLIP); False if they exclude each other (CLIP)."""


class Compared(nn.Module):
    """Features with texts for classes: logits are `scale * cosine + bias`."""

    embeddings: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, embeddings: Tensor, scale: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("embeddings", embeddings)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [N, K] of features [N, D]."""
        return self.scale * (functional.normalize(inputs, dim=1) @ self.embeddings.T) + self.bias


class Prompted(Compared):
    """A model of picture features with texts for classes."""

    def __init__(self, network: nn.Module, embeddings: Tensor, texts: Texts) -> None:
        super().__init__(embeddings, torch.tensor(texts.scale), torch.tensor(texts.bias))
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [N, K] of pictures [N, 3, H, W]."""
        return super().forward(self.network(inputs))

    def comparison(self) -> Compared:
        """What comes behind the features."""
        return Compared(self.embeddings, self.scale, self.bias)


def embedded(texts: Texts, prompts: Sequence[Sequence[str]]) -> Tensor:
    """One unit vector for each class [K, D]: of its text, or of the mean of its texts' unit vectors.

    The mean cosine to the texts is the cosine to that vector, times a number that is the same for all pictures.
    """
    known = {text: functional.normalize(texts.encode(text), dim=0) for one in prompts for text in one}
    means = [torch.stack([known[text] for text in one]).mean(0) for one in prompts]
    return functional.normalize(torch.stack(means), dim=1)


def refuse_unfit(prompts: Sequence[Sequence[str]]) -> None:
    """Raises ModelError for no prompt, an empty one, or two classes with the same prompts."""
    if not prompts or not all(one and all(text.strip() for text in one) for one in prompts):
        raise ModelError("a prompt is empty: wanted a text such as `a photo of a dog` for each class")
    if len({tuple(one) for one in prompts}) < len(prompts):
        raise ModelError("two classes have the same prompts, so that no map could tell them apart: leave one out")


def readout_of(texts: Texts, num_prompts: int) -> ReadoutName:
    """How scores are read: one text alone has no softmax."""
    if texts.are_alone:
        return "sigmoid"
    return "softmax" if num_prompts > 1 else "identity"


def name_of(prompts: Sequence[str]) -> str:
    """A class's name: its prompt, or the first of several."""
    return prompts[0] if len(prompts) == 1 else f"{prompts[0]} (and {len(prompts) - 1} more)"
