"""Damaged JSON documents of an output: one sentence, for each document, damage and command."""

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from blocksight.jobs.audit.result import AUDIT_KEY, read_audit
from blocksight.jobs.audit.run import AuditRequest, run_audit
from blocksight.jobs.cli.main import app
from blocksight.jobs.ledger import attempt_markers
from blocksight.jobs.ledger.dead_letters import letter_key, read_letters
from blocksight.jobs.ledger.output import model_facts
from blocksight.jobs.ledger.receipt_batches import read_receipts
from blocksight.jobs.ledger.reconcile import MANIFEST_KEY, final_manifest
from blocksight.jobs.plan.config import digest_of
from blocksight.jobs.plan.documents import parsed, read_document
from blocksight.jobs.plan.forward_setting import FORWARD_KEY, planned_forward
from blocksight.jobs.plan.plan import MODEL_KEY, PLAN_FOLDER, PLAN_KEY, Plan, existing_plan, load_plan
from blocksight.jobs.plan.preflight import PREFLIGHT_KEY, stored_preflight
from blocksight.jobs.plan.records import Cause, DeadLetter, ModelFacts, Receipt, UnreconciledError
from blocksight.jobs.plan.stored_units import UNITS_SCHEMA
from blocksight.storage.stores.local import LocalStore
from blocksight.storage.stores.store import ObjectStore
from tests.jobs.jobs_of import change_receipt, run_here
from tests.jobs.tiny import MODEL, folder_of_images
from tests.storage.memory import MemoryStore

COMMANDS = {
    "status": ("status",),
    "verify": ("verify",),
    "show": ("show", "ant/000.png", "--blocks", "--model", MODEL),
    "report": ("report",),
    "audit": ("audit", "--model", MODEL),
    "compare": ("compare",),
    "versus": ("versus", "{other}", "--output", "difference"),
    "spotlight": ("export", "spotlight", "exported"),
    "virelay": ("export", "virelay", "exported"),
    "sql": ("sql",),
    "retry": ("retry",),
    "finalize": ("finalize", "--max-dead-units", "9"),
    "gc": ("gc",),
    "evaluate": ("evaluate", "--metrics", "gini", "--runner", "local", "--model", MODEL),
    "explain": ("explain", "--model", MODEL, "--runner", "local", "--max-dead-units", "9"),
}

