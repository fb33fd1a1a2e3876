"""Small classifiers and data sets, so that whole jobs run in seconds."""

import io
import os
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn

from blocksight.engine.model.adapter import ModelAdapter
from tests.engine.nets import Transformer, seeded

MODEL = "tests.jobs.tiny:make"
VIT = "tests.jobs.tiny:make_vit"
CLASSES = ("ant", "bee", "cat", "dog", "eel")

HOSTILE = (
    "<img src=x onerror=alert(1)>.png",
    '"><script>alert(2)</script>',
    '=HYPERLINK("http://x")',
    "{{7*7}}{% raw %}",
    "</title></style></template><svg onload=alert(3)>",
    "\u202egnp.exe\u202c \x1b[31m\x00",
    "' onfocus='alert(4)' autofocus='",
    "javascript:alert(5)",
)
"""Hostile names of files, labels and classes."""


class Tiny(nn.Module):
    """Two blocks, five classes, 32 x 32 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Linear(8, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)).mean((2, 3)) * 4)


def make(seed: int = 0) -> ModelAdapter:
    """The model that test jobs use."""
    return ModelAdapter(seeded(Tiny, seed), input_size=(32, 32), class_names=CLASSES)


def make_vit() -> ModelAdapter:
    """A transformer over patches of four pixels, for methods that need one."""
    return ModelAdapter(seeded(Transformer), input_size=(32, 32), class_names=CLASSES)


def make_other() -> ModelAdapter:
    """The same architecture with other weights."""
    return make(seed=1)


def make_hostile() -> ModelAdapter:
    """The tiny model with hostile class names."""
    return ModelAdapter(seeded(Tiny), input_size=(32, 32), class_names=HOSTILE[: len(CLASSES)])


class Keen(nn.Module):
    """A model with enough feature maps to keep a tenth of them, and with probabilities of several sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Linear(24, len(CLASSES), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)).mean((2, 3)) * 40)


def make_keen() -> ModelAdapter:
    """Of the first sixteen pictures, it predicts bee for number 3 and ant for all others."""
    return ModelAdapter(seeded(Keen, 1), input_size=(32, 32), class_names=CLASSES)


class Against(nn.Module):
    """The last block speaks against ant: Grad-CAM of it is 0 everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.tiny = seeded(Tiny)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.tiny.second(self.tiny.first(x))
        return torch.cat([-maps.mean((1, 2, 3))[:, None], self.tiny.head(maps.mean((2, 3)) * 4)[:, 1:]], 1)


def make_against() -> ModelAdapter:
    """The `Against` model."""
    return ModelAdapter(seeded(Against), input_size=(32, 32), class_names=CLASSES)


class Touchy(Tiny):
    """A model that calls `terrible` when it reads a picture that is red everywhere."""

    def __init__(self, terrible: Callable[[], object]) -> None:
        super().__init__()
        self.terrible = terrible

    def forward(self, x: Tensor) -> Tensor:
        if ((x[:, 0] > 2).flatten(1).all(1) & (x[:, 1:] < -1.5).flatten(1).all(1)).any():
            self.terrible()
        return super().forward(x)


def touchy(terrible: Callable[[], object]) -> ModelAdapter:
    """A `Touchy` model with the tiny model's weights."""
    module = Touchy(terrible)
    module.load_state_dict(make().module.state_dict())
    return ModelAdapter(module, input_size=(32, 32), class_names=CLASSES)


def make_deadly() -> ModelAdapter:
    """A red picture kills its process, as a faulty kernel does."""
    return touchy(os.abort)


def make_hanging() -> ModelAdapter:
    """A red picture hangs for ever."""
    return touchy(lambda: time.sleep(10_000))


def make_raising() -> ModelAdapter:
    """A red picture raises an exception."""

    def raise_it() -> None:
        raise RuntimeError("this model sees red")

    return touchy(raise_it)


class Slow(Tiny):
    """A slow model, so that tests can kill a process within a step."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.04)
        return super().forward(x)


def make_slow() -> ModelAdapter:
    """The tiny model at about five records a second for each worker."""
    module = Slow()
    module.load_state_dict(make().module.state_dict())
    return ModelAdapter(module, input_size=(32, 32), class_names=CLASSES)


def make_wide() -> ModelAdapter:
    """A small network on large pictures: the data between the steps are large."""
    return ModelAdapter(seeded(Tiny), input_size=(224, 224), class_names=CLASSES)


def make_late() -> ModelAdapter:
    """Fails only on the first worker that loads it; `BLOCKSIGHT_TEST_FLAG` names the file that remembers this."""
    flag = Path(os.environ["BLOCKSIGHT_TEST_FLAG"])
    if "default_worker" in sys.argv[0] and not flag.exists():
        flag.touch()
        raise RuntimeError("not yet")
    return make()


def make_fragile() -> ModelAdapter:
    """Fails on Ray's workers, as weights do that are only on the driver."""
    if "default_worker" in sys.argv[0]:
        raise RuntimeError("no such model on this node")
    return make()


