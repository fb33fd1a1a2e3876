"""Passes metrics to Ray, whose agent on each node shows them at `/metrics`, with `ray_` before each name."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Protocol

from ray.util.metrics import Counter, Gauge, Histogram


class Described(Protocol):
    """What a metric is."""

    @property
    def kind(self) -> str:
        """counter, gauge or histogram."""
        ...

    @property
    def about(self) -> str:
        """For people."""
        ...

    @property
    def labels(self) -> Mapping[str, Sequence[str]]:
        """The values that each label may have."""
        ...


def export_values(
    samples: Iterable[tuple[str, tuple[str, ...], float]], metrics: Mapping[str, Described], bounds: Sequence[float]
) -> None:
    """Passes on what counters grew by, the values of gauges, and observations of histograms with these bounds.

    Each is a name, its labels' values in their order, and a number. A process that is connected to Ray calls it.
    """
    for name, labels, value in samples:
        metric = metrics[name]
        own = _metric(metric.kind, name, metric.about, tuple(metric.labels), tuple(bounds))
        tags = dict(zip(metric.labels, labels, strict=True))
        if metric.kind == "gauge":
            own.set(value, tags=tags)
        elif metric.kind == "histogram":
            own.observe(value, tags=tags)
        elif value > 0:  # Ray refuses 0
            own.inc(value, tags=tags)


@cache
def _metric(kind: str, name: str, about: str, labels: tuple[str, ...], bounds: tuple[float, ...]) -> Any:
    if kind == "histogram":
        return Histogram(name, about, boundaries=list(bounds), tag_keys=labels)
    return (Gauge if kind == "gauge" else Counter)(name, about, tag_keys=labels)
