"""Images whose evidence is planted in known boxes, and a CNN, a ViT and a Swin trained to look for it.

Grey noise holds objects of five classes. All five consist of as many bright as dark pixels of the same two
tones, as bright on average as the noise, so that neither colour nor brightness tells a class: its shape does.

`python -m tests.engine.planted` trains both networks, in a minute, and stores their weights beside this file.
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.threads import one_thread

CLASS_NAMES = ("horizontal stripes", "vertical stripes", "checkerboard", "disc", "cross")
NUM_CLASSES = len(CLASS_NAMES)
SIDE = 64
"""Of an image, in pixels."""
OBJECT_SIDE = 20
CORNER_STEP = 4
"""Boxes begin at multiples of this, half a patch of the ViT."""
MIDDLE, NOISE, CONTRAST = 128, 44, 60
"""A pixel is uniform in MIDDLE -+ NOISE; an object adds or takes CONTRAST; nothing is clipped."""


def generator(seed: int) -> torch.Generator:
    """A source of random numbers of its own."""
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- pictures


@cache
def patterns() -> Tensor:
    """The five objects [5, 20, 20], half of each +1 and half -1."""
    offset = torch.arange(OBJECT_SIDE, dtype=torch.float64) - (OBJECT_SIDE - 1) / 2
    down, across = offset.abs()[:, None], offset.abs()[None]
    stripes = (1 - 2 * (torch.arange(OBJECT_SIDE) // 2 % 2)).double()
    rows = stripes[:, None].expand(-1, OBJECT_SIDE)
    far = 1e-3 * torch.maximum(down, across)  # breaks ties, so that half of the pixels is half
    disc = _nearer_half(down**2 + across**2 + far)
    cross = _nearer_half(torch.minimum(down, across) + far)
    return torch.stack([rows, rows.T, rows * rows.T, disc, cross]).float()


def _nearer_half(distance_hw: Tensor) -> Tensor:
    signs = -torch.ones(distance_hw.numel(), dtype=distance_hw.dtype)
    signs[distance_hw.flatten().argsort(stable=True)[: len(signs) // 2]] = 1
    return signs.view(distance_hw.shape)


def draw(classes_nk: Tensor, corners_nk2: Tensor, rng: torch.Generator) -> Tensor:
    """Images uint8 [N, 3, 64, 64], each with K objects (also none), their left and top corners given.

    The noise is drawn first: the same generator gives the same background around any objects. An object is
    as often its own negative.
    """
    num, per_image = classes_nk.shape
    noise = torch.randint(-NOISE, NOISE + 1, (num, 3, SIDE, SIDE), dtype=torch.int16, generator=rng)
    polarity = 2 * torch.randint(0, 2, (num, per_image), generator=rng) - 1
    shapes = (_placed(classes_nk, corners_nk2) * polarity[:, :, None, None]).sum(1, keepdim=True)
    return (MIDDLE + noise + CONTRAST * shapes).to(torch.uint8)


def _placed(classes_nk: Tensor, corners_nk2: Tensor) -> Tensor:
    """Each object's +1 and -1 in its box, zeros around it, int16 [N, K, 64, 64]."""
    local = torch.arange(SIDE) - corners_nk2[..., None]  # [N, K, (across, down), 64]
    inside = (local >= 0) & (local < OBJECT_SIDE)
    across, down = local.clamp(0, OBJECT_SIDE - 1).unbind(2)
    signs = patterns().to(torch.int16)[classes_nk[..., None, None], down[..., None], across[..., None, :]]
    return signs * (inside[:, :, 1, :, None] & inside[:, :, 0, None, :])


def _boxes(corners: Tensor) -> Tensor:
    return torch.cat([corners, corners + OBJECT_SIDE], -1)


@cache
def _corners() -> Tensor:
    steps = torch.arange(0, SIDE - OBJECT_SIDE + 1, CORNER_STEP)
    return torch.cartesian_prod(steps, steps)


@cache
def _disjoint_corners() -> Tensor:
    """All pairs of corners [P, 2, 2] whose boxes do not touch a common pixel."""
    every = _corners()
    apart = (every[:, None] - every[None]).abs().amax(-1) >= OBJECT_SIDE
    first, second = apart.nonzero(as_tuple=True)
    return torch.stack([every[first], every[second]], 1)


