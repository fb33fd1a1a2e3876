"""Proofs of places: the axes follow the picture, and nothing goes around a block; what fails them is refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from blocksight.engine.errors import ModelError
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.layouts import Layout
from blocksight.engine.model.proofs import (
    ELSEWHERE,
    NO_PICTURE,
    NO_PLACES,
    NO_READING,
    NOT_THE_BATCH,
    POOLED,
    leaks,
    probe_pictures,
    proved_reading,
)
from tests.engine.nets import Transformer, seeded, smooth


def found_in(net, side=32):
    return ModelAdapter(seeded(net), input_size=(side, side)).network


# ---------------------------------------------------------------- readings


def read(change, side=48, *grids):
    """The reading of a tensor that is made of the probe pictures' own 8 x 8 means."""
    maps = functional.avg_pool2d(probe_pictures(smooth(2, side, side)), side // 8)
    return proved_reading(change(maps), (side, side), grids)


def tokens(maps, prefix):
    rows = maps.flatten(2).transpose(1, 2)
    return torch.cat([torch.ones(len(maps), prefix, 3), rows], 1)


@pytest.mark.parametrize(
    ("change", "layout"),
    [
        (lambda maps: maps, Layout("channels first", 3, (8, 8))),
        (lambda maps: maps.permute(0, 2, 3, 1), Layout("channels last", 3, (8, 8))),
        (lambda maps: maps.repeat(1, 3, 1, 1).permute(0, 2, 3, 1), Layout("channels last", 9, (8, 8))),
        (lambda maps: maps.repeat(1, 3, 1, 1), Layout("channels first", 9, (8, 8))),
        (lambda maps: tokens(maps, 0), Layout("tokens", 3, (8, 8))),
        (lambda maps: tokens(maps, 17), Layout("tokens", 3, (8, 8), 17)),
    ],
)
def test_axes_are_told_by_what_moves(change, layout):
    """Nine channels beside eight cells have two readings by their aspect, and one by the picture."""
    assert read(change).layout == layout


def within(maps, *corners):
    """The maps with all cells but those of some corners at zero."""
    keep = torch.zeros_like(maps)
    for rows, columns in corners:
        keep[:, :, rows, columns] = 1
    return maps * keep


UPPER, LOWER, ALL = slice(0, 4), slice(4, 8), slice(0, 8)


@pytest.mark.parametrize("part", [(ALL, UPPER), (ALL, LOWER), (UPPER, ALL), (LOWER, ALL)])
def test_a_network_may_look_at_a_half_of_the_picture(part):
    assert read(lambda maps: within(maps, part)).layout == Layout("channels first", 3, (8, 8))


@pytest.mark.parametrize("part", [(ALL, UPPER), (LOWER, ALL)])
def test_a_class_token_may_see_more_than_the_cells_do(part):
    def change(maps):
        rows = tokens(within(maps, part), 1)
        return torch.cat([maps.mean((2, 3))[:, None], rows[:, 1:]], 1)

    assert read(change).layout == Layout("tokens", 3, (8, 8), 1)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda maps: maps.transpose(2, 3), ELSEWHERE),
        (lambda maps: maps.flip(3), ELSEWHERE),
        (lambda maps: tokens(maps.mean(3, keepdim=True).repeat_interleave(2, 2), 0), NO_READING),
        (lambda maps: within(maps, (slice(1, 3), slice(6, 8))), NO_READING),
        (lambda maps: maps.masked_fill(maps > 2 * maps[0].max(), torch.inf), NO_READING),
        (lambda maps: 1 + 1e-7 * tokens(functional.adaptive_avg_pool2d(maps, 3), 0), NO_PICTURE),
        (lambda maps: maps.flatten(1), POOLED),
        (lambda maps: maps.mean((1, 2, 3)), NO_PLACES),
        (lambda maps: maps.to_sparse(), NO_PLACES),
        (lambda maps: within(maps, (slice(0, 2), slice(0, 2)), (slice(6, 8), slice(6, 8))), NO_READING),
        (lambda maps: tokens(maps, 1)[:, torch.randperm(65, generator=torch.Generator().manual_seed(0))], NO_READING),
        (lambda maps: maps.mean((2, 3), keepdim=True).expand(-1, -1, 8, 8), NO_READING),
        (lambda maps: maps.flatten(2).permute(2, 0, 1), NOT_THE_BATCH),
        (lambda maps: maps.roll(1, 0) + maps, NO_READING),
        (lambda maps: torch.ones_like(maps).flatten(2), NO_PICTURE),
        (lambda _: torch.ones(7, 0, 8, 8), NO_PLACES),
        (lambda maps: maps * float("nan"), NO_READING),
        (lambda maps: maps.long(), NO_PLACES),
        (lambda _: 7, NO_PLACES),
    ],
    ids=[
        "transposed",
        "mirrored",
        "rows alone",
        "one patch",
        "infinite",
        "tokens that are nearly constant",
        "a row",
        "a number",
        "sparse",
        "the diagonal alone",
        "no raster",
        "one mean",
        "batch second",
        "mixed",
        "constant",
        "empty",
        "nan",
        "integers",
        "size",
    ],
)
def test_what_does_not_follow_the_picture_has_no_reading(change, fault):
    found = read(change)
    assert (found.layout, found.fault) == (None, fault)


