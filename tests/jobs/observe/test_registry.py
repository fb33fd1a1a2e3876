"""The registry, the counted store and the metrics file, each alone."""

import random
import threading
from types import SimpleNamespace

import pytest

from blocksight.jobs.observe.catalogue import METRICS, SECONDS
from blocksight.jobs.observe.counted_store import CountedStore
from blocksight.jobs.observe.metrics_file import MetricsFile, write_whole
from blocksight.jobs.observe.registry import OF_PROCESS, Registry, Sample, record_all
from blocksight.jobs.observe.run_metrics import RunMetrics
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.text import counted
from blocksight.jobs.worker.attempts import open_worker_stores
from blocksight.storage.stores.retrying import PatientStore
from blocksight.storage.stores.store import AlreadyExistsError, MissingError, StoreError, UnavailableError
from tests.jobs.jobs_of import config_of
from tests.storage.memory import MemoryStore

REQUESTS = "blocksight_store_requests_total"


def requests() -> dict[tuple[str, ...], float]:
    """What was counted since the last call."""
    return {sample.labels: sample.value for sample in OF_PROCESS.taken() if sample.name == REQUESTS}


def test_no_label_can_hold_a_key_a_file_or_a_class():
    registry = Registry()
    for name, metric in METRICS.items():
        for place in range(len(metric.labels)):
            labels = [values[0] for values in metric.labels.values()]
            labels[place] = "n02123045/tabby.jpg"
            with pytest.raises(ValueError, match=r"has no label 'n02123045/tabby.jpg'; known: "):
                registry.add(name, *labels)
    assert registry.text().strip() == ""
    assert sum(len(values) for metric in METRICS.values() for values in metric.labels.values()) < 100


@pytest.mark.parametrize(
    ("name", "labels"), [("blocksight_unknown", ()), ("blocksight_forwards_total", ("ok",)), (REQUESTS, ("read",))]
)
def test_a_metric_is_of_the_catalogue(name, labels):
    with pytest.raises(ValueError, match=f"no metric {name} with {counted(len(labels), 'label')}"):
        Registry().add(name, *labels)


def test_counters_add_up_in_any_order_and_are_taken_once():
    parts = [Registry() for _ in range(3)]
    drawn = random.Random(0)
    for _ in range(50):
        drawn.choice(parts).add("blocksight_stage_seconds_total", drawn.choice(["read", "commit"]), value=0.5)
    whole = Registry()
    for part in parts:
        record_all(whole, part.taken())
        assert part.taken() == []
    assert whole.total("blocksight_stage_seconds_total") == 25.0


def test_the_text_is_prometheus_own_format():
    registry = Registry()
    registry.add("blocksight_records_total", "ok", value=3)
    registry.record(Sample("blocksight_units", ("open",), 5))
    registry.record(Sample("blocksight_units", ("open",), 4))
    for seconds in (0.1, 2.0, 1e6):
        registry.add("blocksight_unit_seconds", value=seconds)
    lines = registry.text().splitlines()
    assert "# TYPE blocksight_records_total counter" in lines
    assert 'blocksight_records_total{status="ok"} 3' in lines
    assert 'blocksight_units{state="open"} 4' in lines
    assert [line.rpartition(" ")[2] for line in lines if "_bucket" in line] == ["1", "1", "1", *["2"] * 9, "3"]
    assert {"blocksight_unit_seconds_sum 1000002.1", "blocksight_unit_seconds_count 3"} <= {*lines}
    assert len(SECONDS) == 12
    assert registry.figures()["blocksight_unit_seconds"] == {"count": 3, "sum": 1000002.1}
    assert registry.figures()["blocksight_records_total"] == {"status=ok": 3}


class BusyStore(MemoryStore):
    """Answers with 503 a few times."""

    busy = 2

    def head(self, key):
        if self.busy:
            self.busy -= 1
            raise UnavailableError("SlowDown")
        return super().head(key)

    def put(self, key, data):
        raise StoreError("AccessDenied")


