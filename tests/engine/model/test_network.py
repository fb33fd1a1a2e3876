"""The traced network: which tensors every path passes, names by hand, and what cannot be traced."""

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from blocksight.engine.catalog.parameters import RiseParameters
from blocksight.engine.errors import ModelError
from blocksight.engine.explainers import make_explainer
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.paths import unavoidable_nodes
from blocksight.engine.model.proofs import LEAKS
from blocksight.engine.model.targets import ClassProbability
from tests.engine.nets import Plain, Residual, Untraceable, seeded, smooth

# ---------------------------------------------------------------- unavoidable nodes


@pytest.mark.parametrize(
    ("feeds", "wanted"),
    [
        ({"in": []}, {"in"}),
        ({"in": [], "a": ["in"], "out": ["a"]}, {"in", "a", "out"}),
        ({"in": [], "a": ["in"], "out": ["a", "in"]}, {"in", "out"}),
        ({"in": [], "a": ["in"], "b": ["a"], "add": ["a", "b"], "out": ["add"]}, {"in", "a", "add", "out"}),
        ({"in": [], "a": ["in"], "b": ["in"], "cat": ["a", "b"]}, {"in", "cat"}),
        ({"in": [], "a": ["in"], "b": ["a"], "c": ["a"], "d": ["b", "c"], "out": ["d"]}, {"in", "a", "d", "out"}),
        ({"in": [], "a": ["in"], "dead": ["a"], "out": ["a"]}, {"in", "a", "out"}),
        ({"in": [], "scale": [], "mul": ["in", "scale"], "out": ["mul"]}, {"in", "mul", "out"}),
        ({"in": [], "a": ["in", "elsewhere"], "out": ["a", "elsewhere"]}, {"in", "a", "out"}),
        ({"in": [], "gate": ["in"], "mul": ["in", "gate"], "out": ["mul"]}, {"in", "mul", "out"}),
    ],
)
def test_unavoidable_nodes_by_hand(feeds, wanted):
    assert unavoidable_nodes(feeds) == wanted


@st.composite
def graphs(draw):
    """Feeds of a small graph, of which some nodes may be dead ends or hang in the air."""
    size = draw(st.integers(1, 8))
    feeds = {0: []}
    for node in range(1, size):
        feeds[node] = draw(st.lists(st.integers(-1, node - 1), max_size=3, unique=True))
    if size > 1:
        feeds[size - 1] = sorted({*feeds[size - 1], draw(st.sampled_from(sorted(reachable(feeds))))} - {size - 1})
    return feeds


def reachable(feeds):
    found = {0}
    for node, before in feeds.items():
        if found & set(before):
            found.add(node)
    return found


def paths_to(feeds, node):
    if node == 0:
        return [[0]]
    return [[*path, node] for before in feeds.get(node, []) for path in paths_to(feeds, before)]


@settings(max_examples=300)
@given(graphs())
def test_unavoidable_nodes_lie_on_every_path(feeds):
    paths = paths_to(feeds, len(feeds) - 1)
    assert paths
    assert unavoidable_nodes(feeds) == {node for node in feeds if all(node in path for path in paths)}


def test_very_many_paths_are_counted_exactly():
    """2 ** 200 paths through a chain of shortcuts."""
    feeds = {0: []}
    for node in range(1, 601, 3):
        feeds |= {node: [node - 1], node + 1: [node - 1], node + 2: [node, node + 1]}
    assert unavoidable_nodes(feeds) == {0, *range(3, 601, 3)}


# ---------------------------------------------------------------- names by hand


@pytest.fixture(scope="module")
def plain():
    return ModelAdapter(seeded(Plain), input_size=(32, 32)).network


@pytest.fixture(scope="module")
def resnet():
    net = seeded(lambda: torchvision.models.resnet18(num_classes=7))
    return ModelAdapter(net, input_size=(64, 64)).network


def test_a_name_is_a_node_or_a_dotted_path(plain):
    assert [block.name for block in plain.blocks(["features.4", "features_7"])] == ["features_4", "features_7"]
    assert plain.blocks(["features"])[0].name == "features_8"  # a module's last tensor


