"""The steps of a unit around the model: reads and decodes before it, encodes and commits after it."""

import hashlib
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blocksight.jobs.ledger.receipts import committed_receipt, object_metadata, receipt_in, receipt_of
from blocksight.jobs.observe.stages import timed, timed_reading
from blocksight.jobs.plan.config import JobConfig
from blocksight.jobs.plan.context import JobContext, worker_name
from blocksight.jobs.plan.records import Receipt, RecordFacts, Unit, UnitInput, UnitResult, with_reject
from blocksight.jobs.plan.text import counted
from blocksight.jobs.worker.attempts import WorkerStores
from blocksight.jobs.worker.error_classes import is_of_record, is_of_unit
from blocksight.jobs.worker.isolation import ProcessDiedError, isolated_if
from blocksight.jobs.worker.watchdog import heartbeat
from blocksight.storage.images.decode import decode, fit
from blocksight.storage.inputs.loose import read_images
from blocksight.storage.inputs.records import RawRecord, as_text, read_failed
from blocksight.storage.inputs.survey import Layout
from blocksight.storage.inputs.tables import read_table, table_facts
from blocksight.storage.inputs.tars import read_tar
from blocksight.storage.limits import MAX_UNPLANNED_RECORDS
from blocksight.storage.outputs.fragments import encode_fragment
from blocksight.storage.outputs.map_codec import CODEC, encode_levels
from blocksight.storage.outputs.schema import MAX_ERROR_LENGTH, RECORD_COLUMNS, REJECTED
from blocksight.storage.rejects import Reject, RejectCode
from blocksight.storage.stores.store import AlreadyExistsError, ObjectError, ObjectInfo, ObjectStore, StoreError

COLUMNS_OF_A_REJECT = {
    *("key", "shard", "shard_index", "unit_id", "status"),
    *("reject_code", "reject_stage", "error"),
}
"""Every rejected row keeps these columns: they name the record and the reason."""

Row = Mapping[str, Any]
"""In the columns of `blocksight.storage.outputs.schema.SCHEMA`; until it is encoded, `map` holds grey levels [H, W]."""

Decoding = Callable[[RawRecord], tuple[RecordFacts, NDArray[np.uint8] | None]]
"""A record's facts and its pixels, if it has any."""


def take_unit(unit: Unit, stores: WorkerStores, context: JobContext, *, careful: bool = False) -> UnitInput | Receipt:
    """Reads and decodes a unit. Returns its receipt instead if the fragment is already committed."""
    receipt = committed_receipt(stores.output, unit)
    if receipt is not None:
        return receipt
    return read_unit(unit, stores.source, context.config, context.facts.input_size, careful=careful)


def read_unit(
    unit: Unit, source: ObjectStore, config: JobConfig, input_size: tuple[int, int], *, careful: bool = False
) -> UnitInput:
    """Reads the unit's records and decodes them to the model's input size; a bad record keeps its reason.

    `careful`: in child processes, so that only a record that kills its process is rejected. Raises MissingError,
    ChangedError, ObjectError and DamagedError if the shard itself is gone, changed, refused or unreadable,
    ProcessDiedError if reading it kills the process, and StoreError.
    """
    records: list[RecordFacts] = []
    pixels: list[NDArray[np.uint8]] = []
    with (
        timed_reading() as decode_time,
        isolated_if(partial(_all_raw_records, source=source), careful) as listed,
        isolated_if(partial(decoded, config=config, input_size=input_size), careful) as decoding,
    ):
        for raw in listed(unit) if careful else raw_records(unit, source):
            heartbeat()
            with decode_time:
                facts, picture = decoded_or_rejected(decoding, raw, source)
            records.append(facts)
            if picture is not None:
                pixels.append(picture)
    stacked = np.stack(pixels) if pixels else np.zeros((0, *input_size, 3), np.uint8)
    return UnitInput(unit, tuple(records), stacked)


