"""A registry: the values of metrics, which add up in any order, also over processes."""

import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from blocksight.jobs.observe.catalogue import COUNTER, GAUGE, HISTOGRAM, METRICS, SECONDS
from blocksight.jobs.plan.text import counted


class Sample(NamedTuple):
    """One change of a metric: what a counter grew by, a gauge's new value, or one observation of a histogram."""

    name: str
    labels: tuple[str, ...]
    """Values of the metric's labels, in their order in the catalogue."""
    value: float


@dataclass
class Histogram:
    """How many observations lie in each bucket, and their sum."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    total: float = 0.0

    def add(self, value: float) -> None:
        """Counts one observation, in seconds."""
        self.counts[bisect_left(SECONDS, value)] += 1
        self.total += value


class Registry:
    """The values of the catalogue's metrics. May be used by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers: dict[tuple[str, tuple[str, ...]], float] = {}
        self._histograms: dict[str, Histogram] = {}

    def record(self, sample: Sample) -> None:
        """Takes a change in. Raises ValueError for a metric or a label's value that the catalogue does not have."""
        metric = METRICS.get(sample.name)
        if metric is None or len(sample.labels) != len(metric.labels):
            raise ValueError(
                f"no metric {sample.name} with {counted(len(sample.labels), 'label')}; known: {', '.join(METRICS)}"
            )
        for value, known in zip(sample.labels, metric.labels.values(), strict=True):
            if value not in known:
                raise ValueError(f"{sample.name} has no label {value!r}; known: {', '.join(known)}")
        with self._lock:
            if metric.kind == HISTOGRAM:
                self._histograms.setdefault(sample.name, Histogram()).add(sample.value)
            elif metric.kind == GAUGE:
                self._numbers[sample.name, sample.labels] = sample.value
            else:
                before = self._numbers.get((sample.name, sample.labels), 0.0)
                self._numbers[sample.name, sample.labels] = before + sample.value

    def add(self, name: str, *labels: str, value: float = 1.0) -> None:
        """As `record`, of one metric."""
        self.record(Sample(name, labels, value))

    def taken(self) -> list[Sample]:
        """What the counters hold, which begin anew: another registry adds it up."""
        with self._lock:
            numbers, self._numbers = self._numbers, {}
        return [Sample(*key, value) for key, value in numbers.items() if METRICS[key[0]].kind == COUNTER]

    def total(self, name: str) -> float:
        """The sum of a counter over all of its labels."""
        with self._lock:
            return sum(value for (own, _), value in self._numbers.items() if own == name)

    def figures(self) -> dict[str, object]:
        """The values for JSON, by metric: a number, or the numbers by `label=value`; of a histogram count and sum."""
        found: dict[str, object] = {}
        for sample in self._samples():
            by_label = found.setdefault(sample.name, {})
            assert isinstance(by_label, dict)
            by_label[",".join(f"{name}={own}" for name, own in _named(sample).items())] = sample.value
        plain = {name: own[""] if isinstance(own, dict) and own.keys() == {""} else own for name, own in found.items()}
        with self._lock:
            for name, own in self._histograms.items():
                plain[name] = {"count": sum(own.counts), "sum": own.total}
        return plain

    def text(self) -> str:
        """The values in the text format of Prometheus, as node-exporter's textfile collector reads it."""
        samples = self._samples()
        lines: list[str] = []
        for name, metric in METRICS.items():
            own = [sample for sample in samples if sample.name == name]
            with self._lock:
                histogram = self._histograms.get(name)
            body = [f"{name}{_labels(_named(sample))} {sample.value:.10g}" for sample in own]
            body += [] if histogram is None else _histogram_lines(name, histogram)
            if body:
                lines += [f"# HELP {name} {metric.about}", f"# TYPE {name} {metric.kind}", *body]
        return "\n".join([*lines, ""])

    def _samples(self) -> list[Sample]:
        with self._lock:
            return [Sample(*key, value) for key, value in sorted(self._numbers.items())]


def record_all(registry: Registry, samples: Iterable[Sample]) -> None:
    """Takes all of them in."""
    for sample in samples:
        registry.record(sample)


def _named(sample: Sample) -> dict[str, str]:
    return dict(zip(METRICS[sample.name].labels, sample.labels, strict=True))


def _labels(labels: Mapping[str, str]) -> str:
    """The values need no escape: the catalogue has them."""
    inner = ",".join(f'{name}="{value}"' for name, value in labels.items())
    return f"{{{inner}}}" if inner else ""


def _histogram_lines(name: str, histogram: Histogram) -> list[str]:
    bounds = [*(f"{bound:g}" for bound in SECONDS), "+Inf"]
    sums = [sum(histogram.counts[: place + 1]) for place in range(len(bounds))]
    buckets = [f'{name}_bucket{{le="{bound}"}} {count}' for bound, count in zip(bounds, sums, strict=True)]
    return [*buckets, f"{name}_sum {histogram.total:.10g}", f"{name}_count {sums[-1]}"]


OF_PROCESS = Registry()
"""What this process measured and nobody has taken yet: seconds of stages, and calls to stores."""
OF_WORKERS = Registry()
"""What the workers of this driver measured, and exported themselves; a run's metrics take it."""
