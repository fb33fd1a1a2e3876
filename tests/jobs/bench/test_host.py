"""The host's share: both ways of running a job are measured, and what cannot be measured is refused. Ray is played."""

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console

from blocksight.cluster.sizing import Sizing
from blocksight.jobs.bench import host
from blocksight.jobs.bench.cpu_meter import CpuMeter
from blocksight.jobs.bench.host import HostShare, make_shards
from blocksight.jobs.cli.bench_tables import host_table
from blocksight.jobs.plan.records import Receipt, UnfinishedError, UnitSkipped
from blocksight.jobs.run import local, pipeline
from blocksight.storage.images.decode import decode
from blocksight.storage.inputs.tars import read_tar
from blocksight.storage.stores.local import LocalStore
from tests.jobs.jobs_of import blocksight, called

QUIET = Console(quiet=True)
BUSY = "import time\nwhile time.process_time() < 0.5: pass\nprint('done', flush=True)\ninput()"
RECEIPT = Receipt("0" * 20, 0, "data/0.parquet", 0, "", 0, 0, 0, 0, {}, 0, {})
FOUND = HostShare(2000, 0, 8, 2, {"read": 1.0, "explain": 2.0, "commit": 1.0}, in_process=4.0, through_ray=5.0)


def test_the_meter_counts_a_process_below_also_after_its_end():
    with (
        CpuMeter() as meter,
        subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        before = meter.seconds()
        child.stdout.readline()
        while_it_lives = meter.seconds()
        child.communicate(b"\n")
        assert while_it_lives - before > 0.25
        assert meter.seconds() >= while_it_lives


def test_made_shards_hold_the_same_readable_pictures_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "SHARD_IMAGES", 3)
    folders = [make_shards(tmp_path / name, 7) for name in ("one", "other")]
    first, second = ({file.name: file.read_bytes() for file in folder.rglob("*.parquet")} for folder in folders)
    assert first == second
    store = LocalStore(folders[0])
    records = [raw for info in store.list("") for raw in read_tar(store, info, 0, info.size)]
    assert len({raw.key for raw in records}) == 7
    assert all(decode(raw.data or b"").pixels.shape == (96, 96, 3) for raw in records)


def test_the_ratio_is_of_the_rates_and_the_table_shows_it():
    assert FOUND.ratio == pytest.approx(0.8)
    rates = FOUND.figures()["records_per_second_of_a_core"]
    assert rates == {"in process": 250.0, "through Ray": 200.0}
    shown = Console(width=200, record=True, file=sys.stdout)
    shown.print(host_table(FOUND))
    text = shown.export_text()
    for part in ("2,000 records in 8 units", "4.00 ms, 250 records a second of a core", "5.00 ms", "0.80"):
        assert part in text


def test_too_few_units_and_ignored_options_are_refused():
    code, text = called("bench", "--host", "--limit", 8)
    assert code == 2
    assert "8 records make 1 unit, and 17 are needed" in text
    code, text = called("bench", "--host", "--model", "resnet50", "--price", 2)
    assert code == 2
    assert "leave --model, --price out" in text


@pytest.mark.parametrize(
    "option",
    [
        *(("--device", "gpu"), ("--precision", "float16"), ("--batch-size", 4), ("--preset", "paper")),
        *(("--blocks", "a"), ("--truth", "boxes.json"), ("--class-map", "map.json"), ("-p", "mu=1")),
    ],
    ids=str,
)
def test_an_option_of_the_model_is_no_option_of_the_hosts_share(option):
    code, text = called("bench", "--host", *option)
    assert code == 2
    assert f"leave {option[0]} out" in text


def test_a_unit_without_a_receipt_ends_the_measurement():
    with pytest.raises(UnfinishedError, match="nothing can be measured"):
        list(host._committed(iter([UnitSkipped("0" * 20)])))


@pytest.fixture
def without_ray(monkeypatch):
    """The session and its pipeline are this process: the same units, the same outcomes."""

    def run_units(units, context, state, sizing, stop, _rate, _tell):
        return local.run_units(units, context, state, stop)

    sizing = Sizing(1, 0.0, 1.0, 0.5, threads_per_actor=1)
    monkeypatch.setattr(host, "session_of", lambda _: nullcontext(sizing))
    monkeypatch.setattr(pipeline, "run_units", run_units)


def test_both_ways_are_measured_in_one_run(monkeypatch, without_ray):
    monkeypatch.setattr(host, "SHARD_IMAGES", 8)
    monkeypatch.setattr(host, "UNITS_ASIDE", 1)
    ran = blocksight("bench", "--host", "--limit", 32, "--workers", 1, "--json")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert (found["records"], found["rejected"], found["units"], found["actors"]) == (32, 0, 4, 1)
    own = found["milliseconds"]
    assert own["in process"] == pytest.approx(own["read"] + own["explain"] + own["commit"])
    assert min(own["read"], own["explain"], own["commit"], own["through Ray"]) > 0
    rates = found["records_per_second_of_a_core"]
    assert found["ratio"] == pytest.approx(rates["through Ray"] / rates["in process"])


class Meter:
    """Counts 50 s for the start of a session, 30 for its end, and a second for each unit of 8 records."""

    def __init__(self):
        self.now = 0.0

    def seconds(self):
        return self.now


def test_start_and_end_of_a_session_are_left_out(monkeypatch):
    meter, units = Meter(), 7

    def run_units(*_):
        meter.now += 50
        for _ in range(units):
            meter.now += 1
            yield replace(RECEIPT, num_records=8)
            meter.now += 30 * (meter.now == 50 + units)

    monkeypatch.setattr(pipeline, "run_units", run_units)
    monkeypatch.setattr(host, "UNITS_ASIDE", 2)
    monkeypatch.setattr(host, "open_output", lambda _: None)
    job = SimpleNamespace(
        context=lambda *_: SimpleNamespace(config=None, run_id=""), plan=SimpleNamespace(units=range(units))
    )
    seconds, done = host._run_through_ray(job, None, Sizing(1, 0.0, 1.0, 0.5, threads_per_actor=1), meter, QUIET)
    assert (seconds, len(done)) == (1 / 8, units)