def _all_raw_records(unit: Unit, source: ObjectStore) -> list[RawRecord]:
    """The unit's records. If a table's rows cannot be read together it reads halves, down to the row that fails."""
    try:
        return list(raw_records(unit, source))
    except Exception as error:
        if unit.layout is not Layout.PARQUET or not unit.is_counted or not is_of_unit(error):
            raise
        if unit.stop - unit.start == 1:
            shard = unit.objects[0].key
            return [RawRecord(f"{shard}/{unit.start}", shard, unit.start, None, reject=read_failed(error))]
        middle = (unit.start + unit.stop) // 2
        halves = (replace(unit, stop=middle), replace(unit, start=middle))
        return [raw for half in halves for raw in _all_raw_records(half, source)]


def raw_records(unit: Unit, source: ObjectStore) -> Iterator[RawRecord]:
    """The unit's records in the shard's order. Raises as `read_unit`."""
    if unit.layout is Layout.IMAGES:
        return read_images(source, unit.objects)
    if unit.layout is Layout.TAR:
        return read_tar(source, unit.objects[0], unit.start, unit.stop)
    if not unit.is_counted:
        _refuse_too_many_rows(source, unit.objects[0])
    return read_table(source, unit.objects[0], unit.start, unit.stop)


def _refuse_too_many_rows(source: ObjectStore, info: ObjectInfo) -> None:
    """Raises ObjectError if a table that the plan could not read is too large for one unit."""
    count = table_facts(source, info).num_rows
    if count > MAX_UNPLANNED_RECORDS:
        raise ObjectError(
            f"{source.uri}/{info.key} could not be read when the plan was made and has {counted(count, 'row')} now, "
            f"at most {MAX_UNPLANNED_RECORDS} are taken as one unit: explain it into another output"
        )


def decoded_or_rejected(
    decoding: Decoding, raw: RawRecord, source: ObjectStore
) -> tuple[RecordFacts, NDArray[np.uint8] | None]:
    """The record's facts and pixels by `decoding`; a record at which that dies, or fails twice, is rejected."""
    named = replace(raw, shard=f"{source.uri}/{raw.shard}")
    try:
        return _tried_twice(decoding, named)
    except ProcessDiedError as error:
        reject = Reject(RejectCode.PROCESS_DIED, str(error))
    except Exception as error:
        if not is_of_record(error, decoding):
            raise
        reject = Reject(RejectCode.DECODE_FAILED, f"{type(error).__name__}: {error}")
    return with_reject(_facts(named), reject, "decode"), None


def _tried_twice(decoding: Decoding, raw: RawRecord) -> tuple[RecordFacts, NDArray[np.uint8] | None]:
    """The result of `decoding`, tried twice if the record is to blame."""
    try:
        return decoding(raw)
    except ProcessDiedError:
        raise
    except Exception as error:
        if not is_of_record(error, decoding):
            raise
    return decoding(raw)


def _facts(raw: RawRecord) -> RecordFacts:
    return RecordFacts(raw.key, raw.shard, raw.index, raw.label)


def decoded(
    raw: RawRecord, config: JobConfig, input_size: tuple[int, int]
) -> tuple[RecordFacts, NDArray[np.uint8] | None]:
    """The record's facts and its pixels [H, W, 3] at the model's input size; None if the facts hold a reject."""
    facts = _facts(raw)
    if raw.reject is not None:
        return with_reject(facts, raw.reject, "read"), None
    data = raw.data or b""
    facts = replace(facts, sha256=hashlib.sha256(data).hexdigest(), num_bytes=len(data))
    try:
        image = decode(data)
        picture = fit(image.pixels, input_size, config.resize)
    except Reject as reject:
        return with_reject(facts, reject, "decode"), None
    return replace(facts, format=image.kind, width=image.width, height=image.height), picture


def commit_unit(
    result: UnitResult,
    output: ObjectStore,
    fingerprint: str,
    *,
    attempt: str | None = None,
    careful: bool = False,
) -> Receipt:
    """Writes the unit's fragment once, with its receipt; adopts the fragment of an attempt that was first.

    Creating the fragment is the commit. If the reply is lost, the attempt id in the object's metadata tells whose
    it is. `careful`: maps are encoded in a child process, and only a record that fails is rejected. Raises
    StoreError if nothing was committed, ValueError if records are missing.
    """
    with timed("encode"):
        body = _encoded_unit(result, fingerprint, careful=careful)
    receipt = replace(
        receipt_of(result.unit, body),
        attempt=attempt or uuid.uuid4().hex,
        explain_seconds=result.explain_seconds,
        forward=result.forward,
        worker=worker_name(),
    )
    with timed("commit"):
        return create_or_adopt(output, result.unit, body, receipt)