def test_a_stage_of_a_resnet_is_its_last_tensor(resnet):
    found = resnet.blocks(["relu", "layer1", "layer3.0"])
    assert [block.name for block in found] == ["relu", "layer1_1_relu_1", "layer3_0_relu_1"]
    assert [block.grid for block in found] == [(32, 32), (16, 16), (4, 4)]


def test_named_blocks_win_over_the_rule(plain):
    assert [block.name for block in plain.blocks()] == ["features_1", "features_4", "features_7"]
    assert [block.name for block in plain.blocks(["features.0"])] == ["features_0"]


def test_named_blocks_come_shallow_to_deep(plain):
    """The cascade runs in this order: named the other way round it would be another method."""
    assert [block.name for block in plain.blocks(["features.7", "features.1"])] == ["features_1", "features_7"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("featurs.4", r"no block 'featurs.4' in Plain; nearest: .*features"),
        ("layer1", r"no block 'layer1' in Plain; nearest: .*features_1"),
        ("", "no block '' in Plain; there are features_0, "),
        ("head", "'head' is no feature map"),
        ("flatten", "'flatten' is no feature map"),
    ],
)
def test_a_name_that_is_no_block_is_one_sentence(plain, name, sentence):
    with pytest.raises(ModelError, match=sentence):
        plain.blocks([name])


def test_the_nearest_names_of_an_untraced_network():
    network = ModelAdapter(seeded(Untraceable), input_size=(24, 24)).network
    assert [block.name for block in network.blocks(["second", "first.0"][::-1])] == ["first.0", "second"]
    with pytest.raises(ModelError, match=r"no block 'frist' in Untraceable; nearest: .*first"):
        network.blocks(["frist"])


# ---------------------------------------------------------------- what is traced


def test_a_shortcuts_inside_is_avoidable():
    places = {place.name: place for place in ModelAdapter(seeded(Residual), input_size=(24, 24)).network.places}
    assert not places["inner"].is_unavoidable
    assert not places["down"].is_unavoidable
    assert not places["project"].is_unavoidable
    assert places["stem"].is_unavoidable
    assert places["stem"].has_weights
    assert not places["relu"].has_weights
    assert places["stem"].grid == (24, 24)
    assert (places["inner"].grid, places["inner"].fault) == (None, LEAKS)  # not read: it could be no block


def test_what_cannot_be_traced_is_read_by_its_modules():
    network = ModelAdapter(seeded(Untraceable), input_size=(24, 24)).network
    assert network.graph is None
    assert [block.name for block in network.blocks()] == ["first", "second"]
    assert [block.grid for block in network.blocks()] == [(24, 24), (12, 12)]


class Counting(nn.Module):
    """Computes with a number of its own, which a trace would fix for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.head(self.first(x).mean((2, 3)) * self.calls)


def test_a_trace_that_computes_something_else_is_not_used():
    assert ModelAdapter(seeded(Counting), input_size=(24, 24)).network.graph is None


def pair(x):
    x **= 2
    return x


OPERATIONS = {
    "method": lambda x: x.relu_(),
    "keyword": lambda x: functional.relu(x, inplace=True),
    "positional": lambda x: functional.leaky_relu(x, 0.1, True),
    "operator": pair,
    "torch-function": torch.relu_,
    "torch-clamp": lambda x: torch.clamp_(x, 0, 1),
    "functional": lambda x: functional.elu_(x),
}


class Overwriting(nn.Module):
    """Overwrites what its first convolution computes."""

    def __init__(self, operation: str) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)
        self.operation = operation

    def forward(self, x):
        return self.head(OPERATIONS[self.operation](self.first(x)).mean((2, 3)))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_tap_before_an_operation_in_place_is_not_overwritten(operation):
    net, inputs = seeded(lambda: Overwriting(operation)), smooth(1, 16, 16)
    adapter = ModelAdapter(net, input_size=(16, 16))
    with adapter.borrowed():
        logits, (maps,) = adapter.network.taps(adapter.network.blocks(["first"]))(inputs)
        assert torch.equal(maps, net.first(inputs))
        assert torch.allclose(logits, net(inputs), atol=1e-6)


def test_the_survey_consumes_no_global_random_numbers():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    assert ModelAdapter(seeded(Plain), input_size=(32, 32)).network.places
    assert torch.equal(torch.random.get_rng_state(), before)


class WithBuffer(nn.Module):
    """Reads a buffer of its own in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.4))
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.first(x - self.mean).relu().mean((2, 3)))


