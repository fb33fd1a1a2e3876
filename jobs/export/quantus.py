"""Writes arrays for Quantus: normalised model inputs, explained classes, maps, and a list of keys."""

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from blocksight.engine.model.adapter import ModelAdapter
from blocksight.jobs.export.array_file import ArrayFile
from blocksight.jobs.export.records import ExplainedRecord, ExplainedRecords
from blocksight.jobs.ledger.output import map_of
from blocksight.storage.images.decode import fit
from blocksight.storage.outputs.pictures import resized


def write(
    shown: Iterable[ExplainedRecord], records: ExplainedRecords, folder: Path, *, adapter: ModelAdapter
) -> Sequence[str]:
    """Writes the arrays, one row per map, and returns the lines of Python that read them. `shown` yields the records
    with progress."""
    size, resize = adapter.input_size, records.plan.identity["resize"]
    with ExitStack() as files:
        images = files.enter_context(ArrayFile(folder / "x_batch.npy", (3, *size), np.float32))
        classes = files.enter_context(ArrayFile(folder / "y_batch.npy", (), np.int64))
        maps = files.enter_context(ArrayFile(folder / "a_batch.npy", (1, *size), np.float32))
        keys = files.enter_context((folder / "keys.json").open("w", encoding="utf-8"))
        keys.write("[")
        for record in shown:
            fitted = torch.from_numpy(fit(record.pixels, size, resize).copy()).permute(2, 0, 1)
            image = adapter.normalise(fitted[None])[0].numpy()
            for one in record.maps_of_classes:
                images.append(image)
                maps.append(resized(map_of(one.row), size)[None])
                classes.append(np.int64(one.row["target_index"]))
                facts = {name: one.row[name] for name in ("key", "target_index", "target_name", "label_name")}
                keys.write((",\n" if classes.num_rows > 1 else "\n") + json.dumps(facts))
        keys.write("\n]\n")
    return [
        f"import numpy as np; folder = {str(folder)!r}",
        'x, y, a = (np.load(f"{folder}/{name}_batch.npy", mmap_mode="r") for name in "xya")',
    ]
