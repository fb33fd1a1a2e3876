"""A real job on a real Ray session, whose node is scraped as Prometheus does."""

import json
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from rich.console import Console

from blocksight.cluster.checks.monitoring import SELECTOR
from blocksight.cluster.files import text_of
from blocksight.cluster.nodes import joined_nodes
from blocksight.cluster.session import ray_session
from blocksight.cluster.sizing import size_for
from blocksight.jobs.observe.catalogue import METRICS
from blocksight.jobs.plan.config import Execution
from blocksight.jobs.run.job import run_job
from blocksight.storage.stores.local import LocalStore
from tests.cluster.checks.test_monitoring import queries_of
from tests.jobs.jobs_of import config_of, rows_in
from tests.jobs.tiny import folder_of_images

parser = pytest.importorskip("prometheus_client.parser", reason="ray[default], whose agent shows metrics, is missing")

pytestmark = [pytest.mark.servers, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")]

REPORT_MILLISECONDS = 200
"""Ray's own is 10,000: what a process measured in its last moments may take so long to be seen."""
SCRAPE_SECONDS = 60.0


@contextmanager
def scraped_session() -> Iterator[str]:
    """A session whose processes report often; yields its node's address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", str(REPORT_MILLISECONDS))
        with ray_session(num_actors=1):
            [node] = ray.nodes()
            patch.setattr("blocksight.cluster.session.ray_session", _joined)
            yield f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


@contextmanager
def _joined(_address, num_actors, device, *_):
    yield size_for(joined_nodes(), num_actors, device)


def scraped(address: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """The job's values by sample name and our labels, added up over processes."""
    with urllib.request.urlopen(address, timeout=10) as reply:
        families = parser.text_string_to_metric_families(reply.read().decode())
    found: dict[str, dict] = defaultdict(lambda: defaultdict(float))
    known = {name for metric in METRICS.values() for name in metric.labels}
    for family in families:
        for sample in family.samples:
            if sample.name.startswith("ray_blocksight_") and not sample.name.endswith("_created"):
                labels = tuple(sorted((name, value) for name, value in sample.labels.items() if name in known))
                found[sample.name.removeprefix("ray_")][labels] += sample.value
    return found


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job whose actor and driver export: its output, the figures that it stored, and what was scraped."""
    folder = tmp_path_factory.mktemp("scrape")
    data = folder_of_images(folder / "in")
    with scraped_session() as address:
        run_job(
            config_of(data, folder / "out"),
            Execution(workers=1, log_json=str(folder / "units.jsonl")),
            Console(quiet=True),
        )
        store = LocalStore(folder / "out")
        [key] = [info.key for info in store.list("_job/runs/") if info.key.endswith("metrics.json")]
        figures = json.loads(store.read(key))
        yield store, figures, _seen_whole(address, figures)


def _seen_whole(address: str, figures: dict) -> dict:
    """What scrapes saw last, once they say what the run's own figures say, or if they never do."""
    deadline = time.monotonic() + SCRAPE_SECONDS
    found: dict = {}
    while True:
        for name, values in scraped(address).items():  # a gauge is shown once each time that it is set
            found.setdefault(name, {}).update(values)
        if _differences(found, figures) == [] or time.monotonic() > deadline:
            return found
        time.sleep(REPORT_MILLISECONDS / 1_000)


def _differences(found: dict, figures: dict) -> list[str]:
    """The counters and gauges of which both do not say the same, and the observations of histograms."""
    told = []
    for name, own in figures.items():
        if isinstance(own, dict) and own.keys() == {"count", "sum"}:
            told += [] if sum(found.get(f"{name}_count", {}).values()) == own["count"] else [name]
            continue
        by_label = own if isinstance(own, dict) else {"": own}
        for labels, value in by_label.items():
            key = tuple(sorted(tuple(one.split("=")) for one in labels.split(","))) if labels else ()
            seen = found.get(name, {}).get(key, 0.0)
            told += [] if seen == pytest.approx(value, rel=1e-6, abs=1e-9) else [f"{name} {labels}: {seen}, {value}"]
    return told


def test_ray_shows_what_the_run_stored(job):
    _, figures, found = job
    assert _differences(found, figures) == []
    assert figures.keys() == METRICS.keys()


def test_the_records_that_are_shown_are_the_rows(job):
    store, _, found = job
    statuses = [row["status"] for row in rows_in(store)]
    assert dict(found["blocksight_records_total"]) == {
        (("status", "ok"),): statuses.count("ok"),
        (("status", "rejected"),): statuses.count("rejected"),
    }
    assert found["blocksight_units"][("state", "open"),] == 0


def test_the_log_of_units_has_the_same_work_in_it(job):
    store, figures, _ = job
    lines = [json.loads(line) for line in (Path(store.uri).parent / "units.jsonl").read_text().splitlines()]
    assert len(lines) == figures["blocksight_unit_seconds"]["count"] > 0
    assert sum(line["seconds"] for line in lines) == pytest.approx(figures["blocksight_unit_seconds"]["sum"], abs=0.01)


@pytest.mark.parametrize("file", ["grafana/blocksight.json", "prometheus/alerts.yaml"])
def test_every_query_of_our_files_names_what_a_real_run_showed(job, file):
    *_, found = job
    asked = {one["name"] for query in queries_of(text_of(file)) for one in SELECTOR.finditer(query)}
    assert asked
    assert asked <= found.keys()


def test_every_label_of_ours_has_a_value_of_the_catalogue(job):
    *_, found = job
    for name, metric in METRICS.items():
        for labels in found.get(name, {}):
            assert all(value in metric.labels[label] for label, value in labels)
    assert "png" not in json.dumps([[name, *map(str, values)] for name, values in found.items()])