def test_where_every_cell_hears_the_whole_picture_the_shape_tells_if_it_goes_on():
    """A finer grid than before is a matrix of attention, and mixed pictures are no maps."""

    def mean(maps):
        return maps.mean((2, 3), keepdim=True).expand(-1, -1, 8, 8)

    found = read(mean, 48, (48, 48), (8, 8))
    assert found.layout == Layout("channels first", 3, (8, 8))
    assert found.is_assumed
    assert read(mean, 48, (48, 48), (8, 7)).fault == NO_READING
    assert read(lambda maps: mean(maps).roll(1, 0) + mean(maps), 48, (8, 8)).fault == NO_READING


def test_a_tensor_that_hardly_moves_is_read_by_its_shape_and_says_so():
    found = read(lambda maps: 1 + 1e-7 * maps)
    assert found.layout == Layout("channels first", 3, (8, 8))
    assert found.is_assumed
    assert read(lambda maps: 1 + 1e-7 * maps.repeat(1, 3, 1, 1)).layout is None  # two readings


class Fed(nn.Module):
    """A CNN of three sizes whose picture or maps are changed on the way."""

    def __init__(self, change, place):
        super().__init__()
        self.stem, self.second = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1)
        self.last, self.head = nn.Conv2d(8, 9, 3, 2, 1), nn.Linear(9, 4)
        self.change, self.place = change, place

    def forward(self, x):
        for place, layer in enumerate((self.stem, self.second, self.last)):
            x = layer(self.change(x) if place == self.place else x).relu()
        return self.head(x.mean((2, 3)))


def cut(x):
    return x[:, :, :, : x.shape[3] * 3 // 4]


class Pooled(nn.Module):
    """Maps that are made of the means of others."""

    def __init__(self):
        super().__init__()
        self.drawn = nn.Linear(8, 8 * 64)

    def forward(self, x):
        return self.drawn(x.mean((2, 3))).view(-1, 8, 8, 8)


@pytest.mark.parametrize("is_traced", [True, False])
@pytest.mark.parametrize(
    ("change", "place", "known"),
    [
        (lambda x: x, 0, [(32, 32), (16, 16), (8, 8)]),
        (lambda x: x.flip(3), 0, []),
        (lambda x: x.transpose(2, 3), 0, []),
        (lambda x: functional.pad(x, (16,) * 4), 0, []),
        (cut, 0, []),
        (cut, 1, [(32, 32)]),
        (Pooled(), 2, [(32, 32), (16, 16)]),
    ],
    ids=["as it is", "mirrored", "transposed", "padded", "cut", "cut later", "pooled"],
)
def test_layers_behind_the_change_are_no_blocks(change, place, known, is_traced, monkeypatch):
    """The deepest of them hear too much to show where the picture lies: they follow the layer before."""
    if not is_traced:
        monkeypatch.setattr("blocksight.engine.model.network._trace", lambda *_: None)
    network = found_in(lambda: Fed(change, place), 64)
    if known:
        assert [block.grid for block in network.blocks()] == known
        assert (ELSEWHERE in network.beyond(network.blocks()[-1])) == (change is cut)
    else:
        with pytest.raises(ModelError, match="the picture lies elsewhere in it: cut, padded, turned"):
            network.blocks()


# ---------------------------------------------------------------- paths around a place


class Branching(nn.Module):
    """A residual sum, of which the trace sees nothing; `detached`: what goes around the branch has no gradient."""

    detached = False

    def __init__(self):
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.last, self.head = nn.Conv2d(6, 6, 3, stride=2, padding=1), nn.Linear(6, 4)

    def forward(self, x):
        assert bool(x.isfinite().all())
        x = self.stem(x)
        x = self.branch(x) + (x.detach() if self.detached else x)
        return self.head(self.last(x).relu().mean((2, 3)))


class Detached(Branching):
    detached = True


@pytest.mark.parametrize("net", [Branching, Detached])
def test_a_branch_of_an_untraced_network_is_no_block(net):
    network = found_in(net)
    assert network.graph is None
    assert [block.name for block in network.blocks()] == ["stem", "last"]
    assert not network.beyond(network.blocks()[-1])
    with pytest.raises(ModelError, match=r"'branch' is no block: the output still depends .* stem, last$"):
        network.blocks(["branch"])


class Gated(nn.Module):
    """A gate of the input goes around its maps."""

    def __init__(self):
        super().__init__()
        self.maps, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.maps(x).mean((2, 3))) * (1 + x.mean((1, 2, 3))[:, None])


