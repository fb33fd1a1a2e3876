"""The plan: what there is, cut into units once, written once, and the same for every resume."""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.sizing import LEAST_UNIT_SECONDS, shrinking, unit_records
from jobs.config import ConfigError, JobConfig, differences, digest_of
from jobs.estimate import estimate
from jobs.records import ModelFacts, Unit
from storage.store import AlreadyExistsError, MissingError, ObjectInfo, ObjectStore
from storage.stores import open_store
from storage.survey import Layout, Survey, survey
from storage.tables import count_rows
from storage.tars import sample_tar, tar_offset_after

PLAN_KEY = "_job/plan/plan.json"
MODEL_KEY = "_job/plan/model.json"
OUR_FOLDERS = ("data/", "_job/", "report/")

UNITS_SCHEMA = pa.schema(
    [
        ("ordinal", pa.int32()),
        ("unit_id", pa.string()),
        ("layout", pa.string()),
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("num_records", pa.int64()),
        ("objects", pa.list_(pa.struct([("key", pa.string()), ("size", pa.int64()), ("etag", pa.string())]))),
    ]
)


class DriftError(ConfigError):
    """The output belongs to another configuration; the message shows both."""


@dataclass(frozen=True)
class Plan:
    """Everything that a run needs to know before it starts."""

    identity: Mapping[str, Any]
    """The resolved configuration: all that changes the result's bytes."""
    layout: Layout
    units: tuple[Unit, ...]
    num_objects: int
    num_bytes: int
    """Of the input objects."""
    num_records: int
    """Exact for images and Parquet, an estimate for tar."""
    ignored: Mapping[str, int]
    """Objects that are no input, by extension."""

    @property
    def fingerprint(self) -> str:
        """Hash of the resolved configuration."""
        return digest_of(self.identity)

    @property
    def is_exact(self) -> bool:
        """Whether `num_records` was counted, not estimated."""
        return self.layout is not Layout.TAR or self.identity["limit"] is not None

    def label_names(self) -> list[str]:
        """The class folders of loose images, sorted; empty for other layouts."""
        if self.layout is not Layout.IMAGES:
            return []
        folders = {PurePosixPath(info.key).parent.name for unit in self.units for info in unit.objects}
        return sorted(folders - {""})


@dataclass(frozen=True)
class _Piece:
    """A unit before it has its place and its name."""

    objects: tuple[ObjectInfo, ...]
    start: int
    stop: int
    num_records: int


def open_source(data: str, endpoint_url: str | None) -> tuple[ObjectStore, str]:
    """The store that holds the input, and the prefix below it: a single file is a prefix of its folder."""
    uri = data.rstrip("/")
    if PurePosixPath(uri).suffix and not Path(uri).is_dir():
        folder, _, name = uri.rpartition("/")
        return open_store(folder or ".", endpoint_url), name
    return open_store(uri, endpoint_url), ""


def open_output(config: JobConfig) -> ObjectStore:
    """The store of the result. Refuses a bucket's root, and an output inside the input or around it."""
    data, output = (uri.rstrip("/") + "/" for uri in (config.data, config.output))
    if output.startswith("s3://") and output.count("/") <= 3:
        raise ConfigError(f"output {config.output!r} is a whole bucket; name a prefix in it, such as {output}maps")
    if output.startswith(data) or data.startswith(output):
        raise ConfigError(
            f"output {config.output!r} and data {config.data!r} contain each other; choose another output"
        )
    return open_store(config.output, config.endpoint_url)


@dataclass(frozen=True)
class Workforce:
    """What a plan expects to run on; it shapes the units' sizes alone."""

    num_workers: int
    on_gpu: bool