def test_the_trace_moves_with_the_model():
    adapter = ModelAdapter(seeded(WithBuffer), input_size=(16, 16))
    assert adapter.network.graph is not None
    adapter.to("meta")
    tensors = {**dict(adapter.network.graph.named_parameters()), **dict(adapter.network.graph.named_buffers())}
    assert {name: tensor.device.type for name, tensor in tensors.items()} == dict.fromkeys(tensors, "meta")


# ---------------------------------------------------------------- a module that runs several times


class OneRelu(nn.Module):
    """One ReLU behind each of two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, stride=2)
        self.relu, self.head = nn.ReLU(), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.relu(self.second(self.relu(self.first(x)))).mean((2, 3)))


class OneReluUntraced(OneRelu):
    """The same, in a forward that looks at its input, which cannot be traced."""

    def forward(self, x):
        assert bool(x.isfinite().all())
        return super().forward(x)


def both_of_one_relu():
    return [ModelAdapter(seeded(make), input_size=(24, 24)) for make in (OneRelu, OneReluUntraced)]


@pytest.mark.parametrize("explainer", ["sise", "ablationcam", "gradcam", "scorecam"])
def test_each_call_of_a_module_is_a_place_of_its_own(explainer):
    traced, untraced = both_of_one_relu()
    assert traced.network.graph is not None
    assert untraced.network.graph is None
    assert [place.name for place in untraced.network.blocks()] == ["relu#1", "relu#2"]
    target = ClassProbability(torch.tensor([[1], [2]]))
    one, other = (
        [own[0].saliency_hw for own in make_explainer(explainer, adapter).explain(smooth(2, 24, 24), target)]
        for adapter in (traced, untraced)
    )
    assert np.array_equal(one, other)


def test_a_module_without_a_number_means_its_last_call():
    _, untraced = both_of_one_relu()
    assert [place.name for place in untraced.network.blocks(["relu"])] == ["relu#2"]
    assert [place.name for place in untraced.network.blocks(["relu#1"])] == ["relu#1"]


# ---------------------------------------------------------------- tensors that hold no feature maps


class EmbeddedPlaces(nn.Module):
    """A transformer whose places are an embedding, of one picture or repeated for every picture."""

    def __init__(self, *, repeats: bool) -> None:
        super().__init__()
        self.repeats, self.patches, self.places = repeats, nn.Conv2d(3, 8, 4, 4), nn.Embedding(36, 8)
        self.layer, self.head = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 5)

    def forward(self, x):
        numbers = torch.arange(36, device=x.device)[None]
        places = self.places(numbers.expand(len(x), -1) if self.repeats else numbers)
        return self.head(self.layer(self.patches(x).flatten(2).transpose(1, 2) + places).mean(1))


@pytest.mark.parametrize("repeats", [False, True])
def test_an_embedding_of_places_holds_no_feature_maps(repeats):
    adapter = ModelAdapter(seeded(lambda: EmbeddedPlaces(repeats=repeats)), input_size=(24, 24))
    (places,) = [place for place in adapter.network.places if place.name == "places"]
    assert places.layout is None
    ((one,),) = make_explainer("gradcam", adapter).explain(smooth(1, 24, 24), ClassProbability(torch.tensor([[1]])))
    assert one.saliency_hw.shape == (24, 24)


class Within(nn.Module):
    """TorchScript behind a layer that can be read; torch cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Conv2d(3, 3, 1), torch.jit.script(seeded(OneRelu))

    def forward(self, x):
        return self.inner(self.first(x)) if x.sum() < 1e9 else x


