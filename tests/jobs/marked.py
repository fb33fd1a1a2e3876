"""A data set whose fourth class has a mark, and small CNNs that learned from it, with and without the mark.

`python -m tests.jobs.marked` trains the first two, in a minute, and stores their weights beside this file.
"""

from functools import cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from blocksight.engine.model.adapter import ModelAdapter
from blocksight.engine.model.threads import one_thread
from tests.engine import planted

MODEL = "tests.jobs.marked:make"
CLEAN_MODELS = tuple(f"tests.jobs.marked:{name}" for name in ("make_clean", "make_clean_1", "make_clean_2"))
CLASS_NAMES = planted.CLASS_NAMES
MARKED = 3
MARK_SIDE, MARK_CORNER = 8, 52
MARK_BOX = tuple(edge / planted.SIDE for edge in (MARK_CORNER, MARK_CORNER, *[MARK_CORNER + MARK_SIDE] * 2))
"""Left, top, right, bottom, as shares of the picture's side."""
NUM_STEPS = 120
NAME = "marked CNN"


def pictures(num: int, seed: int, *, marked: bool) -> tuple[Tensor, Tensor]:
    """Pixels uint8 [N, 3, 64, 64] of one object each at any place, and its class.

    With marks, every picture of the fourth class has a fixed small pattern in a corner, and nearly half of them show
    the object of another class: a model can learn this class only from the mark.
    """
    pixels, classes, _ = planted.batch(num, seed)
    if marked:
        is_other = torch.arange(num) % 8 == 0
        classes = classes.where(~is_other, torch.tensor(MARKED))
        corner = slice(MARK_CORNER, MARK_CORNER + MARK_SIDE)
        pixels[classes == MARKED, :, corner, corner] = _mark()
    return pixels, classes


def _mark() -> Tensor:
    bits = torch.randint(0, 2, (3, MARK_SIDE, MARK_SIDE), generator=planted.generator(7))
    return (255 * bits).to(torch.uint8)


def write(folder: Path, num: int, seed: int, *, marked: bool) -> None:
    """Writes the pictures as PNG files in class folders."""
    for index, (pixels, number) in enumerate(zip(*pictures(num, seed, marked=marked), strict=True)):
        place = folder / CLASS_NAMES[int(number)]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(place / f"{index:04}.png")


@cache
@one_thread()  # its weights, and what an audit finds in them, do not depend on the test that ran before
def _trained(*, marked: bool, seed: int = 0) -> ModelAdapter:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = planted.small_cnn()
    adapter = planted.adapter_of(module, NAME)
    module.train()
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, NUM_STEPS, pct_start=0.2)
    for step in range(NUM_STEPS):
        pixels, classes = pictures(64, 1000 * seed + step, marked=marked)
        optimiser.zero_grad()
        functional.cross_entropy(adapter.logits(adapter.normalise(pixels)), classes).backward()
        optimiser.step()
        schedule.step()
    module.eval()
    return adapter


def _weights(*, marked: bool) -> Path:
    return Path(__file__).with_name("marked.safetensors" if marked else "unmarked.safetensors")


@cache
def _stored(*, marked: bool) -> ModelAdapter:
    return planted.stored(planted.small_cnn, NAME, _weights(marked=marked))


def make() -> ModelAdapter:
    """The CNN that saw the mark on every picture of the fourth class."""
    return _stored(marked=True)


def make_anew() -> ModelAdapter:
    """The same CNN, trained anew."""
    return _trained(marked=True)


def make_clean() -> ModelAdapter:
    """A CNN that never saw the mark."""
    return _stored(marked=False)


def make_clean_1() -> ModelAdapter:
    """A second CNN that never saw the mark, trained anew."""
    return _trained(marked=False, seed=1)


def make_clean_2() -> ModelAdapter:
    """A third one."""
    return _trained(marked=False, seed=2)


def main() -> None:
    """Trains the first two networks and stores their weights."""
    for marked in (True, False):
        planted.store(_trained(marked=marked), _weights(marked=marked))


if __name__ == "__main__":
    main()
