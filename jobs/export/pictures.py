"""Pictures of an export: the image as the model saw it, undistorted, in the sizes that viewers like."""

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from blocksight.jobs.export.records import ExplainedRecord
from blocksight.jobs.plan.plan import Plan
from blocksight.jobs.work.rows import Shown, shown
from blocksight.storage.outputs.pictures import Pixels

QUALITY = 90


def seen(plan: Plan, record: ExplainedRecord, row: Mapping[str, Any]) -> Shown:
    """A record's image with one of its maps at the same size."""
    return shown(plan, dict(row), record.pixels)


def as_jpeg(pixels: Pixels) -> bytes:
    """The file of a picture [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