def make_plan(config: JobConfig, *, weights_sha256: str | None, workforce: Workforce) -> Plan:
    """Lists the input and cuts it into units; reads no image."""
    source, prefix = open_source(config.data, config.endpoint_url)
    identity = config.identity(weights_sha256)
    found = survey(source, prefix)
    pieces = list(_pieces(source, found, config, workforce))
    fingerprint = digest_of(identity)
    units = tuple(_unit(ordinal, fingerprint, found.layout, piece) for ordinal, piece in enumerate(pieces))
    used = {info.key: info for piece in pieces for info in piece.objects}
    return Plan(
        identity,
        found.layout,
        units,
        num_objects=len(used),
        num_bytes=sum(info.size for info in used.values()),
        num_records=sum(piece.num_records for piece in pieces),
        ignored=found.ignored,
    )


def _pieces(source: ObjectStore, found: Survey, config: JobConfig, workforce: Workforce) -> Iterator[_Piece]:
    if found.layout is Layout.IMAGES:
        return _image_pieces(found.objects[: config.limit], config, workforce)
    if found.layout is Layout.PARQUET:
        return _table_pieces(source, found.objects, config, workforce)
    return _tar_pieces(source, found.objects, config, workforce)


def _sizes(config: JobConfig, num_records: int, workforce: Workforce) -> tuple[int, int]:
    """Records of a full unit, and of the smallest one that is still worth its overhead."""
    num_targets = config.target_choice.count
    guess = estimate(config.model, config.explainer_parameters(), num_records, num_targets, on_gpu=workforce.on_gpu)
    seconds = guess.seconds_per_record
    full = unit_records(seconds, guess.bytes_per_record, num_records, workforce.num_workers)
    return full, min(full, max(1, round(LEAST_UNIT_SECONDS / seconds)))


def _image_pieces(objects: Sequence[ObjectInfo], config: JobConfig, workforce: Workforce) -> Iterator[_Piece]:
    full, floor = _sizes(config, len(objects), workforce)
    start = 0
    for size in shrinking(len(objects), full, floor, workforce.num_workers):
        chosen = tuple(objects[start : start + size])
        yield _Piece(chosen, 0, len(chosen), len(chosen))
        start += size


def _table_pieces(
    source: ObjectStore, objects: Sequence[ObjectInfo], config: JobConfig, workforce: Workforce
) -> Iterator[_Piece]:
    counts = _limited([count_rows(source, info) for info in objects], config.limit)
    full, _ = _sizes(config, sum(counts), workforce)
    for info, count in zip(objects, counts, strict=False):
        for start in range(0, count, full):
            stop = min(start + full, count)
            yield _Piece((info,), start, stop, stop - start)


def _limited(counts: Sequence[int], limit: int | None) -> list[int]:
    """The first `limit` of records that lie in shards of these sizes, as sizes."""
    if limit is None:
        return list(counts)
    before = accumulate(counts, initial=0)
    return [max(0, min(count, limit - done)) for count, done in zip(counts, before, strict=False)]


