"""Draws README's picture from a finished demo: three photographs, and below each its map laid over it.

`blocksight demo`, then `python -m tests.demo_picture blocksight-demo` writes `tests/figures/demo.jpg`.
"""

import sys
from pathlib import Path

from blocksight.jobs.worker.rows import all_rows, existing_output, images_of, shown
from blocksight.storage.outputs.pictures import Tile, contact_sheet, overlay

PHOTOGRAPHS = ("chelsea.png", "coffee.png", "camera.png")
"""Photographs of the demo that are in the public domain (CC0)."""
HEIGHT, QUALITY = 220, 85
"""The side of a tile in pixels, and the quality of the JPEG."""
FIGURE = Path(__file__).parent / "figures" / "demo.jpg"


def main(demo: str) -> None:
    """Reads the maps and photographs of the demo's folder and writes the figure."""
    output = existing_output(f"{demo}/maps")
    rows = {row["key"]: row for row in all_rows(output.store, output.plan)}
    images = dict(images_of(output.plan, None, PHOTOGRAPHS))
    above, below = [], []
    for key in PHOTOGRAPHS:
        row = rows[key]
        side = HEIGHT * max(row["height"], row["width"]) // row["height"]
        tile = shown(output.plan, row, images[key], side)
        above.append(Tile(tile.pixels, key))
        caption = f"{row['target_name']}, probability {row['score']:.2f}"
        below.append(Tile(overlay(tile.pixels, tile.saliency_hw), caption))
    contact_sheet([*above, *below], len(PHOTOGRAPHS)).save(FIGURE, quality=QUALITY, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
