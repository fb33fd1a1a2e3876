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
        raise ModelError(
            "the weights file is neither safetensors nor a torch state dict of plain tensors; a file that "
            "holds code (TorchScript, .pt2, pickled modules) is refused: save model.state_dict() instead"
        ) from error
    if not isinstance(loaded, dict):
        raise ModelError(f"the weights file holds a {type(loaded).__name__}, not a state dict")
    return loaded


def _refuse_compressed(data: bytes) -> None:
    """Raises ValueError for a compressed archive: torch writes none, and would unpack one of any size."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return  # the older format
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > len(data):
        raise ValueError(f"an archive of {len(data)} bytes unpacks to {unpacked}: compressed archives are refused")
