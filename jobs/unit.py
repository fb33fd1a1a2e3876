"""A unit's way but for the model: read and decode before it, encode and commit after it."""

import hashlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.config import JobConfig
from jobs.context import worker_name
from jobs.receipts import commit_facts, receipt_of, write_receipt
from jobs.records import Receipt, RecordFacts, Unit, UnitFailure, UnitInput, UnitResult, with_reject
from storage.fragments import encode_fragment
from storage.images import decode, fit
from storage.loose import read_images
from storage.maps import CODEC, encode_map
from storage.records import RawRecord
from storage.rejects import Reject
from storage.schema import MAX_ERROR_LENGTH, REJECTED
from storage.store import AlreadyExistsError, ObjectStore, StoreError
from storage.survey import Layout
from storage.tables import read_table
from storage.tars import read_tar


def read_unit(unit: Unit, source: ObjectStore, config: JobConfig, input_size: tuple[int, int]) -> UnitInput:
    """Reads every record of the unit and decodes it to the model's input size; a bad one keeps its reason.

    Raises StoreError where the shard itself is gone, changed or unreadable.
    """
    records: list[RecordFacts] = []
    pixels: list[NDArray[np.uint8]] = []
    for raw in raw_records(unit, source):
        facts, picture = _decoded(raw, f"{source.uri}/{raw.shard}", config, input_size)
        records.append(facts)
        if picture is not None:
            pixels.append(picture)
    stacked = np.stack(pixels) if pixels else np.zeros((0, *input_size, 3), np.uint8)
    return UnitInput(unit, tuple(records), stacked)


def raw_records(unit: Unit, source: ObjectStore) -> Iterator[RawRecord]:
    if unit.layout is Layout.IMAGES:
        return read_images(source, unit.objects)
    read = read_tar if unit.layout is Layout.TAR else read_table
    return read(source, unit.objects[0], unit.start, unit.stop)


def _decoded(
    raw: RawRecord, shard: str, config: JobConfig, input_size: tuple[int, int]
) -> tuple[RecordFacts, NDArray[np.uint8] | None]:
    facts = RecordFacts(raw.key, shard, raw.index, raw.label)
    if raw.reject is not None:
        return with_reject(facts, raw.reject, "read"), None
    data = raw.data or b""
    facts = replace(facts, sha256=hashlib.sha256(data).hexdigest(), num_bytes=len(data))
    try:
        image = decode(data)
        picture = fit(image.pixels, input_size, config.resize)
    except Reject as reject:
        return with_reject(facts, reject, "decode"), None
    return replace(facts, format=image.format, width=image.width, height=image.height), picture


def commit_unit(result: UnitResult, output: ObjectStore, fingerprint: str, *, attempt: str | None = None) -> Receipt:
    """Writes the unit's fragment once, then its receipt; where another attempt was first, adopts that one.

    The fragment's creation is the commit. A reply that was lost is settled by the attempt id in the
    object's metadata. Raises StoreError where nothing was committed, ValueError where rows went astray.
    """
    attempt = attempt or uuid.uuid4().hex
    rows = [_encoded_row(row) for row in result.rows]
    _check_rows(rows, result.num_records)
    body = encode_fragment(rows, _provenance(result.unit, fingerprint))
    receipt = receipt_of(result.unit, body)
    metadata = {"attempt": attempt, **commit_facts(receipt)}
    if _create_or_adopt(output, result.unit, body, metadata):
        receipt = replace(receipt, attempt=attempt, explain_seconds=result.explain_seconds, worker=worker_name())
    else:
        receipt = receipt_of(result.unit, output.read(result.unit.fragment_key))
    write_receipt(output, receipt)
    return receipt


def _create_or_adopt(output: ObjectStore, unit: Unit, body: bytes, metadata: Mapping[str, str]) -> bool:
    """Whether the committed object is ours; False: another attempt's stands and counts."""
    try:
        output.create(unit.fragment_key, body, metadata=metadata)
    except StoreError as error:
        standing = output.head(unit.fragment_key)
        if standing is None:
            raise
        ours = standing.metadata.get("attempt") == metadata["attempt"]
        if not ours and not isinstance(error, AlreadyExistsError):
            raise
        return ours
    return True


def _check_rows(rows: Sequence[Mapping[str, Any]], num_records: int) -> None:
    seen = {(row["shard"], row["shard_index"]) for row in rows}
    if len(seen) != num_records:
        raise ValueError(f"{num_records} records came in and {len(seen)} would go out: nothing was committed")


def _provenance(unit: Unit, fingerprint: str) -> dict[str, str]:
    first = unit.objects[0]
    return {
        "blocksight.job": fingerprint,
        "blocksight.unit": unit.unit_id,
        "blocksight.input_etag": first.etag if unit.layout is not Layout.IMAGES else "",
    }


def _encoded_row(row: Mapping[str, Any]) -> dict[str, Any]:
    if row["status"] == REJECTED:
        return dict(row)
    encoded = encode_map(row["map"])
    return {
        **row,
        "map": encoded.data,
        "map_codec": CODEC,
        "map_height": encoded.height,
        "map_width": encoded.width,
        "map_low": encoded.low,
        "map_high": encoded.high,
    }


def failed(unit: Unit, stage: str, error: Exception) -> UnitFailure:
    """The note that a unit was not committed this time; a store's own sentence needs no type before it."""
    text = str(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {error}"
    return UnitFailure(unit.unit_id, unit.ordinal, unit.objects[0].key, stage, text[:MAX_ERROR_LENGTH])
