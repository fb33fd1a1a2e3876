"""The race: our Score-CAM and occlusion against other libraries' on the same network, images and masks, in one run."""

import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from io import StringIO
from math import inf, nan
from statistics import median
from typing import Literal

import torch
from torch import Tensor, nn

from blocksight.engine.catalog.forward_setting import ForwardSetting
from blocksight.engine.catalog.parameters import OcclusionParameters, ScoreCamParameters
from blocksight.engine.explainers.explainer import Explainer
from blocksight.engine.explainers.occlusion import Occlusion, window_starts
from blocksight.engine.explainers.scorecam import ScoreCam
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.blocks import Place
from blocksight.engine.model.device_errors import DeviceTrouble, device_trouble, while_it_fits
from blocksight.engine.model.taps import hook_outputs
from blocksight.engine.scoring.forward import Forward
from blocksight.jobs.plan.config import ConfigError

Job = Literal["Score-CAM", "occlusion"]

REPEATS = 5
PACKAGES = ("pytorch_grad_cam", "torchcam", "captum")
LAYER = "last_block"
"""Name of the module that returns the last block, for the peers."""
CPU_BATCH_SIZES = (1, 4, 8, 16, 32, 64)
GPU_BATCH_SIZES = (*CPU_BATCH_SIZES, 128, 256)
NUM_PROBED = 64
"""Masked inputs after which a probe of a batch size ends; two batches, if that is more."""


@dataclass(frozen=True)
class Contender:
    """One implementation with one setup."""

    name: str
    job: Job
    how: str
    """The setup in words: as shipped, or helped, and by what."""
    run: Callable[[Tensor], int]
    """Explains the predicted class of one normalised image [1, 3, H, W]; returns the masked forwards it made."""
    is_ours: bool = False


@dataclass(frozen=True)
class Row:
    """The figures of one contender."""

    contender: Contender
    num_forwards: int
    """Masked forwards over all images of one repeat."""
    best: float
    """Masked forwards per second in the fastest repeat: of CPU time on a CPU, of wall time on a GPU."""
    median: float
    """Masked forwards per second in the median repeat."""
    ahead: float
    """Our best rate at the same job divided by `best`; 1 for our fastest, NaN without a contender of ours."""

    def figures(self) -> dict[str, str | float]:
        """The figures as plain values."""
        own = self.contender
        names: dict[str, str | float] = {"name": own.name, "job": own.job, "how": own.how}
        return {
            **names,
            "forwards": self.num_forwards,
            "forwards_per_second": self.best,
            "median_forwards_per_second": self.median,
            "we_are_ahead": self.ahead,
        }


@dataclass(frozen=True)
class Race:
    """A race's rows, in the order of its contenders, and its settings."""

    rows: tuple[Row, ...]
    num_images: int
    repeats: int
    num_threads: int
    """Torch's threads on the CPU."""


