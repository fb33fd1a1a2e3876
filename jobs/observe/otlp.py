"""Sends a run's metrics and a span per unit to an OpenTelemetry collector, where one is named and the SDK is there."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from blocksight.jobs.observe.catalogue import GAUGE, HISTOGRAM, METRICS, SECONDS
from blocksight.jobs.observe.registry import Sample
from blocksight.jobs.observe.unit_log import unit_facts
from blocksight.jobs.plan.records import Outcome, Receipt

if TYPE_CHECKING:
    from opentelemetry.metrics import Meter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
SCOPE = "blocksight"
SERVICE_NAME = "OTEL_SERVICE_NAME"
CLOSE_SECONDS = 3.0
"""How long the end of a run waits for the collector to take the last values."""
SPAN_FACTS = ("unit", "attempt", "node")
"""Of a line of the log of units; the others may hold a key, or what a library said of one."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Sender:
    """What takes a run's values; by default nobody does."""

    samples: Callable[[Sequence[Sample]], None] = lambda _: None
    unit: Callable[[Outcome, float], None] = lambda *_: None
    """An outcome, and the seconds of work in it."""


@contextmanager
def sending(run_id: str, part: str | None, tell: Tell) -> Iterator[Sender]:
    """Sends what the body passes on, in threads of the SDK with bounded queues.

    A collector that does not answer ends no job and holds none up: it is told of once, and the end waits for it for
    CLOSE_SECONDS at most. Without an endpoint, or without the SDK, nothing is imported, sent or said.
    """
    place = os.environ.get(ENDPOINT, "").strip()
    if not place:
        yield Sender()
        return
    complaint = _Complaint(place, tell)
    providers = _providers(tell)
    if providers is None:
        complaint.end()
        yield Sender()
        return
    meters, tracers = providers
    run = {"run": run_id} if part is None else {"run": run_id, "part": part}
    instruments, tracer = _instruments(meters.get_meter(SCOPE)), tracers.get_tracer(SCOPE)
    try:
        yield Sender(partial(_send, instruments), partial(_span, tracer, run))
    finally:
        _close((meters.shutdown, tracers.shutdown), complaint)


def _providers(tell: Tell) -> "tuple[MeterProvider, TracerProvider] | None":
    """Of meters and of spans; they are this run's own, so what else a process sends by the SDK goes on beside them."""
    try:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        return None
    try:
        with ExitStack() as begun:
            resource = Resource.create({"service.name": os.environ.get(SERVICE_NAME) or SCOPE})
            spans = BatchSpanProcessor(OTLPSpanExporter())
            begun.callback(spans.shutdown)
            reader = PeriodicExportingMetricReader(OTLPMetricExporter())
            begun.pop_all()
    except Exception as error:  # noqa: BLE001 - variables that the SDK does not take end no job
        kind = type(error).__name__
        tell(f"OpenTelemetry: the SDK refuses what its variables say ({kind}); the job goes on without it")
        return None
    # the SDK's own shutdown at an exit would wait for a collector
    meters = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
    tracers = TracerProvider(resource=resource, shutdown_on_exit=False)
    tracers.add_span_processor(spans)
    return meters, tracers


def _instruments(meter: "Meter") -> dict[str, Callable[..., None]]:
    """What takes a value of each metric of the catalogue, with its labels."""
    found: dict[str, Callable[..., None]] = {}
    for name, metric in METRICS.items():
        if metric.kind == GAUGE:
            found[name] = meter.create_gauge(name, description=metric.about).set
        elif metric.kind == HISTOGRAM:
            found[name] = meter.create_histogram(
                name, description=metric.about, explicit_bucket_boundaries_advisory=SECONDS
            ).record
        else:
            found[name] = meter.create_counter(name, description=metric.about).add
    return found


def _send(instruments: dict[str, Callable[..., None]], samples: Sequence[Sample]) -> None:
    for name, labels, value in samples:
        instruments[name](value, dict(zip(METRICS[name].labels, labels, strict=True)))


def _span(tracer: "Tracer", run: dict[str, str], outcome: Outcome, seconds: float) -> None:
    """One span for a unit that came to an end, as long as its work; nothing for one that was given back."""
    from opentelemetry.trace import StatusCode

    facts = unit_facts(outcome, seconds)
    if not facts:
        return
    own = {name: facts[name] for name in SPAN_FACTS if facts[name] is not None}
    end = time.time_ns()
    span = tracer.start_span("unit", attributes={**run, **own}, start_time=end - int(seconds * 1e9))
    span.set_status(StatusCode.OK if isinstance(outcome, Receipt) else StatusCode.ERROR)
    span.end(end)


class _Complaint(logging.Handler):
    """Makes one sentence of all that the SDK says; its own words may hold what a server answered."""

    def __init__(self, place: str, tell: Tell) -> None:
        super().__init__(logging.WARNING)
        self._place, self._tell, self._is_told = place, tell, False
        self._log = logging.getLogger("opentelemetry")
        self._propagated, self._log.propagate = self._log.propagate, False
        self._log.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002 - what it says is not passed on
        self.say()

    def say(self) -> None:
        """Says it the first time."""
        if not self._is_told:
            self._is_told = True
            host = _host(self._place)
            self._tell(
                f"OpenTelemetry: not all metrics and spans reach {host} as the variables OTEL_... ask; the job goes on"
            )

    def end(self) -> None:
        """Lets the SDK speak for itself again."""
        self._log.removeHandler(self)
        self._log.propagate = self._propagated


def _host(place: str) -> str:
    """The host alone: an address may hold a password."""
    try:
        address = urlsplit(place)
        host = address.hostname or "the collector"
        return f"{host}:{address.port}" if address.port else host
    except ValueError:
        return "the collector"


def _close(shutdowns: Sequence[Callable[[], None]], complaint: _Complaint) -> None:
    """Shuts down in a thread for which the end of the process does not wait."""

    def close() -> None:
        for shutdown in shutdowns:
            try:
                shutdown()
            except Exception:  # noqa: BLE001 - what the SDK cannot end, it leaves
                complaint.say()
        complaint.end()

    closing = threading.Thread(target=close, name="otlp-close", daemon=True)
    closing.start()
    closing.join(CLOSE_SECONDS)
    if closing.is_alive():
        complaint.say()
