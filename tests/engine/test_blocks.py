"""Block discovery: the table of the paper, torchvision's families, hand-made graphs, names by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.blocks import Place, discover_blocks
from engine.errors import ModelError
from engine.models import ModelAdapter, load_model
from engine.network import unavoidable_nodes
from tests.engine.nets import Plain, Residual, Untraceable, seeded


def blocks_of(architecture):
    adapter = load_model(f"torchvision:{architecture}", weights="random")
    return [(block.name, block.channels, block.grid[0]) for block in adapter.network.blocks()]


def test_vgg16_has_the_papers_1472_maps():
    names = ["features_3", "features_8", "features_15", "features_22", "features_29"]
    assert blocks_of("vgg16") == list(zip(names, [64, 128, 256, 512, 512], [224, 112, 56, 28, 14], strict=True))


@pytest.mark.parametrize(("architecture", "third"), [("resnet50", 5), ("resnet101", 22)])
def test_resnets_have_the_papers_3904_maps(architecture, third):
    names = ["relu", "layer1_2_relu_2", "layer2_3_relu_2", f"layer3_{third}_relu_2", "layer4_2_relu_2"]
    assert blocks_of(architecture) == list(zip(names, [64, 256, 512, 1024, 2048], [112, 56, 28, 14, 7], strict=True))


@pytest.mark.parametrize(
    ("architecture", "channels"),
    [
        ("densenet121", [64, 128, 256, 512, 1024]),
        ("efficientnet_b0", [96, 144, 240, 672, 1280]),
        ("mobilenet_v3_large", [64, 72, 240, 672, 960]),
        ("regnet_y_400mf", [32, 48, 104, 208, 440]),
        ("convnext_tiny", [96, 192, 384, 768]),
    ],
)
def test_families_give_a_block_per_resolution(architecture, channels):
    found = blocks_of(architecture)
    assert [own for _, own, _ in found] == channels
    assert [size for _, _, size in found] == [112, 56, 28, 14, 7][-len(channels) :]


def test_efficientnet_lite0_has_2432_maps():
    pytest.importorskip("efficientnet_lite_pytorch", reason="the demo extra is not installed")
    network = load_model("efficientnet_lite0").network
    assert [block.channels for block in network.blocks()] == [96, 144, 240, 672, 1280]


def place(name, grid, *, learned=True, unavoidable=True):
    return Place(name, 8, (grid, grid) if grid else None, unavoidable, learned)


def names(places):
    return [found.name for found in discover_blocks(places)]


def test_the_last_unavoidable_tensor_of_each_size_wins():
    places = [
        place("a", 32),
        place("b", 32),
        place("inner", 32, unavoidable=False),
        place("c", 16),
        place("head", None),
    ]
    assert names(places) == ["b", "c"]


def test_padding_and_pooling_make_no_block():
    places = [
        place("pad", 33, learned=False),
        place("conv", 16),
        place("pad2", 17, learned=False),
        place("pool", 8, learned=False),
    ]
    assert names(places) == ["conv"]


def test_an_unpadded_convolution_begins_no_block():
    places = [place("a", 62), place("b", 60), place("pool", 30, learned=False), place("c", 28), place("d", 26)]
    assert names(places) == ["b", "d"]


def test_normalisation_inside_the_model_is_no_block():
    assert names([place("scale", 32, learned=False), place("conv", 16), place("point", 1)]) == ["conv"]


def test_unavoidable_nodes_of_a_shortcut():
    feeds = {"in": [], "a": ["in"], "b": ["a"], "add": ["a", "b"], "out": ["add"]}
    assert unavoidable_nodes(feeds) == {"in", "a", "add", "out"}
    around = {"in": [], "a": ["in"], "out": ["a", "in"]}
    assert unavoidable_nodes(around) == {"in", "out"}


@st.composite
def graphs(draw):
    size = draw(st.integers(2, 8))
    feeds = {0: []}
    for node in range(1, size):
        feeds[node] = draw(st.lists(st.integers(0, node - 1), min_size=1, max_size=3, unique=True))
    return feeds


def paths_to(feeds, node):
    if node == 0:
        return [[0]]
    return [[*path, node] for before in feeds[node] for path in paths_to(feeds, before)]


@settings(max_examples=200, deadline=None)
@given(graphs())
def test_unavoidable_nodes_lie_on_every_path(feeds):
    paths = paths_to(feeds, len(feeds) - 1)
    wanted = {node for node in feeds if all(node in path for path in paths)}
    assert unavoidable_nodes(feeds) == wanted


def test_names_by_hand():
    network = ModelAdapter(seeded(Plain), input_size=(32, 32)).network
    assert [block.name for block in network.blocks(["features.4", "features_7"])] == ["features_4", "features_7"]
    assert network.blocks(["features"])[0].name == "features_8"
    with pytest.raises(ModelError, match=r"no block 'featurs.4'.*nearest: .*features"):
        network.blocks(["featurs.4"])
    with pytest.raises(ModelError, match="is no feature map"):
        network.blocks(["head"])


def test_a_shortcuts_inside_is_avoidable():
    found = ModelAdapter(seeded(Residual), input_size=(24, 24)).network.blocks()
    assert [(block.channels, block.grid) for block in found] == [(8, (24, 24)), (12, (12, 12))]
    assert found[0].name.startswith("relu")


def test_what_cannot_be_traced_is_read_by_its_modules():
    network = ModelAdapter(seeded(Untraceable), input_size=(24, 24)).network
    assert network.graph is None
    assert [block.name for block in network.blocks()] == ["first", "second"]


class NoMaps(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3 * 64, 4)

    def forward(self, x):
        return self.head(x.flatten(1))


def test_a_network_without_feature_maps_says_so():
    with pytest.raises(ModelError, match=r"no block was found in NoMaps.*--blocks"):
        ModelAdapter(NoMaps(), input_size=(8, 8)).network.blocks()


class ChannelsLast(torch.nn.Module):
    """Turns its maps to [N, h, w, C], as attention over windows does."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 3, padding=1)
        self.norm = torch.nn.LayerNorm(6)
        self.head = torch.nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.norm(self.conv(x).permute(0, 2, 3, 1)).mean((1, 2)))


def test_channels_last_tensors_are_not_read_as_grids():
    found = ModelAdapter(seeded(ChannelsLast), input_size=(32, 32)).network.blocks()
    assert [(block.name, block.channels, block.grid) for block in found] == [("conv", 6, (32, 32))]