def contenders(
    adapter: ModelAdapter,
    forwards: Sequence[tuple[ForwardSetting, Forward]],
    windows: OcclusionParameters | None = None,
) -> list[Contender]:
    """Ours with each of these forward passes, then each peer as shipped and helped. Call it outside `borrowed()`.

    Helped means: channels last, the fastest batch size (probed here), and float16 on a GPU. Raises ConfigError if a
    peer is not installed.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} cannot be imported: pip install '.[peers]'")
    same = windows or OcclusionParameters()
    found = [own for setting, forward in forwards for own in _ours(adapter, setting, forward, same)]
    for peer in PEERS:
        found += [_as_shipped(peer, adapter, same), _helped(peer, adapter, same)]
    return found


def race(
    contenders: Sequence[Contender],
    inputs_nchw: Tensor,
    repeats: int = REPEATS,
    begin: Callable[[Contender], None] = lambda _: None,
) -> Race:
    """Runs all contenders on all images in turn, `repeats` times, so that other load on the machine affects all alike.

    There is no warm-up: the first repeat may be slow, and best and median ignore it. `begin` is called with each
    contender before its turn.
    """
    counts: list[list[int]] = [[] for _ in contenders]
    seconds: list[list[float]] = [[] for _ in contenders]
    for _ in range(repeats):
        for index, contender in enumerate(contenders):
            begin(contender)
            start = _now(inputs_nchw.device)
            counts[index].append(sum(contender.run(image) for image in inputs_nchw.split(1)))
            seconds[index].append(max(_now(inputs_nchw.device) - start, 1e-9))
    rates = [[n / s for n, s in zip(*own, strict=True)] for own in zip(counts, seconds, strict=True)]
    rows = tuple(
        Row(
            contender,
            own[0],
            max(measured),
            median(measured),
            _ours_at(contender.job, contenders, rates) / max(measured),
        )
        for contender, own, measured in zip(contenders, counts, rates, strict=True)
    )
    return Race(rows, len(inputs_nchw), repeats, torch.get_num_threads())


def _ours_at(job: Job, contenders: Sequence[Contender], rates: Sequence[Sequence[float]]) -> float:
    ours = [max(own) for one, own in zip(contenders, rates, strict=True) if one.is_ours and one.job == job]
    return max(ours, default=nan)


def _now(device: torch.device) -> float:
    """Seconds of this process's CPU time; for a GPU, of wall time after its work is finished."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


# ---------------------------------------------------------------- ours


def _ours(
    adapter: ModelAdapter, setting: ForwardSetting, forward: Forward, windows: OcclusionParameters
) -> list[Contender]:
    """Our contenders for both jobs, one image at a time as the peers do."""
    options = {"batch_size": setting.batch_size, "images_per_pass": 1, "forward": forward}
    explainers: dict[Job, Explainer] = {
        "Score-CAM": ScoreCam(adapter, ScoreCamParameters(), **options),
        "occlusion": Occlusion(adapter, windows, **options),
    }
    return [
        Contender("blocksight", job, str(setting), partial(_explain, explainer), is_ours=True)
        for job, explainer in explainers.items()
    ]


def _explain(explainer: Explainer, image: Tensor) -> int:
    with explainer.adapter.borrowed(), torch.no_grad():
        predicted = explainer.adapter.of_classes(explainer.adapter.logits(image)).argmax(1, keepdim=True)
    ((found,),) = explainer.explain(image, explainer.adapter.target(predicted))
    return found.num_forwards


# ---------------------------------------------------------------- networks for the peers


@dataclass(frozen=True)
class Subject:
    """A copy of the network for a peer, which may add hooks to it."""

    module: nn.Module
    layer: str
    """The sub-module that returns the last block."""
    block: Place
    windows: OcclusionParameters
    dtype: torch.dtype
    memory_format: torch.memory_format

    def as_input(self, image: Tensor) -> Tensor:
        """The image in the network's precision and memory format."""
        return image.to(dtype=self.dtype, memory_format=self.memory_format)

    @property
    def reshape(self) -> Callable[[Tensor], Tensor] | None:
        """Turns the layer's output into feature maps [N, C, h, w]; None if it has that shape already."""
        layout = self.block.layout
        return None if layout is None or layout.kind == "channels first" else layout.maps

    def num_masks(self, job: Job, image: Tensor) -> int:
        """The number of masks of the job on this network, constant maps included."""
        if job == "Score-CAM":
            return self.block.channels
        rows, columns = (len(window_starts(side, self.windows.window, self.windows.stride)) for side in image.shape[2:])
        return rows * columns


