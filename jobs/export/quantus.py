"""Writes arrays for Quantus: normalised model inputs, explained classes, maps, and a list of keys."""

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import header_data_from_array_1_0, write_array_header_1_0
from numpy.typing import NDArray

from blocksight.engine.model.adapter import ModelAdapter
from blocksight.jobs.export.records import ExplainedRecord, ExplainedRecords
from blocksight.jobs.ledger.output import map_of
from blocksight.storage.images.decode import fit
from blocksight.storage.outputs.pictures import resized


class ArrayFile:
    """An .npy file that is written row by row; closing it writes the number of rows into the header."""

    def __init__(self, path: Path, row_shape: Sequence[int], kind: type[np.generic]) -> None:
        self.file = path.open("wb")
        self.rows = np.empty((0, *row_shape), kind)
        self.num_rows = 0
        self._write_header()

    def append(self, row: NDArray[np.generic] | np.generic) -> None:
        """Adds one row, which has the row shape of the file."""
        added = np.asarray(row, self.rows.dtype).reshape(self.rows.shape[1:])
        self.file.write(added.tobytes())
        self.num_rows += 1

    def __enter__(self) -> "ArrayFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.seek(0)
        self._write_header()  # numpy leaves room in it for any number of rows
        self.file.close()

    def _write_header(self) -> None:
        facts = {**header_data_from_array_1_0(self.rows), "shape": (self.num_rows, *self.rows.shape[1:])}
        write_array_header_1_0(self.file, facts)


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
            for one in record.maps:
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