def scripted():
    return torch.jit.script(seeded(OneRelu))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("make", [scripted, lambda: torch.jit.freeze(scripted().eval())])
def test_the_layers_of_torchscript_cannot_be_read_and_rise_needs_none(make):
    adapter = ModelAdapter(make(), input_size=(24, 24))
    calls = []
    adapter.module.register_forward_pre_hook(lambda *_: calls.append(1))  # as workers count their heartbeats
    with pytest.raises(ModelError, match=r"TorchScript, whose layers cannot be read: .* rise or occlusion"):
        adapter.network.blocks()
    rise = make_explainer("rise", adapter, RiseParameters(num_masks=8))
    calls.clear()
    ((one,),) = rise.explain(smooth(1, 24, 24), ClassProbability(torch.tensor([[1]])))
    assert one.saliency_hw.shape == (24, 24)
    assert calls


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_torchscript_within_a_model_is_one_place():
    adapter = ModelAdapter(Within(), input_size=(24, 24))
    assert [place.name for place in adapter.network.places] == ["first"]
    assert make_explainer("gradcam", adapter).explain(smooth(1, 24, 24), ClassProbability(torch.tensor([[1]])))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_torchscript_whose_weights_are_constants_cannot_be_told_apart():
    assert ModelAdapter(scripted(), input_size=(24, 24)).fingerprint
    with pytest.raises(ModelError, match=r"before torch\.jit\.freeze"):
        _ = ModelAdapter(torch.jit.freeze(scripted().eval()), input_size=(24, 24)).fingerprint


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda logits: logits > 0, "bool"),
        (lambda logits: (10 * logits).long(), "int64"),
        (lambda logits: logits.to(torch.complex64), "complex64"),
        (torch.Tensor.to_sparse, "sparse"),
    ],
)
def test_an_output_that_is_no_float_is_told(change, kind):
    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = seeded(OneRelu)

        def forward(self, x):
            return change(self.inner(x))

    with pytest.raises(ModelError, match=f"returns {kind} numbers, .* return what comes before the argmax"):
        _ = ModelAdapter(Changed(), input_size=(24, 24)).num_classes


def test_an_exported_program_is_told():
    exported = torch.export.export(seeded(OneRelu).eval(), (smooth(2, 24, 24),)).module()
    with pytest.raises(ModelError, match=r"program of torch\.export, .* return the module that it was made from"):
        _ = ModelAdapter(exported, input_size=(24, 24)).num_classes


def test_a_model_of_volumes_and_one_without_shapes():
    """Only weights of four dimensions have channels last; torch raises for others, and for lazy layers."""
    volumes = nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 4, 3), nn.Flatten(1, 2), nn.Flatten(1), nn.Linear(16, 5)
    )
    assert ModelAdapter(volumes, input_size=(4, 4)).num_classes == 5
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.Linear(16, 5))
    with pytest.raises(ModelError, match=r"0\.weight of model 'model' has no shape yet"):
        ModelAdapter(lazy, input_size=(4, 4))


class Windowed(nn.Module):
    """Cuts each image into four windows, which it joins to the batch: its maps are not one of each image."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
        self.head = nn.Linear(20, 3)

    def forward(self, x):
        maps = self.first(x).relu()
        windows = maps.unflatten(2, (2, 16)).unflatten(4, (2, 16)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        return self.head(self.second(windows).relu().mean((2, 3)).unflatten(0, (-1, 4)).flatten(1))


class UntraceableWindowed(Windowed):
    def forward(self, x):
        assert bool(x.isfinite().all())
        return super().forward(x)


@pytest.mark.parametrize("kind", [Windowed, UntraceableWindowed])
def test_a_map_of_windows_in_the_batch_is_no_block(kind):
    network = ModelAdapter(seeded(kind), input_size=(32, 32)).network
    assert {"relu_1", "second"} & {place.name for place in network.places}
    assert [place.name for place in network.places if place.grid and place.grid != (32, 32)] == []
    assert [block.grid for block in network.blocks()] == [(32, 32)]
