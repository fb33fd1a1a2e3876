"""LeGrad, gradient-weighted rollout and tokens left out: by hand, twins, the libraries' classes, and refusals."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from blocksight.engine.catalog.parameters import LeGradParameters, OcclusionParameters, RiseParameters
from blocksight.engine.errors import ModelError
from blocksight.engine.explainers import make_explainer
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.attention import explicit_attention
from blocksight.engine.model.expressions import WeightedSum
from blocksight.engine.model.targets import ClassLogit
from blocksight.engine.model.token_dropping import TokenDropping
from blocksight.engine.model.token_stream import _check_mixing, token_stream
from tests.engine import planted, planted_clip
from tests.engine import slow_explainers as slow
from tests.engine.libraries import CHANGED, GLOBAL, SIDE, WINDOWED, made
from tests.engine.nets import Plain, Transformer, seeded, smooth

METHODS = ("legrad", "chefer")


def adapter_of(net, size=32, name="model"):
    return ModelAdapter(net, input_size=(size, size), mean=(0, 0, 0), std=(1, 1, 1), name=name)


class Double(nn.Module):
    """A network in float64 that takes the engine's float32 inputs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.double())


def native(method, net, inputs, classes, parameters=None):
    """The maps at the patches' grid, [N, h, w]."""
    adapter = net if isinstance(net, ModelAdapter) else adapter_of(net, inputs.shape[2])
    one = make_explainer(method, adapter, parameters)
    found = one.attribute(inputs, ClassLogit(torch.tensor(classes)[:, None]), [0] * len(inputs))
    return torch.stack([own[0].values for own in found])


# ---------------------------------------------------------------- by hand


class Hand(nn.Module):
    """One block of one head over a class token (0, 0) and four patches; each weight is 0 or the identity.

    The attention's rows are given; None: even, 1/5 everywhere.
    """

    def __init__(self, rows: Tensor | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([HandBlock(rows)])

    def forward(self, x: Tensor) -> Tensor:
        patches = nn.functional.avg_pool2d(x[:, :2], 2).flatten(2).transpose(1, 2)
        tokens = torch.cat([0 * patches[:, :1], patches], 1)
        return self.blocks[0](tokens)[:, 0]


class HandBlock(nn.Module):
    def __init__(self, rows: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("bias", torch.zeros(5) if rows is None else rows.log())

    def forward(self, tokens: Tensor) -> Tensor:
        similarity = 0 * (tokens @ tokens.transpose(1, 2))[:, None] + self.bias
        return tokens + (similarity.softmax(-1) @ tokens[:, None])[:, 0]


def hand_picture():
    """Patches whose tokens are (2, 0), (1, 1), (-1, 2), (0, -1)."""
    values = torch.tensor([[2.0, 0], [1, 1], [-1, 2], [0, -1]]).T.reshape(2, 2, 2)
    picture = torch.cat([values, torch.zeros(1, 2, 2)])
    return picture.repeat_interleave(2, 1).repeat_interleave(2, 2)[None].float()


def by_hand(method, classes, rows=None):
    return native(method, adapter_of(Hand(rows).eval(), 4), hand_picture(), classes)[0].flatten().tolist()


@pytest.mark.parametrize("method", METHODS)
def test_even_attention_by_hand(method):
    """The logits are (0.4, 0.4)."""
    assert by_hand(method, [0]) == pytest.approx([0.4, 0.2, 0, 0])
    assert by_hand(method, [1]) == pytest.approx([0, 0.2, 0.4, 0])


def test_rollout_weighs_by_the_attention_and_legrad_does_not():
    rows = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16])
    assert by_hand("chefer", [0], rows) == pytest.approx([0.5, 0.125, 0, 0])
    assert by_hand("chefer", [1], rows) == pytest.approx([0, 0.125, 0.125, 0])
    assert by_hand("legrad", [0], rows) == pytest.approx([0.4, 0.2, 0, 0])