def _subject(
    adapter: ModelAdapter, windows: OcclusionParameters, dtype: torch.dtype, memory_format: torch.memory_format
) -> Subject:
    block = adapter.network.blocks()[-1]
    module, layer = _with_layer(adapter, block)
    module = module.eval().to(dtype=dtype, memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    return Subject(module, layer, block, windows, dtype, memory_format)


def _with_layer(adapter: ModelAdapter, block: Place) -> tuple[nn.Module, str]:
    """A copy of the network, and the name of its sub-module that returns the block.

    The copy has an identity module after the block. The peers need a module, but the block may have none: an activation
    may be a function, or a module that several layers share. Of a shared module's outputs pytorch-grad-cam takes the
    first and torch-cam the last (EfficientNet-Lite0 shares one of stem and head).
    """
    graph = adapter.network.graph
    if graph is None:
        return UntracedWithLayer(deepcopy(adapter.module), block.name), LAYER
    own = deepcopy(graph)
    own.add_submodule(LAYER, nn.Identity())
    (node,) = [node for node in own.graph.nodes if node.name == block.name]
    with own.graph.inserting_after(node):
        behind = own.graph.call_module(LAYER, (node,))
    node.replace_all_uses_with(behind, lambda user: user is not behind)
    own.recompile()
    return own, LAYER


class UntracedWithLayer(nn.Module):
    """A network without a graph, with an identity module after one call of a sub-module."""

    def __init__(self, network: nn.Module, block: str) -> None:
        super().__init__()
        self.network = network
        self.block = block
        self.add_module(LAYER, nn.Identity())

    def forward(self, inputs_nchw: Tensor) -> Tensor:
        layer = self.get_submodule(LAYER)
        with hook_outputs(self.network, [self.block], lambda _, maps: layer(maps)):
            return self.network(inputs_nchw)


# ---------------------------------------------------------------- the peers


@dataclass(frozen=True)
class Peer:
    """Another library's implementation of a job."""

    name: str
    job: Job
    batch_size: int
    """Its default."""
    num_plain: int
    """Forwards of the whole image, by the library or its user, before the masked ones."""
    explain: Callable[[Subject, Tensor, int], Tensor]
    """Returns a map of the predicted class of an image [1, 3, H, W], with this batch size."""


def _by_grad_cam(subject: Subject, image: Tensor, batch_size: int) -> Tensor:
    from pytorch_grad_cam import ScoreCAM

    cam = ScoreCAM(subject.module, [subject.module.get_submodule(subject.layer)], subject.reshape)
    cam.batch_size = batch_size  # pyright: ignore[reportAttributeAccessIssue] # it has no parameter for it
    try:
        with redirect_stderr(StringIO()):  # it draws a progress bar
            return torch.from_numpy(cam(image, None))
    finally:
        cam.activations_and_grads.release()


def _by_torchcam(subject: Subject, image: Tensor, batch_size: int) -> Tensor:
    from torchcam.methods import ScoreCAM

    with ScoreCAM(subject.module, subject.layer, batch_size, reshape_transform=subject.reshape) as cam:
        with torch.inference_mode():
            predicted = int(subject.module(image).argmax())
        return cam(predicted)[0]


def _by_captum(subject: Subject, image: Tensor, batch_size: int) -> Tensor:
    from captum.attr import Occlusion as CaptumOcclusion

    with torch.inference_mode():
        predicted = int(subject.module(image).argmax())
    window, stride = ((3, side, side) for side in (subject.windows.window, subject.windows.stride))
    occlusion = CaptumOcclusion(subject.module)
    return occlusion.attribute(image, window, stride, target=predicted, perturbations_per_eval=batch_size)


PEERS = (
    Peer("pytorch-grad-cam", "Score-CAM", 16, 1, _by_grad_cam),
    Peer("torch-cam", "Score-CAM", 32, 2, _by_torchcam),
    Peer("captum", "occlusion", 1, 2, _by_captum),
)


def _as_shipped(peer: Peer, adapter: ModelAdapter, windows: OcclusionParameters) -> Contender:
    subject = _subject(adapter, windows, torch.float32, torch.contiguous_format)
    how = f"as shipped: float32, batch {peer.batch_size}"
    return Contender(peer.name, peer.job, how, partial(_masked_forwards, peer, subject, peer.batch_size))


def _helped(peer: Peer, adapter: ModelAdapter, windows: OcclusionParameters) -> Contender:
    image = _example(adapter)
    if adapter.device.type == "cuda":
        subject, precision = _in_half_where_it_runs(peer, adapter, windows, image)
        size = _best_batch_size(peer, subject, image, GPU_BATCH_SIZES)
    else:
        subject, precision = _subject(adapter, windows, torch.float32, torch.channels_last), "float32"
        size = _best_batch_size(peer, subject, image, CPU_BATCH_SIZES)
    how = f"helped: {precision}, channels last, batch {size}"
    return Contender(peer.name, peer.job, how, partial(_masked_forwards, peer, subject, size))


def _in_half_where_it_runs(
    peer: Peer, adapter: ModelAdapter, windows: OcclusionParameters, image: Tensor
) -> tuple[Subject, str]:
    """The network in float16, or in float32 if the peer fails with that, and the precision with the reason."""
    half, full = (_subject(adapter, windows, dtype, torch.channels_last) for dtype in (torch.float16, torch.float32))
    refused = _refusal(peer, half, image)
    return (half, "float16") if refused is None else (full, f"float32 ({refused})")


def _example(adapter: ModelAdapter) -> Tensor:
    """A normalised image of noise [1, 3, H, W]."""
    own = torch.Generator().manual_seed(0)
    return adapter.normalise(torch.randint(0, 256, (1, 3, *adapter.input_size), dtype=torch.uint8, generator=own))


def _refusal(peer: Peer, half: Subject, image: Tensor) -> str | None:
    """Says why the peer does not run in float16; None if it does."""
    try:
        found = peer.explain(half, half.as_input(image), peer.batch_size)
    except Exception as error:  # a peer may raise anything in an unsupported precision
        if device_trouble(error) is DeviceTrouble.LOST:
            raise
        return f"float16 fails with {type(error).__name__}"
    return None if found.isfinite().all() else "float16 gives NaN"


def _best_batch_size(peer: Peer, subject: Subject, image: Tensor, sizes: Sequence[int]) -> int:
    """The batch size at which the peer is fastest, of those that fit into memory."""
    rates: dict[int, float] = {}
    with while_it_fits():
        for size in sizes:
            rates[size] = max(_probed_rate(peer, subject, size, image) for _ in range(2))
    return max(rates, key=rates.__getitem__, default=sizes[0])


# ---------------------------------------------------------------- counting


class Enough(Exception):
    """Ends a probe that has seen enough masked inputs."""


class MaskedInputs:
    """A hook that counts a module's masked inputs, which follow the plain ones, and can end the run."""

    def __init__(self, num_plain: int, most: float = inf) -> None:
        """Raises Enough at the first batch after `most` masked inputs."""
        self.count = -num_plain
        self.most = most
        self.start = 0.0
        """Time of the first masked batch."""

    def __call__(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self.count == 0:
            self.start = _now(inputs[0].device)
        if self.count >= self.most:
            raise Enough
        self.count += len(inputs[0])


def _masked_forwards(peer: Peer, subject: Subject, batch_size: int, image: Tensor) -> int:
    """Lets the peer explain an image and returns its masked forwards. Raises ConfigError for an unexpected number."""
    counter = MaskedInputs(peer.num_plain)
    with subject.module.register_forward_pre_hook(counter):
        peer.explain(subject, subject.as_input(image), batch_size)
    wanted = subject.num_masks(peer.job, image)
    if counter.count != wanted:
        raise ConfigError(
            f"{peer.name} scored {counter.count} masks, expected {wanted}: its layer {subject.layer!r} does not "
            f"return the last block's {subject.block.channels} maps alone; install the peers that were "
            "tried: pip install -c cluster/constraints.txt '.[peers]'"
        )
    return counter.count


def _probed_rate(peer: Peer, subject: Subject, batch_size: int, image: Tensor) -> float:
    """Masked forwards per second of the peer's first batches, without what it does before them."""
    counter = MaskedInputs(peer.num_plain, max(NUM_PROBED, 2 * batch_size))
    with subject.module.register_forward_pre_hook(counter), suppress(Enough):
        peer.explain(subject, subject.as_input(image), batch_size)
    return counter.count / max(_now(image.device) - counter.start, 1e-9)
