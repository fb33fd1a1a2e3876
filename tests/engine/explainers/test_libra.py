"""Balanced gradients: each rule by hand, the sum of all terms, a slow twin, and what is refused."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from blocksight.engine.catalog.composition import parse_method
from blocksight.engine.errors import ModelError
from blocksight.engine.explainers import make_explainer
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.attention import explicit_attention
from blocksight.engine.model.balanced import balanced, check_balanced
from blocksight.engine.model.targets import ClassLogit
from tests.engine import slow_explainers as slow
from tests.engine.explainers.test_token_methods import Double, Hand, adapter_of, hand_picture
from tests.engine.libraries import GLOBAL, WINDOWED, made
from tests.engine.nets import Curved, Depthwise, InPlace, Plain, Residual, Transformer, seeded, smooth


def terms(func, *given):
    """The balanced gradient by each given tensor, and the value."""
    own = [(torch.tensor(one, dtype=torch.float64).requires_grad_(True)) for one in given]
    with balanced(nn.Identity()):
        value = func(*(one + 0 for one in own))  # no leaves: activations
    slopes = torch.autograd.grad(value, own, materialize_grads=True)
    return [slope.tolist() for slope in slopes], float(value.detach())


# ---------------------------------------------------------------- by hand

GELU_1, SILU_2 = 0.8413447460685429, 1.7615941559557649


def test_the_deviation_of_a_norm_is_constant_and_its_mean_is_not():
    """The plain gradient is (0, 0)."""
    (slope,), value = terms(lambda x: functional.layer_norm(x, (2,), eps=0.0)[1], [1.0, 3.0])
    assert slope == pytest.approx([-0.5, 0.5])
    assert value == pytest.approx(1)


@pytest.mark.parametrize(
    ("func", "at", "slope"),
    [
        (functional.gelu, 1.0, GELU_1),
        (functional.silu, 2.0, SILU_2 / 2),
        (lambda x: x * torch.sigmoid(1.702 * x), 2.0, 1 / (1 + 2.718281828459045 ** (-3.404))),
        (lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)), 1.0, None),
        (torch.tanh, 0.5, 0.46211715726000973 / 0.5),
        (functional.gelu, 0.0, 0.5),
        (functional.silu, 0.0, 0.5),
        (torch.tanh, 0.0, 1.0),
        (lambda x: x**2, 3.0, 3.0),
        (functional.relu, 3.0, 1.0),
    ],
)
def test_the_gate_of_an_activation_is_constant(func, at, slope):
    (found,), value = terms(func, at)
    if slope is not None:
        assert found == pytest.approx(slope)
        assert found * at == pytest.approx(value)


def test_each_factor_of_a_product_gets_half():
    (one, other), value = terms(lambda a, b: a * b, 3.0, 2.0)
    assert (one, other, value) == (1.0, 1.5, 6.0)
    assert terms(lambda a, b: a / b, 6.0, 2.0) == ([0.5, 0.0], 3.0)


@pytest.mark.parametrize(
    "norm",
    [
        lambda x: functional.rms_norm(x, (4,), eps=0.0),
        lambda x: functional.normalize(x, dim=0),
        lambda x: x / x.norm(),
        lambda x: x * torch.rsqrt(x.pow(2).mean()),
        lambda x: functional.group_norm(x[None], 2, eps=0.0)[0],
    ],
)
def test_every_way_to_write_a_norm_has_terms_that_sum_to_its_output(norm):
    given = [1.0, -2.0, 0.5, 3.0]
    (slope,), value = terms(lambda x: norm(x)[3], given)
    assert sum(a * b for a, b in zip(slope, given, strict=True)) == pytest.approx(value)


def test_the_value_path_alone_carries_the_gradient_of_attention():
    adapter = adapter_of(Hand().eval(), 4)
    inputs = hand_picture().requires_grad_(True)
    with balanced(adapter.module):
        logits = adapter.logits(inputs)
    (slope,) = torch.autograd.grad(logits[0, 0], inputs)
    per_patch = functional.avg_pool2d((slope * inputs).detach().sum(1), 2).flatten() * 4
    assert per_patch.tolist() == pytest.approx([0.4, 0.2, -0.2, 0])
    assert float(logits[0, 0].detach()) == pytest.approx(0.4)


# ---------------------------------------------------------------- completeness and the twin

ADDED = ("bias", "pos_embed", "position_embedding", "positional_embedding", "pos_embedding", "cls_token", "class_token")
ADDED += ("class_embedding", "reg_token", "register_tokens", "dist_token")
"""In the names of parameters that are added."""


@pytest.mark.parametrize("name", [*GLOBAL, *WINDOWED])
def test_the_terms_of_pixels_and_of_all_that_is_added_sum_to_the_logit(name):
    net, inputs = made({**GLOBAL, **WINDOWED}[name]).double(), smooth(1, 32, 32).double().requires_grad_(True)
    plain = net(inputs)
    with balanced(net):
        logits = net(inputs)
    assert (logits - plain).abs().max() <= 1e-12 * plain.abs().max()
    added = [own for path, own in net.named_parameters() if any(part in path for part in ADDED)]
    gaps = []
    for output in (logits, plain):
        slopes = torch.autograd.grad(output[0, 1], [inputs, *added], allow_unused=True)
        total = sum(
            float((a * b).detach().sum()) for a, b in zip(slopes, [inputs, *added], strict=True) if a is not None
        )
        gaps.append(abs(total - float(output[0, 1].detach())))
    assert gaps[0] <= 1e-10 * float(plain.detach().abs().max())
    assert gaps[1] > 1e-6 * float(plain.detach().abs().max())


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_balanced_gradients_equal_their_twin(prefix):
    """Central differences of a forward whose constants are held by hand; they are exact, for it is affine."""
    net, inputs = seeded(lambda: Transformer(prefix=prefix, fused=True)).double(), smooth(1, 8, 8).double()
    own = inputs.clone().requires_grad_(True)
    with balanced(net):
        logit = net(own)[0, 2]
    (slope,) = torch.autograd.grad(logit, own)
    assert float(slow.libra_logit(net, inputs[0], inputs[0], 2)) == pytest.approx(float(logit.detach()), rel=1e-12)
    for place in itertools.product(range(3), (0, 3, 7), (1, 6)):
        up, down = inputs[0].clone(), inputs[0].clone()
        up[place] += 1
        down[place] -= 1
        wanted = (slow.libra_logit(net, inputs[0], up, 2) - slow.libra_logit(net, inputs[0], down, 2)) / 2
        assert float(slope[0][place]) == pytest.approx(float(wanted), abs=1e-11)


# ---------------------------------------------------------------- around other methods

BASES = ("hirescam", "gradcam", "gradient", "integrated_gradients", "daam", "legrad", "chefer")


@pytest.mark.parametrize("base", BASES)
def test_a_method_under_libra_is_that_method_inside_the_context(base):
    adapter, inputs, target = (
        adapter_of(seeded(Transformer), 16),
        smooth(2, 16, 16),
        ClassLogit(torch.tensor([[1], [3]])),
    )
    plain = make_explainer(base, adapter)
    found = make_explainer(f"libra({base})", adapter).explain(inputs, target)
    with balanced(adapter.module):
        wanted = plain.explain(inputs, target)
    without = plain.explain(inputs, target)
    alone = make_explainer(f"libra({base})", adapter).explain(inputs[1:], target.of(slice(1, 2)))
    for own, other, old in zip(found, wanted, without, strict=True):
        assert (own[0].saliency_hw == other[0].saliency_hw).all()
        assert abs(own[0].saliency_hw - old[0].saliency_hw).max() > 1e-3 * old[0].saliency_hw.max()
        assert own[0].score == pytest.approx(old[0].score, rel=1e-6)
    assert abs(alone[0][0].saliency_hw - found[1][0].saliency_hw).max() <= 1e-6 * found[1][0].saliency_hw.max()


def test_hirescam_under_libra_holds_all_that_the_last_block_says():
    """The map sums to the logit, less what biases behind the block and the class token add."""
    adapter, inputs = adapter_of(Double(seeded(lambda: Transformer(prefix=0, fused=True))), 16), smooth(1, 16, 16)
    target = ClassLogit(torch.tensor([[2]]))
    ((one,),) = make_explainer("libra(hirescam)", adapter, blocks=["net.blocks.1"]).attribute(inputs, target, [0])
    net = adapter.module.net
    behind = sum(float(slope @ own.detach()) for slope, own in _bias_terms(adapter, net, inputs))
    assert float(one.values.sum()) + behind == pytest.approx(one.score, rel=1e-9)


def _bias_terms(adapter, net, inputs):
    """Of the biases behind the last block: the last norm's and the head's."""
    added = [net.norm.bias, net.head.bias]
    with balanced(adapter.module):
        logit = adapter.logits(inputs)[0, 2]
    return zip(torch.autograd.grad(logit, added), added, strict=True)


def test_attention_has_a_gradient_whichever_context_is_entered_first():
    net, inputs = seeded(lambda: Transformer(fused=True)), smooth(1, 16, 16).requires_grad_(True)
    slopes = []
    for contexts in ((balanced(net), None), (None, balanced(net))):
        found = []
        outer, inner = contexts
        with outer or torch.enable_grad(), explicit_attention(net, found.append), inner or torch.enable_grad():
            logits = net(inputs)
        slopes.append(torch.autograd.grad(logits[0, 1], [one.weights for one in found]))
    for one, other in zip(*slopes, strict=True):
        assert torch.allclose(one, other, rtol=1e-5)
        assert one.abs().max() > 0


@pytest.mark.parametrize("name", ["rise", "occlusion", "fullgrad", "scorecam"])
def test_methods_without_gradients_are_no_base(name):
    with pytest.raises(ValueError, match=r"libra changes the gradients .* take libra\(gradcam\)"):
        parse_method(f"libra({name})")
    assert str(parse_method("libra")) == "libra(chefer)"
    assert str(parse_method("ucag(libra(chefer))")) == "ucag(libra(chefer))"


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("make", [Plain, Residual, Depthwise, Curved, Transformer])
def test_networks_of_torchs_own_operations_are_reached(make):
    check_balanced(adapter_of(seeded(make)), "libra")


class Softplus(Plain):
    """An activation without a rule."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.softplus(self.features(x)).flatten(1))


class Squashed(Plain):
    """A norm that is written out with a logarithm."""

    def forward(self, x: Tensor) -> Tensor:
        maps = self.features(x).flatten(1)
        return self.head(maps * (-(maps**2).mean(1, keepdim=True).log() / 2).exp())


class Kernel(torch.autograd.Function):
    """SiLU in a kernel of its own, whose insides torch's functions do not show."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        return slope * x.sigmoid() * (1 + x * (1 - x.sigmoid()))


class Own(Plain):
    """Uses a kernel of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Kernel.apply(self.features(x)).flatten(1))


@pytest.mark.parametrize("make", [Softplus, Squashed, InPlace, Own])
def test_an_operation_that_no_rule_reaches_is_refused(make):
    with pytest.raises(ModelError, match="some operation is not reached"):
        make_explainer("libra(gradient)", ModelAdapter(seeded(make), input_size=(32, 32)))


def test_everything_is_restored_after_an_exception():
    net, inputs = seeded(Transformer), smooth(1, 16, 16)
    with pytest.raises(RuntimeError, match="channels"), balanced(net):
        net(inputs[:, :2])
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in net.modules())
    assert not torch.overrides._get_current_function_mode_stack()