def test_a_margin_has_the_map_of_the_margin():
    """Not the difference of the classes' maps: what is cut off at 0 does not subtract."""
    margin = WeightedSum(torch.tensor([[0, 1]]), torch.tensor([[1.0, -1.0]]).double(), "softmax", is_log=False)
    rows = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16])

    def found(method, rows, target):
        one = make_explainer(method, adapter_of(Hand(rows).eval(), 4))
        return one.attribute(hand_picture(), target, [0])[0][0].values.flatten().tolist()

    assert found("legrad", None, margin) == pytest.approx([0.4, 0, 0, 0.2])
    assert found("chefer", rows, margin) == pytest.approx([0.5, 0, 0, 0.0625])
    turned = WeightedSum(margin.classes, -margin.weights, "softmax", is_log=False)
    assert found("legrad", None, turned) == pytest.approx([0, 0, 0.6, 0])


# ---------------------------------------------------------------- slow twins


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("pool", ["mean", "model"])
def test_legrad_equals_its_twin(pool, prefix):
    net, inputs = seeded(lambda: Transformer(prefix=prefix, fused=True)).double(), smooth(2, 8, 8)
    adapter = ModelAdapter(Double(net), input_size=(8, 8))
    found = native("legrad", adapter, inputs, [1, 3], LeGradParameters(pool=pool))
    for own, image, target in zip(found, inputs.double(), (1, 3), strict=True):
        wanted = slow.legrad(net, image, target, pool=pool)
        assert wanted.max() > 1e-4
        assert (own - wanted).abs().max() <= 1e-8


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_rollout_equals_its_twin(prefix):
    net, inputs = seeded(lambda: Transformer(prefix=prefix, fused=True)).double(), smooth(2, 8, 8)
    found = native("chefer", ModelAdapter(Double(net), input_size=(8, 8)), inputs, [1, 3])
    for own, image, target in zip(found, inputs.double(), (1, 3), strict=True):
        wanted = slow.chefer(net, image, target)
        assert wanted.max() > 1e-4
        assert (own - wanted).abs().max() <= 1e-8


# ---------------------------------------------------------------- the libraries' classes


@pytest.fixture(scope="module")
def doubles():
    """Every model in float64, made once."""
    kept = {}

    def of(name):
        if name not in kept:
            kept[name] = adapter_of(Double(made(GLOBAL[name])), name=name)
        return kept[name]

    return of


def numeric(adapter, picture, target, places):
    """The attentions of a picture, and central differences of the logit by some entries of each."""
    found = []

    def run(change=None):
        numbers = iter(range(99))
        found.clear()
        with explicit_attention(adapter.module, found.append, lambda a: change(next(numbers), a) if change else a):
            return adapter.logits(picture)[0, target]

    with adapter.borrowed(), torch.no_grad():
        run()
        plain = [one.weights.clone() for one in found]
        slopes = [
            [(run(_moved(number, place, 1e-6)) - run(_moved(number, place, -1e-6))) / 2e-6 for place in places]
            for number in range(len(plain))
        ]
    return plain, slopes


def _moved(number, place, step):
    def change(own, a):
        if own == number:
            a = a.clone()
            a[(0, *place)] += step
        return a

    return change


PLACES = [(0, 0, 2), (1, 0, 5), (1, -1, 3)]
"""Head, query and token."""


