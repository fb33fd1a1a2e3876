"""Exceptions in a step: one of a record rejects it, one of a unit gives it up, one of the machine does neither."""

import errno
import gzip
import io
import os
import re
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from blocksight.engine.errors import ModelError
from blocksight.engine.model.device_errors import device_trouble, told_by_device
from blocksight.jobs.cli.job_tables import plan_table
from blocksight.jobs.explain.step import ExplainStep
from blocksight.jobs.ledger.dead_letters import read_letters
from blocksight.jobs.ledger.reconcile import check
from blocksight.jobs.ledger.retry import reopen
from blocksight.jobs.ledger.shard_counts import other_counts
from blocksight.jobs.observe.registry import OF_PROCESS, OF_WORKERS
from blocksight.jobs.plan import plan
from blocksight.jobs.plan.config import ConfigError, Execution
from blocksight.jobs.plan.plan import load_plan
from blocksight.jobs.plan.records import (
    DeadLetter,
    RecordFacts,
    UnitFailure,
    UnitInput,
    UnitReturned,
    UnreconciledError,
)
from blocksight.jobs.plan.units import WHOLE_SHARD, Workforce
from blocksight.jobs.run import pipeline
from blocksight.jobs.run.job import plan_job, run_job
from blocksight.jobs.run.local import run_unit
from blocksight.jobs.run.workers import workforce_of
from blocksight.jobs.worker import unit as steps
from blocksight.jobs.worker.attempts import CAREFUL_DEATHS, MAX_FAILURES, WorkerStores, begin, done_here
from blocksight.jobs.worker.error_classes import AMPLE_BYTES, UnfitWorkerError, is_of_record, is_of_unit
from blocksight.jobs.worker.isolation import Isolated, ProcessDiedError, ProcessStartError
from blocksight.jobs.worker.unit import commit_unit, decoded_or_rejected
from blocksight.storage.inputs.records import RawRecord
from blocksight.storage.inputs.survey import Layout, Survey
from blocksight.storage.inputs.tars import read_tar, sample_tar
from blocksight.storage.outputs.fragments import read_fragment
from blocksight.storage.parquet.rows import UnknownColumnsError
from blocksight.storage.stores.local import LocalStore
from blocksight.storage.stores.store import DamagedError, MissingError, ObjectError, StoreError, UnavailableError
from tests.faults.devices import DEVICE_ERRORS, HOST_MEMORY, LOST, MEMORY, UNFIT
from tests.faults.stores import InterceptedStore
from tests.jobs.jobs_of import called, config_of, pieces_of, run_here
from tests.jobs.tiny import MODEL, picture, tar_bytes
from tests.jobs.worker.test_attempts import attempted, dead_attempts
from tests.jobs.worker.test_commit import UNIT, result
from tests.storage.memory import MemoryStore

