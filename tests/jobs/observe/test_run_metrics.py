"""What whole jobs without Ray say of themselves: the metrics file, and the figures beside the run's record."""

import json
import re
from collections import Counter

from rich.console import Console

from blocksight.jobs.observe.catalogue import METRICS
from blocksight.jobs.observe.registry import OF_PROCESS, OF_WORKERS
from blocksight.jobs.observe.run_metrics import RunMetrics
from blocksight.jobs.plan.config import Execution
from blocksight.jobs.plan.records import Receipt
from blocksight.jobs.run.job import run_job
from blocksight.storage.stores.local import LocalStore
from tests.jobs.jobs_of import config_of, receipts_in, rows_in
from tests.jobs.tiny import folder_of_images

LINE = re.compile(r"^(?P<name>\w+)(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)$", re.MULTILINE)


def run_with_file(data, output, place):
    execution = Execution(runner="local", metrics_file=str(place))
    return run_job(config_of(data, output), execution, Console(quiet=True))


def values_in(text):
    return {(found["name"], found["labels"] or ""): float(found["value"]) for found in LINE.finditer(text)}


def test_the_file_says_what_the_output_holds(tmp_path):
    data = folder_of_images(tmp_path / "in")
    (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n, cut off")
    run_with_file(data, tmp_path / "out", tmp_path / "own.prom")
    store = LocalStore(tmp_path / "out")
    rows, receipts, found = rows_in(store), receipts_in(store), values_in((tmp_path / "own.prom").read_text())
    num_ok = sum(row["status"] == "ok" for row in rows)
    codes = Counter(row["reject_code"] for row in rows if row["status"] == "rejected")
    assert len(codes) > 1
    assert found["blocksight_records_total", 'status="ok"'] == num_ok > 0
    assert found["blocksight_records_total", 'status="rejected"'] == codes.total()
    assert {code: found["blocksight_rejects_total", f'code="{code}"'] for code in codes} == codes
    assert found["blocksight_forwards_total", ""] == sum(receipt["num_forwards"] for receipt in receipts) > 0
    assert found["blocksight_units", 'state="committed"'] == len(receipts)
    assert found["blocksight_units", 'state="open"'] == 0
    assert found["blocksight_unit_seconds_count", ""] == len(receipts)
    stages = {
        stage: found["blocksight_stage_seconds_total", f'stage="{stage}"']
        for stage in METRICS["blocksight_stage_seconds_total"].labels["stage"]
    }
    assert all(seconds > 0 for seconds in stages.values())
    assert abs(sum(stages.values()) - found["blocksight_unit_seconds_sum", ""]) < 1e-6
    assert found["blocksight_store_requests_total", 'verb="create",outcome="ok"'] >= len(receipts)
    assert 0 < found["blocksight_gpu_busy_ratio", ""] <= 1
    assert {
        name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name, _ in found
    } == METRICS.keys()
    [key] = [info.key for info in store.list("_job/runs/") if info.key.endswith("metrics.json")]
    stored = json.loads(store.read(key))
    assert stored["blocksight_records_total"] == {"status=ok": num_ok, "status=rejected": codes.total()}
    assert stored["blocksight_unit_seconds"]["count"] == len(receipts)


def test_a_run_counts_its_own_units_alone(tmp_path):
    data = folder_of_images(tmp_path / "in")
    for name in ("first", "second"):
        for left in (OF_PROCESS, OF_WORKERS):  # by a run that was cut off
            left.add("blocksight_store_requests_total", "read", "ok", value=1_000)
        run_with_file(data, tmp_path / name, tmp_path / f"{name}.prom")
    first, second = (values_in((tmp_path / f"{name}.prom").read_text()) for name in ("first", "second"))
    same = [key for key in first if "seconds" not in key[0] and "ratio" not in key[0]]
    assert {key: first[key] for key in same} == {key: second[key] for key in same}
    assert first["blocksight_store_requests_total", 'verb="read",outcome="ok"'] < 1_000


def test_a_code_of_a_stranger_ends_no_job_and_becomes_no_label(tmp_path):
    """A fragment that is there already is adopted, with the codes that its metadata hold."""
    run_with_file(folder_of_images(tmp_path / "in"), tmp_path / "out", tmp_path / "own.prom")
    receipt = receipts_in(LocalStore(tmp_path / "out"))[0]
    metrics = RunMetrics(1, 1)
    metrics.add(Receipt(**{**receipt, "rejects": {"tabby.jpg": 2, "truncated": 1, "later": 3}}))
    assert metrics.registry.figures()["blocksight_rejects_total"] == {"code=other": 5, "code=truncated": 1}


def test_a_failed_stage_counts_and_the_unit_stays_open(tmp_path, monkeypatch):
    def failing(*_, **__):
        raise RuntimeError("no map today")

    monkeypatch.setattr("blocksight.jobs.explain.step.ExplainStep.__call__", failing)
    outcome = run_with_file(folder_of_images(tmp_path / "in"), tmp_path / "out", tmp_path / "own.prom")
    found = values_in((tmp_path / "own.prom").read_text())
    given_up = len(outcome.job_state.dead) + len(outcome.ran.failures)
    assert given_up > 0
    assert found["blocksight_units", 'state="dead"'] + found["blocksight_units", 'state="failed"'] == given_up
    assert found["blocksight_records_total", 'status="ok"'] == 0
    assert found["blocksight_stage_seconds_total", 'stage="explain"'] > 0
