"""Writes a Parquet file for Spotlight: pictures, labels, scores, metrics, and the pooled map as an embedding."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from blocksight.jobs.audit.result import GRID
from blocksight.jobs.export.parts import FormOfRecords, Part
from blocksight.jobs.export.pictures import as_jpeg, fitted_image
from blocksight.jobs.export.records import ExplainedMap, ExplainedRecord, ExplainedRecords
from blocksight.jobs.plan.plan import Plan
from blocksight.storage.outputs.fragments import read_rows
from blocksight.storage.parquet.rows import table_of_rows

FILE = "maps.parquet"
ROWS_AT_ONCE = 64
"""Rows in memory at once, each with two pictures."""

STORED = {
    "key": pa.string(),
    "label_name": pa.string(),
    "target_name": pa.string(),
    "target": pa.string(),
    "target_index": pa.int32(),
    "target_rank": pa.int32(),
    "score": pa.float64(),
    "explainer": pa.string(),
    "is_flat": pa.bool_(),
    "is_saturated": pa.bool_(),
}
"""Columns of the output that are copied unchanged."""
AUDITED = {"cluster": pa.int16(), "strangeness": pa.float32()}
"""Columns of the audit that are copied unchanged."""


class Spotlight(FormOfRecords):
    """One Parquet file with a row per map."""

    def write_records(self, records: Iterator[ExplainedRecord], reader: ExplainedRecords, folder: Path) -> None:
        """Writes the rows of these records."""
        schema, rows = _schema(reader), _rows(records, reader.plan)
        with pq.ParquetWriter(folder / FILE, schema, compression="zstd") as writer:
            while batch := list(islice(rows, ROWS_AT_ONCE)):
                writer.write_table(table_of_rows(batch, schema))

    def join(self, parts: Iterator[Part], reader: ExplainedRecords, folder: Path) -> Sequence[str]:
        """Writes the file and returns the lines of Python that open it."""
        schema = _schema(reader)
        with pq.ParquetWriter(folder / FILE, schema, compression="zstd") as writer:
            for part in parts:
                rows = read_rows((part.folder / FILE).read_bytes(), schema, str(part.folder))
                if part.num_maps:
                    writer.write_table(rows.slice(0, part.num_maps), ROWS_AT_ONCE)
        kinds = '"image": spotlight.Image, "overlay": spotlight.Image'
        kinds += ', "embedding": spotlight.Embedding' if reader.has_audit else ""
        return [
            "import pandas as pd; from renumics import spotlight",
            f"spotlight.show(pd.read_parquet({str(folder / FILE)!r}), dtype={{{kinds}}})",
        ]


def _schema(records: ExplainedRecords) -> pa.Schema:
    kinds = {**STORED, "prediction": pa.string(), "image": pa.binary(), "overlay": pa.binary()}
    kinds |= dict.fromkeys(records.columns.values(), pa.float64())
    if records.has_audit:
        kinds |= {**AUDITED, "embedding": pa.list_(pa.float32(), GRID * GRID)}
    return pa.schema(list(kinds.items()))


def _rows(shown: Iterable[ExplainedRecord], plan: Plan) -> Iterator[dict[str, Any]]:
    for record in shown:
        prediction = record.prediction
        for one in record.maps:
            picture = fitted_image(plan, record, one.row)
            yield {
                **{name: one.row[name] for name in STORED},
                "prediction": prediction and prediction["target_name"],
                "image": as_jpeg(picture.pixels),
                "overlay": as_jpeg(picture.overlay),
                **one.metrics,
                **_audited(one),
            }


def _audited(one: ExplainedMap) -> dict[str, Any]:
    if one.audited is None:
        return {}
    pooled = one.audited["pooled"]
    embedding = None if pooled is None else np.frombuffer(pooled, np.uint8).astype(np.float32) / 255
    return {**{name: one.audited[name] for name in AUDITED}, "embedding": embedding}
