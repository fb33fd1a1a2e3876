"""Python starts as where OpenVINO is not installed; put this folder on PYTHONPATH."""

import sys

sys.modules["openvino"] = None  # pyright: ignore[reportArgumentType]
