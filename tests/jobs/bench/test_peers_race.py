"""The race against the peers: who takes part, that all do the same job, and their order. No test measures time."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import replace

import captum.attr
import pytest
import torch
import torchcam.methods
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from blocksight.engine.catalog.forward_setting import ForwardSetting
from blocksight.engine.catalog.parameters import OcclusionParameters
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.jobs.bench import peers
from blocksight.jobs.bench.peers import CPU_BATCH_SIZES, PEERS, Contender, contenders, race
from blocksight.jobs.plan.config import ConfigError
from tests.engine.nets import Residual, seeded, smooth

SIDE = 32
WINDOWS = OcclusionParameters(window=8, stride=5)
NUM_WINDOWS = 36
SETTINGS = (ForwardSetting(batch_size=3), ForwardSetting(batch_size=8))


class Shared(nn.Module):
    """One activation module after two layers, as in EfficientNet-Lite0: its first output is not the last block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 9, 3, stride=2, padding=1)
        self.activation = nn.ReLU()
        self.head = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(self.last(self.activation(self.stem(x)))).mean((2, 3)))


class Untraceable(Shared):
    """A network that torch.fx cannot trace."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else x * 1)


class UntraceablePlain(nn.Module):
    """A network that torch.fx cannot trace, without a shared module."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Sequential(nn.Conv2d(3, 7, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(x if x.sum() > 0 else x * 1).mean((2, 3)))


class TwoZeroMaps(Shared):
    """A network whose last block has two maps that are 0 everywhere."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.last.weight[:2] = 0
            self.last.bias[:2] = -1


def transformer() -> nn.Module:
    net = VisionTransformer(
        image_size=SIDE, patch_size=8, num_layers=2, num_heads=2, hidden_dim=12, mlp_dim=16, num_classes=5
    )
    nn.init.normal_(net.heads.head.weight)  # torchvision starts it at zero
    return net


def adapter_of(make: Callable[[], nn.Module]) -> ModelAdapter:
    return ModelAdapter(seeded(make), input_size=(SIDE, SIDE))


def field_of(adapter: ModelAdapter) -> list[Contender]:
    return contenders(adapter, [(setting, adapter.logits) for setting in SETTINGS], WINDOWS)


def image() -> Tensor:
    return smooth(1, SIDE, SIDE)


def num_varied(adapter: ModelAdapter) -> int:
    """Number of the last block's maps that are not constant."""
    with adapter.borrowed():
        (maps,) = adapter.network.taps(adapter.network.blocks()[-1:])(image())[1]
    return int((maps[0].amax((1, 2)) > maps[0].amin((1, 2))).sum())


# ---------------------------------------------------------------- the same job for all


@pytest.mark.parametrize(
    ("make", "maps"), [(Shared, 9), (Residual, 12), (UntraceablePlain, 7), (Untraceable, 9), (transformer, 12)]
)
def test_all_score_every_map_or_window(make, maps):
    adapter = adapter_of(make)
    assert {(one.name, one.job, one.run(image())) for one in field_of(adapter)} == {
        ("blocksight", "Score-CAM", num_varied(adapter)),
        ("blocksight", "occlusion", NUM_WINDOWS),
        ("pytorch-grad-cam", "Score-CAM", maps),
        ("torch-cam", "Score-CAM", maps),
        ("captum", "occlusion", NUM_WINDOWS),
    }


def test_only_the_peers_score_constant_maps():
    counts = {one.name: one.run(image()) for one in field_of(adapter_of(TwoZeroMaps)) if one.job == "Score-CAM"}
    assert counts == {"blocksight": 7, "pytorch-grad-cam": 9, "torch-cam": 9}


def test_a_layer_with_other_maps_is_refused():
    """pytorch-grad-cam reads a shared module's first call."""
    own = peers._subject(adapter_of(Untraceable), WINDOWS, torch.float32, torch.contiguous_format)
    subject = replace(own, layer="network.activation")
    with pytest.raises(ConfigError, match=r"grad-cam scored 6 masks, expected 9: its layer 'network.activation'"):
        peers._masked_forwards(PEERS[0], subject, 16, image())