OF_A_RECORD = [
    ValueError("x"),
    RecursionError("x"),
    OverflowError("x"),
    pa.ArrowInvalid("x"),
    OSError("broken data stream"),
    ValueError("a label that says: out of memory"),
    RuntimeError("shapes do not fit"),
]
OF_THE_MACHINE = [
    MemoryError(),
    OSError(errno.ENOSPC, "no space"),
    OSError(errno.EMFILE, "too many files"),
    ConnectionResetError(errno.ECONNRESET, "reset"),
    ImportError("no decoder on this node"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
]
OF_THE_DEVICE = [error for trouble, error in DEVICE_ERRORS if trouble is not HOST_MEMORY]
OF_THE_JOB = [
    *(ModelError("x"), ConfigError("x"), UnreconciledError("x"), ProcessStartError("x")),
    UnknownColumnsError("x"),
]


@pytest.mark.parametrize("error", OF_A_RECORD, ids=str)
def test_an_error_that_a_record_raises_anywhere_is_of_the_record(error):
    assert is_of_unit(error)


@pytest.mark.parametrize(
    "error", [*OF_THE_MACHINE, *OF_THE_DEVICE, *OF_THE_JOB, StoreError("x"), UnavailableError("x")], ids=repr
)
def test_an_error_that_no_record_can_cause_is_not_of_the_record(error):
    assert not is_of_unit(error)


@pytest.mark.parametrize(("free", "blamed"), [(AMPLE_BYTES, True), (AMPLE_BYTES - 1, False)])
def test_memory_is_a_records_fault_where_there_is_plenty(monkeypatch, free, blamed):
    monkeypatch.setattr("blocksight.jobs.worker.error_classes.free_bytes", lambda: free)
    assert is_of_record(MemoryError(), Isolated(dict)) is blamed
    assert not is_of_record(MemoryError(), dict)


# ---------------------------------------------------------------- units


def place():
    return WorkerStores(MemoryStore(), MemoryStore(), "run")


def failing(error, seen):
    def work(careful):
        seen.append(careful)
        raise error

    return work


@pytest.mark.parametrize("stage", ["read", "explain", "commit"])
def test_a_unit_that_fails_each_time_is_given_up_within_one_run(stage):
    stores, seen = place(), []
    letter = attempted(UNIT, stage, stores, failing(ValueError("odd"), seen))
    assert isinstance(letter, DeadLetter)
    assert (letter.cause, letter.stage, letter.error) == ("failed", stage, "ValueError: odd")
    assert seen == [False, True, True]
    assert read_letters(stores.output, [UNIT]) == {UNIT.unit_id: letter}


def test_a_unit_that_fails_once_is_done():
    seen = []

    def work(careful):
        seen.append(careful)
        if not careful:
            raise ValueError("odd")
        return "done"

    assert attempted(UNIT, "read", place(), work) == "done"
    assert seen == [False, True]


@pytest.mark.parametrize("error", OF_THE_DEVICE, ids=repr)
@pytest.mark.parametrize("stage", ["read", "explain", "commit"])
def test_an_error_of_the_device_gives_no_unit_up(stage, error):
    stores, seen = place(), []
    made = attempted(UNIT, stage, stores, failing(error, seen))
    assert seen == [False]
    assert read_letters(stores.output, [UNIT]) == {}
    trouble = device_trouble(error)
    if trouble is MEMORY:
        assert isinstance(made, UnitFailure)
        assert made.error == told_by_device(error)
    else:
        assert isinstance(made, UnitReturned)
        assert (made.reason, made.is_unfit) == (told_by_device(error), trouble is UNFIT)
    next_attempt = begin(UNIT, stores)
    assert next_attempt.num_deaths == (trouble is LOST)  # a record may be the cause: soon an attempt is careful


def test_the_only_worker_ends_the_run_if_it_is_unfit():
    assert done_here("receipt") == "receipt"
    with pytest.raises(UnfitWorkerError, match="no driver"):
        done_here(UnitReturned("u", "w", "no driver", is_unfit=True))


@pytest.mark.parametrize("error", [*OF_THE_MACHINE, *OF_THE_JOB], ids=repr)
def test_an_error_of_the_machine_leaves_a_unit_open(error):
    stores, seen = place(), []
    assert isinstance(attempted(UNIT, "read", stores, failing(error, seen)), UnitFailure)
    assert len(seen) == (1 if type(error) in map(type, OF_THE_JOB) else MAX_FAILURES)
    assert read_letters(stores.output, [UNIT]) == {}


@pytest.fixture
def deadly_stores():
    """Stores of a unit for which two processes died."""
    stores = place()
    dead_attempts(stores.output, UNIT.unit_id, CAREFUL_DEATHS)
    return stores


TAKEN = UnitInput(UNIT, (), np.zeros((0, 2, 2, 3), np.uint8))
CONTEXT = SimpleNamespace(run_id="run", config=None, facts=SimpleNamespace(input_size=(2, 2)), fingerprint="job")


def noting(seen, made):
    def step(*_arguments, careful):
        seen.append(careful)
        return made

    return step


def test_every_local_step_is_made_careful(deadly_stores, monkeypatch):
    seen = []
    monkeypatch.setattr("blocksight.jobs.run.local.take_unit", noting(seen, TAKEN))
    monkeypatch.setattr("blocksight.jobs.run.local.commit_unit", noting(seen, "committed"))
    assert run_unit(UNIT, CONTEXT, deadly_stores, lambda: noting(seen, result())) == "committed"
    assert seen == [True, True, True]


def test_a_unit_that_is_taken_with_care_is_read_with_care(deadly_stores, monkeypatch):
    seen = []
    monkeypatch.setattr(steps, "committed_receipt", lambda *_: None)
    monkeypatch.setattr(steps, "read_unit", noting(seen, TAKEN))
    for careful in (True, False):
        steps.take_unit(UNIT, deadly_stores, CONTEXT, careful=careful)
    assert seen == [True, False]


def test_every_step_on_ray_is_made_careful(deadly_stores, monkeypatch):
    seen = []
    monkeypatch.setattr(pipeline, "open_worker_stores", lambda _: deadly_stores)
    monkeypatch.setattr(pipeline, "_STORES", {})
    monkeypatch.setattr(pipeline, "take_unit", noting(seen, TAKEN))
    monkeypatch.setattr(pipeline, "commit_unit", noting(seen, DeadLetter("u", 0, "i", "failed", "s", "e", 1)))
    actor = pipeline._Explain.__new__(pipeline._Explain)
    actor.input_size, actor.stores = (2, 2), deadly_stores
    actor.held = pipeline._Held(lambda: noting(seen, result()))
    read = pipeline._read(pa.table({"unit": [pipeline._json(UNIT)]}), CONTEXT)
    assert pipeline._outcome(pipeline._commit(actor(read), CONTEXT).to_pylist()[0]).cause == "failed"
    assert seen == [True, True, True]


def test_what_each_step_on_ray_measured_reaches_the_driver_once(monkeypatch):
    def step(stage, made):
        def run(*_, **__):
            OF_PROCESS.add("blocksight_stage_seconds_total", stage, value=1.0)
            return made

        return run

    for registry in (OF_PROCESS, OF_WORKERS):
        registry.taken()
    stores = place()
    monkeypatch.setattr(pipeline, "open_worker_stores", lambda _: stores)
    monkeypatch.setattr(pipeline, "_STORES", {})
    monkeypatch.setattr(pipeline, "take_unit", step("read", TAKEN))
    dead = DeadLetter("u", 0, "i", "failed", "s", "e", 1)
    monkeypatch.setattr(pipeline, "commit_unit", step("commit", dead))
    monkeypatch.setattr("blocksight.jobs.worker.attempts.timed", lambda _: nullcontext())
    actor = pipeline._Explain.__new__(pipeline._Explain)
    actor.input_size, actor.stores = (2, 2), stores
    actor.held = pipeline._Held(lambda: step("explain", result()))
    read = pipeline._read(pa.table({"unit": [pipeline._json(UNIT)]}), CONTEXT)
    pipeline._outcome(pipeline._commit(actor(read), CONTEXT).to_pylist()[0])
    assert OF_PROCESS.taken() == []
    assert {(*sample.labels, sample.value) for sample in OF_WORKERS.taken()} == {
        ("read", 1.0),
        ("explain", 1.0),
        ("commit", 1.0),
    }


# ---------------------------------------------------------------- records


def failing_over(*keys, error):
    def decoding(raw):
        if raw.key in keys:
            raise error
        return "facts", "picture"

    return decoding


@pytest.mark.parametrize(
    ("error", "code"), [(ValueError("x"), "decode_failed"), (ProcessDiedError("x"), "process_died")]
)
def test_a_record_that_decoding_fails_on_is_rejected(error, code):
    decoding = failing_over("k", error=error)
    facts, nothing = decoded_or_rejected(decoding, RawRecord("k", "s", 4, 7, b"x"), MemoryStore())
    assert (facts.reject_code, facts.reject_stage, facts.shard_index, facts.label) == (code, "decode", 4, 7)
    assert nothing is None
    assert decoded_or_rejected(decoding, RawRecord("other", "s", 5, 7, b"x"), MemoryStore()) == ("facts", "picture")


def test_a_record_that_decoding_fails_on_once_is_decoded():
    answers = iter([ValueError("a hiccup"), ("facts", "picture")])

    def decoding(raw):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert decoded_or_rejected(decoding, RawRecord("k", "s", 4, 7, b"x"), MemoryStore()) == ("facts", "picture")


@pytest.mark.parametrize("error", [*OF_THE_MACHINE, ProcessStartError("x")], ids=repr)
def test_no_record_is_rejected_for_an_error_of_the_machine(error):
    with pytest.raises(type(error)):
        decoded_or_rejected(failing_over("k", error=error), RawRecord("k", "s", 4, 7, b"x"), MemoryStore())


def test_a_tar_record_that_cannot_be_read_is_rejected_alone(monkeypatch):
    store = MemoryStore()
    store.put("s.tar", tar_bytes(0, 3))

    def label(file, draft):
        member = draft.members["cls"]
        text = file.read_at(member.data_start, member.size)
        if text == b"1":
            raise ValueError("an odd label")
        return int(text)

    monkeypatch.setattr("blocksight.storage.inputs.tars._label", label)
    info = store.head("s.tar")
    found = list(read_tar(store, info, 0, info.size))
    assert [record.label for record in found] == [0, None, 2]
    assert (str(found[1].reject.code), found[1].reject.message) == ("read_failed", "ValueError: an odd label")


def rows_between(bad, error):
    """A reader of tables that fails on some rows."""

    def read_table(store, info, start, stop):
        for row in range(start, stop):
            if row in bad:
                raise error
            yield RawRecord(f"t/{row}", info.key, row, None, b"x")

    return read_table


def test_rows_that_cannot_be_read_are_found_by_halves(monkeypatch):
    seen, read_table = set(), rows_between({3, 9}, ValueError("odd"))
    monkeypatch.setattr(steps, "read_table", lambda store, *rest: (seen.add(id(store)), read_table(store, *rest))[1])
    whole = replace(UNIT, objects=(replace(UNIT.objects[0], key="t"),), start=2, stop=12, num_records=10)
    store = MemoryStore()
    found = steps._all_raw_records(whole, store)
    assert seen == {id(store)}
    assert [record.index for record in found] == list(range(2, 12))
    assert [record.key for record in found] == [f"t/{row}" for row in range(2, 12)]
    assert [record.index for record in found if record.reject is not None] == [3, 9]
    assert str(found[1].reject.code) == "read_failed"


@pytest.mark.parametrize("error", [DamagedError("x"), StoreError("x"), MemoryError()])
def test_what_is_no_rows_fault_blames_no_row(monkeypatch, error):
    monkeypatch.setattr(steps, "read_table", rows_between({1}, error))
    with pytest.raises(type(error)):
        steps._all_raw_records(UNIT, MemoryStore())


# ---------------------------------------------------------------- explain


class Step(ExplainStep):
    """An explain step without a model, whose rows hold the label alone."""

    def __init__(self):
        self.setting = "none"

    def _base_row(self, unit_input, record):
        return {"key": record.key, "label": None if record.label is None else int(record.label)}


def explained_one_by_one(explain):
    facts = tuple(RecordFacts(f"k{number}", "s", number, label) for number, label in enumerate(["1", "2", "odd"]))
    taken = UnitInput(UNIT, facts, np.zeros((3, 4, 4, 3), np.uint8))
    return Step()._explain_one_by_one(taken, explain).rows


def test_a_record_that_the_model_fails_on_is_rejected_even_if_its_label_is_odd():
    def explain(alone):
        (record,) = alone.records
        if record.key != "k0":
            raise ValueError("odd")
        return SimpleNamespace(rows=[{"key": record.key, "status": "ok"}])

    rows = explained_one_by_one(explain)
    assert [row["status"] for row in rows] == ["ok", "rejected", "rejected"]
    assert [(row["reject_code"], row["reject_stage"], row["label"]) for row in rows[1:]] == [
        ("model_failed", "explain", 2),
        ("model_failed", "explain", None),
    ]


@pytest.mark.parametrize("error", [*OF_THE_MACHINE, *OF_THE_DEVICE, *OF_THE_JOB], ids=repr)
def test_no_record_is_rejected_where_the_machine_cannot_explain(error):
    def explain(alone):
        raise error

    with pytest.raises(type(error)):
        explained_one_by_one(explain)


# ---------------------------------------------------------------- commit


def test_a_commit_on_ray_is_tried_again_with_the_same_rows(monkeypatch):
    seen = []

    def commit(made, output, fingerprint, *, careful):
        seen.append((made.unit, [row["key"] for row in made.rows], made.num_records, careful))
        if not careful:
            raise ValueError("odd")
        return "committed"

    monkeypatch.setattr(pipeline, "commit_unit", commit)
    monkeypatch.setattr(pipeline, "open_worker_stores", lambda _: place())
    monkeypatch.setattr(pipeline, "_row_of", lambda made: made)
    monkeypatch.setattr(pipeline, "_measured", lambda made, _before: made)
    assert pipeline._commit(pipeline._result_table(result(), asdict(begin(UNIT, place()))), CONTEXT) == "committed"
    assert seen == [(UNIT, ["t/0", "t/1"], 2, False), (UNIT, ["t/0", "t/1"], 2, True)]


def committed(rows, store, **how):
    commit_unit(replace(result(), rows=tuple(rows)), store, "job", **how)
    return read_fragment(store.read(UNIT.fragment_key)).to_pylist()


@pytest.fixture
def apart_here(monkeypatch):
    """Makes careful steps call their function in this process."""
    asked = []

    class Here(partial):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    def isolated_if(function, careful):
        asked.append(careful)
        return Here(function)

    monkeypatch.setattr(steps, "isolated_if", isolated_if)
    return asked


def test_a_careful_commit_has_the_same_bytes(apart_here):
    plain, careful = MemoryStore(), MemoryStore()
    commit_unit(result(), plain, "job")
    commit_unit(result(), careful, "job", careful=True)
    assert apart_here == [False, True]
    assert plain.read(UNIT.fragment_key) == careful.read(UNIT.fragment_key)


def test_a_record_over_which_encoding_dies_is_rejected_alone(apart_here, monkeypatch):
    def dies(row):
        if row["key"] == "t/0":
            raise ProcessDiedError("Aborted")
        return dict(row)

    monkeypatch.setattr(steps, "_encoded_row", dies)
    first, second = committed(result().rows, MemoryStore(), careful=True)
    assert (first["reject_code"], first["reject_stage"], first["map"]) == ("process_died", "encode", None)
    assert second["reject_code"] == "corrupt"


@pytest.mark.parametrize(
    "spoiled",
    [
        {"label": 2**40},
        {"label_name": "\udcff"},
        {"key": "t/\udcff"},
        {"map": np.zeros((2, 2, 2), np.float32)},
        {"width": "wide"},
        {"score": "high"},
    ],
    ids=["large label", "label in no UTF-8", "key in no UTF-8", "three axes", "text for width", "text for score"],
)
def test_a_record_that_does_not_fit_its_columns_is_rejected_alone(apart_here, spoiled):
    good, bad = result().rows
    rows = [{**good, "shard_index": 5, "key": "t/5", **spoiled}, good, bad]
    store = MemoryStore()
    with pytest.raises(Exception):  # noqa: B017, PT011 - any; the careful attempt behind it finds the record
        commit_unit(replace(result(), rows=tuple(rows), num_records=3), store, "job")
    made = commit_unit(replace(result(), rows=tuple(rows), num_records=3), store, "job", careful=True)
    first, second, third = read_fragment(store.read(UNIT.fragment_key)).to_pylist()
    assert (first["reject_code"], first["reject_stage"], first["shard_index"]) == ("encode_failed", "encode", 5)
    assert first["error"]
    assert (second["status"], third["reject_code"]) == ("ok", "corrupt")
    assert made.rejects == {"corrupt": 1, "encode_failed": 1}


@pytest.mark.parametrize("error", OF_THE_MACHINE, ids=repr)
def test_encoding_rejects_no_record_for_an_error_of_the_machine(apart_here, monkeypatch, error):
    def fails(row):
        raise error

    monkeypatch.setattr(steps, "_encoded_row", fails)
    with pytest.raises(type(error)):
        commit_unit(result(), MemoryStore(), "job", careful=True)


# ---------------------------------------------------------------- shards that cannot be read


class Spoiled(MemoryStore):
    """A store that raises when some keys are read."""

    def __init__(self, **errors):
        super().__init__()
        self.errors = {key.replace("_", "."): error for key, error in errors.items()}

    def read(self, key, **how):
        if key in self.errors:
            raise self.errors[key]
        return super().read(key, **how)


def cut(store, layout, **options):
    """The pieces of a plan over three shards of two records each."""
    for number in range(3):
        table = pa.BufferOutputStream()
        pq.write_table(pa.table({"image": [picture(number), picture(number + 9)]}), table)
        is_table = layout is Layout.PARQUET
        store.put(f"{number}.{layout}", table.getvalue().to_pybytes() if is_table else tar_bytes(2 * number, 2))
    objects = tuple(sorted(store.list(), key=lambda info: info.key))
    config = config_of("in", "out", explainer="gradient", **options)
    return list(pieces_of(store, Survey(layout, objects, {}), config, Workforce(1, on_gpu=False)))


@pytest.mark.parametrize("error", [ObjectError("forbidden"), MissingError("gone since it was listed")])
def test_a_shard_that_cannot_be_read_is_a_piece_of_its_own(error):
    first, bad, last = cut(Spoiled(**{"1_parquet": error}), Layout.PARQUET)
    assert [first.num_records, bad.num_records, last.num_records] == [2, 0, 2]
    assert (bad.start, bad.stop, bad.trouble) == (0, WHOLE_SHARD, str(error))
    tars = cut(Spoiled(**{"0_tar": error}), Layout.TAR)
    assert [piece.num_records for piece in tars] == [piece.num_records for piece in cut(MemoryStore(), Layout.TAR)]
    assert [piece.trouble for piece in tars] == [str(error), None, None]


def test_shards_that_tell_nothing_are_guessed_by_their_bytes(monkeypatch):
    """A shard without a sound record cannot predict the others, and none of the first shards has one."""
    store, layout = MemoryStore(), Layout.TAR
    for number in range(3):
        store.put(f"{number}.tar", b"no tar" * 50_000)
    objects = tuple(sorted(store.list(), key=lambda info: info.key))
    config = config_of("in", "out", explainer="gradient")
    with pytest.raises(StoreError, match=r"0\.tar holds no readable tar member"):
        list(pieces_of(store, Survey(layout, objects, {}), config, Workforce(1, on_gpu=False)))
    store.put("1.tar", tar_bytes(0, 2))
    sound = store.head("1.tar")
    mixed = list(pieces_of(store, Survey(layout, (objects[0], sound), {}), config, Workforce(1, on_gpu=False)))
    assert [(piece.start, piece.stop, piece.num_records) for piece in mixed] == [
        (0, 300_000, 0),
        (0, sound.size, round(sample_tar(store, sound).num_records)),
    ]
    assert [piece.trouble is None for piece in mixed] == [False, True]
    monkeypatch.setattr("blocksight.jobs.plan.units.SAMPLED_SHARDS", 1)
    blind = list(pieces_of(store, Survey(layout, (objects[0], sound), {}), config, Workforce(1, on_gpu=False)))
    assert [piece.num_records for piece in blind] == [0, 1]


def test_a_limit_ends_behind_a_shard_that_cannot_be_read():
    broken = Spoiled(**{"1_parquet": ObjectError("forbidden")})
    assert [(one.num_records, one.stop) for one in cut(broken, Layout.PARQUET, limit=3)] == [(2, 2), (0, 1), (1, 1)]
    assert [one.num_records for one in cut(broken, Layout.PARQUET, limit=2)] == [2]
    of_tars = cut(Spoiled(**{"0_tar": ObjectError("forbidden")}), Layout.TAR, limit=3)
    assert [(one.num_records, one.trouble) for one in of_tars] == [(0, "forbidden"), (2, None), (1, None)]


@pytest.mark.parametrize("layout", [Layout.PARQUET, Layout.TAR])
def test_a_set_of_which_nothing_can_be_read_is_refused(layout):
    errors = {f"{number}_{layout}": ObjectError(f"shard {number} is forbidden") for number in range(3)}
    with pytest.raises(ObjectError, match="shard 0"):
        cut(Spoiled(**errors), layout)


@pytest.mark.parametrize("layout", [Layout.PARQUET, Layout.TAR])
def test_a_store_that_is_away_is_no_error_of_a_shard(layout):
    with pytest.raises(UnavailableError):
        cut(Spoiled(**{f"1_{layout}": UnavailableError("503")}), layout)


def unplanned(store):
    (info,) = store.list()
    return replace(UNIT, objects=(info,), start=0, stop=WHOLE_SHARD, num_records=0)


def test_a_shard_that_can_be_read_after_all_is_read_whole(monkeypatch):
    store, body = MemoryStore(), pa.BufferOutputStream()
    pq.write_table(pa.table({"image": [picture(number) for number in range(5)]}), body)
    store.put("t.parquet", body.getvalue().to_pybytes())
    assert [raw.index for raw in steps.raw_records(unplanned(store), store)] == [0, 1, 2, 3, 4]
    monkeypatch.setattr(steps, "MAX_UNPLANNED_RECORDS", 4)
    with pytest.raises(ObjectError, match="has 5 rows now, at most 4"):
        steps.raw_records(unplanned(store), store)


# ---------------------------------------------------------------- objects that cannot be written


def run_where(tmp_path, monkeypatch, fails, error=UnavailableError):
    """Runs a job of three units on an output where some calls always fail. Returns its outcome and the inner output."""
    data = tmp_path / "in"
    if not data.exists():
        data.mkdir()
        for number in range(3):
            pq.write_table(pa.table({"image": [picture(number)]}), data / f"{number}.parquet")

    def intercept(name, key, call):
        if fails(name, key):
            raise error("500")
        return call()

    monkeypatch.setattr("blocksight.storage.stores.retrying.FIRST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr("blocksight.storage.stores.retrying.PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr("blocksight.jobs.run.job.SHORT_PATIENCE_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(plan, "open_store", lambda uri, _: InterceptedStore(LocalStore(uri), intercept))
        return run_here(data, tmp_path / "out", explainer="gradient"), LocalStore(tmp_path / "out")


@pytest.mark.parametrize("error", [UnavailableError, StoreError])
@pytest.mark.parametrize("calls", [("create",), ("create", "head", "read")], ids=len)
def test_a_fragment_that_cannot_be_written_is_a_dead_letter(tmp_path, monkeypatch, error, calls):
    def fails(name, key):
        return name in calls and re.match("data/../000001-", key) is not None

    outcome, store = run_where(tmp_path, monkeypatch, fails, error)
    assert [(letter.ordinal, letter.cause) for letter in outcome.job_state.dead.values()] == [(1, "output_unwritable")]
    assert [unit.ordinal for unit in outcome.job_state.open_units] == []
    assert outcome.ran.stopped is None
    assert len(outcome.job_state.receipts) == 2
    (letter,) = reopen(store, outcome.job_state.plan, "output_unwritable")
    assert "500; other objects beside it can be written" in letter.error
    assert run_where(tmp_path, monkeypatch, lambda _name, _key: False)[0].manifest["num_ok"] == 3


@pytest.mark.parametrize("error", [UnavailableError, StoreError])
def test_where_no_fragment_can_be_written_the_units_stay_open(tmp_path, monkeypatch, error):
    outcome, _ = run_where(tmp_path, monkeypatch, lambda name, key: name == "create" and key.startswith("data/"), error)
    assert outcome.job_state.dead == {}
    assert len(outcome.job_state.open_units) == 3
    assert outcome.ran.stopped == ("the store does not answer" if error is UnavailableError else None)


def test_a_unit_whose_letter_cannot_be_written_either_stays_open_alone(tmp_path, monkeypatch):
    def fails(name, key):
        return name == "create" and (
            re.match("data/../000001-", key) is not None or ("/dead/" in key and "_probe-" not in key)
        )

    outcome, _ = run_where(tmp_path, monkeypatch, fails)
    assert [unit.ordinal for unit in outcome.job_state.open_units] == [1]
    assert len(outcome.job_state.receipts) == 2
    assert outcome.ran.stopped is None


@pytest.mark.parametrize("calls", [("create",), ("create", "read")], ids=len)
def test_a_job_does_without_receipts_that_cannot_be_written_or_read(tmp_path, monkeypatch, calls):
    def fails(name, key):
        return name in calls and "/receipts/" in key and "_probe-" not in key

    outcome, store = run_where(tmp_path, monkeypatch, fails)
    assert outcome.manifest["num_ok"] == 3
    assert [faults for _, faults in check(store, outcome.job_state.plan) if faults] == []
    assert run_where(tmp_path, monkeypatch, fails)[0].manifest == outcome.manifest


def test_a_broken_table_among_sound_ones_is_one_dead_letter(tmp_path):
    data, whole = tmp_path / "in", None
    data.mkdir()
    for number in range(4):
        pq.write_table(pa.table({"image": [picture(number), picture(number + 9)]}), data / f"{number}.parquet")
    whole = (data / "1.parquet").read_bytes()
    (data / "1.parquet").write_bytes(whole[: len(whole) // 2])
    (data / "2.parquet").write_bytes(b"")
    config, execution = config_of(data, tmp_path / "out", explainer="gradient"), Execution(runner="local")
    _, plan = plan_job(config, execution)
    assert plan.troubles.keys() == {"1.parquet", "2.parquet"}
    shown = io.StringIO()
    Console(file=shown, width=200).print(plan_table(config, plan, workforce_of(execution), "none in the data", config))
    assert "1.parquet: " in shown.getvalue()
    outcome = run_here(data, tmp_path / "out", explainer="gradient")
    assert {(letter.inputs, letter.cause) for letter in outcome.job_state.dead.values()} == {
        ("1.parquet", "container_corrupt"),
        ("2.parquet", "container_corrupt"),
    }
    assert outcome.job_state.total("num_ok") == 4
    assert outcome.job_state.open_units == []
    assert not outcome.job_state.plan.is_exact
    assert outcome.exceeded_budgets[0] == "2 dead units, and --max-dead-units allows 0"


def test_a_compressed_shard_among_sound_ones_is_one_dead_letter(tmp_path):
    data = tmp_path / "in"
    data.mkdir()
    for number in range(3):
        (data / f"{number}.tar").write_bytes(tar_bytes(2 * number, 2))
    (data / "1.tar").write_bytes(gzip.compress((data / "1.tar").read_bytes()))
    code, printed = called("plan", "--data", data, "--output", tmp_path / "out", "--model", MODEL)
    assert code == 0
    assert "1.tar is gzip inside" in " ".join(printed.split())
    outcome = run_here(data, tmp_path / "out", explainer="gradient")
    (letter,) = outcome.job_state.dead.values()
    assert (letter.inputs, letter.cause) == ("1.tar", "container_corrupt")
    assert outcome.job_state.total("num_ok") == 4
    assert outcome.manifest is None


def test_a_shard_with_fewer_records_than_its_sidecar_says_is_named(tmp_path):
    data, out = tmp_path / "in", tmp_path / "out"
    data.mkdir()
    for number, said in enumerate((2, 3, 2)):
        (data / f"{number}.tar").write_bytes(tar_bytes(2 * number, 2))
        (data / f"{number}_stats.json").write_text(f'{{"successes": {said}}}')
    (data / "left.avif").write_bytes(b"")
    shown = io.StringIO()
    outcome = run_job(config_of(data, out, explainer="gradient"), Execution(runner="local"), Console(file=shown))
    said = " ".join(shown.getvalue().split())
    assert "data: sidecars say 7 records in 3 shards" in said
    assert "images in formats that are not read, left out (1): left.avif" in said
    assert other_counts(outcome.job_state) == {"1.tar": (3, 2)}
    assert outcome.job_state.plan == load_plan(LocalStore(out))
    code, printed = called("status", out)
    assert code == 0
    assert "than their sidecars say (said and found): 1.tar 3 and 2" in " ".join(printed.split())
    some = replace(outcome.job_state, receipts={})
    assert other_counts(some) == {}


def test_a_broken_table_that_was_mended_is_retried_and_verified(tmp_path):
    data, out = tmp_path / "in", tmp_path / "out"
    data.mkdir()
    for number in range(2):
        pq.write_table(pa.table({"image": [picture(number), picture(number + 9)]}), data / f"{number}.parquet")
    whole, before = (data / "1.parquet").read_bytes(), (data / "1.parquet").stat()
    (data / "1.parquet").write_bytes(bytes(len(whole)))
    os.utime(data / "1.parquet", ns=(before.st_mtime_ns, before.st_mtime_ns))
    run_here(data, out, explainer="gradient")
    (data / "1.parquet").write_bytes(whole)
    os.utime(data / "1.parquet", ns=(before.st_mtime_ns, before.st_mtime_ns))
    store = LocalStore(out)
    (letter,) = reopen(store, load_plan(store))
    assert (letter.inputs, letter.num_records) == ("1.parquet", 0)
    outcome = run_here(data, out, explainer="gradient")
    assert outcome.manifest["num_ok"] == 4
    assert [faults for _, faults in check(store, outcome.job_state.plan) if faults] == []