DAMAGE: Mapping[str, Callable[[bytes], bytes]] = {
    "cut": lambda body: body[: len(body) // 2],
    "empty": lambda _: b"",
    "no UTF-8": lambda body: body.replace(b'"', b'"\xff', 1),
    "list": lambda _: b"[]",
    "number": lambda _: b"7",
    "null": lambda _: b"null",
    "text": lambda _: b'"data"',
    "no field": lambda _: b"{}",
    "another field": lambda body: changed(body, lambda own: own | {"strange": 1}),
    "fields of null": lambda body: changed(body, lambda own: dict.fromkeys(own)),
    "fields of lists": lambda body: changed(body, lambda own: {name: [[]] for name in own}),
    "fields of text": lambda body: changed(body, lambda own: dict.fromkeys(own, "../../x")),
    "fields of NaN": lambda body: changed(body, lambda own: dict.fromkeys(own, float("nan"))),
    "fields of many digits": lambda body: changed(body, lambda own: dict.fromkeys(own, 10**4000)),
    "negative numbers": lambda body: changed(body, lambda own: mapped(own, lambda value: -1 - value)),
    "huge numbers": lambda body: changed(body, lambda own: mapped(own, lambda value: value + 2**63)),
    "too many digits": lambda body: body.replace(b"{", b'{"strange": ' + b"9" * 5000 + b",", 1),
    "nested": lambda _: b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a field twice": lambda body: body.replace(b"{", b"{" + body.strip()[1:-1] + b",", 1),
    "too long": lambda body: body + b" " * (17 << 20),
}
"""Kinds of damage to a document, by name. Each must be noticed."""


def changed(body: bytes, change: Callable[[Any], Any]) -> bytes:
    return json.dumps(change(json.loads(body))).encode()


def mapped(value, change):
    """The JSON value with each number changed."""
    if isinstance(value, dict):
        return {name: mapped(own, change) for name, own in value.items()}
    if isinstance(value, list):
        return [mapped(own, change) for own in value]
    return change(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def unit_ids(store: ObjectStore) -> list[str]:
    return [unit.unit_id for unit in existing_plan(store).units]


RUN = "_job/runs/20260101T000000Z-00000000/"
KEYS: Mapping[str, Callable[[ObjectStore], str]] = {
    "plan": lambda _: PLAN_KEY,
    "model": lambda _: MODEL_KEY,
    "forward": lambda _: FORWARD_KEY,
    "preflight": lambda _: PREFLIGHT_KEY,
    "manifest": lambda _: MANIFEST_KEY,
    "audit": lambda _: AUDIT_KEY,
    "letter": lambda store: letter_key(unit_ids(store)[-1]),
    "receipt": lambda store: next(info.key for info in store.list("_job/receipts/")),
    "run": lambda _: f"{RUN}run.json",
    "stop": lambda _: f"{RUN}stop",
    "marker": lambda store: f"{attempt_markers.prefix_of(unit_ids(store)[0])}0.json",
}
"""The documents of an output."""
READERS: Mapping[str, Callable[[ObjectStore, Plan], object]] = {
    "plan": lambda store, _: load_plan(store),
    "model": lambda store, _: model_facts(store),
    "forward": lambda store, _: planned_forward(store),
    "preflight": lambda store, _: stored_preflight(store),
    "manifest": final_manifest,
    "audit": lambda store, _: read_audit(store),
    "letter": lambda store, plan: read_letters(store, plan.units),
}
"""The function that reads each document, if there is one."""
NOTICED = {
    "status": {"plan", "preflight", "manifest", "letter"},
    "verify": {"plan", "manifest", "letter"},
    "show": {"plan", "model", "preflight", "forward"},
    "report": {"plan", "model", "preflight", "manifest", "audit", "letter"},
    "audit": {"plan", "model", "preflight"},
    "compare": {"plan"},
    "versus": {"plan"},
    "spotlight": {"plan", "audit"},
    "virelay": {"plan", "model", "audit"},
    "sql": {"plan"},
    "retry": {"plan", "manifest", "letter"},
    "finalize": {"plan", "manifest", "letter"},
    "gc": {"plan", "manifest", "letter"},
    "evaluate": {"plan", "model", "preflight", "forward"},
    "explain": {"plan", "letter"},
}
"""The documents that each command needs."""
REBUILT = {"status", "verify", "report", "gc", "explain"}
"""Commands that read receipts or notes of runs, and work without them."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A finished output with every kind of object, and a second one of the same data."""
    folder = tmp_path_factory.mktemp("documents")
    data = folder_of_images(folder / "in", 2, bad=False)
    run_here(data, folder / "other", explainer="layercam")
    run_here(data, folder / "out")
    store = LocalStore(folder / "out")
    run_audit(AuditRequest(str(folder / "out"), tries=False), Console(quiet=True))
    own = next(info.key for info in store.list("_job/runs/"))
    store.put(f"{RUN}run.json", store.read(own))
    store.put(f"{RUN}stop", b'{"reason": 15}')
    store.put(KEYS["marker"](store), b'{"worker": 1}')
    return folder


@pytest.fixture
def place(base, tmp_path, monkeypatch):
    """A copy of the output, in the current folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base / "out", tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def memory(base):
    """A copy of the output in memory; its last unit is a dead letter."""
    held, store = LocalStore(base / "out"), MemoryStore()
    for info in held.list():
        store.create(info.key, held.read(info.key))
    give_up_a_unit(store)
    store.put(MANIFEST_KEY, held.read(MANIFEST_KEY))
    return store


def give_up_a_unit(store: ObjectStore) -> None:
    """Replaces the last unit's fragment by a dead letter and removes the manifest."""
    unit = existing_plan(store).units[-1]
    for key in (unit.fragment_key, MANIFEST_KEY):
        store.delete(key)
    change_receipt(store, unit.unit_id, lambda _: None)
    letter = DeadLetter(unit.unit_id, unit.ordinal, "x", Cause.POISON, "read", "it died", unit.num_records)
    store.create(letter_key(unit.unit_id), json.dumps(asdict(letter)).encode())


def is_harmless(kind: str, damage: str) -> bool:
    """True for a change of numbers in a document that holds none."""
    return kind == "preflight" and damage in ("negative numbers", "huge numbers")


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", READERS)
def test_every_damage_to_a_document_is_one_sentence(memory, kind, damage):
    plan, key = existing_plan(memory), KEYS[kind](memory)
    READERS[kind](memory, plan)
    body = memory.read(key)
    if is_harmless(kind, damage):
        pytest.skip("the document holds no number")
    memory.put(key, DAMAGE[damage](body))
    with pytest.raises(UnreconciledError) as raised:
        READERS[kind](memory, plan)
    message = str(raised.value)
    assert message.startswith(f"memory:///{key} is damaged, ")
    assert len(message) < 600
    assert "\n" not in message


def test_no_more_of_a_document_is_read_than_the_bound(monkeypatch):
    store = MemoryStore()
    store.put("x", b"{}" + b" " * 1000)
    asked = []
    monkeypatch.setattr(store, "read", lambda _, length: asked.append(length) or b"{}" + b" " * (length - 2))
    with pytest.raises(UnreconciledError, match="larger than 100 bytes"):
        read_document(store, "x", ModelFacts, 100)
    assert asked == [101]


@pytest.mark.parametrize(("kind", "name"), [(Receipt, "num_ok"), (DeadLetter, "ordinal"), (ModelFacts, "num_classes")])
@pytest.mark.parametrize("value", [True, "1", 1.5, -1, 2**63, None])
def test_a_count_is_a_whole_number(kind, name, value):
    sound = {
        Receipt: Receipt("u", 0, "f", 1, "s", 1, 1, 1, 0, {}, 0, {}),
        DeadLetter: DeadLetter("u", 0, "x", "poison", "read", "it died", 1),
        ModelFacts: ModelFacts("w", 5, (8, 8)),
    }[kind]
    assert parsed(json.dumps(asdict(sound)).encode(), kind) == sound
    with pytest.raises(ValueError, match=f"^{name}: "):
        parsed(json.dumps(asdict(sound) | {name: value}).encode(), kind)


@pytest.mark.parametrize(
    "fields", [{"unit_id": "../../x"}, {"ordinal": 7}, {"fragment": "../../../etc/passwd"}, {"unit_id": "0" * 20}]
)
def test_a_receipt_of_another_unit_is_not_taken(memory, fields):
    unit = existing_plan(memory).units[0]
    assert read_receipts(memory, [unit])[1] == []
    change_receipt(memory, unit.unit_id, lambda own: own | fields)
    receipts, unbatched = read_receipts(memory, [unit])
    assert (receipts[unit.unit_id].fragment, unbatched) == (unit.fragment_key, [unit.unit_id])


ROWS = {
    "an id that is a path": {"unit_id": "../../../../../../.."},
    "an id in capitals": {"unit_id": "A" * 20},
    "no id": {"unit_id": None},
    "another place": {"ordinal": 5},
    "another layout": {"layout": "tar"},
    "an unknown layout": {"layout": "zip"},
    "no layout": {"layout": None},
    "a negative start": {"start": -1},
    "a stop before the start": {"stop": -2},
    "more images than objects": {"stop": 2**62, "num_records": 2**62},
    "fewer than no records": {"num_records": -1},
    "no object": {"objects": [], "stop": 0, "num_records": 0},
    "null for objects": {"objects": None},
    "null for an object": {"objects": [None]},
    "an object without a version": {"objects": [{"key": "a", "size": 1, "etag": None}]},
    "an object above the data": {"objects": [{"key": "../../etc/passwd", "size": 1, "etag": "x"}]},
    "an object of no bytes and less": {"objects": [{"key": "a", "size": -1, "etag": "x"}]},
}
"""Wrong values for a row of the plan's units."""


def planned(store: ObjectStore, rows: list[dict]) -> None:
    """Writes a consistent plan of these units."""
    body = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=UNITS_SCHEMA), body)
    key = f"{PLAN_FOLDER}units-{hashlib.sha256(body.getvalue()).hexdigest()[:16]}.parquet"
    store.put(key, body.getvalue())
    store.put(PLAN_KEY, changed(store.read(PLAN_KEY), lambda own: own | {"units": key, "num_units": len(rows)}))


def rows_of(store: ObjectStore) -> list[dict]:
    named = json.loads(store.read(PLAN_KEY))["units"]
    return pq.read_table(io.BytesIO(store.read(named))).to_pylist()


@pytest.mark.parametrize("row", ROWS)
def test_malformed_units_are_refused(memory, row):
    first, *others = rows_of(memory)
    planned(memory, [first, *others])
    assert load_plan(memory) is not None
    planned(memory, [first | ROWS[row], *others])
    with pytest.raises(UnreconciledError, match="is damaged"):
        load_plan(memory)


def test_duplicate_units_are_refused(memory):
    first, *_ = rows_of(memory)
    planned(memory, [first, first | {"ordinal": 1}])
    with pytest.raises(UnreconciledError, match="the same id"):
        load_plan(memory)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"fingerprint": "0" * 64}, "fingerprint is not that of its configuration"),
        ({"num_units": 9}, "9 units should be there"),
        ({"units": f"{PLAN_FOLDER}units-{'0' * 16}.parquet"}, "there is no"),
        ({"units": "../../../etc/passwd"}, "units: "),
        ({"layout": "zip"}, "layout: "),
        ({"ignored": {".txt": -1}}, "ignored"),
    ],
)
def test_a_plan_is_consistent_or_damaged(memory, change, expected):
    memory.put(PLAN_KEY, changed(memory.read(PLAN_KEY), lambda own: own | change))
    with pytest.raises(UnreconciledError, match=expected):
        load_plan(memory)