@pytest.mark.parametrize("name", GLOBAL)
def test_every_attention_is_seen_and_has_the_gradient_of_differences(name, doubles):
    """Class, register and distillation tokens, casts to float32, rotary positions, and poolers."""
    adapter, picture = doubles(name), smooth(1, 32, 32)
    found = []
    with adapter.borrowed(), explicit_attention(adapter.module, found.append):
        logits = adapter.logits(picture.clone().requires_grad_(True))
        slopes = torch.autograd.grad(logits[0, 1], [one.weights for one in found])
    with torch.no_grad():
        assert (adapter.logits(picture) - logits).abs().max() <= 1e-6 * logits.abs().max()
    assert [one.kind for one in found] == ["self"] * 3 + ["pool"] * ("pooler" in name or "SigLIP" in name)
    plain, wanted = numeric(adapter, picture, 1, PLACES)
    for own, slope, attention, numbers in zip(found, slopes, plain, wanted, strict=True):
        assert torch.equal(own.weights, attention)
        for place, number in zip(PLACES, numbers, strict=True):
            assert float(slope[(0, *place)]) == pytest.approx(float(number), abs=1e-6 * float(slope.abs().max()) + 1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", GLOBAL)
def test_an_image_in_a_batch_equals_itself_alone_and_classes_differ(name, method, doubles):
    adapter, inputs = doubles(name), smooth(3, 32, 32)
    together = native(method, adapter, inputs, [1, 2, 0])
    alone = native(method, adapter, inputs[1:2], [2])
    other = native(method, adapter, inputs[1:2], [3])
    assert together.shape == (3, 4, 4)
    scale = float(together[1].max())
    assert scale > 0
    assert (together[1] - alone[0]).abs().max() <= 1e-12 * scale
    assert (other[0] - alone[0]).abs().max() >= 0.01 * scale


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("method", [*METHODS, "daam"])
def test_windowed_attention_is_refused_with_the_way_out(method, name):
    """Also if some of it spans all patches."""
    with pytest.raises(ModelError, match=r"timm, Swin .*take gradcam, layercam"):
        make_explainer(method, adapter_of(made(WINDOWED[name]), name="timm, Swin"))


# ---------------------------------------------------------------- proofs of the stream


class Convolved(Transformer):
    """Mixes neighbouring patches behind its first attention."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(12, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.blocks[0](self.tokens(x))
        tokens = self.blocks[1](tokens + self.mix(tokens.transpose(1, 2)).transpose(1, 2))
        return self.head(self.norm(tokens)[:, 0])


class Columns(Transformer):
    """Its patches lie column by column."""

    def tokens(self, x: Tensor) -> Tensor:
        return super().tokens(x.transpose(2, 3))


class Skipping(Transformer):
    """The patches' tokens reach the head beside the last block."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens(x)
        behind = self.blocks[1](self.blocks[0](tokens))
        return self.head(self.norm(behind)[:, 0] + tokens.mean(1))


class Tied(Transformer):
    """Its end adds something of each picture that comes from before the blocks."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (x[:, :1, 0, 0] > 9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("make", "why"), [(Convolved, "mixes patches"), (Columns, "has it not")])
def test_patches_that_mix_elsewhere_or_lie_otherwise_are_refused(make, why, method):
    with pytest.raises(ModelError, match=why):
        make_explainer(method, adapter_of(seeded(make)))


def test_a_layout_that_names_other_tokens_is_refused():
    adapter = adapter_of(seeded(Transformer))
    stream = token_stream(adapter, "chefer")
    wrong = replace(stream, layout=replace(stream.layout, prefix=0))
    with pytest.raises(ModelError, match="reaches other tokens than expected"):
        _check_mixing(adapter, "chefer", wrong)


def test_a_block_that_is_bypassed_is_no_block():
    with pytest.raises(ModelError, match="needs blocks of one attention each that nothing bypasses"):
        make_explainer("legrad", adapter_of(seeded(Skipping)))


@pytest.mark.parametrize("pool", ["mean", "model"])
def test_an_end_that_needs_something_of_each_picture_runs_on_copies(pool):
    inputs, asked = smooth(2, 16, 16), LeGradParameters(pool=pool)
    one, other = (native("legrad", adapter_of(seeded(make), 16), inputs, [1, 3], asked) for make in (Transformer, Tied))
    assert (one - other).abs().max() <= 1e-6 * one.max()


@pytest.mark.parametrize("method", METHODS)
def test_a_network_without_attention_is_refused(method):
    with pytest.raises(ModelError, match=f"{method} needs attention of all patches .* no attention that is seen"):
        make_explainer(method, adapter_of(seeded(Plain)))


@pytest.mark.parametrize("method", METHODS)
def test_nothing_stays_on_the_model_after_an_exception(method):
    net = seeded(Transformer)
    one = make_explainer(method, adapter_of(net))
    with pytest.raises((RuntimeError, IndexError)):
        one.explain(smooth(1, 32, 32), ClassLogit(torch.tensor([[99]])))
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in net.modules())
    assert not torch.overrides._get_current_function_mode_stack()
    assert np.isfinite(one.explain(smooth(1, 32, 32), ClassLogit(torch.tensor([[1]])))[0][0].saliency_hw).all()


# ---------------------------------------------------------------- tokens left out

ROTARY = "timm, EVA"
"""Its positions enter in every block."""


def natively(net, name, x, kept):
    """The logits of a library's own hook behind the positions, where the kept tokens are gathered."""
    places = {
        "timm": "patch_drop",
        "timm, no class token": "patch_drop",
        "timm, 4 registers": "patch_drop",
        "timm, attention pooler": "patch_drop",
        "timm, DeiT": "patch_drop",
        "torchvision": "encoder.dropout",
        "transformers, ViT": "model.vit.embeddings",
        "transformers, DINOv2": "model.dinov2.embeddings",
        "transformers, DINOv2 with registers": "model.dinov2_with_registers.embeddings",
        "transformers, CLIP": "tower.embeddings",
        "transformers, SigLIP": "tower.embeddings",
        "open_clip": "tower.patch_dropout",
        "open_clip, attention pooler": "tower.patch_dropout",
    }

    def gather(_module, _given, tokens):
        prefix = tokens.shape[1] - 16
        chosen = [*range(prefix), *(prefix + one for one in kept)]
        return tokens[:, chosen]

    with net.get_submodule(places[name]).register_forward_hook(gather), torch.no_grad():
        return net(x)


@pytest.mark.parametrize("name", [name for name in GLOBAL if name != ROTARY])
def test_dropping_equals_a_hook_by_hand_in_every_library(name):
    net = made(GLOBAL[name])
    adapter = adapter_of(net, SIDE)
    kept = [1, 2, 6, 11, 15]
    x = smooth(2, SIDE, SIDE)
    with adapter.borrowed(), torch.no_grad():
        found = TokenDropping(adapter).logits(x, torch.tensor(kept).expand(2, -1))
        whole = adapter.logits(x)
    wanted = natively(net, name, x, kept)
    assert (found - wanted).abs().max() <= 1e-2 * (wanted - whole).abs().max()
    assert (wanted - whole).abs().max() > 1e-4


@pytest.mark.parametrize("name", [*WINDOWED, ROTARY])
def test_windows_and_rotary_positions_are_refused(name):
    adapter = adapter_of(made({**GLOBAL, **WINDOWED}[name]), SIDE)
    with pytest.raises(ModelError, match="the baseline drop needs"):
        make_explainer("rise", adapter, RiseParameters(num_masks=4, baseline="drop"))


# ---------------------------------------------------------------- attentions that cannot be followed


@pytest.mark.parametrize("method", ["daam", "legrad", "chefer"])
@pytest.mark.parametrize("name", CHANGED)
def test_weights_that_change_before_they_are_used_are_no_attention(name, method):
    """Of ConViT's three attentions only the last is plain; a map of it alone would pass for the network's."""
    with pytest.raises(ModelError, match=r"softmaxes before they weigh|more than one softmax|was seen"):
        make_explainer(method, adapter_of(made(CHANGED[name]), SIDE))


@pytest.mark.parametrize("name", GLOBAL)
def test_no_attention_is_missed(name, doubles):
    adapter = doubles(name)
    with adapter.borrowed(), torch.no_grad(), explicit_attention(adapter.module, lambda _: None) as missed:
        adapter.logits(smooth(1, 32, 32))
    assert missed == []


# ---------------------------------------------------------------- texts as classes


@pytest.mark.parametrize("explainer", ["libra(chefer)", "occlusion"])
def test_two_prompts_have_two_maps_each_on_its_own_object(explainer):
    """On a CLIP that learned pictures of one and two objects by their captions."""
    pixels, classes, boxes = planted.pairs(8, 1_000_001)
    right = []
    for picture, own, places in zip(pixels, classes.tolist(), boxes, strict=True):
        prompts = [[planted_clip.prompt(planted.CLASS_NAMES[one])] for one in own]
        adapter = planted_clip.adapter_with_texts(planted_clip.stored_clip()).with_prompts(prompts)
        parameters = OcclusionParameters(window=8, stride=8, baseline="drop") if explainer == "occlusion" else None
        explain = make_explainer(explainer, adapter, parameters).explain
        [maps] = explain(adapter.normalise(picture[None]), ClassLogit(torch.tensor([[0, 1]])))
        for number, one in enumerate(maps):
            inside = [planted.energy_inside(torch.from_numpy(one.saliency_hw), place) for place in places]
            right.append(inside[number] > inside[1 - number])
    assert sum(right) >= 15