def test_each_call_counts_also_those_that_are_repeated(monkeypatch):
    monkeypatch.setattr("blocksight.storage.stores.retrying.FIRST_PAUSE_SECONDS", 0.001)
    store = PatientStore(CountedStore(BusyStore()))
    requests()
    store.create("a", b"1")
    with pytest.raises(AlreadyExistsError):
        store.create("a", b"2")
    assert store.read("a") == b"1"
    with pytest.raises(MissingError):
        store.read("b")
    assert store.head("a") is not None
    assert [info.key for info in store.list()] == ["a"]
    with pytest.raises(StoreError, match="AccessDenied"):
        store.put("c", b"")
    store.delete("a")
    store.delete_many(["a"])
    assert requests() == {
        ("create", "ok"): 1,
        ("create", "exists"): 1,
        ("read", "ok"): 1,
        ("read", "missing"): 1,
        ("head", "unavailable"): 2,
        ("head", "ok"): 1,
        ("list", "ok"): 1,
        ("put", "refused"): 1,
        ("delete", "ok"): 2,
    }


@pytest.mark.parametrize(
    ("raised", "outcome"),
    [(KeyboardInterrupt, "interrupted"), (SystemExit, "interrupted"), (RuntimeError, "refused")],
)
def test_a_call_without_an_answer_is_not_counted_as_one_that_went_well(raised, outcome, monkeypatch):
    def stopped(*_, **__):
        raise raised

    store = CountedStore(MemoryStore())
    monkeypatch.setattr(MemoryStore, "read", stopped)
    requests()
    with pytest.raises(raised):
        store.read("a")
    assert requests() == {("read", outcome): 1}


def test_a_list_of_which_the_beginning_is_enough_went_well():
    store = CountedStore(MemoryStore())
    for key in ("a", "b"):
        store.create(key, b"")
    requests()
    listed = store.list()
    assert next(listed).key == "a"
    listed.close()
    assert requests() == {("list", "ok"): 1}


def test_a_workers_stores_count_within_what_repeats(tmp_path, monkeypatch):
    """Outside of it, a call that was repeated six times would count once."""
    monkeypatch.setattr("blocksight.storage.stores.retrying.FIRST_PAUSE_SECONDS", 0.001)
    (tmp_path / "in").mkdir()
    context = SimpleNamespace(config=config_of(tmp_path / "in", tmp_path / "out"), run_id="run", witnesses=())
    for store in (lambda stores: stores.source, lambda stores: stores.output):
        patient = store(open_worker_stores(context))
        patient.store.store = BusyStore()
        requests()
        assert patient.head("none") is None
        assert requests() == {("head", "unavailable"): 2, ("head", "ok"): 1}


def test_the_file_is_whole_at_each_moment_and_has_the_last_values(tmp_path, monkeypatch):
    monkeypatch.setattr("blocksight.jobs.observe.run_metrics.SHOW_SECONDS", 0.001)
    place = tmp_path / "blocksight.prom"
    metrics, seen = RunMetrics(300, 1), set()
    with metrics.shown(str(place)):
        for _ in range(300):
            metrics.registry.add("blocksight_forwards_total")
            seen.add(place.read_text())
    assert all(text.endswith("\n") for text in seen)
    assert "blocksight_forwards_total 300\n" in place.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["blocksight.prom"]


def test_a_file_that_cannot_be_replaced_leaves_the_old_one_and_no_other(tmp_path, monkeypatch):
    place = tmp_path / "blocksight.prom"
    write_whole(place, "old\n")

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", no_space)
    with pytest.raises(OSError, match="No space"):
        write_whole(place, "new\n")
    assert place.read_text() == "old\n"
    assert [path.name for path in tmp_path.iterdir()] == ["blocksight.prom"]


def test_a_place_that_cannot_be_written_is_told_at_once(tmp_path):
    with pytest.raises(ConfigError, match="No such file or directory; name a file in a folder that exists"):
        MetricsFile(str(tmp_path / "none" / "x.prom"), Registry())


def test_a_gauge_is_exported_again_and_again_while_no_unit_ends(monkeypatch):
    monkeypatch.setattr("blocksight.jobs.observe.run_metrics.SHOW_SECONDS", 0.001)
    exported, enough = [], threading.Event()

    def export(samples):
        exported.extend(sample for sample in samples if sample.labels == ("open",))
        if len(exported) == 5:
            enough.set()

    with RunMetrics(7, 1, export).shown(None):
        assert enough.wait(10)
    assert {sample.value for sample in exported} == {7}
