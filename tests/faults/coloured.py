"""A data set of any size, made by rule: pictures with a coloured spot in tar shards, and a network that sees them."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from blocksight.engine.model.adapter import ModelAdapter

MODEL = "tests.faults.coloured:make"
CLASS_NAMES = ("red", "green", "blue")
SIDE, SPOT = 16, 5
"""Pixels of a picture and of its spot."""
SHARD_RECORDS = 1_000
NOISE = 96
"""Grey levels of the background are below it."""


class SpotNetwork(nn.Module):
    """Two blocks that blur each channel and cut its background off: the largest mean names the spot's colour."""

    def __init__(self) -> None:
        super().__init__()
        channels = len(CLASS_NAMES)
        self.first = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Linear(channels, channels)
        with torch.no_grad():
            for block, threshold in ((self.first[0], NOISE / 255), (self.second[0], 0.0)):
                block.weight.copy_(torch.eye(channels)[:, :, None, None].expand(-1, -1, 3, 3) / 9)
                block.bias.fill_(-threshold)
            self.head.weight.copy_(64 * torch.eye(channels))
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)).mean((2, 3)))


def make() -> ModelAdapter:
    """The network, with its input in [0, 1]."""
    return ModelAdapter(
        SpotNetwork().eval(),
        name="spots",
        input_size=(SIDE, SIDE),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        class_names=CLASS_NAMES,
    )


def class_of(number: int) -> int:
    """The class of a record."""
    return number % len(CLASS_NAMES)


def pictures(first: int, count: int) -> NDArray[np.uint8]:
    """Pixels [N, H, W, 3] of the records from `first` on; a shard's are the same in each data set."""
    dice = np.random.default_rng(first)
    pixels = dice.integers(0, NOISE, (count, SIDE, SIDE, 3), dtype=np.uint8)
    tops, lefts = dice.integers(0, SIDE - SPOT, (2, count))
    for place, (top, left) in enumerate(zip(tops, lefts, strict=True)):
        pixels[place, top : top + SPOT, left : left + SPOT, class_of(first + place)] = 255
    return pixels


def shard_bytes(first: int, count: int) -> bytes:
    """A shard in WebDataset layout: a PNG and a class for each record."""
    buffer = io.BytesIO()
    with tarfile.TarFile(fileobj=buffer, mode="w") as tar:
        for number, pixels in enumerate(pictures(first, count), first):
            for suffix, body in (("png", _png(pixels)), ("cls", str(class_of(number)).encode())):
                info = tarfile.TarInfo(f"{number:09}.{suffix}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


def _png(pixels: NDArray[np.uint8]) -> bytes:
    body = io.BytesIO()
    Image.fromarray(pixels).save(body, "PNG", compress_level=1)
    return body.getvalue()


def write_shards(folder: Path, num_records: int) -> Iterator[int]:
    """Writes the shards that are missing, and yields how many records are there after each.

    A shard appears whole, so that a run that was cut off goes on. Shards of a larger data set are not looked at.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, num_records, SHARD_RECORDS):
        count = min(SHARD_RECORDS, num_records - first)
        path = folder / f"{first:09}-{count}.tar"
        if not path.exists():
            begun = path.with_suffix(".begun")
            begun.write_bytes(shard_bytes(first, count))
            begun.rename(path)
        yield first + count
