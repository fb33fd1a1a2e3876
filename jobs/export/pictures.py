"""Makes the pictures of an export: undistorted images with their maps at the same size, and JPEG files."""

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from blocksight.jobs.export.records import ExplainedRecord
from blocksight.jobs.plan.plan import Plan
from blocksight.jobs.worker.rows import Shown, shown
from blocksight.storage.inputs.ground_truth import Truth
from blocksight.storage.outputs.pictures import Pixels

QUALITY = 90


def fitted_image(plan: Plan, record: ExplainedRecord, row: Mapping[str, Any], truth: Truth | None = None) -> Shown:
    """A record's image and one of its maps, at the same size, with the boxes of `truth`."""
    return shown(plan, dict(row), record.pixels, truth=truth)


def as_jpeg(pixels: Pixels) -> bytes:
    """A JPEG file of a picture [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
