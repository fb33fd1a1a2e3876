"""Stop requests and waiting: signals, grace period, time limits, heartbeats, and rows from another thread."""

import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from blocksight.cluster.errors import ClusterError
from blocksight.cluster.nodes import NodeWatch
from blocksight.engine.model import liveness
from blocksight.jobs.ledger.stop_request import Stop, is_stopped, stopped_by_signals
from blocksight.jobs.run import pipeline
from blocksight.jobs.run.pipeline import _arriving_rows
from blocksight.jobs.worker import watchdog
from blocksight.storage.stores.retrying import PatientStore
from blocksight.storage.stores.store import MissingError, UnavailableError
from tests.faults.stores import InterceptedStore
from tests.storage.memory import MemoryStore


def stop(output=None):
    return Stop(output or MemoryStore(), "run")


def wait_until(holds):
    deadline = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_first_signal_asks_and_the_second_ends(capfd):
    output = MemoryStore()
    asked = stop(output)
    before = signal.getsignal(signal.SIGTERM)
    with stopped_by_signals(asked, cuts_off=False):
        assert asked.deadline == float("inf")
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: asked.reason == "SIGTERM")
        assert capfd.readouterr().err == "\nfinishing what is under way; press again to stop now\n"
        assert asked.deadline < time.monotonic() + 30
        wait_until(lambda: is_stopped(output, "run"))
        assert not is_stopped(output, "another")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_work_in_this_process_is_cut_off_when_the_grace_is_over(monkeypatch):
    monkeypatch.setattr("blocksight.jobs.ledger.stop_request.GRACE_SECONDS", 0.3)
    asked, begun = stop(), time.monotonic()
    with pytest.raises(KeyboardInterrupt), stopped_by_signals(asked, cuts_off=True):  # noqa: PT012 - a long work
        os.kill(os.getpid(), signal.SIGTERM)
        while time.monotonic() < begun + 20:
            time.sleep(0.01)
    assert asked.reason == "SIGTERM"
    assert time.monotonic() < begun + 10
    asked.clear()
    assert not is_stopped(asked.output, "run")


def test_the_first_reason_counts():
    asked = stop()
    asked.request("one")
    asked.request("two")
    assert asked.reason == "one"


def test_a_second_signal_within_the_first_is_no_traceback(monkeypatch):
    """Two signals at once, as `timeout` sends them to a process and its group, may arrive within the handler."""

    def second(_thread):
        raise KeyboardInterrupt

    ours = stop()
    monkeypatch.setattr(threading.Thread, "start", second)
    with pytest.raises(KeyboardInterrupt):
        ours.request("SIGTERM")
    monkeypatch.undo()
    ours.clear()
    assert ours.reason == "SIGTERM"


def nothing():
    """An end for rows that end by themselves."""


def readers():
    """The threads that read rows."""
    return [thread for thread in threading.enumerate() if thread.name == pipeline.READER]


def test_rows_arrive_in_order_and_errors_with_them():
    def rows():
        yield {"n": 1}
        yield {"n": 2}
        raise ZeroDivisionError("in the thread")

    arriving = _arriving_rows(rows(), stop(), 9, NodeWatch(print), nothing)
    assert [next(arriving), next(arriving)] == [{"n": 1}, {"n": 2}]
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        next(arriving)
    assert list(_arriving_rows(iter([{"n": 1}]), stop(), 9, NodeWatch(print), nothing)) == [{"n": 1}]


def silent(release):
    yield {"n": 1}
    release.wait(10)


def test_a_silence_that_lasts_too_long_ends_the_run(monkeypatch):
    monkeypatch.setattr(pipeline, "POLL_SECONDS", 0.05)
    release = threading.Event()
    arriving = _arriving_rows(silent(release), stop(), 0.3, NodeWatch(print), release.set)
    assert next(arriving) == {"n": 1}
    with pytest.raises(ClusterError, match="no unit has finished for 0 s"):
        next(arriving)
    assert readers() == []


def test_the_grace_time_ends_the_waiting(monkeypatch):
    monkeypatch.setattr(pipeline, "POLL_SECONDS", 0.05)
    monkeypatch.setattr("blocksight.jobs.ledger.stop_request.GRACE_SECONDS", 0.3)
    release, asked = threading.Event(), stop()
    arriving = _arriving_rows(silent(release), asked, 9, NodeWatch(print), release.set)
    next(arriving)
    asked.request("SIGTERM")
    assert list(arriving) == []
    assert readers() == []