def test_units_are_those_that_the_plan_names(memory):
    named = json.loads(memory.read(PLAN_KEY))["units"]
    body = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows_of(memory)[:1], schema=UNITS_SCHEMA), body)
    memory.put(named, body.getvalue())
    with pytest.raises(UnreconciledError, match="does not hold what its name says"):
        load_plan(memory)


CONFIGURATIONS = {
    "model": [None, 7, "x" * 600],
    "weights": [7, ["a"]],
    "data": [None, "relative", "~nobody-of-this-name/x"],
    "target": ["top-0", None, "top-9999999"],
    "explainer": ["unknown", None, "ucag(" * 9],
    "parameters": [None, [], "mu"],
    "resize": ["stretch", None, "own", "short side 256, centre 0x224", "whole 99999x9, centre 9x9"],
    "seed": ["0", -1, None, 2**63],
    "limit": [0, "9"],
    "blocks": ["a", None, [1]],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, own in CONFIGURATIONS.items() for value in own])
def test_a_configuration_of_another_shape_is_damaged(memory, name, value):
    configuration = json.loads(memory.read(PLAN_KEY))["configuration"] | {name: value}
    stored = {"configuration": configuration, "fingerprint": digest_of(configuration)}
    memory.put(PLAN_KEY, changed(memory.read(PLAN_KEY), lambda own: own | stored))
    with pytest.raises(UnreconciledError, match="configuration: "):
        load_plan(memory)


