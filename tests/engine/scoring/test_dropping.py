"""The baseline `drop`: by hand, slow twins, native hooks of the libraries, batches, and refusals."""

from functools import partial

import pytest
import torch
from torch import nn

from blocksight.engine.catalog.parameters import (
    AdaSiseParameters,
    OcclusionParameters,
    RiseParameters,
    ScoreCamParameters,
    SiseParameters,
)
from blocksight.engine.errors import ModelError
from blocksight.engine.explainers import make_explainer
from blocksight.engine.explainers.occlusion import Windows
from blocksight.engine.metrics import MASKED, masked_metrics
from blocksight.engine.metrics.metric import Maps, ranks_of
from blocksight.engine.model.targets import ClassLogit, ClassProbability
from blocksight.engine.model.token_dropping import TokenDropping
from blocksight.engine.saliency import minmax
from blocksight.engine.scoring.dropping import PatchMasks, make_scorer
from blocksight.engine.scoring.scorer import MaskSet
from tests.engine import oracles
from tests.engine import slow_explainers as slow
from tests.engine.explainers.test_token_methods import Hand, adapter_of, hand_picture
from tests.engine.nets import AttendingBlock, Plain, Transformer, seeded, smooth


class Placed(Transformer):
    """With positions, for pictures of 16 x 16 pixels: 4 x 4 patches."""

    def __init__(self, *, prefix: int = 1) -> None:
        super().__init__(prefix=prefix)
        self.positions = nn.Parameter(torch.randn(1, prefix + 16, 12))

    def tokens(self, x):
        return super().tokens(x) + self.positions


def placed(prefix=1):
    return adapter_of(seeded(partial(Placed, prefix=prefix)), 16)


def binary(patterns):
    """Masks of patches [K, h, w] from rows of characters, x is kept."""
    return torch.tensor([[[one == "x" for one in row] for row in rows.split()] for rows in patterns]).double()


# ---------------------------------------------------------------- by hand


def test_two_of_four_patches_by_hand():
    """Tokens (2, 0) and (1, 1) beside the class token (0, 0): even attention over three gives (1, 1/3)."""
    net, picture = Hand().eval(), hand_picture()
    net.blocks[0].bias = torch.zeros(1)  # even attention over any number of tokens
    adapter = adapter_of(net, 4)
    scorer = make_scorer(adapter, "drop", 3)
    masks = PatchMasks(0, binary(["xx ..", "x. ..", "xx xx"]))
    (scores,) = scorer.scores(picture, ClassLogit(torch.tensor([[0, 1]])), [masks])
    assert scores.flatten().tolist() == pytest.approx([1, 1 / 3, 1, 0, 0.4, 0.4])


def kept_of(source, adapter=None):
    """Rows of x and . of every mask, as it is applied to a picture."""
    adapter = adapter or placed()
    applied = make_scorer(adapter, "drop", 1).applied(torch.zeros(1, 3, 16, 16), source)
    return [" ".join("".join("x" if one else "." for one in row) for row in own) for own in applied.values_khw]


def soft(values):
    """A mask that is even over each of 16 patches."""
    own = torch.tensor(values).view(1, 4, 4).double()
    return MaskSet(0, own.repeat_interleave(4, 1).repeat_interleave(4, 2))


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ([0.9, 0.8, 0.7] + 13 * [0.1], "xx.. .... .... ...."),  # 3 lie above a half, and of 2 and 4 the lower is taken
        ([0.1] * 12 + [0.6, 0.9, 0.8, 0.7], ".... .... .... xxxx"),
        ([0.6] * 5 + [0.5] * 11, "xxxx .... .... ...."),  # a half is not above a half; of equal ones the first
        ([0.5] * 5 + [0.7] + [0.5] * 10, ".... .x.. .... ...."),  # one at least
        ([0.2] * 16, "x... .... .... ...."),
        ([1.0] * 16, "xxxx xxxx xxxx xxxx"),
    ],
)
def test_a_soft_mask_keeps_whole_eighths(values, kept):
    assert kept_of(soft(values)) == [kept]


