"""The plan: the input cut into units, written once and used by every resume."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from operator import attrgetter
from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from blocksight.jobs.plan.config import ConfigError, JobConfig, Part, check_identity, differences, digest_of
from blocksight.jobs.plan.documents import Sha256, damaged, read_document
from blocksight.jobs.plan.estimate import MeasuredRate
from blocksight.jobs.plan.records import NO_VECTORS, Count, ModelFacts, StoredVectors, Unit
from blocksight.jobs.plan.shard_advice import shard_advice
from blocksight.jobs.plan.stored_units import read_units, units_bytes, units_name
from blocksight.jobs.plan.text import counted
from blocksight.jobs.plan.units import (
    Piece,
    Shards,
    Workforce,
    check_units,
    pieces,
    read_shards,
    seconds_per_record,
)
from blocksight.storage.inputs.inventory import inventory_objects
from blocksight.storage.inputs.labels import folder_label
from blocksight.storage.inputs.survey import Layout, Survey, survey
from blocksight.storage.outputs.schema import FLAT_VERSIONS, SCHEMA_VERSION
from blocksight.storage.stores.locations import contain_each_other, is_whole_bucket, normal_place
from blocksight.storage.stores.opening import open_bucket, open_named, open_store, probe_reads
from blocksight.storage.stores.retrying import SHORT_PATIENCE_SECONDS, PatientStore, witnesses_of
from blocksight.storage.stores.store import (
    AlreadyExistsError,
    DamagedError,
    MissingError,
    ObjectInfo,
    ObjectStore,
    StoreError,
)

PLAN_FOLDER = "_job/plan/"
PLAN_KEY = f"{PLAN_FOLDER}plan.json"
MODEL_KEY = f"{PLAN_FOLDER}model.json"
LABELS_KEY = f"{PLAN_FOLDER}labels.json"
REGIONS_FOLDER = "regions/"
UNIT_FOLDERS = ("data/", "_job/attempts/", "_job/receipts/", "_job/dead/", "evaluations/", REGIONS_FOLDER)
"""Folders of an output in which each object belongs to one unit."""
OUR_FOLDERS = ("data/", "_job/", "report/", "evaluations/", "audit/", REGIONS_FOLDER)

MAX_CLASS_FOLDERS = 30_000
"""Class folders that a plan names: more are no classes but a folder for each image."""


class PlanDocument(TypedDict):
    """What `plan.json` holds."""

    fingerprint: Sha256
    configuration: dict[str, Any]
    units: Annotated[str, Field(pattern=rf"^{PLAN_FOLDER}units-[0-9a-f]{{16}}\.parquet$")]
    num_units: Count
    layout: Layout
    num_objects: Count
    num_bytes: Count
    num_records: Count
    ignored: dict[str, Count]
    weights: NotRequired[str | None]
    notes: NotRequired[list[str]]
    expected: NotRequired[dict[str, Count]]
    class_folders: NotRequired[list[str]]
    number_names: NotRequired[list[str]]
    rate: NotRequired[MeasuredRate | None]


class LabelsDocument(TypedDict):
    """What `labels.json` holds."""

    text: str
    """How the data set's labels were read, in one line."""


class DriftError(ConfigError):
    """The output belongs to another configuration; the message shows both."""