def ran(command: str, base: Path, place: Path) -> Result:
    name, *rest = (part.format(other=base / "other") for part in COMMANDS[command])
    named = ["--data", str(base / "in"), "--output", str(place)] if name == "explain" else [str(place)]
    shutil.rmtree("exported", ignore_errors=True)
    return CliRunner().invoke(app, [name, *named, *rest])


def is_said(found: Result) -> bool:
    """Whether the command ended with exit code 5 and the sentence for a damaged output. A traceback fails the test."""
    if isinstance(found.exception, UnreconciledError):
        return True
    assert found.exception is None or isinstance(found.exception, SystemExit), repr(found.exception)
    return found.exit_code == 5


@pytest.mark.parametrize("command", COMMANDS)
def test_no_shape_of_a_document_is_a_traceback(base, place, command):
    """Damages each document that the command needs in one way; the ways rotate over commands and documents."""
    noticed = NOTICED[command]
    for kind in KEYS:
        if kind not in noticed and not (command in REBUILT and kind not in READERS):
            continue
        store = LocalStore(place)
        if kind == "letter":
            give_up_a_unit(store)
        key = KEYS[kind](store)
        body = (store if kind == "letter" else LocalStore(base / "out")).read(key)
        body = body.splitlines()[0] if kind == "receipt" else body
        turn = 3 * list(COMMANDS).index(command) + list(KEYS).index(kind)
        name = list(DAMAGE)[turn % len(DAMAGE)]
        if is_harmless(kind, name):
            continue
        store.put(key, DAMAGE[name](body))
        assert is_said(ran(command, base, place)) == (kind in noticed), (kind, name)
        store.put(key, body)
