"""Several files of a model as one value, which travels to workers and is hashed as a weights file is."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from blocksight.engine.errors import ModelError

MAGIC = b"blocksight model files 1\n"
WEIGHTS = "--weights"
"""The name under which the file of `--weights` stands; no file of a folder is called so."""


def pack(files: Mapping[str, bytes]) -> bytes:
    """The files, sorted by name, as one value: the same files are the same bytes."""
    names = sorted(files)
    header = json.dumps([[name, len(files[name])] for name in names])
    return b"".join([MAGIC, header.encode(), b"\n", *(files[name] for name in names)])


def unpack(packed: bytes) -> dict[str, memoryview]:
    """The files by name, without a copy. Raises ModelError for bytes that `pack` did not make."""
    if not packed.startswith(MAGIC):
        raise ModelError("the model's files were not packed by this program")
    end = packed.index(b"\n", len(MAGIC))
    files, start, view = {}, end + 1, memoryview(packed)
    for name, size in json.loads(packed[len(MAGIC) : end]):
        files[name] = view[start : start + size]
        start += size
    return files


def split(packed: bytes | None) -> tuple[bytes | None, bytes | None]:
    """The packed files of a model without the file of `--weights`, and that file; None for what is not there."""
    if packed is None or not packed.startswith(MAGIC):
        return None, packed
    files = unpack(packed)
    weights = files.pop(WEIGHTS, None)
    return (packed if weights is None else pack({name: bytes(body) for name, body in files.items()})), (
        None if weights is None else bytes(weights)
    )


@contextmanager
def folder_of(files: Mapping[str, memoryview]) -> Iterator[str]:
    """A folder with the files, as libraries read them."""
    with TemporaryDirectory(prefix="blocksight-model-") as folder:
        for name, body in files.items():
            (Path(folder) / name).write_bytes(body)
        yield folder
