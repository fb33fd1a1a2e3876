"""Refuses switches that make Ray unpickle files: a job reads untrusted files."""

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
"""The switches of Ray 2.60."""

UNSAFE = re.compile(r"RAY_\w*(AUTOLOAD|UNSAFE|CLOUDPICKLE)\w*")
"""The pattern of their names; a later version of Ray may have more."""

OFF = ("", "0", "false")


def refuse_unsafe_switches() -> None:
    """Raises ClusterError if a switch is on in this process. Call it in each process that reads files."""
    unsafe = sorted(name for name, value in os.environ.items() if UNSAFE.fullmatch(name) and value.lower() not in OFF)
    if unsafe:
        raise ClusterError(f"{', '.join(unsafe)} lets input files run code; unset it")
