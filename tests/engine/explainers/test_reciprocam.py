"""Recipro-CAM: by hand, a slow twin, networks without gradients, and batches that may not grow."""

import pytest
import torch
from torch import Tensor, nn

from blocksight.engine.catalog.parameters import ReciproCamParameters
from blocksight.engine.errors import ModelError
from blocksight.engine.explainers import make_explainer
from blocksight.engine.explainers.reciprocam import place_masks
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.targets import ClassLogit
from tests.engine import oracles
from tests.engine.explainers.test_token_methods import Double, Hand, adapter_of, hand_picture
from tests.engine.libraries import GLOBAL, made
from tests.engine.nets import Depthwise, Plain, Pooled, Residual, Transformer, Untraceable, seeded, smooth


def native(net, inputs, classes, kernel="single", **options):
    adapter = net if isinstance(net, ModelAdapter) else adapter_of(net, inputs.shape[2])
    one = make_explainer("reciprocam", adapter, ReciproCamParameters(kernel), **options)
    found = one.attribute(inputs, ClassLogit(torch.tensor(classes)[:, None]), [0] * len(inputs))
    return torch.stack([own[0].values for own in found])


class Tail(Hand):
    """The tokens of the hand case enter its block as a named layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.AvgPool2d(2)
        self.join = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        patches = self.enter(x[:, :2]).flatten(2).transpose(1, 2)
        return self.blocks[0](self.join(torch.cat([0 * patches[:, :1], patches], 1)))[:, 0]


def test_a_transformers_map_by_hand():
    adapter = adapter_of(Tail().eval(), 4)
    (found,) = native(adapter, hand_picture(), [0], blocks=["join"])
    assert found.flatten().tolist() == pytest.approx([0.4, 0.2, -0.2, 0])


def test_under_mean_pooling_the_map_is_the_class_activation_map():
    """`z(A_k alone) - z(0) = sum_c w_c A_c[k] / P`."""
    net, inputs = seeded(Pooled), smooth(1, 16, 16)
    (found,) = native(net, inputs, [1])
    own = net.features(inputs)[0].detach().double()
    wanted = torch.einsum("k,khw->hw", net.head.weight[1].detach().double(), own) / 256
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_the_bell_is_cut_at_the_rim():
    middle, corner = place_masks((3, 4), "gauss")[[5, 0]]
    assert middle[:, :3].flatten().tolist() == [1 / 16, 1 / 8, 1 / 16, 1 / 8, 1 / 4, 1 / 8, 1 / 16, 1 / 8, 1 / 16]
    assert corner[:2, :2].flatten().tolist() == [1 / 4, 1 / 8, 1 / 8, 1 / 16]
    assert middle[:, 3].sum() == corner[2].sum() == 0


@pytest.mark.parametrize("kernel", ["gauss", "single"])
@pytest.mark.parametrize("make", [Plain, Residual, Depthwise, Untraceable])
def test_reciprocam_equals_its_twin(make, kernel):
    """Place by place, with the last maps written out and their part of the network run by hand."""
    from tests.engine.explainers.test_explainers import TAILS

    net, inputs = seeded(make), smooth(2, 16, 16)
    found = native(net, inputs, [0, 3], kernel) if make is not Plain else native(net, smooth(2, 32, 32), [0, 3], kernel)
    inputs = inputs if make is not Plain else smooth(2, 32, 32)
    double = oracles.double_copy(net)
    for own, image, target in zip(found, inputs.double(), (0, 3), strict=True):
        maps = double.written_out(image[None])[1][-1].detach()
        nothing = float(TAILS[make](double, 0 * maps)[0, target])
        for row in range(maps.shape[2]):
            for column in range(maps.shape[3]):
                kept = torch.zeros_like(maps)
                for i, j in ((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)):
                    weight = 4 / (4 * 2 ** abs(i) * 4 * 2 ** abs(j)) if kernel == "gauss" else float(i == j == 0)
                    if 0 <= row + i < maps.shape[2] and 0 <= column + j < maps.shape[3]:
                        kept[:, :, row + i, column + j] = weight * maps[:, :, row + i, column + j]
                wanted = float(TAILS[make](double, kept)[0, target]) - nothing
                assert float(own[row, column]) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_prefix_tokens_stay_and_patches_are_zeroed(prefix):
    net, inputs = seeded(lambda: Transformer(prefix=prefix, fused=True)).double(), smooth(1, 16, 16)
    (found,) = native(adapter_of(Double(net), 16), inputs, [2], blocks=["net.blocks.0"])
    tokens = net.blocks[0](net.tokens(inputs.double())).detach()

    def logit(keep):
        own = tokens.clone()
        own[:, [prefix + place for place in range(16) if place != keep]] = 0
        last = net.norm(net.blocks[1](own))
        return float(net.head(last[:, 0] if prefix else last.mean(1))[0, 2].detach())

    wanted = [logit(keep) - logit(None) for keep in range(16)]
    assert found.flatten().tolist() == pytest.approx(wanted, abs=1e-10)


@pytest.mark.parametrize("name", GLOBAL)
def test_an_image_in_a_batch_equals_itself_alone(name):
    adapter, inputs = adapter_of(Double(made(GLOBAL[name])), name=name), smooth(3, 32, 32)
    together, alone = native(adapter, inputs, [1, 2, 0]), native(adapter, inputs[1:2], [2])
    assert (together[1] - alone[0]).abs().max() <= 1e-12 * together[1].abs().max()


class Still(nn.Module):
    """A network whose forward takes no gradients, as exported ones do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x if float(x.sum()) > -1e9 else -x)


NAMED = {"Plain": (lambda: seeded(Plain), "features.7"), "timm": (lambda: made(GLOBAL["timm"]), "blocks.1")}
"""A network, and a block of it."""


@pytest.mark.parametrize("name", NAMED)
def test_a_network_without_gradients_has_the_same_map(name):
    make, block = NAMED[name]
    inputs = smooth(2, 32, 32)
    wanted = native(make(), inputs, [1, 3], blocks=[block])
    found = native(Still(make()).eval(), inputs, [1, 3], blocks=[f"net.{block}"])
    assert wanted.abs().max() > 1e-5
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_without_gradients_the_last_patches_of_a_class_token_are_passed_over():
    assert native(Still(made(GLOBAL["timm"])).eval(), smooth(1, 32, 32), [1]).abs().max() > 1e-5


class Tied(Residual):
    """Its end counts the pictures."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).reshape(x.shape[0], 5)


def test_a_network_whose_batch_may_not_grow_runs_whole():
    inputs = smooth(2, 16, 16)
    wanted = native(seeded(Residual), inputs, [1, 3])
    found = native(seeded(Tied), inputs, [1, 3], blocks=["relu__1"])
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_block_that_the_logits_do_not_hear_is_refused():
    with pytest.raises(ModelError, match="name an earlier block"):
        native(Still(made(GLOBAL["timm"])).eval(), smooth(1, 32, 32), [1], blocks=["net.blocks.2"])
