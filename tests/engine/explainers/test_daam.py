"""DAAM: explicit attention, identities that hold exactly, a slow twin, and its targets."""

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from blocksight.engine.catalog.parameters import DaamParameters
from blocksight.engine.errors import ModelError
from blocksight.engine.explainers import EXPLAINERS
from blocksight.engine.explainers.explainer import Attribution
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.attention import explicit_attention
from blocksight.engine.model.features import head_path, without_head
from blocksight.engine.model.neighbours import NeighbourClassifier
from blocksight.engine.model.resample import upsampling
from blocksight.engine.model.taps import gradients
from blocksight.engine.model.targets import ClassProbability
from tests.engine import oracles
from tests.engine import slow_explainers as slow
from tests.engine.nets import Plain, Transformer, seeded, smooth


def vision_transformer() -> nn.Module:
    """Torchvision's, with a head of random weights."""
    net = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=12, mlp_dim=16, num_classes=5
    )
    nn.init.normal_(net.heads.head.weight)
    return net


class TokensFirst(nn.Module):
    """Torch's multi-head attention with the batch as second dimension, and returned weights."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.head = nn.Conv2d(3, 12, 8, stride=8), nn.Linear(12, 5)
        self.attend = nn.MultiheadAttention(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.project(x).flatten(2).permute(2, 0, 1)
        taken, weights = self.attend(tokens, tokens, tokens)
        return self.head((tokens + taken).mean(0)) + weights[:, :5, 0]


class Layers(nn.Module):
    """Torch's transformer layer, which has one fast path for the whole layer."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.head = nn.Conv2d(3, 12, 8, stride=8), nn.Linear(12, 5)
        self.layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.project(x).flatten(2).transpose(1, 2)).mean(1))


def fused() -> nn.Module:
    return Transformer(fused=True)


ATTENTIONS = {
    vision_transformer: [f"encoder.layers.encoder_layer_{layer}.self_attention" for layer in range(3)],
    TokensFirst: ["attend"],
    Layers: ["layer.self_attn"],
    fused: ["blocks.0.attention", "blocks.1.attention"],
    Transformer: ["blocks.0.attention", "blocks.1.attention"],
}


def watched(net, inputs):
    found = []
    with explicit_attention(net, found.append):
        logits = net(inputs)
    return logits, found


def adapter_of(net, size=32, **options):
    return ModelAdapter(net, input_size=(size, size), mean=(0, 0, 0), std=(1, 1, 1), **options)


def explained(net, inputs, classes, parameters=None, **options):
    adapter = net if isinstance(net, ModelAdapter) else adapter_of(net, inputs.shape[2])
    one = EXPLAINERS["daam"](adapter, parameters or DaamParameters(), **options)
    return one.explain(inputs, ClassProbability(torch.tensor(classes)[:, None]))


def steps_of(explanation):
    return np.stack([one.values_hw for one in explanation.products.accumulated_maps])


# ---------------------------------------------------------------- explicit attention


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("make", ATTENTIONS)
def test_explicit_attention_gives_the_fused_ones_logits(make, grad):
    """With gradients and without, for which torch has different paths; all parts have the right shapes."""
    net, inputs = seeded(make), smooth(2, 32, 32)
    with torch.set_grad_enabled(grad):
        wanted = net(inputs)
        logits, found = watched(net, inputs)
    assert (logits - wanted).abs().max() <= 1e-5
    assert [one.name for one in found] == ATTENTIONS[make]
    for one in found:
        images, heads, tokens, width = one.values.shape
        assert images == 2
        assert heads * width == 12
        assert one.weights.shape == (2, heads, tokens, tokens)
        assert torch.allclose(one.weights.sum(-1), torch.ones(()), atol=1e-6)


