"""The zoo: blocks of timm's and torchvision's classifiers are right by the oracle of `zoo.py`, or refused."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from tests.engine.zoo import verdict

NAMES = Path(__file__).with_name("zoo_timm.txt").read_text().split()
"""Up to five architectures of each family of timm, small ones first."""
ALLOWED = {"right", "refused", "unjudged"}
STORED = json.loads((Path(__file__).parent.parent / "figures" / "zoo.json").read_text())["models"]
"""The verdicts so far. `.ci/run` draws among those that were right; the rest of the lane was not run yet."""
RIGHT = {name.removeprefix("timm:") for name, own in STORED.items() if own["verdict"] == "right"}


def in_the_lane(name):
    return pytest.param(name, marks=[pytest.mark.judged] if name in RIGHT else [])


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [in_the_lane(name) for name in NAMES])
def test_blocks_of_timm_are_right_or_refused(name):
    import timm

    torch.manual_seed(0)
    net = timm.create_model(name, pretrained=False)
    side = net.default_cfg.get("input_size", (3, 224, 224))[-1]
    is_last = getattr(net, "output_fmt", "") == "NHWC"
    found, why = verdict(net, side, getattr(net, "num_prefix_tokens", None), is_last=is_last)
    assert found in ALLOWED, why


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["swin_v2_t", "swin_v2_s", "maxvit_t", "swin_t", "vit_b_16", "convnext_tiny"])
def test_blocks_of_torchvision_are_right_or_refused(name):
    import torchvision

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torchvision.models.get_model(name)
    side = 256 if "swin_v2" in name else 224
    found, why = verdict(net, side, is_last="swin" in name)
    assert found == "right", why


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit", "test_vit3"])
def test_blocks_of_tiny_networks_are_right(name):
    timm = pytest.importorskip("timm", reason="the timm extra is not installed")
    torch.manual_seed(0)
    net = timm.create_model(name, pretrained=False)
    found, why = verdict(net, net.default_cfg["input_size"][-1], getattr(net, "num_prefix_tokens", None))
    assert found == "right", why