def test_a_binary_mask_keeps_as_many_patches_as_its_area():
    inside = torch.zeros(2, 16)
    rows = torch.ones(2, 16)
    rows[0, 4:8] = 0
    rows[1, 4:12] = 0
    columns = torch.ones(2, 16)
    columns[:, :4] = 0
    assert kept_of(Windows(0, rows, columns)) == ["xxxx .xxx xxxx xxxx", "xxxx .xxx .xxx xxxx"]
    assert kept_of(Windows(0, inside, inside)) == 2 * ["x... .... .... ...."]
    assert kept_of(PatchMasks(0, binary(["x.x. .... .x.. ...x"]))) == ["x.x. .... .x.. ...x"]


# ---------------------------------------------------------------- twins


def test_every_pass_is_of_the_kept_tokens_alone_and_none_is_wasted():
    adapter, seen = placed(), []
    scorer = make_scorer(adapter, "drop", 2)
    adapter.module.blocks[0].register_forward_hook(lambda _, given, made: seen.append((given[0].shape, made.shape)))
    masks = binary(["xxxx .... .... ....", "x... .... .... ....", "...x ...x ...x ...x", "xxxx xxxx xxxx xxxx"])
    masks = torch.cat([masks, masks[:1]])
    scorer.scores(smooth(2, 16, 16), ClassLogit(torch.zeros(2, 1).long()), [PatchMasks(1, masks)])
    assert [tuple(given) for given, _ in seen] == [(2, 1 + count, 12) for count in (1, 4, 4, 16)]


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_scores_equal_a_transformer_over_the_kept_tokens(batch_size, prefix):
    adapter, inputs = placed(prefix), smooth(2, 16, 16)
    target = ClassProbability(torch.tensor([[0, 4], [2, 1]]))
    drawn = torch.rand(9, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.4
    drawn[:, 0, 0] = True
    sources = [PatchMasks(1, drawn[:5].double()), PatchMasks(0, drawn[5:].double())]
    with adapter.borrowed():
        found = make_scorer(adapter, "drop", batch_size).scores(inputs, target, sources)
    twin = oracles.double_copy(adapter.module)
    for own, source in zip(found, sources, strict=True):
        for scores, kept in zip(own, source.values_khw, strict=True):
            logits = slow.without_tokens(twin, inputs[source.image].double(), kept)
            wanted = [float(oracles.probability(logits, int(one))) for one in target.classes[source.image]]
            assert scores.tolist() == pytest.approx(wanted, rel=1e-5)


def test_scores_do_not_depend_on_the_company_in_a_batch():
    """Bit by bit, for one batch size."""
    adapter, inputs = placed(), smooth(3, 16, 16)
    drawn = (torch.rand(30, 4, 4, generator=torch.Generator().manual_seed(2)) < 0.5).double()
    drawn[:, 0, 0] = 1
    target, scorer = ClassLogit(torch.tensor([[1], [2], [3]])), make_scorer(adapter, "drop", 4)
    together = scorer.scores(inputs, target, [PatchMasks(image, drawn) for image in (2, 0, 1)])
    (alone,) = scorer.scores(inputs[2:], target.of(slice(2, 3)), [PatchMasks(0, drawn)])
    assert torch.equal(together[0], alone)


# ---------------------------------------------------------------- methods


def test_rise_adds_what_is_kept():
    adapter, inputs = placed(), smooth(1, 16, 16)
    parameters = RiseParameters(num_masks=40, grid=4, baseline="drop")
    [[found]] = make_explainer("rise", adapter, parameters, batch_size=4).explain(
        inputs, ClassProbability(torch.tensor([[1]])), [7]
    )
    wanted = slow.rise_of_tokens(
        oracles.double_copy(adapter.module), inputs[0].double(), 1, 7, num_masks=40, grid=4, keep=0.5
    )
    assert torch.from_numpy(found.saliency_hw).sub(wanted).abs().max() <= 1e-5 * wanted.max()
    assert found.num_forwards == 40


def test_occlusion_charges_the_patches_that_are_left_out():
    adapter, inputs = placed(), smooth(1, 16, 16)
    parameters = OcclusionParameters(window=8, stride=4, baseline="drop")
    [[found]] = make_explainer("occlusion", adapter, parameters).explain(
        inputs, ClassProbability(torch.tensor([[1]])), [0]
    )
    wanted = slow.occlusion_of_tokens(oracles.double_copy(adapter.module), inputs[0].double(), 1, window=2)
    assert torch.from_numpy(found.saliency_hw).sub(wanted).abs().max() <= 1e-5 * wanted.max()
    assert wanted.max() > 1e-3


def test_sise_adds_what_is_kept_by_its_score_over_its_area():
    adapter, inputs = placed(), smooth(1, 16, 16)
    [[found]] = make_explainer("sise", adapter, SiseParameters(baseline="drop")).explain(
        inputs, ClassProbability(torch.tensor([[1]])), [0]
    )
    twin, image = oracles.double_copy(adapter.module), inputs[0].double()
    (block,) = found.blocks
    tokens = twin.blocks[0](twin.tokens(image[None]))[0, 1:]
    total = torch.zeros(4, 4, dtype=torch.float64)
    for channel in block.kept:
        mask = oracles.minmax(oracles.upsample(tokens[:, channel].view(1, 4, 4), (16, 16))[0])
        kept = slow.kept_eighths(mask, 4)
        score = oracles.probability(slow.without_tokens(twin, image, kept), 1)
        total += score / kept.sum() * kept
    wanted = oracles.minmax(oracles.upsample(total[None], (16, 16))[0])
    assert torch.from_numpy(block.saliency_hw).sub(wanted).abs().max() <= 1e-5


def test_score_cam_takes_drop():
    adapter, inputs = placed(), smooth(1, 16, 16)
    target = ClassProbability(torch.tensor([[1]]))
    grey, dropped = (
        make_explainer("scorecam", adapter, ScoreCamParameters(baseline=baseline)).explain(inputs, target, [0])[0][0]
        for baseline in ("zero", "drop")
    )
    assert abs(grey.saliency_hw - dropped.saliency_hw).max() > 1e-4


# ---------------------------------------------------------------- metrics


def measured(adapter, baseline, saliency, batch_size=4):
    inputs, target = smooth(1, 16, 16), ClassProbability(torch.tensor([[1]]))
    with adapter.borrowed(), torch.no_grad():
        scores = target.score(adapter.logits(inputs), torch.arange(1)).tolist()
    maps = Maps(inputs, target, [[saliency]], scores, [[1]], [[None]], [3], [3])
    every = [own.evaluate(maps)[0][0] for own in masked_metrics(adapter, baseline, batch_size)]
    return {name: value for one in every for name, value in one.items()}


def test_metrics_leave_out_as_many_patches_as_pixels():
    adapter = placed()
    values = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(4)).double()
    saliency = minmax(nn.functional.interpolate(values, scale_factor=4, mode="bilinear")[0, 0].numpy())
    found = measured(adapter, "drop", saliency)
    twin, image = oracles.double_copy(adapter.module), smooth(1, 16, 16)[0].double()
    ranks = torch.from_numpy(ranks_of(saliency))

    def score(mask):
        return float(oracles.probability(slow.without_tokens(twin, image, slow.kept_of_area(mask, 4)), 1))

    deleted = [score(ranks >= round(step / 28 * 256)) for step in range(29)]
    inserted = [score(ranks < round(step / 28 * 256)) for step in range(29)]
    assert found["deletion"].curve == pytest.approx(deleted, rel=1e-5)
    assert found["insertion"].curve == pytest.approx(inserted, rel=1e-5)
    whole, kept = deleted[0], score(ranks < int(0.15 * 256))
    assert found["drop"].value == pytest.approx(100 * max(0, whole - kept) / whole, rel=1e-4)