@dataclass(frozen=True)
class Plan:
    """Everything that a run needs to know before it starts."""

    identity: Mapping[str, Any]
    """The resolved configuration: everything that changes the result's bytes."""
    layout: Layout
    units: tuple[Unit, ...]
    num_objects: int
    num_bytes: int
    """Of the input objects."""
    num_records: int
    """Exact for images and Parquet, an estimate for tar."""
    ignored: Mapping[str, int]
    """Numbers of objects that are no input, by extension, and of tables with an unread column, by column."""
    weights: str | None = None
    """Path or URI of the weights file that the job was planned with; its hash is in the identity."""
    notes: tuple[str, ...] = ()
    """Sentences on what of the input was followed, joined or left out."""
    expected: Mapping[str, int] = field(default_factory=dict)
    """Records by key of a tar shard, as its sidecar says; empty if a limit may end before."""
    class_folders: tuple[str, ...] = ()
    """Class folders of loose images, sorted: of the whole input, also if a limit leaves some out."""
    number_names: tuple[str, ...] = ()
    """What the tables call the numbers of their labels; empty if nothing says it, or they differ."""
    rate: MeasuredRate | None = None
    """Of one worker, from which the units' sizes come; None: constants decided, or an older version planned it."""
    troubles: Mapping[str, str] = field(default_factory=dict)
    """Why shards could not be read, by key; not stored."""

    @property
    def fingerprint(self) -> str:
        """Hash of the resolved configuration."""
        return digest_of(self.identity)

    def part(self, part: Part | None) -> "Plan":
        """The plan with the units of one part alone: a run of consecutive units. None: the whole plan."""
        if part is None:
            return self
        first, stop = (len(self.units) * place // part.of for place in (part.number, part.number + 1))
        units = self.units[first:stop]
        return replace(self, units=units, num_records=sum(unit.num_records for unit in units))

    @property
    def is_exact(self) -> bool:
        """True if `num_records` was counted, not estimated."""
        is_counted = all(unit.is_counted for unit in self.units)
        return is_counted and (self.layout is not Layout.TAR or self.identity["limit"] is not None)

    @property
    def ignored_text(self) -> str:
        """What is no input, by kind; empty if all is."""
        return ", ".join(f"{count} {kind}" for kind, count in sorted(self.ignored.items()))

    @property
    def witnesses(self) -> tuple[str, ...]:
        """Keys of a few input objects: if they can be read, a failure is of one object and not of the store."""
        return witnesses_of(lambda: (info for unit in self.units for info in unit.objects))

    def label_counts(self) -> Counter[str]:
        """How many records each class folder of loose images holds; empty for other layouts."""
        if self.layout is not Layout.IMAGES:
            return Counter()
        return _class_folders(info for unit in self.units for info in unit.objects)


def _class_folders(objects: Iterable[ObjectInfo]) -> Counter[str]:
    """How many of the objects each folder holds; those without a folder do not count."""
    labels = (folder_label(info.key) for info in objects)
    return Counter(str(label) for label in labels if label is not None)


def _folder_names(objects: Iterable[ObjectInfo]) -> tuple[str, ...]:
    """The class folders, sorted; none if they are too many, which may be as many as the images."""
    names: set[str] = set()
    for info in objects:
        label = folder_label(info.key)
        if label is not None:
            names.add(str(label))
        if len(names) > MAX_CLASS_FOLDERS:
            return ()
    return tuple(sorted(names))


def _totals(cut: Sequence[Piece]) -> tuple[int, int]:
    """Number and bytes of the objects; of a shard that several pieces share once."""
    infos = (info for piece in cut for info in piece.objects)
    num_objects = num_bytes = 0
    for _, same in groupby(infos, key=attrgetter("key")):
        num_objects, num_bytes = num_objects + 1, num_bytes + next(same).size
    return num_objects, num_bytes


def source_of(plan: Plan, endpoint_url: str | None) -> ObjectStore:
    """The store of a plan's input, with short retries, which tells a bad object from a bad store."""
    source, _ = open_named(plan.identity["data"], endpoint_url)
    return PatientStore(source, SHORT_PATIENCE_SECONDS, witnesses=plan.witnesses)


def open_output(config: JobConfig) -> ObjectStore:
    """The output's store. Raises ConfigError for a bucket's root, and for an output inside or around the input."""
    check_place(config.output, {"data": config.data})
    return open_store(config.output, config.endpoint_url)


def check_place(output: str, taken: Mapping[str, str]) -> None:
    """Raises ConfigError for a bucket's root, and for a place inside or around a taken one (URIs by name)."""
    place = normal_place(output)
    if is_whole_bucket(place):
        raise ConfigError(f"output {place!r} is a whole bucket; name a prefix in it, such as {place}/maps")
    for name, uri in taken.items():
        if contain_each_other(place, uri):
            raise ConfigError(f"{place!r} and {name} {uri!r} contain each other; choose another place")


@dataclass(frozen=True)
class FoundInput:
    """An input that was listed and can be cut into units, more than once without another look at it."""

    config: JobConfig
    identity: Mapping[str, Any]
    survey: Survey
    shards: Shards
    weights: str | None

    def cut(self, workforce: Workforce) -> Plan:
        """The plan with units of the size that fits these workers."""
        found = self.survey
        cut = list(pieces(found, self.shards, self.config, workforce))
        fingerprint = digest_of(self.identity)
        spread = _is_spread(self.identity)
        units = tuple(_unit(ordinal, fingerprint, found.layout, piece, spread) for ordinal, piece in enumerate(cut))
        num_objects, num_bytes = _totals(cut)
        return Plan(
            self.identity,
            found.layout,
            units,
            num_objects=num_objects,
            num_bytes=num_bytes,
            num_records=sum(piece.num_records for piece in cut),
            ignored={**found.ignored, **_unread_columns(cut)},
            weights=self.weights,
            notes=(*found.notes, *_notes_of(cut), *self._advice(num_objects, workforce)),
            expected=found.expected if self.config.limit is None else {},
            class_folders=_folder_names(found.objects) if found.layout is Layout.IMAGES else (),
            number_names=_number_names(cut),
            rate=workforce.rate,
            troubles={piece.objects[0].key: piece.trouble for piece in cut if piece.trouble is not None},
        )

    def _advice(self, num_objects: int, workforce: Workforce) -> Iterable[str]:
        """A sentence if the input is better made into shards."""
        if self.survey.layout is not Layout.IMAGES:
            return ()
        seconds = seconds_per_record(self.config, num_objects, workforce)
        advice = shard_advice(self.config.data, num_objects, seconds, workforce.num_workers)
        return () if advice is None else (advice,)


def make_plan(config: JobConfig, *, weights_sha256: str | None, workforce: Workforce) -> Plan:
    """Lists the input and cuts it into units. Reads no image, but tests that listed objects can be read."""
    return find_input(config, weights_sha256=weights_sha256).cut(workforce)


def find_input(config: JobConfig, *, weights_sha256: str | None) -> FoundInput:
    """Lists the input. Reads no image, but tests that listed objects can be read."""
    source, key = open_named(config.data, config.endpoint_url)
    found = survey(source, key) if config.inventory is None else _inventoried(source, key, config)
    witnesses = witnesses_of(lambda: found.objects)
    patient = PatientStore(source, SHORT_PATIENCE_SECONDS, witnesses=witnesses)
    probe_reads(patient, found.objects)
    weights = None if config.weights is None or config.weights_are_named else normal_place(config.weights)
    return FoundInput(config, config.identity(weights_sha256), found, read_shards(patient, found, config), weights)


def _inventoried(source: ObjectStore, key: str, config: JobConfig) -> Survey:
    """The input by an inventory in place of a listing."""
    bucket, manifest = open_bucket(str(config.inventory), config.endpoint_url)
    found = survey(source, key, inventory_objects(bucket, manifest, source.uri))
    note = f"listed by the inventory {config.inventory}: what was stored after it was made is not in the plan"
    return replace(found, notes=(*found.notes, note))


def _unread_columns(cut: Sequence[Piece]) -> Counter[str]:
    """The number of tables with an unread column, by column."""
    shards = {piece.objects[0].key: piece.unread for piece in cut}
    return Counter(f"with an unread {column}" for unread in shards.values() for column in unread)


def _number_names(cut: Sequence[Piece]) -> tuple[str, ...]:
    """The names that all tables agree on."""
    found = {piece.number_names for piece in cut if piece.trouble is None}
    return next(iter(found)) if len(found) == 1 else ()


def _notes_of(cut: Sequence[Piece]) -> Iterable[str]:
    """The first sentence of each kind on the shards."""
    notes = {kind: note for piece in reversed(cut) for kind, note in piece.notes.items()}
    if len({piece.number_names for piece in cut if piece.trouble is None}) > 1:
        notes["number names"] = "the tables give the numbers of their labels different names, which are left out"
    return notes.values()


def _is_spread(identity: Mapping[str, Any]) -> bool:
    """True if the fragments of an output with this configuration lie in 256 folders."""
    return identity["schema"] not in FLAT_VERSIONS


def _unit(ordinal: int, fingerprint: str, layout: Layout, piece: Piece, spread: bool) -> Unit:
    inputs = [[info.key, info.size, info.etag] for info in piece.objects]
    unit_id = digest_of({"job": fingerprint, "inputs": inputs, "start": piece.start, "stop": piece.stop})[:20]
    return Unit(ordinal, unit_id, layout, piece.objects, piece.start, piece.stop, piece.num_records, spread)


def ensure_plan(store: ObjectStore, plan: Plan) -> Plan:
    """Writes the plan once; returns the stored plan, which must have the same configuration.

    `plan.json` names the list of units by a hash of its bytes, so that two drivers that plan at the same time
    cannot mix their lists. Raises DriftError, and ConfigError for a folder with other files.
    """
    stored = load_plan(store)
    if stored is None:
        _refuse_foreign(store)
        body = units_bytes(plan.units)
        units_key = f"{PLAN_FOLDER}{units_name(body)}"
        store.put(units_key, body)
        try:
            store.create(PLAN_KEY, _plan_json(plan, units_key))
        except AlreadyExistsError as error:
            stored = load_plan(store)
            if stored is None:  # a broken link in a local output
                raise StoreError(f"{store.uri}/{PLAN_KEY} exists and cannot be read: remove it") from error
        else:
            return plan
    refuse_drift(plan.identity, stored.identity, "configuration")
    return stored


def refuse_older(plan: Plan, uri: str) -> None:
    """Raises DriftError for an output of an earlier version: this one reads it and adds nothing to it."""
    theirs = plan.identity["schema"]
    if theirs != SCHEMA_VERSION:
        raise DriftError(
            f"{uri} was begun by a version that writes schema {theirs}, and this one writes {SCHEMA_VERSION}: finish "
            "it with that version, or choose another --output; `status`, `show`, `audit` and the others read it"
        )


def refuse_other_configuration(identity: Mapping[str, Any], plan: Plan) -> None:
    """Raises DriftError if an output that is read has another configuration; its schema may be older."""
    refuse_drift({**identity, "schema": plan.identity["schema"]}, plan.identity, "configuration")


def refuse_drift(ours: Mapping[str, Any], theirs: Mapping[str, Any], what: str) -> None:
    """Raises DriftError, with a line per difference, if the request differs from the output."""
    lines = differences(ours, theirs)
    if lines:
        shown = "\n  ".join(lines)
        raise DriftError(
            f"the output belongs to another {what}; choose another --output, or ask for the same again:\n  {shown}"
        )


def ensure_model(store: ObjectStore, facts: ModelFacts) -> None:
    """Writes the model's facts once; raises DriftError if the output was begun with another model."""
    try:
        store.create(MODEL_KEY, _json_bytes(_plain(facts)))
    except AlreadyExistsError:
        refuse_other_model(store, facts)


def ensure_labels(store: ObjectStore, text: str) -> None:
    """Writes once how the labels were read."""
    with suppress(AlreadyExistsError):
        store.create(LABELS_KEY, _json_bytes({"text": text}))


def planned_labels(store: ObjectStore) -> str | None:
    """How the labels were read, in one line; None in an output of an older version, or before the model was loaded.

    Raises StoreError, and UnreconciledError if it is damaged.
    """
    try:
        return read_document(store, LABELS_KEY, LabelsDocument)["text"]
    except MissingError:
        return None


def stored_vectors(store: ObjectStore) -> StoredVectors:
    """What was computed for the targets of an output; nothing before its model was stored."""
    try:
        return read_document(store, MODEL_KEY, ModelFacts).vectors
    except MissingError:
        return NO_VECTORS


def refuse_other_model(store: ObjectStore, facts: ModelFacts) -> None:
    """Raises DriftError if the output was begun with another model, and MissingError if with none."""
    stored = _plain(read_document(store, MODEL_KEY, ModelFacts))
    known = {name for name, value in stored.items() if value is not None} - {"notes"}
    ours = _plain(facts)
    refuse_drift({name: ours[name] for name in known}, {name: stored[name] for name in known}, "model")


def _plain(facts: ModelFacts) -> Mapping[str, Any]:
    """The facts as JSON gives them back."""
    return json.loads(json.dumps(asdict(facts)))


def load_plan(store: ObjectStore) -> Plan | None:
    """An output's plan, or None. Raises StoreError, and UnreconciledError if it is damaged."""
    body = plan_document(store)
    if body is None:
        return None
    try:
        check_identity(body["configuration"])
        if body["fingerprint"] != digest_of(body["configuration"]):
            raise ValueError("its fingerprint is not that of its configuration")
        return _plan_of(body, _named_units(store, body))
    except (ValueError, TypeError, DamagedError, MissingError) as error:
        raise damaged(store.uri, PLAN_KEY, error) from error


def plan_document(store: ObjectStore) -> PlanDocument | None:
    """The content of `plan.json`, or None if there is none. Raises as `load_plan`."""
    try:
        return read_document(store, PLAN_KEY, PlanDocument)
    except MissingError:
        return None


def existing_plan(store: ObjectStore) -> Plan:
    """An output's plan. Raises ConfigError if there is none, and UnreconciledError if it is damaged."""
    made = load_plan(store)
    if made is None:
        raise ConfigError(f"there is no blocksight output in {store.uri}: {PLAN_KEY} is missing")
    return made


def _named_units(store: ObjectStore, body: PlanDocument) -> tuple[Unit, ...]:
    """The units that a plan names. Raises ValueError, ArrowException and MissingError."""
    units_body = store.read(body["units"])
    if f"{PLAN_FOLDER}{units_name(units_body)}" != body["units"]:
        raise ValueError(f"{body['units']} does not hold what its name says")
    units = read_units(units_body, _is_spread(body["configuration"]))
    check_units(units, body["layout"])
    if len(units) != body["num_units"]:
        raise ValueError(f"{counted(body['num_units'], 'unit')} should be there, and {len(units)} can be read")
    return units


def _plan_of(body: PlanDocument, units: tuple[Unit, ...]) -> Plan:
    return Plan(
        body["configuration"],
        body["layout"],
        units,
        body["num_objects"],
        body["num_bytes"],
        body["num_records"],
        body["ignored"],
        body.get("weights"),
        tuple(body.get("notes", ())),
        body.get("expected", {}),
        tuple(body.get("class_folders", ())),
        tuple(body.get("number_names", ())),
        body.get("rate"),
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
            "weights": plan.weights,
            "notes": list(plan.notes),
            "expected": dict(plan.expected),
            "class_folders": list(plan.class_folders),
            "number_names": list(plan.number_names),
            "rate": plan.rate and asdict(plan.rate),
        }
    )


def _json_bytes(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()
