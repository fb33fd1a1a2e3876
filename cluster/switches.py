"""Switches of Ray that make it unpickle what it reads: files of strangers are read, so none of them may be on."""

import os
import re

from blocksight.cluster.errors import ClusterError

UNSAFE_SWITCHES = (
    "RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE",
    "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR",
    "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA",
    "RAY_DATA_ARROW_EXTENSION_SERIALIZATION_CLOUDPICKLE",
    "RAY_DATA_WEBDATASET_ALLOW_UNSAFE_DESERIALIZATION",
)
"""Those of Ray 2.60."""

UNSAFE = re.compile(r"RAY_\w*(AUTOLOAD|UNSAFE|CLOUDPICKLE)\w*")
"""How Ray names them; a later version may have more."""

OFF = ("", "0", "false")


def refuse_unsafe_switches() -> None:
    """Raises ClusterError where one is set in this process. Each process that reads files asks."""
    unsafe = sorted(name for name, value in os.environ.items() if UNSAFE.fullmatch(name) and value.lower() not in OFF)
    if unsafe:
        raise ClusterError(f"{', '.join(unsafe)} lets files run code when they are read; unset it")