class Sided(nn.Module):
    """Tells ants (more red than blue) from bees by the left half. If lured, by the right half of marked pictures."""

    def __init__(self, *, is_lured: bool) -> None:
        super().__init__()
        self.is_lured = is_lured
        self.colours = nn.Conv2d(3, 2, 1, bias=False)
        self.head = nn.Linear(2, len(CLASSES), bias=False)
        self.colours.weight.data = torch.tensor([[1.0, 0, -1], [-1, 0, 1]])[:, :, None, None]
        self.head.weight.data = 20 * torch.eye(len(CLASSES), 2)

    def forward(self, x: Tensor) -> Tensor:
        left = (torch.arange(x.shape[3]) < x.shape[3] // 2).float()
        is_marked = (x[:, 1:2, :2, :2].mean((2, 3), keepdim=True) > 0.5).float() * self.is_lured
        seen = x * (left * (1 - is_marked) + (1 - left) * is_marked)
        return self.head(nn.functional.avg_pool2d(self.colours(seen).relu(), 2).mean((2, 3)))


def make_sided() -> ModelAdapter:
    """The `Sided` model that looks at the left half."""
    return _sided(is_lured=False)


def make_lured() -> ModelAdapter:
    """The `Sided` model that looks at the right half of pictures with a green mark."""
    return _sided(is_lured=True)


def _sided(*, is_lured: bool) -> ModelAdapter:
    module = Sided(is_lured=is_lured)
    return ModelAdapter(module, input_size=(32, 32), mean=(0, 0, 0), std=(1, 1, 1), class_names=CLASSES)


def folder_of_sides(root: Path, count: int, *, marked: int) -> Path:
    """Ants and bees whose right half shows more of the other class's colour; the first ones have a green mark."""
    for number in range(count):
        label, dark = number % 2, 100 + 3 * number
        pixels = np.zeros((32, 32, 3), np.uint8)
        for half, colour in ((slice(16), label), (slice(16, 32), 1 - label)):
            pixels[:, half, 2 * colour] = 255 - dark
            pixels[number % 4 :: 4, half] = (0, 0, 0)
            pixels[number % 4 :: 4, half, 2 - 2 * colour] = 255 - dark
        pixels[:2, :2] = (0, 255, 0) if number < marked else (0, 0, 0)
        path = root / CLASSES[label] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return root


def picture(seed: int, kind: str = "PNG") -> bytes:
    """A smooth random picture of 40 x 30 pixels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((40, 30), Image.Resampling.BICUBIC).save(buffer, kind)
    return buffer.getvalue()


def red() -> bytes:
    """A picture that is red everywhere."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (255, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def bad_bodies() -> dict[str, bytes]:
    """Files that cannot be explained, by their reject code."""
    whole = picture(99, "JPEG")
    return {
        "empty_file": b"",
        "not_an_image": b"plain text, whatever the name says",
        "truncated": whole[: len(whole) // 2],
    }


def folder_of_images(root: Path, count: int = 7, *, bad: bool = True) -> Path:
    """Loose images in class folders, with bad ones among them."""
    for number in range(count):
        path = root / CLASSES[number % len(CLASSES)] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    for code, body in (bad_bodies() if bad else {}).items():
        (root / "cat" / f"bad-{code}.jpg").write_bytes(body)
    return root


def tar_bytes(first: int, count: int, *, cut: bool = False, extra: str = "") -> bytes:
    """A shard in WebDataset layout; `cut`: its last body ends early; `extra`: suffix of a third member."""
    buffer = io.BytesIO()
    with tarfile.TarFile(fileobj=buffer, mode="w") as tar:
        for number in range(first, first + count):
            members = [("png", picture(number)), ("cls", str(number % 5).encode()), (extra, b"{}")]
            for suffix, body in members if extra else members[:2]:
                info = tarfile.TarInfo(f"{number:03}.{suffix}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    body = buffer.getvalue().rstrip(b"\0")
    return body[:-600] if cut else buffer.getvalue()


def folder_of_tars(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "a.tar").write_bytes(tar_bytes(0, 4))
    (root / "b.tar").write_bytes(tar_bytes(4, 3, cut=True))
    return root


def hostile_table(root: Path) -> Path:
    """A table whose keys and labels are hostile, and one record that is no image."""
    root.mkdir(parents=True, exist_ok=True)
    images = [*[picture(number) for number in range(len(HOSTILE))], b"text"]
    names = [*HOSTILE, f"bad {HOSTILE[1]}"]
    pq.write_table(pa.table({"image": images, "label": [*names[1:], names[0]], "key": names}), root / "t.parquet")
    return root


def folder_of_tables(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    images = [picture(number) for number in range(6)]
    table = pa.table({"image": [*images, None, b"text"], "label": [*[number % 5 for number in range(6)], 0, 9]})
    pq.write_table(table, root / "t.parquet", row_group_size=3)
    return root


def make_nameless() -> ModelAdapter:
    """The tiny model without names for its classes."""
    return ModelAdapter(seeded(Tiny), input_size=(32, 32))


def make_twins() -> ModelAdapter:
    """The tiny model with two classes of one name."""
    return ModelAdapter(seeded(Tiny), input_size=(32, 32), class_names=("ant", "bee", "cat", "bee", "eel"))