def test_rows_that_are_left_early_are_read_by_no_thread(monkeypatch):
    """The thread may be about to begin when it is asked to end: it is asked until it has ended."""
    monkeypatch.setattr(pipeline, "POLL_SECONDS", 0.05)
    release, asked = threading.Event(), []

    def end():
        asked.append(True)
        if len(asked) == 3:
            release.set()

    arriving = _arriving_rows(silent(release), stop(), 9, NodeWatch(print), end)
    assert next(arriving) == {"n": 1}
    assert len(readers()) == 1
    arriving.close()
    assert readers() == []
    assert len(asked) == 3


# ---------------------------------------------------------------- patience, watchdog, device memory


class Away:
    """An interceptor that fails `times` times before it lets a call through."""

    def __init__(self, times, error=UnavailableError):
        self.left, self.error = times, error

    def __call__(self, name, key, call):
        if self.left:
            self.left -= 1
            raise self.error("503")
        return call()


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr("blocksight.storage.stores.retrying.FIRST_PAUSE_SECONDS", 0.001)


def test_a_patient_store_asks_again_until_it_answers(no_pauses):
    inner = MemoryStore()
    for name, call in {
        "put": lambda store: store.put("a", b"1"),
        "create": lambda store: store.create("b", b"2", metadata={"m": "1"}),
        "read": lambda store: store.read("a") == b"1" or pytest.fail("other bytes"),
        "head": lambda store: store.head("b").metadata["m"] == "1" or pytest.fail("other metadata"),
        "list": lambda store: len(list(store.list())) == 2 or pytest.fail("a short list"),
        "delete": lambda store: store.delete("a"),
    }.items():
        away = Away(3)
        call(PatientStore(InterceptedStore(inner, away), seconds=5))
        assert away.left == 0, name
    assert [info.key for info in inner.list()] == ["b"]


def test_patience_ends_and_other_errors_go_through_at_once(no_pauses):
    with pytest.raises(UnavailableError):
        PatientStore(InterceptedStore(MemoryStore(), Away(10**9)), seconds=0.05).head("a")
    away = Away(5, MissingError)
    with pytest.raises(MissingError):
        PatientStore(InterceptedStore(MemoryStore(), away), seconds=5).head("a")
    assert away.left == 4


def test_waiting_for_a_store_sends_heartbeats(no_pauses):
    heartbeats = []
    PatientStore(InterceptedStore(MemoryStore(), Away(3)), seconds=5, waiting=lambda: heartbeats.append(1)).head("a")
    assert len(heartbeats) == 4


def test_a_step_may_wait_for_its_stores_longer_than_the_watchdog_allows(tmp_path, monkeypatch):
    """Two store calls that both wait for their full patience take longer than the watchdog allows."""
    from blocksight.jobs.worker.attempts import open_worker_stores
    from tests.jobs.jobs_of import config_of

    heartbeats = []
    monkeypatch.setattr("blocksight.jobs.worker.attempts.heartbeat", lambda: heartbeats.append(1))
    (tmp_path / "in").mkdir()
    context = SimpleNamespace(config=config_of(tmp_path / "in", tmp_path / "out"), run_id="run", witnesses=())
    stores = open_worker_stores(context)
    for store in (stores.source, stores.output):
        assert store.head("a") is None
    assert len(heartbeats) == 2


def test_the_watchdog_is_armed_only_within_its_context(monkeypatch):
    armed, now = [], [0.0]
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda *_, **__: armed.append(True))
    monkeypatch.setattr("faulthandler.cancel_dump_traceback_later", lambda: armed.append(False))
    watchdog.heartbeat()
    assert armed == []
    with watchdog.watchdog():
        assert armed == [True]
        watchdog.heartbeat()  # too soon to count
        now[0] += watchdog.HEARTBEAT_SECONDS
        watchdog.heartbeat()
    watchdog.heartbeat()
    assert armed == [True, True, False]
    with watchdog.watchdog():  # at once, however soon after the last
        assert armed[3:] == [True]


def test_a_compiler_at_work_is_a_heartbeat():
    assert watchdog.heartbeat in liveness.LISTENERS


def test_a_full_device_halves_the_batch(tmp_path, monkeypatch):
    """Raises CUDA's error; the images are explained with a quarter of the batch."""
    from blocksight.jobs.explain.step import ExplainStep
    from blocksight.storage.stores.local import LocalStore
    from tests.jobs.jobs_of import rows_in, run_here
    from tests.jobs.tiny import folder_of_images

    original, sizes = ExplainStep._explain_all, []

    def full(self, unit_input):
        sizes.append(self.explainer.scorer.batch_size)
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, unit_input)

    monkeypatch.setattr(ExplainStep, "_explain_all", full)
    run_here(folder_of_images(tmp_path / "in", 2, bad=False), tmp_path / "out")
    assert sizes[:3] == [4, 2, 1]
    assert {row["status"] for row in rows_in(LocalStore(tmp_path / "out"))} == {"ok"}
