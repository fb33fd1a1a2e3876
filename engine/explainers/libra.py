"""Libra: another method's attributions with balanced gradients."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from blocksight.engine.explainers.explainer import Attribution, Learner, SignedExplainer
from blocksight.engine.explainers.wrapper import MakeBase
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.balanced import balanced, check_balanced
from blocksight.engine.model.targets import Target


class Libra(SignedExplainer):
    """LibraGrad (Mehri et al., arXiv 2411.16760): the rules of `blocksight.engine.model.balanced` around a method."""

    def __init__(self, adapter: ModelAdapter, parameters: Any, *, base: MakeBase, **options: Any) -> None:
        """`base` makes the wrapped method, from an adapter and the options of `Explainer`."""
        check_balanced(adapter, "libra")
        self.base = base(adapter, **options)
        super().__init__(adapter, parameters, **options)

    def _attribute_pass(self, inputs_nchw: Tensor, target: Target, seeds: Sequence[int]) -> list[list[Attribution]]:
        with balanced(self.adapter.module):
            return self.base.attribute(inputs_nchw, target, seeds)

    def signed_map(self, values: Tensor) -> Tensor:
        return self.base.signed_map(values)

    def saliency_map(self, signed_hw: Tensor) -> Tensor:
        return self.base.saliency_map(signed_hw)

    def learner(self) -> Learner:
        return self.base.learner()