@pytest.mark.parametrize("make", [Shared, Untraceable])
def test_the_peers_network_computes_the_same(make):
    adapter = adapter_of(make)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        subject = peers._subject(adapter, WINDOWS, torch.float32, memory_format)
        with torch.no_grad():
            torch.testing.assert_close(subject.module(image()), adapter.logits(image()))
        kernels = [weight for weight in subject.module.parameters() if weight.dim() == 4]
        assert all(kernel.is_contiguous(memory_format=memory_format) for kernel in kernels)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_peer_leaves_no_hook_and_no_progress_bar(peer, capfd):
    subject = peers._subject(adapter_of(Shared), WINDOWS, torch.float32, torch.contiguous_format)
    peers._masked_forwards(peer, subject, 4, image())
    peers._probed_rate(peer, subject, 1, image())
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in subject.module.modules())
    assert capfd.readouterr() == ("", "")


def test_the_users_model_stays_as_it_was():
    adapter = adapter_of(Shared)
    before = {name: tensor.clone() for name, tensor in adapter.module.state_dict().items()}
    for one in field_of(adapter):
        one.run(image())
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.module.state_dict().items())
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in adapter.module.modules())
    assert not hasattr(adapter.network.graph, peers.LAYER)


# ---------------------------------------------------------------- as shipped, and helped


def batches_of(peer: peers.Peer, batch_size: int) -> list[int]:
    """The sizes of a peer's batches for a network with 40 maps in its last block, constant ones included."""

    class Wide(Shared):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.head = nn.Conv2d(6, 40, 3, stride=2, padding=1), nn.Linear(40, 5)

    sizes: list[int] = []
    subject = peers._subject(adapter_of(Wide), WINDOWS, torch.float32, torch.contiguous_format)
    subject.module.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    peer.explain(subject, image(), batch_size)
    return sizes


def test_a_peer_keeps_to_its_batch_size():
    assert [batches_of(peer, 16) for peer in PEERS] == [[1, 16, 16, 8], [1, 1, 16, 16, 8], [1, 1, 16, 16, 4]]


def test_shipped_batch_sizes_are_the_libraries_defaults():
    grad_cam, torchcam_, captum_ = PEERS
    scored = inspect.signature(torchcam.methods.ScoreCAM).parameters["batch_size"]
    occluded = inspect.signature(captum.attr.Occlusion.attribute).parameters["perturbations_per_eval"]
    assert (torchcam_.batch_size, captum_.batch_size) == (scored.default, occluded.default)
    source = inspect.getsource(sys.modules["pytorch_grad_cam.score_cam"])
    assert f"BATCH_SIZE = {grad_cam.batch_size}\n" in source


def test_each_peer_is_listed_twice_with_its_setting():
    field = field_of(adapter_of(Shared))
    assert [(one.name, one.job, one.how) for one in field if one.is_ours] == [
        ("blocksight", job, str(setting)) for setting in SETTINGS for job in ("Score-CAM", "occlusion")
    ]
    shipped, helped = (
        {one.name: one.how for one in field if one.how.startswith(word)} for word in ("as shipped", "helped")
    )
    assert shipped == {peer.name: f"as shipped: float32, batch {peer.batch_size}" for peer in PEERS}
    allowed = {f"helped: float32, channels last, batch {size}" for size in CPU_BATCH_SIZES}
    assert shipped.keys() == helped.keys()
    assert set(helped.values()) <= allowed


def test_the_fastest_batch_size_that_fits_is_taken(monkeypatch):
    def rate(peer: peers.Peer, subject: peers.Subject, size: int, image: Tensor) -> float:
        if size > 8:
            raise torch.OutOfMemoryError
        return {1: 3.0, 4: 9.0, 8: 7.0}[size]

    monkeypatch.setattr(peers, "_probed_rate", rate)
    helped = [one.how for one in field_of(adapter_of(Shared)) if one.how.startswith("helped")]
    assert helped == ["helped: float32, channels last, batch 4"] * 3


