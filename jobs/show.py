"""Shows one record of an output: its facts as a table, and a picture per target."""

import re
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import RenderableType

from jobs.config import ConfigError
from jobs.plan import Plan
from jobs.results import picture, rows_of
from jobs.tables import record_table
from storage.pictures import Pixels, side_by_side
from storage.schema import OK
from storage.store import ObjectStore


def render_record(
    store: ObjectStore, plan: Plan, key: str, endpoint_url: str | None, path: Path | None
) -> tuple[RenderableType, list[Path]]:
    """The record's table, and the pictures written: image, overlay and map side by side, one per target.

    Raises ConfigError where no record has the key, or the picture cannot be written. A rejected record has no picture.
    """
    rows = rows_of(store, plan, key)
    explained = [row for row in rows if row["status"] == OK]
    written = []
    for row in explained:
        shown = picture(plan, endpoint_url, row)
        target = _path(path, key, row, alone=len(explained) == 1)
        _save(side_by_side(shown.pixels, shown.saliency_hw), target)
        written.append(target)
    return record_table(rows), written


def _path(path: Path | None, key: str, row: dict[str, Any], *, alone: bool) -> Path:
    """The asked-for file, or one named after the key with every unusual character replaced."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", key).strip(".-")[-100:] or "record"
    base = path or Path(f"{plain}.map.png")  # never the name of the image itself
    return base if alone else base.with_name(f"{base.stem}-{row['target_index']}{base.suffix}")


def _save(pixels: Pixels, path: Path) -> None:
    try:
        Image.fromarray(pixels).save(path, "PNG")
    except OSError as error:
        raise ConfigError(f"the picture {path} cannot be written: {error.strerror or error}") from error