def test_metrics_that_paint_in_shares_take_zero_and_say_so():
    adapter = placed()
    saliency = minmax(smooth(1, 16, 16)[0, 0].double().numpy())
    dropped, painted = (measured(adapter, baseline, saliency) for baseline in ("drop", "zero"))
    own = {"/".join(one.names): one for one in masked_metrics(adapter, "drop", 4)}
    zero = {"/".join(one.names): one for one in masked_metrics(adapter, "zero", 4)}
    for name, one in own.items():
        is_painted = one.details()["baseline"] not in ("drop",)
        assert is_painted == (name in ("road_morf", "road_lerf") or name.startswith(("average", "positive")))
        assert (one.protocol == zero[name].protocol) == is_painted
        for value in one.names:
            assert (dropped[value] == painted[value]) == is_painted or value in ("increase", "pos", "neg")
    assert {type(one) for one in own.values()} == set(MASKED.values())


# ---------------------------------------------------------------- refusals


class Overlapping(Placed):
    """Its patches hear their neighbours before they are tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 3, padding=1)

    def tokens(self, x):
        return super().tokens(self.stem(x))


class Counted(AttendingBlock):
    """Adds positions of its own: the first ones, however many tokens there are."""

    def __init__(self) -> None:
        super().__init__(12, 2, fused=False)
        self.places = nn.Parameter(torch.randn(1, 17, 12))

    def forward(self, x):
        return super().forward(x + self.places[:, : x.shape[1]])


class CountedEverywhere(Placed):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Counted(), Counted()])


class Whole(Placed):
    """Its head reads all places."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(17 * 12, 5)

    def forward(self, x):
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        return self.wide(self.norm(x).flatten(1))


