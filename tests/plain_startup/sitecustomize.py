"""With this folder on PYTHONPATH, Python does not find OpenVINO."""

import sys

sys.modules["openvino"] = None  # pyright: ignore[reportArgumentType]