def draw_one(num: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """As `batch`, from a generator."""
    corners = _corners()[torch.randint(len(_corners()), (num,), generator=rng)]
    classes = torch.randint(NUM_CLASSES, (num,), generator=rng)
    return draw(classes[:, None], corners[:, None], rng), classes, _boxes(corners)


def draw_two(num: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """As `pairs`, from a generator."""
    corners = _disjoint_corners()[torch.randint(len(_disjoint_corners()), (num,), generator=rng)]
    first = torch.randint(NUM_CLASSES, (num,), generator=rng)
    second = (first + torch.randint(1, NUM_CLASSES, (num,), generator=rng)) % NUM_CLASSES
    classes = torch.stack([first, second], 1)
    return draw(classes, corners, rng), classes, _boxes(corners)


def batch(num: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels uint8 [N, 3, 64, 64] with one object each, classes [N], boxes [N, 4].

    A box is left, top, right, bottom, the last two exclusive.
    """
    return draw_one(num, generator(seed))


def pairs(num: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels uint8 [N, 3, 64, 64] with two objects each, of different classes in disjoint boxes.

    Also their classes [N, 2] and boxes [N, 2, 4] in the same order.
    """
    return draw_two(num, generator(seed))


def off_centre(num: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `batch`, of objects whose centre is at least a quarter of a side away from the picture's."""
    pixels, classes, boxes = batch(max(200, 2 * num), seed)
    away = (boxes[:, :2] + OBJECT_SIDE / 2 - SIDE / 2).abs().amax(1) >= SIDE / 4
    return pixels[away][:num], classes[away][:num], boxes[away][:num]


def energy_inside(map_hw: Tensor, box: Tensor) -> float:
    """The part of a non-negative map's sum that lies in the box, in [0, 1]; 0 for a map of zeros."""
    left, top, right, bottom = box.tolist()
    total = float(map_hw.double().sum())
    return float(map_hw[top:bottom, left:right].double().sum()) / total if total else 0.0


# ---------------------------------------------------------------- networks


def small_cnn() -> nn.Module:
    """Convolutions with grids of 32, 16 and 8, average pooling and one linear layer; 61 thousand weights."""
    layers: list[nn.Module] = []
    for before, after, stride in ((3, 16, 2), (16, 32, 2), (32, 64, 2), (64, 64, 1)):
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, NUM_CLASSES))


def small_vit() -> nn.Module:
    """torchvision's vision transformer with four layers over 8 x 8 patches and a class token."""
    return torchvision.models.VisionTransformer(
        image_size=SIDE, patch_size=8, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=NUM_CLASSES
    )


def small_swin() -> nn.Module:
    """torchvision's Swin with two stages of two layers over 4 x 4 patches, in windows of 4 x 4 tokens."""
    return torchvision.models.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=32,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
        stochastic_depth_prob=0.0,
        num_classes=NUM_CLASSES,
    )


class Lesson(NamedTuple):
    """How many images of a training step hold one object, two, and none."""

    single: int
    double: int
    empty: int


def train(
    make: Callable[[], nn.Module], name: str, *, num_steps: int, peak_rate: float, lesson: Lesson, seed: int = 0
) -> ModelAdapter:
    """The network after so many steps on fresh images; the same seed gives the same bits, on one thread.

    The wanted softmax is one for the object's class, a half for each of two, and even where there is no
    object: evidence raises its class, wherever it lies and whatever stands beside it, and no class is the
    default.
    """
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(seed)
        adapter = adapter_of(make(), name)
        module, rng = adapter.module.train(), generator(seed)
        optimiser = torch.optim.AdamW(module.parameters(), lr=peak_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak_rate, num_steps, pct_start=0.2)
        for _ in range(num_steps):
            pixels, wanted = _lesson(rng, lesson)
            optimiser.zero_grad()
            functional.cross_entropy(adapter.logits(adapter.normalise(pixels)), wanted).backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimiser.step()
            schedule.step()
        module.eval()
    return adapter


def adapter_of(module: nn.Module, name: str) -> ModelAdapter:
    """The adapter of a classifier of these images."""
    return ModelAdapter(
        module, name=name, input_size=(SIDE, SIDE), mean=(0.5,) * 3, std=(0.25,) * 3, class_names=CLASS_NAMES
    )


def _lesson(rng: torch.Generator, wanted: Lesson) -> tuple[Tensor, Tensor]:
    """Pixels and wanted softmax."""
    single, classes, _ = draw_one(wanted.single, rng)
    double, both, _ = draw_two(wanted.double, rng)
    num_empty = wanted.empty
    empty = draw(torch.empty(num_empty, 0, dtype=torch.long), torch.empty(num_empty, 0, 2, dtype=torch.long), rng)
    softmax = [
        functional.one_hot(classes, NUM_CLASSES),
        functional.one_hot(both, NUM_CLASSES).sum(1) / 2,
        torch.full((num_empty, NUM_CLASSES), 1 / NUM_CLASSES),
    ]
    return torch.cat([single, double, empty]), torch.cat(softmax)


train_cnn = partial(train, small_cnn, "planted CNN", peak_rate=1e-2, lesson=Lesson(32, 24, 8))
train_vit = partial(train, small_vit, "planted ViT", peak_rate=2e-3, lesson=Lesson(16, 12, 4))
train_swin = partial(train, small_swin, "planted Swin", peak_rate=2e-3, lesson=Lesson(16, 12, 4))


FULLY: dict[str, Callable[[], ModelAdapter]] = {
    "cnn": partial(train_cnn, num_steps=200),
    "vit": partial(train_vit, num_steps=300),
}
"""Trains a network as its stored weights were trained, by its name."""


WEIGHTS = {name: Path(__file__).with_name(f"planted-{name}.safetensors") for name in FULLY}
"""Files of trained weights."""


def store(adapter: ModelAdapter, file: Path) -> None:
    """Writes a trained network's weights as they are."""
    state = {name: value.contiguous() for name, value in adapter.module.state_dict().items()}
    safetensors.torch.save_file(state, file)
    file.chmod(0o644)


def stored(make: Callable[[], nn.Module], name: str, file: Path) -> ModelAdapter:
    """The network with the weights of a file that `store` wrote."""
    module = make()
    module.load_state_dict(safetensors.torch.load_file(file))
    return adapter_of(module.eval(), name)


@cache
def trained_cnn() -> ModelAdapter:
    """The trained CNN, read once per process."""
    return stored(small_cnn, "planted CNN", WEIGHTS["cnn"])


@cache
def trained_vit() -> ModelAdapter:
    """The trained ViT, read once per process."""
    return stored(small_vit, "planted ViT", WEIGHTS["vit"])


def main() -> None:
    """Trains both networks and stores their weights."""
    for name, trained in FULLY.items():
        store(trained(), WEIGHTS[name])


if __name__ == "__main__":
    main()
