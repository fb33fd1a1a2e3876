"""A NumPy file that is written row by row."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.lib.format import header_data_from_array_1_0, write_array_header_1_0
from numpy.typing import NDArray


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