@pytest.mark.parametrize("names", [(), ("maps",)])
def test_a_refusal_names_what_was_tried(names):
    with pytest.raises(ModelError, match=r"maps.*the output still depends on the picture"):
        found_in(Gated).blocks(names)


def test_a_way_around_is_shown_by_its_gradient_or_by_its_values():
    def run(around):
        return lambda x, hook: hook("place", x).sum((1, 2, 3)) + around(x)

    example = smooth(2, 8, 8)
    assert not leaks(run(lambda _: 0), example)
    assert leaks(run(lambda x: 0 * x.sum((1, 2, 3))), example)
    assert leaks(run(lambda x: x.sum((1, 2, 3)).detach()), example)
    assert not leaks(run(lambda _: torch.rand(2)), example)  # a dropout tells nothing


class Wrapped(nn.Module):
    """Layers that return tuples and dicts, one module that is called twice, a bias made of parameters alone."""

    class Layer(nn.Module):
        def __init__(self, form):
            super().__init__()
            self.conv, self.form = nn.Conv2d(3, 3, 3, padding=1), form

        def forward(self, x):
            return self.form(x + self.conv(x))

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.randn(1, 3, 16, 16))

        def forward(self, count):
            return self.bias.expand(count, -1, -1, -1) * 2

    def __init__(self):
        super().__init__()
        self.first, self.second = self.Layer(lambda x: (x, None)), self.Layer(lambda x: {"maps": x, "other": x})
        self.act, self.table, self.head = nn.Softplus(), self.Table(), nn.Linear(3, 4)

    def forward(self, x):
        assert bool(x.isfinite().all())
        x = self.act(self.first(x)[0])
        x = functional.avg_pool2d(self.second(x)["maps"], 2)
        x = self.act(x + self.table(len(x)))
        return self.head(x.mean((2, 3)))


def test_tuples_several_calls_and_parameters():
    network = found_in(Wrapped)
    assert [block.name for block in network.blocks()] == ["second", "act#2"]
    assert network.blocks(["act#1"])[0].grid == (32, 32)
    with pytest.raises(ModelError, match="'table' is no block: the output still depends on the picture"):
        network.blocks(["table"])
    taps = network.taps(network.blocks(["second"]))
    logits, (maps,) = taps(smooth(2, 32, 32))
    assert torch.equal(taps.tail()(smooth(2, 32, 32), maps), logits)


def test_data_parallel_has_the_blocks_of_its_module():
    import torchvision

    net = seeded(lambda: torchvision.models.resnet18(num_classes=7))
    plain, parallel = (ModelAdapter(one, input_size=(64, 64)).network.blocks() for one in (net, nn.DataParallel(net)))
    assert [block.layout for block in parallel] == [block.layout for block in plain]
    assert [block.name for block in parallel] == ["module.relu", *(f"module.layer{number}" for number in range(1, 5))]


@pytest.mark.parametrize("net", [Transformer, Branching])
def test_what_was_proved_holds_for_other_weights(net):
    """The sanity metric randomises weights, and a network that passes nothing on proves nothing."""
    adapter = ModelAdapter(seeded(net), input_size=(32, 32))
    names = [block.name for block in adapter.network.blocks()]
    dead = seeded(net)
    for weight in dead.parameters():
        weight.data.zero_()
    if net is Transformer:
        with pytest.raises(ModelError, match="is no feature map"):
            adapter.with_module(dead).network.blocks(names)
    other = adapter.with_weights_of(dead).network
    assert other.blocks(names) == adapter.network.blocks()
    assert not other.taps(other.blocks(names))(smooth(2, 32, 32))[0].any()