def test_a_probe_ends_early(monkeypatch):
    seen: list[peers.MaskedInputs] = []
    monkeypatch.setattr(peers, "NUM_PROBED", 5)
    counter = peers.MaskedInputs
    monkeypatch.setattr(peers, "MaskedInputs", lambda *args: seen.append(counter(*args)) or seen[-1])
    subject = peers._subject(adapter_of(Shared), WINDOWS, torch.float32, torch.contiguous_format)
    for peer in PEERS:
        assert peers._probed_rate(peer, subject, 2, image()) > 0
    assert [one.count for one in seen] == [6, 6, 6]


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_half_precision_is_taken_where_the_peer_can(peer):
    """Half precision is meant for a GPU; a CPU can do it too."""
    subject, precision = peers._in_half_where_it_runs(peer, adapter_of(Shared), WINDOWS, image())
    assert (subject.dtype, precision) == (torch.float16, "float16")
    assert peers._masked_forwards(peer, subject, 4, image()) == subject.num_masks(peer.job, image())
    subject, precision = peers._in_half_where_it_runs(peer, adapter_of(TwoZeroMaps), WINDOWS, image())
    if peer.job == "Score-CAM":  # both divide by a constant map's range of 0 and 1e-8, which is 0 in float16
        assert (subject.dtype, precision) == (torch.float32, "float32 (float16 gives NaN)")
    else:
        assert (subject.dtype, precision) == (torch.float16, "float16")


def test_an_error_of_a_peer_in_half_precision_is_reported():
    def fails(*_: object) -> Tensor:
        raise RuntimeError("not implemented for 'Half'")

    peer = replace(PEERS[0], explain=fails)
    subject, precision = peers._in_half_where_it_runs(peer, adapter_of(Shared), WINDOWS, image())
    assert (subject.dtype, precision) == (torch.float32, "float32 (float16 fails with RuntimeError)")


def test_a_missing_package_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcam", None)
    with pytest.raises(ConfigError, match=r"^torchcam cannot be imported: pip install '\.\[peers\]'$"):
        contenders(adapter_of(Shared), [])


# ---------------------------------------------------------------- the race


class Runners:
    """Contenders that note each run and move a clock by their seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, float]] = []
        self.clock = 0.0
        monkeypatch.setattr(peers, "_now", lambda _: self.clock)

    def contender(self, name: str, job: peers.Job, seconds: list[float], *, is_ours: bool = False) -> Contender:
        left = iter(seconds)

        def run(image: Tensor) -> int:
            self.log.append((name, float(image.mean())))
            self.clock += next(left)
            return 10

        return Contender(name, job, "", run, is_ours)


def test_contenders_take_turns(monkeypatch):
    runners = Runners(monkeypatch)
    field = [runners.contender(name, "Score-CAM", [1.0] * 6) for name in "abc"]
    inputs = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    race(field, inputs, repeats=3)
    assert runners.log == [(name, number) for name in "abc" for number in (0, 1)] * 3


def test_rows_hold_best_median_and_our_lead_at_the_same_job(monkeypatch):
    runners = Runners(monkeypatch)
    found = race(
        [
            runners.contender("slower", "Score-CAM", [5.0, 5.0, 5.0], is_ours=True),
            runners.contender("faster", "Score-CAM", [4.0, 1.0, 2.0], is_ours=True),
            runners.contender("peer", "Score-CAM", [10.0, 5.0, 4.0]),
            runners.contender("other", "occlusion", [2.0, 2.0, 2.0]),
        ],
        torch.zeros(1, 3, 4, 4),
        repeats=3,
    )
    assert [(row.num_forwards, row.best, row.median, row.ahead) for row in found.rows[:3]] == [
        (10, 2.0, 2.0, 5.0),
        (10, 10.0, 5.0, 1.0),
        (10, 2.5, 2.0, 4.0),
    ]
    assert found.rows[3].ahead != found.rows[3].ahead, "no contender of ours did this job"
    assert (found.num_images, found.repeats, found.num_threads) == (1, 3, torch.get_num_threads())
    assert inspect.signature(race).parameters["repeats"].default == 5