def _tar_pieces(
    source: ObjectStore, objects: Sequence[ObjectInfo], config: JobConfig, workforce: Workforce
) -> Iterator[_Piece]:
    """Byte ranges of the shards: a reader takes the records that begin in its range."""
    shards = list(_tar_shards(source, objects, config.limit))
    full, _ = _sizes(config, sum(count for _, _, count in shards), workforce)
    for info, stop, count in shards:
        parts = max(1, round(count / full))
        edges = [round(stop * part / parts) for part in range(parts + 1)]
        shares = [count * (part + 1) // parts - count * part // parts for part in range(parts)]
        for start, end, share in zip(edges, edges[1:], shares, strict=False):
            yield _Piece((info,), start, end, share)


def _tar_shards(
    source: ObjectStore, objects: Sequence[ObjectInfo], limit: int | None
) -> Iterator[tuple[ObjectInfo, int, int]]:
    """Shard, end of its used bytes, number of records: counted under a limit, else guessed from the first."""
    if limit is None:
        per_byte = sample_tar(source, objects[0]) / max(1, objects[0].size)
        yield from ((info, info.size, max(1, round(info.size * per_byte))) for info in objects)
        return
    left = limit
    for info in objects:
        if left <= 0:
            return
        stop, count = tar_offset_after(source, info, left)
        left -= count
        yield info, stop, count


def _unit(ordinal: int, fingerprint: str, layout: Layout, piece: _Piece) -> Unit:
    inputs = [[info.key, info.size, info.etag] for info in piece.objects]
    unit_id = digest_of({"job": fingerprint, "inputs": inputs, "start": piece.start, "stop": piece.stop})[:20]
    return Unit(ordinal, unit_id, layout, piece.objects, piece.start, piece.stop, piece.num_records)


def settle_plan(store: ObjectStore, plan: Plan) -> Plan:
    """Writes the plan once; where one stands already, that one counts and must have the same configuration.

    The units lie in an object named by its content and `plan.json` names it, so that two drivers that
    plan at once cannot mix their listings. Raises DriftError, and ConfigError for a folder of foreign files.
    """
    standing = load_plan(store)
    if standing is None:
        _refuse_foreign(store)
        body = _units_bytes(plan.units)
        units_key = f"_job/plan/units-{hashlib.sha256(body).hexdigest()[:16]}.parquet"
        store.put(units_key, body)
        try:
            store.create(PLAN_KEY, _plan_json(plan, units_key))
        except AlreadyExistsError:
            standing = load_plan(store)
        else:
            return plan
    assert standing is not None
    refuse_drift(plan.identity, standing.identity, "configuration")
    return standing


def refuse_drift(ours: Mapping[str, Any], theirs: Mapping[str, Any], what: str) -> None:
    """Raises DriftError, with a line per difference, where what is asked for is not what stands."""
    lines = differences(ours, theirs)
    if lines:
        shown = "\n  ".join(lines)
        raise DriftError(
            f"the output belongs to another {what}; choose another --output, or ask for the same again:\n  {shown}"
        )


def settle_model(store: ObjectStore, facts: ModelFacts) -> None:
    """Writes what the model is, once; raises DriftError where the output was begun with another one."""
    body = json.loads(json.dumps(asdict(facts)))
    try:
        store.create(MODEL_KEY, _json_bytes(body))
    except AlreadyExistsError:
        refuse_drift(body, json.loads(store.read(MODEL_KEY)), "model")


def load_plan(store: ObjectStore) -> Plan | None:
    """The plan that stands in an output, or None."""
    try:
        body = json.loads(store.read(PLAN_KEY))
    except MissingError:
        return None
    units = _read_units(store.read(body["units"]))
    return Plan(
        body["configuration"],
        Layout(body["layout"]),
        units,
        body["num_objects"],
        body["num_bytes"],
        body["num_records"],
        body["ignored"],
    )


def _refuse_foreign(store: ObjectStore) -> None:
    foreign = next((info.key for info in store.list() if not info.key.startswith(OUR_FOLDERS)), None)
    if foreign is not None:
        raise ConfigError(
            f"the output {store.uri} holds files that are not ours, such as {foreign!r}; choose an empty output"
        )


def _plan_json(plan: Plan, units_key: str) -> bytes:
    return _json_bytes(
        {
            "fingerprint": plan.fingerprint,
            "configuration": plan.identity,
            "units": units_key,
            "num_units": len(plan.units),
            "layout": plan.layout,
            "num_objects": plan.num_objects,
            "num_bytes": plan.num_bytes,
            "num_records": plan.num_records,
            "ignored": plan.ignored,
        }
    )


def _json_bytes(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()


def _units_bytes(units: Sequence[Unit]) -> bytes:
    rows = [
        {
            **{name: getattr(unit, name) for name in UNITS_SCHEMA.names if name != "objects"},
            "objects": [{"key": info.key, "size": info.size, "etag": info.etag} for info in unit.objects],
        }
        for unit in units
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=UNITS_SCHEMA), sink, compression="zstd")
    return sink.getvalue()


def _read_units(body: bytes) -> tuple[Unit, ...]:
    rows = pq.read_table(io.BytesIO(body), schema=UNITS_SCHEMA).to_pylist()
    return tuple(
        Unit(
            **{**row, "layout": Layout(row["layout"]), "objects": tuple(ObjectInfo(**item) for item in row["objects"])}
        )
        for row in rows
    )
