"""Reads stored tensors, safetensors or a torch file of plain tensors; never runs code."""

import io
import warnings
import zipfile
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from blocksight.engine.errors import ModelError


def read_tensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name; they take as much memory as the file. Raises ModelError."""
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"the file is not safetensors: {error}") from error


def read_weights(data: bytes) -> dict[str, Any]:
    """The contents of a weights file by name: safetensors, or torch with `weights_only`. Raises ModelError."""
    try:
        return dict(read_tensors(data))
    except ModelError:
        return _read_torch(data)


def _read_torch(data: bytes) -> dict[str, Any]:
    try:
        _refuse_compressed(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice to load TorchScript in another way, which is refused
            loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        cause = _likely_cause(data)
        if cause is not None:
            raise ModelError(f"the weights file holds no weights: {cause}") from error
        raise ModelError(
            "the weights file is neither safetensors nor a torch state dict of plain tensors; a file that "
            "holds code (TorchScript, .pt2, pickled modules) is refused: save model.state_dict() instead"
        ) from error
    if not isinstance(loaded, dict):
        raise ModelError(f"the weights file holds a {type(loaded).__name__}, not a state dict")
    return loaded


_BEGINNINGS = (
    (b"version https://git-lfs", "it is a pointer of Git LFS; `git lfs pull` brings the file itself"),
    (b"<", "it is a web page, as a download without an account gives it"),
    (b"\x1f\x8b", "it is compressed by gzip; unpack it"),
    (b"\x89HDF\r\n", "it is HDF5, as Keras writes it; wanted safetensors or a torch file"),
    (b"\x93NUMPY", "it is an array of NumPy; wanted safetensors or a torch file"),
    (b"\x08", "it looks like ONNX; wanted safetensors or a torch file"),
)
"""Other kinds of files that are given for weights, by their first bytes."""


def _likely_cause(data: bytes) -> str | None:
    """Why a file is not read, as a clause; None: it may be a torch file that holds code."""
    if not data.strip():
        return "it is empty"
    if data.startswith(b"PK") and not zipfile.is_zipfile(io.BytesIO(data)):
        return "its end is missing, as after a download that broke off"
    length = int.from_bytes(data[:8], "little")
    if data[8:9] == b"{" and length < len(data) and b'"dtype"' in data[8 : 8 + length]:
        return "it is safetensors whose end is missing, as after a download that broke off, or that is damaged"
    return next((cause for beginning, cause in _BEGINNINGS if data.lstrip().startswith(beginning)), None)


def _refuse_compressed(data: bytes) -> None:
    """Raises ValueError for a compressed archive: torch writes none, and would unpack one of any size."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return  # the older format
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > len(data):
        raise ValueError(f"an archive of {len(data)} bytes unpacks to {unpacked}: compressed archives are refused")