def _encoded_unit(result: UnitResult, fingerprint: str, *, careful: bool) -> bytes:
    """The fragment's bytes. Raises ValueError if records are missing."""
    with isolated_if(_encoded_row, careful) as encoded:
        records = groupby(result.rows, key=itemgetter("shard", "shard_index"))
        rows = [row for _, own in records for row in _encoded_record(encoded, list(own), careful=careful)]
    _check_rows(rows, result.num_records)
    return encode_fragment(rows, _provenance(result.unit, fingerprint))


def create_or_adopt(output: ObjectStore, unit: Unit, body: bytes, receipt: Receipt) -> Receipt:
    """The receipt of the committed fragment: ours, or another attempt's that was first."""
    try:
        output.create(unit.fragment_key, body, metadata=object_metadata(receipt))
    except StoreError as error:
        committed = output.head(unit.fragment_key)
        if committed is None:
            raise
        if committed.metadata.get("attempt") == receipt.attempt:
            return receipt
        if not isinstance(error, AlreadyExistsError):
            raise
        return receipt_in(unit, committed) or receipt_of(unit, output.read(unit.fragment_key))
    return receipt


def _check_rows(rows: Sequence[Mapping[str, Any]], num_records: int) -> None:
    seen = {(row["shard"], row["shard_index"]) for row in rows}
    if len(seen) != num_records:
        raise ValueError(f"{counted(num_records, 'record')} came in and {len(seen)} would go out: nothing is committed")


def _provenance(unit: Unit, fingerprint: str) -> dict[str, str]:
    first = unit.objects[0]
    return {
        "blocksight.job": fingerprint,
        "blocksight.unit": unit.unit_id,
        "blocksight.input_etag": first.etag if unit.layout is not Layout.IMAGES else "",
    }


def _encoded_record(encoded: Callable[[Row], Row], rows: Sequence[Row], *, careful: bool) -> list[Row]:
    """A record's encoded rows, one per target, or one rejected row."""
    try:
        made = [encoded(row) for row in rows]
        if careful:
            encode_fragment(made, {})
    except ProcessDiedError as error:
        return [_rejected_row(rows[0], Reject(RejectCode.PROCESS_DIED, str(error)), "encode")]
    except Exception as error:
        if not careful or not is_of_record(error, encoded):
            raise
        reject = Reject(RejectCode.ENCODE_FAILED, f"{type(error).__name__}: {error}")
        return [_storable(_rejected_row(rows[0], reject, "encode"))]
    return made


def _storable(row: Row) -> Row:
    """The rejected row, without the values that do not fit their columns."""
    kept: dict[str, Any] = {**row, "key": as_text(row["key"]), "shard": as_text(row["shard"])}
    for name in row.keys() - COLUMNS_OF_A_REJECT:
        try:
            encode_fragment([{**dict.fromkeys(COLUMNS_OF_A_REJECT, ""), "shard_index": 0, name: row[name]}], {})
        except Exception:  # noqa: BLE001 - a value that fails for any reason is left out
            del kept[name]
    return kept


def _rejected_row(row: Row, reject: Reject, stage: str) -> Row:
    """The record's row with a reason in place of a map."""
    about_record = {name: row[name] for name in RECORD_COLUMNS if name in row}
    message = as_text(reject.message)[:MAX_ERROR_LENGTH]
    return {
        **about_record,
        "status": REJECTED,
        "reject_code": str(reject.code),
        "reject_stage": stage,
        "error": message,
    }


def _encoded_row(row: Row) -> Row:
    if row["status"] == REJECTED:
        return dict(row)
    height, width = row["map"].shape
    return {
        **row,
        "map": encode_levels(row["map"]),
        "map_codec": CODEC,
        "map_height": height,
        "map_width": width,
        **({"map_negative": encode_levels(row["map_negative"])} if "map_negative" in row else {}),
    }
