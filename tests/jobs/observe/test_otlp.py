"""What an OpenTelemetry collector on loopback gets of a run; one that is away or hangs ends no job and delays none."""

import io
import json
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console

from blocksight.jobs.observe import otlp
from blocksight.jobs.observe.catalogue import HISTOGRAM, METRICS, SECONDS
from blocksight.jobs.observe.registry import OF_WORKERS, Sample
from blocksight.jobs.observe.run_metrics import RunMetrics
from blocksight.jobs.plan.config import Execution
from blocksight.jobs.plan.records import DeadLetter, UnitFailure, UnitSkipped
from blocksight.jobs.run.job import run_job
from blocksight.storage.stores.local import LocalStore
from tests.jobs.jobs_of import config_of, receipts_in
from tests.jobs.tiny import folder_of_images

metrics_service = pytest.importorskip(
    "opentelemetry.proto.collector.metrics.v1.metrics_service_pb2", reason="the extra `otel` is not installed"
)
trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

SECRET = "hunter2"


class Collector(ThreadingHTTPServer):
    """Keeps what it is sent. While `answers` is not set, no request is answered."""

    daemon_threads = True
    status = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.bodies: list[tuple[str, bytes]] = []
        self.asked, self.answers = threading.Event(), threading.Event()
        self.answers.set()

    def metrics(self) -> dict[str, dict[tuple[str, ...], float]]:
        """The last values by metric and label values; of a histogram its count, and its bounds are compared."""
        found: dict[str, dict[tuple[str, ...], float]] = {}
        for path, body in self.bodies:
            if path.endswith("/metrics"):
                for resource in metrics_service.ExportMetricsServiceRequest.FromString(body).resource_metrics:
                    for scope in resource.scope_metrics:
                        found |= {metric.name: _values(metric) for metric in scope.metrics}
        return found

    def spans(self) -> list:
        """All spans."""
        requests = [
            trace_service.ExportTraceServiceRequest.FromString(body) for path, body in self.bodies if "trace" in path
        ]
        scopes = [
            scope for request in requests for resource in request.resource_spans for scope in resource.scope_spans
        ]
        return [span for scope in scopes for span in scope.spans]


class Request(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.set()
        self.server.answers.wait(20)
        self.server.bodies.append((self.path, body))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_) -> None:
        pass


def _values(metric) -> dict[tuple[str, ...], float]:
    points = getattr(metric, metric.WhichOneof("data")).data_points
    if METRICS[metric.name].kind == HISTOGRAM:
        assert [tuple(point.explicit_bounds) for point in points] == [SECONDS]
        return {(): sum(point.count for point in points)}
    return {
        tuple(one.value.string_value for one in sorted(point.attributes, key=lambda one: one.key)): (
            point.as_double if point.WhichOneof("value") == "as_double" else point.as_int
        )
        for point in points
    }