class Packed(AttendingBlock):
    """Takes its tokens in a list."""

    def __init__(self) -> None:
        super().__init__(12, 2, fused=False)

    def forward(self, packed):
        return [super().forward(packed[0])]


class PackedEverywhere(Placed):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Packed(), Packed()])

    def forward(self, x):
        packed = [self.tokens(x)]
        for block in self.blocks:
            packed = block(packed)
        return self.head(self.norm(packed[0])[:, 0])


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (PackedEverywhere, "no tokens of 16 patches enter blocks.0"),
        (Overlapping, "a patch enters 4 tokens of the first block"),
        (CountedEverywhere, "with 8 of 16 patches its logits are not those of a full pass"),
        (Whole, "with 8 of 16 patches it fails: mat1 and mat2"),
        (Plain, "no attention that is seen"),
    ],
)
def test_a_network_that_cannot_do_without_tokens_is_refused(make, why):
    with pytest.raises(ModelError, match=why) as refused:
        TokenDropping(adapter_of(seeded(make), 32 if make is Plain else 16))
    assert str(refused.value).endswith("take the baseline zero, which paints patches over")


def test_a_picture_that_patches_do_not_divide_is_refused():
    class Cut(Placed):
        def tokens(self, x):
            return super().tokens(x[:, :, :16, :16])

    with pytest.raises(ModelError, match="does not divide the picture"):
        TokenDropping(adapter_of(seeded(Cut), 18))


def test_windows_that_never_hide_a_patch_are_refused():
    with pytest.raises(ModelError, match="windows of 2 pixels, 2 apart, never leave out some patches of 4 x 4 pixels"):
        make_explainer("occlusion", placed(), OcclusionParameters(window=2, stride=2, baseline="drop"))


@pytest.mark.parametrize("kind", [SiseParameters, AdaSiseParameters])
def test_a_budget_is_refused(kind):
    with pytest.raises(ValueError, match="a budget predicts scores of painted pictures"):
        kind(budget=0.1, baseline="drop")


def test_the_model_is_given_back_without_hooks():
    adapter = placed()
    TokenDropping(adapter)
    assert not any(own._forward_pre_hooks or own._forward_hooks for own in adapter.module.modules())
