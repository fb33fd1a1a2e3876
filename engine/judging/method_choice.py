"""`auto`: the explainer that suits a model's architecture, by what won on planted evidence."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from blocksight.engine.errors import ModelError
from blocksight.engine.explainers import make_explainer
from blocksight.engine.model.token_stream import attentions_of

if TYPE_CHECKING:
    from blocksight.engine.model.adapter import ModelAdapter

FOR_CNN, FOR_OTHERS, FOR_ANY, FOR_SMALL = "sise", "libra(integrated_gradients)", "occlusion", "rise"
"""For CNNs; what won on the vision transformer of the table in `engine/README.md`; what takes any classifier; and the
same for an input that a window of occlusion hides whole."""
CHOICES = (FOR_CNN, FOR_OTHERS, FOR_ANY, FOR_SMALL)


@dataclass(frozen=True)
class Choice:
    """An explainer and why it was chosen."""

    explainer: str
    reason: str

    def __str__(self) -> str:
        return f"{self.explainer}, for {self.reason}"


def chosen_explainer(adapter: "ModelAdapter") -> Choice:
    """SISE for a CNN; for other architectures what won on planted evidence, or what takes any classifier.

    Nothing but the architecture counts, so that the choice is the same for any weights and data.
    """
    if not _has_gradients(adapter):
        return Choice(_for_any(adapter), f"no gradient reaches the output of {adapter.name}")
    found = "attention" if attentions_of(adapter) else _what_is_no_cnn(adapter)
    if found is None:
        return Choice(FOR_CNN, f"{adapter.name} is a CNN: feature maps at several sizes, and no attention")
    try:
        make_explainer(FOR_OTHERS, adapter)
    except ModelError as error:
        return Choice(_for_any(adapter), f"{adapter.name} has {found}, and {FOR_OTHERS} does not take it: {error}")
    return Choice(FOR_OTHERS, f"{adapter.name} has {found}, and is no CNN")


def _for_any(adapter: "ModelAdapter") -> str:
    try:
        make_explainer(FOR_ANY, adapter)
    except ModelError:
        return FOR_SMALL
    return FOR_ANY


def _has_gradients(adapter: "ModelAdapter") -> bool:
    example = adapter.normalise(torch.zeros(1, 3, *adapter.input_size, dtype=torch.uint8))
    with adapter.borrowed(), torch.enable_grad():
        return adapter.logits(example.requires_grad_(True)).requires_grad


def _what_is_no_cnn(adapter: "ModelAdapter") -> str | None:
    """What a network without attention has that no CNN has; None: it is one."""
    try:
        blocks = adapter.network.blocks()
    except ModelError:
        return "no feature maps that every path passes"
    is_of_tokens = any(block.layout is not None and block.layout.kind == "tokens" for block in blocks)
    return "tokens" if is_of_tokens else None