@pytest.fixture
def collector(monkeypatch) -> Iterator[Collector]:
    with Collector() as server:
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        serving.start()
        monkeypatch.setenv(otlp.ENDPOINT, f"http://user:{SECRET}@127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"authorization={SECRET}")
        yield server
        server.answers.set()
        server.shutdown()
        serving.join()
    for thread in threading.enumerate():
        if thread.name == "otlp-close":
            thread.join(30)
            assert not thread.is_alive()


def attributes_of(span) -> dict[str, str]:
    return {one.key: one.value.string_value for one in span.attributes}


def test_the_collector_gets_the_figures_of_the_run_and_a_span_for_each_unit(tmp_path, collector, capfd):
    data = folder_of_images(tmp_path / "in")
    (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n, cut off")
    console = Console(record=True, file=io.StringIO())
    run_job(config_of(data, tmp_path / "out", explainer="gradcam"), Execution(runner="local"), console)
    store = LocalStore(tmp_path / "out")
    [key] = [info.key for info in store.list("_job/runs/") if info.key.endswith("metrics.json")]
    stored, found = json.loads(store.read(key)), collector.metrics()
    assert found.keys() == stored.keys() == METRICS.keys()
    for name, metric in METRICS.items():
        if metric.kind == HISTOGRAM:
            assert found[name] == {(): stored[name]["count"]}
        elif not metric.labels:
            assert found[name] == {(): pytest.approx(stored[name])}
        else:
            by_label = {
                tuple(part.split("=")[1] for part in sorted(own.split(","))): n for own, n in stored[name].items()
            }
            assert found[name] == pytest.approx(by_label)
    spans, receipts = collector.spans(), receipts_in(store)
    wanted = [
        {
            "run": key.split("/")[2],
            "unit": one["unit_id"],
            "attempt": one["attempt"],
            "node": one["worker"].split(":")[0],
        }
        for one in receipts
    ]
    assert [attributes_of(span) for span in spans] == wanted != []
    assert {(span.name, span.status.code, span.status.message) for span in spans} == {("unit", 1, "")}
    assert all(span.end_time_unix_nano > span.start_time_unix_nano for span in spans)
    sent = b"".join(body for _, body in collector.bodies)
    keys = [path.name for path in (tmp_path / "in").rglob("*.*")]
    assert len(keys) > 1
    assert not [word for word in (*keys, SECRET, str(tmp_path)) if word.encode() in sent]
    assert "OpenTelemetry" not in console.export_text()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", [UnitFailure, DeadLetter])
def test_a_unit_that_failed_is_a_span_that_tells_no_key(collector, kind):
    ended = UnitFailure("u", 3, "in/tabby.jpg", "read", "tabby.jpg is odd")
    if kind is DeadLetter:
        ended = DeadLetter("u", 3, "in/tabby.jpg", "failed", "read", "tabby.jpg is odd", 1)
    with otlp.sending("run", "1/4", print) as sender:
        sender.unit(UnitSkipped("u"), 0.0)
        sender.unit(ended, 0.25)
    [span] = collector.spans()
    assert attributes_of(span) == {"run": "run", "part": "1/4", "unit": "u"}
    assert (span.end_time_unix_nano - span.start_time_unix_nano, span.status.code) == (250_000_000, 2)
    assert b"tabby" not in b"".join(body for _, body in collector.bodies)


def test_what_workers_measured_is_sent_once(collector):
    with otlp.sending("run", None, print) as sender:
        metrics = RunMetrics(1, 1, send=sender.samples)
        OF_WORKERS.record(Sample("blocksight_store_requests_total", ("read", "ok"), 5))
        metrics.add(UnitSkipped("u"))
        metrics.add(UnitSkipped("u"))
    assert collector.metrics()["blocksight_store_requests_total"] == {("ok", "read"): 5}


def test_a_collector_that_is_away_is_told_of_once_and_by_its_host_alone(collector, monkeypatch, capfd):
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "20")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    said, enough = [], threading.Semaphore(0)
    collector.status = 500  # the SDK says so at each trial
    monkeypatch.setattr(otlp.logging.Handler, "handle", _counting(enough, logging.Handler.handle))
    with otlp.sending("run", None, said.append) as sender:
        sender.samples([Sample("blocksight_forwards_total", (), 1)])
        for _ in range(3):
            assert enough.acquire(timeout=30)
    [line] = said
    host = f"127.0.0.1:{collector.server_port}"
    assert (
        line == f"OpenTelemetry: not all metrics and spans reach {host} as the variables OTEL_... ask; the job goes on"
    )
    assert capfd.readouterr().err == ""


def _counting(counter, handle):
    def counted(self, record):
        done = handle(self, record)
        counter.release()
        return done

    return counted


def test_a_collector_that_hangs_holds_up_no_end(collector, monkeypatch):
    """It answers when the run has ended; a run that waits for it would wait for ever."""
    monkeypatch.setattr(otlp, "CLOSE_SECONDS", 0.05)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "600")
    said = []
    collector.answers.clear()
    with otlp.sending("run", None, said.append) as sender:
        sender.samples([Sample("blocksight_forwards_total", (), 1)])
    assert len(said) == 1
    assert collector.asked.wait(30)
    assert not collector.answers.is_set()


def test_the_sdk_speaks_for_itself_again_afterwards(collector):
    log = logging.getLogger("opentelemetry")
    before = (log.propagate, [*log.handlers])
    with otlp.sending("run", None, print):
        assert log.handlers != before[1]
    assert (log.propagate, log.handlers) == before


@pytest.mark.parametrize("variable", ["OTEL_METRIC_EXPORT_INTERVAL", "OTEL_BSP_MAX_QUEUE_SIZE"])
def test_variables_that_the_sdk_refuses_end_no_job_and_leave_no_thread(variable, collector, monkeypatch):
    monkeypatch.setenv(variable, "-1")
    said, before = [], threading.active_count()
    with otlp.sending("run", None, said.append) as sender:
        sender.samples([Sample("blocksight_forwards_total", (), 1)])
        assert threading.active_count() == before
    assert said == ["OpenTelemetry: the SDK refuses what its variables say (ValueError); the job goes on without it"]


def test_a_variable_that_the_sdk_passes_over_is_told_without_its_value(collector, monkeypatch, capfd):
    """The SDK's own warning shows the header that it does not understand, which may be a credential."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", SECRET)
    said = []
    with otlp.sending("run", None, said.append):
        pass
    assert len(said) == 1
    assert SECRET not in said[0] + "".join(capfd.readouterr())


@contextmanager
def imports_seen(monkeypatch) -> Iterator[list[str]]:
    """The modules of OpenTelemetry that the body looks for, of which none is found."""

    class Finder:
        @staticmethod
        def find_spec(name, *_):
            if name.startswith("opentelemetry"):
                seen.append(name)
                raise ModuleNotFoundError(name)

    seen: list[str] = []
    with monkeypatch.context() as patch:
        for name in [name for name in sys.modules if name.startswith("opentelemetry")]:
            patch.delitem(sys.modules, name)
        patch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
        yield seen


@pytest.mark.parametrize(("endpoint", "looks"), [(None, False), (" ", False), ("http://127.0.0.1:9", True)])
def test_without_an_endpoint_or_the_sdk_nothing_is_imported_or_said(endpoint, looks, monkeypatch, capfd):
    monkeypatch.delenv(otlp.ENDPOINT, raising=False)
    if endpoint is not None:
        monkeypatch.setenv(otlp.ENDPOINT, endpoint)
    said = []
    with imports_seen(monkeypatch) as seen, otlp.sending("run", None, said.append) as sender:
        sender.samples([Sample("blocksight_forwards_total", (), 1)])
        sender.unit(UnitFailure("u", 3, "a", "read", "b"), 0.25)
    assert (bool(seen), said, capfd.readouterr()) == (looks, [], ("", ""))
