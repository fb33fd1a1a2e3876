"""Every explainer and metric on the pretended GPU: no tensor on the wrong device, and the results of the CPU."""

import pytest

from blocksight.engine.explainers import EXPLAINERS
from blocksight.engine.metrics import MASKED
from tests.engine.nets import TRANSFORMERS_ONLY
from tests.gpu.cases import CASES, QUICK, Case, adapter_of, difference, explained, measured
from tests.gpu.pretended import pretended_gpu

ROUNDING = 1e-12
"""Images of a pass are padded to one size on a GPU, which moves the last bits of float64."""
FUSED_ROUNDING = 1e-6
"""torch's own attention layer has a fused kernel for plain tensors alone; the two differ by float32 rounding."""


def marked(case: Case) -> object:
    """The variants of BEE, which take seconds each, are further cases of what its defaults prove."""
    is_further = "bee" in case.explainer and case.parameters != QUICK["bee"]
    return pytest.param(case, id=str(case), marks=pytest.mark.sweep if is_further else ())


@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_an_explainer_gives_the_cpus_maps(case: Case):
    wanted = explained(case, adapter_of(case.net))
    with pretended_gpu() as counts:
        found = explained(case, adapter_of(case.net).to("cuda"))
    assert difference(found, wanted) <= (FUSED_ROUNDING if case.net == "torchvision's vit" else ROUNDING)
    assert counts.launches.total() > 0


def test_every_explainer_has_its_cases():
    assert {case.explainer for case in CASES if case.net == "cnn"} >= set(EXPLAINERS) - TRANSFORMERS_ONLY
    assert {case.explainer for case in CASES if case.net == "vit"} >= set(EXPLAINERS) - {"fullgrad"}


@pytest.mark.parametrize("baseline", ["zero", "black"])
@pytest.mark.parametrize("name", MASKED)
def test_a_metric_gives_the_cpus_values(name: str, baseline: str):
    wanted = measured(name, baseline, adapter_of("cnn"))
    with pretended_gpu():
        found = measured(name, baseline, adapter_of("cnn").to("cuda"))
    for own, other in zip(found, wanted, strict=True):
        for ours, theirs in zip(own, other, strict=True):
            assert {key: value.value for key, value in ours.items()} == pytest.approx(
                {key: value.value for key, value in theirs.items()}, abs=ROUNDING
            )