@pytest.mark.parametrize("make", ATTENTIONS)
def test_the_contributions_to_a_token_sum_to_its_output(make):
    """`sum_i S[i] = T[0]`, the class token's own share included."""
    _, found = watched(oracles.double_copy(seeded(make)), smooth(2, 32, 32).double())
    for one in found:
        given = one.weights[:, :, 0, :, None] * one.values
        assert torch.allclose(given.sum(2), one.output[:, :, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", ATTENTIONS)
def test_the_captured_output_is_the_one_that_the_network_uses(make):
    logits, found = watched(seeded(make), smooth(2, 32, 32))
    for slope in gradients(logits, torch.eye(2, 5), [one.output for one in found]):
        assert slope.abs().max() > 0


class Calls(nn.Module):
    """One call of attention."""

    def __init__(self, call) -> None:
        super().__init__()
        self.call = call
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.biased = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)
        self.narrow = nn.MultiheadAttention(8, 2, kdim=4, vdim=4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def heads_of(x):
    return x.unflatten(2, (2, 4)).transpose(1, 2)


MASK = torch.ones(6, 6).tril().bool()
ODD = {
    "causal": lambda _, x: functional.scaled_dot_product_attention(*[heads_of(x)] * 3, is_causal=True),
    "without heads": lambda _, x: functional.scaled_dot_product_attention(x, x, x),
    "module with a mask": lambda net, x: net.attend(x, x, x, attn_mask=~MASK, need_weights=False)[0],
    "module without a batch": lambda net, x: net.attend(x[0], x[0], x[0])[0],
    "module with more keys": lambda net, x: net.biased(x, x, x)[0],
    "softmax over other tokens": lambda _, x: (x @ x.transpose(1, 2)).softmax(-1) @ x,
}


@pytest.mark.parametrize("name", ODD)
def test_other_attention_is_unchanged_and_not_captured(name):
    net, x = seeded(lambda: Calls(ODD[name])), torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = net(x)
        found, shown = watched(net, x)
    assert torch.allclose(found, wanted, atol=1e-6)
    assert shown == []


SEEN = {
    "mask": ("self", lambda _, x: functional.scaled_dot_product_attention(*[heads_of(x)] * 3, attn_mask=MASK)),
    "bias": ("self", lambda _, x: functional.scaled_dot_product_attention(*[heads_of(x)] * 3, attn_mask=MASK.float())),
    "scale": ("self", lambda _, x: functional.scaled_dot_product_attention(*[heads_of(x)] * 3, scale=0.3)),
    "cast": (
        "self",
        lambda _, x: (heads_of(x) @ heads_of(x).mT).softmax(-1, dtype=torch.float64).to(x.dtype) @ heads_of(x),
    ),
    "crosswise": ("pool", lambda _, x: functional.scaled_dot_product_attention(heads_of(x[:, :2]), *[heads_of(x)] * 2)),
    "module crosswise": ("pool", lambda net, x: net.attend(x[:, :2], x, x, need_weights=False)[0]),
    "module of several widths": ("self", lambda net, x: net.narrow(x, x[..., :4], x[..., :4])[0]),
}
"""The kind, and one call."""


@pytest.mark.parametrize("name", SEEN)
def test_masked_cast_and_pooling_attention_is_computed_as_it_is_and_captured(name):
    kind, call = SEEN[name]
    net, x = seeded(lambda: Calls(call)), torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = net(x)
        found, (shown,) = watched(net, x)
    assert torch.allclose(found, wanted, atol=1e-6)
    assert shown.kind == kind
    assert shown.weights.shape[::3] == (3, 6)
    assert torch.allclose(shown.weights @ shown.values, shown.output, atol=1e-6)
    assert (shown.weights[0, 0, 0, 1:] == 0).all() == (name == "mask")


def test_other_weights_may_take_the_attentions_place():
    """The network goes on with them, and `receive` shows them."""
    net, inputs, found = seeded(fused), smooth(1, 32, 32), []
    with torch.no_grad(), explicit_attention(net, found.append, torch.zeros_like):
        logits = net(inputs)
    assert not any(one.weights.any() or one.output.any() for one in found)
    assert (logits - net(inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("mean", [True, False])
def test_weights_that_the_module_returns_are_its_own(mean):
    """All heads', or their mean."""
    net = seeded(lambda: Calls(lambda own, x: own.attend(x, x, x, average_attn_weights=mean)[1]))
    x = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(watched(net, x)[0], net(x), atol=1e-6)


def test_attention_is_restored_when_the_network_fails():
    def fail(_):
        raise RuntimeError("half way")

    net, inputs = seeded(fused), smooth(1, 32, 32)
    with pytest.raises(RuntimeError, match="half way"), explicit_attention(net, fail):
        net(inputs)
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in net.modules())
    assert not torch.overrides._get_current_function_mode_stack()
    assert torch.equal(net(inputs), net(inputs))


# ---------------------------------------------------------------- the map


@pytest.mark.parametrize("rectify", [None, False])
@pytest.mark.parametrize("use_fused", [True, False])
def test_daam_equals_its_twin(use_fused, rectify):
    """Block by block; for a class, coefficients are rectified by default."""
    net, inputs = seeded(lambda: Transformer(fused=use_fused, prefix=3)), smooth(2, 16, 16)
    found = explained(net, inputs, [1, 3], DaamParameters(rectify=rectify))
    double = oracles.double_copy(net)
    for image, (own, target) in enumerate(zip(found, (1, 3), strict=True)):
        wanted = torch.stack(slow.daam(double, inputs[image].double(), target, rectify=rectify is None))
        assert wanted[-1].max() > 1e-3
        assert np.abs(steps_of(own[0]) - wanted.numpy()).max() <= 1e-5 * float(wanted.max())
        large = oracles.upsample(wanted[-1][None], (16, 16))[0]
        assert np.abs(own[0].saliency_hw - large.numpy()).max() <= 1e-5 * float(large.max())


@pytest.mark.parametrize(("prefix", "query"), [(0, "auto"), (1, "mean")])
def test_every_token_may_be_a_query(prefix, query):
    net, inputs = seeded(lambda: Transformer(prefix=prefix)), smooth(1, 16, 16)
    (own,) = explained(net, inputs, [2], DaamParameters(query=query))[0]
    wanted = slow.daam(oracles.double_copy(net), inputs[0].double(), 2, rectify=True, every_query=True)
    assert np.abs(steps_of(own) - torch.stack(wanted).numpy()).max() <= 1e-5 * float(wanted[-1].max())


class PatchMean(Transformer):
    """With a class token that the head does not use: it takes the patches' mean."""

    def forward(self, x):
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 1:].mean(1))


def test_a_class_token_without_a_gradient_does_not_count():
    inputs = smooth(1, 16, 16)
    auto, mean = (
        steps_of(explained(seeded(PatchMean), inputs, [2], DaamParameters(query=query))[0][0])
        for query in ("auto", "mean")
    )
    assert np.array_equal(auto, mean)
    assert auto[-1].max() > auto[0].max() > 0


@pytest.mark.parametrize("make", [vision_transformer, Transformer])
def test_blocks_maps_are_sums_that_never_fall(make):
    (own,) = explained(seeded(make), smooth(1, 32, 32), [1])[0]
    products = own.products.accumulated_maps
    assert [one.name for one in products] == ATTENTIONS[make]
    steps = steps_of(own)
    assert steps.dtype == np.float32
    assert steps.min() >= 0
    assert (np.diff(steps, axis=0) >= 0).all()
    assert (np.diff(steps, axis=0) > 0).any(axis=(1, 2)).all()
    upsample = upsampling(steps.shape[1:], (32, 32), torch.device("cpu"))
    assert np.abs(upsample(torch.from_numpy(steps[-1]).double()).numpy() - own.saliency_hw).max() <= 1e-6


def test_each_blocks_map_may_have_equal_weight():
    (own,) = explained(seeded(Transformer), smooth(1, 32, 32), [1], DaamParameters(normalise=True))[0]
    (plain,) = explained(seeded(Transformer), smooth(1, 32, 32), [1])[0]
    each, wanted = (np.diff(steps_of(one), axis=0, prepend=0) for one in (own, plain))
    for one, raw in zip(each, wanted, strict=True):
        assert np.abs(one - (raw - raw.min()) / (raw.max() - raw.min())).max() <= 1e-5


class Linear(nn.Module):
    """One attention, then no projection, norm or layer: the logit is linear in the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.head = nn.Conv2d(3, 6, 4, stride=4, bias=False), nn.Linear(6, 4)
        self.qkv, self.start = nn.Linear(6, 18, bias=False), nn.Parameter(torch.randn(1, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.start.expand(x.shape[0], -1, -1), self.project(x).flatten(2).transpose(1, 2)], 1)
        query, key, value = self.qkv(tokens).unflatten(2, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        taken = (query @ key.transpose(2, 3)).softmax(-1) @ value
        return self.head((tokens + taken.transpose(1, 2).flatten(2))[:, 0])


def test_of_one_linear_block_the_shares_sum_to_the_logit_and_the_map_is_their_positive_part():
    net, inputs = oracles.double_copy(seeded(Linear)), smooth(1, 16, 16).double()
    logits, (one,) = watched(net, inputs)
    wanted = net.head.weight[2].view(2, 1, 3)
    shares = (one.weights[0, :, 0, :, None] * one.values[0] * wanted).sum((0, 2))
    constant = net.head.bias[2] + net.head.weight[2] @ net.start[0, 0]
    assert float(shares.sum() + constant) == pytest.approx(float(logits[0, 2]), rel=1e-12)
    (own,) = explained(seeded(Linear), smooth(1, 16, 16), [2], DaamParameters(rectify=False))[0]
    native = shares[1:].relu().view(4, 4).detach().numpy()
    assert native.max() > 0
    assert np.abs(steps_of(own)[0] - native).max() <= 1e-6 * native.max() + 1e-7


def test_a_patch_whose_value_is_zero_has_no_share():
    """In a network without biases a black patch is a token of zeros."""
    inputs = smooth(1, 16, 16)
    inputs[:, :, 4:8, 8:12] = 0
    (own,) = explained(seeded(Linear), inputs, [2], DaamParameters(rectify=False, query="mean"))[0]
    (step,) = steps_of(own)
    assert step[1, 2] == 0
    assert (step > 0).sum() >= 4


def test_patches_in_another_order_have_their_map_in_that_order():
    """The network has no position embedding."""
    net, inputs = seeded(Transformer), smooth(1, 16, 16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    patches = functional.unfold(inputs, 4, stride=4)[:, :, order]
    moved = functional.fold(patches, (16, 16), 4, stride=4)
    one, other = (steps_of(explained(net, own, [1])[0][0]).reshape(2, 16) for own in (inputs, moved))
    assert np.abs(one[:, order] - other).max() <= 1e-5 * one.max()
    assert np.abs(one - other).max() > 1e-2 * one.max()


def test_a_module_that_runs_twice_has_two_maps():
    class Twice(Transformer):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](self.blocks[0](self.tokens(x)))
            return self.head(x[:, 0])

    (own,) = explained(seeded(Twice), smooth(1, 16, 16), [1])[0]
    assert [one.name for one in own.products.accumulated_maps] == ["blocks.0.attention", "blocks.0.attention#2"]


def test_wrappers_join_the_attributions_of_daam():
    net, inputs = seeded(Transformer), smooth(1, 16, 16)
    one = EXPLAINERS["daam"](adapter_of(net, 16), DaamParameters())
    ((own,),) = one.attribute(inputs, ClassProbability(torch.tensor([[1]])), [0])
    assert isinstance(own, Attribution)
    assert own.values.shape == (4, 4)
    assert own.values.dtype == torch.float64


# ---------------------------------------------------------------- networks that it cannot explain


class Windows(nn.Module):
    """Attention among the four patches of each quarter."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.head = nn.Conv2d(3, 12, 4, stride=4), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.project(x)
        tokens = functional.unfold(maps, 2, stride=2).transpose(1, 2).reshape(-1, 12, 4).transpose(1, 2)
        taken = functional.scaled_dot_product_attention(*[tokens[:, None]] * 3)
        return self.head(taken.reshape(x.shape[0], -1, 12).mean(1))


class Doubled(Transformer):
    """Appends every picture a second time, in another order: no attention belongs to one picture."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens(x)
        one, other = self.blocks[0](torch.cat([tokens, tokens.flip(1)])).chunk(2)
        return self.head((one + other)[:, 0])


@pytest.mark.parametrize("make", [Plain, Windows, Doubled])
def test_without_attention_over_the_patches_the_error_names_other_methods(make):
    with pytest.raises(ModelError, match=r"daam needs self-attention over tokens .* take gradcam, layercam or rise"):
        explained(seeded(make), smooth(1, 32, 32), [1])


class TwoSizes(Transformer):
    """Attention over all patches, and again over a quarter of them."""

    def __init__(self) -> None:
        super().__init__()
        self.coarse, self.fine = nn.Conv2d(3, 12, 8, stride=8), nn.Conv2d(3, 12, 4, stride=4)
        self.attend, self.head = nn.MultiheadAttention(12, 3, batch_first=True), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        found = 0
        for project in (self.fine, self.coarse):
            tokens = project(x).flatten(2).transpose(1, 2)
            found = found + self.attend(tokens, tokens, tokens, need_weights=False)[0].mean(1)
        return self.head(found)


def test_attention_at_several_sizes_is_refused_before_any_image():
    adapter = ModelAdapter(seeded(TwoSizes), input_size=(32, 32))
    with pytest.raises(ModelError, match=r"several sizes \(4 x 4, 8 x 8\): take gradcam"):
        EXPLAINERS["daam"](adapter, DaamParameters())


def test_a_missing_class_token_cannot_be_the_query():
    with pytest.raises(ModelError, match="model has no class token whose attention could count: take query=mean"):
        explained(seeded(lambda: Transformer(prefix=0)), smooth(1, 16, 16), [1], DaamParameters(query="class"))


# ---------------------------------------------------------------- features as targets


def by_hand(net, path, inputs, direction, *, rectify=False):
    """Native D of the last block [N, h, w], with `direction(f)` [N, D] propagated from a module's input."""
    kept = []
    handle = net.get_submodule(path).register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    _, found = watched(net, inputs)
    handle.remove()
    slopes = gradients(kept[0], direction(kept[0].detach()), [one.output for one in found])
    total = 0
    for one, slope in zip(found, slopes, strict=True):
        c = slope[:, :, 0].relu() if rectify else slope[:, :, 0]
        total = total + (one.weights[:, :, 0, :, None] * one.values * c[:, :, None]).sum((1, 3)).relu()[:, 1:]
    return total.detach().unflatten(1, (4, 4)).numpy()


def squares(features):
    return features**2 / (features**2).sum(1, keepdim=True)


@pytest.mark.parametrize("rectify", [None, True])
def test_the_feature_is_what_enters_the_last_linear_layer(rectify):
    """Its squares are propagated, and coefficients keep their sign by default."""
    net, inputs = seeded(Transformer), smooth(2, 16, 16)
    found = explained(net, inputs, [0, 3], DaamParameters(of="feature", rectify=rectify))
    wanted = by_hand(net, "head", inputs, squares, rectify=bool(rectify))
    for own, native in zip(found, wanted, strict=True):
        assert native.max() > 0
        assert np.abs(steps_of(own[0])[-1] - native).max() <= 1e-5 * native.max()


def test_a_network_without_a_head_is_its_own_feature():
    """The same network without its head gives the same map of a picture, for every class."""
    inputs = smooth(2, 16, 16)
    asked = DaamParameters(of="feature")
    wanted = explained(seeded(Transformer), inputs, [0, 3], asked)
    bare = without_head(adapter_of(seeded(Transformer), 16, class_names="abcde"))
    assert bare.class_names is None
    assert bare.num_classes == 12
    assert head_path(bare) is None
    for own, other in zip(explained(bare, inputs, [7, 8], asked), wanted, strict=True):
        assert np.abs(own[0].saliency_hw - other[0].saliency_hw).max() <= 1e-6 * other[0].saliency_hw.max()


def test_the_head_is_the_last_linear_layer_that_gives_the_logits():
    assert head_path(adapter_of(seeded(vision_transformer))) == "heads.head"
    assert head_path(adapter_of(seeded(Plain))) == "head"


class Convolved(nn.Module):
    """A classifier without a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(x).mean((2, 3))


def test_a_classifier_without_a_linear_head_has_no_feature():
    with pytest.raises(ModelError, match="no linear layer over one vector per image gives its logits"):
        head_path(adapter_of(Convolved(), class_names="abcd"))
    assert head_path(adapter_of(Convolved())) is None
    with pytest.raises(ModelError, match=r"must return one vector per image, \[N, D\]"):
        head_path(adapter_of(nn.Conv2d(3, 4, 1)))
    with pytest.raises(ModelError, match="is one linear layer"):
        without_head(adapter_of(OneLayer(3 * 8 * 8, 4), 8))


class OneLayer(nn.Linear):
    """A whole classifier."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))


def banked(inputs, classes):
    """The transformer without its head, with a bank of other pictures."""
    backbone = seeded(Transformer)
    backbone.head = nn.Identity()
    with torch.no_grad():
        features = backbone(inputs)
    return NeighbourClassifier(backbone, features, torch.tensor(classes), ["a", "b", "c"], num_neighbours=4).eval()


def test_under_a_bank_the_agreement_with_the_class_is_propagated():
    """For a class of a neighbour, and for one of none; the coefficients keep their sign."""
    inputs = smooth(2, 16, 16, seed=5)
    net = banked(smooth(9, 16, 16, seed=6), [0, 0, 0, 1, 1, 1, 1, 2, 2])
    found = explained(net, inputs, [0, 2])
    wanted = by_hand(net, "bank", inputs, lambda f: net.bank.agreement(f, torch.tensor([0, 2])))
    for own, native in zip(found, wanted, strict=True):
        assert native.max() > 0
        assert np.abs(steps_of(own[0])[-1] - native).max() <= 1e-5 * native.max()
    other = explained(net, inputs, [1, 1])
    assert np.abs(other[0][0].saliency_hw - found[0][0].saliency_hw).max() > 1e-3 * found[0][0].saliency_hw.max()


def test_under_a_bank_only_the_feature_can_be_a_target():
    inputs = smooth(1, 16, 16, seed=5)
    net = banked(smooth(6, 16, 16, seed=6), [0, 0, 1, 1, 2, 2])
    (own,) = explained(net, inputs, [0], DaamParameters(of="feature"))[0]
    (wanted,) = by_hand(net, "bank", inputs, squares)
    assert np.abs(steps_of(own)[-1] - wanted).max() <= 1e-5 * wanted.max()
