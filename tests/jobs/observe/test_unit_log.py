"""The log of units: a line of JSON per unit that says what the output says, and that no key can forge."""

import json
import re

import pytest
from rich.console import Console

from blocksight.jobs.observe.local_files import check_local_files
from blocksight.jobs.observe.unit_log import unit_log
from blocksight.jobs.plan.config import ConfigError, Execution
from blocksight.jobs.plan.records import DeadLetter, UnitFailure, UnitReturned, UnitSkipped
from blocksight.jobs.run.job import run_job
from blocksight.storage.stores.local import LocalStore
from tests.jobs.jobs_of import blocksight, config_of, receipts_in
from tests.jobs.tiny import MODEL, folder_of_images, folder_of_tars

HOSTILE = 'a\n{"outcome": "committed"}\x1b[2J\x7f\x85\u202e.png'


def lines_in(place):
    return [json.loads(line) for line in place.read_text(encoding="ascii").splitlines()]


def test_a_line_per_unit_says_what_its_receipt_says(tmp_path):
    data, place = folder_of_tars(tmp_path / "in"), tmp_path / "units.jsonl"
    execution = Execution(runner="local", log_json=str(place))
    run_job(config_of(data, tmp_path / "out", explainer="gradcam"), execution, Console(quiet=True))
    store = LocalStore(tmp_path / "out")
    receipts = {receipt["unit_id"]: receipt for receipt in receipts_in(store)}
    lines = [line for line in lines_in(place) if line["outcome"] == "committed"]
    [run] = {info.key.split("/")[2] for info in store.list("_job/runs/")}
    assert {line["unit"] for line in lines} == receipts.keys()
    assert len(lines) == len(receipts) > 1
    for line in lines:
        receipt = receipts[line["unit"]]
        names = {"records": "num_records", "rejected": "num_rejected", "rejects": "rejects", "attempt": "attempt"}
        assert {name: line[name] for name in names} == {name: receipt[own] for name, own in names.items()}
        assert receipt["worker"].startswith(f"{line['node']}:")
        assert (line["run"], line["part"], line["ordinal"]) == (run, None, receipt["ordinal"])
        assert line["seconds"] > 0


@pytest.mark.parametrize(("kind", "outcome"), [(UnitFailure, "failed"), (DeadLetter, "dead")])
def test_no_key_can_forge_a_line_or_steer_a_terminal(tmp_path, kind, outcome):
    ended = UnitFailure("u", 3, HOSTILE, "read", HOSTILE)
    if kind is DeadLetter:
        ended = DeadLetter("u", 3, HOSTILE, "failed", "read", HOSTILE, 1)
    with unit_log(str(tmp_path / "log"), "run", "1/4", print) as log:
        log(ended, 0.25)
    [line] = lines_in(tmp_path / "log")
    assert (line["outcome"], line["part"], line["seconds"], line["stage"]) == (outcome, "1/4", 0.25, "read")
    body = (tmp_path / "log").read_text()
    assert all(char.isprintable() for char in body.removesuffix("\n"))
    assert all(char.isprintable() for char in line["inputs"] + line["error"])


def test_units_that_did_not_end_have_no_line_and_a_second_run_adds_to_the_file(tmp_path):
    place = tmp_path / "log"
    for run in ("first", "second"):
        with unit_log(str(place), run, None, print) as log:
            log(UnitSkipped("u"), 0.0)
            log(UnitReturned("u", "w", "its GPU is lost", is_unfit=True), 0.0)
            log(UnitFailure(run, 0, "x", "read", "gone"), 0.0)
    assert [(line["run"], line["unit"]) for line in lines_in(place)] == [("first", "first"), ("second", "second")]


def test_a_disk_that_is_full_ends_no_job_and_is_told_once():
    told: list[str] = []
    with unit_log("/dev/full", "run", None, told.append) as log:
        for name in ("u", "v"):
            log(UnitFailure(name, 0, "x", "read", "gone"), 0.0)
    assert told == ["--log-json /dev/full: No space left on device; lines of units are lost, and the job goes on"]


@pytest.mark.parametrize(
    ("metrics_file", "log_json", "told"),
    [
        ("none/x.prom", None, "--metrics-file none/x.prom: No such file or directory; name a file in a folder that"),
        (None, "none/x", "--log-json none/x: No such file or directory; name a file in a folder that exists"),
        (".", None, "--metrics-file .: Is a directory"),
        (
            "s3://bucket/x.prom",
            None,
            "--metrics-file s3://bucket/x.prom: it is written on the driver's machine",
        ),
        ("x", "./x", "--metrics-file and --log-json are both x, and each would overwrite the other"),
    ],
)
def test_files_are_looked_at_before_any_work(tmp_path, monkeypatch, metrics_file, log_json, told):
    monkeypatch.chdir(tmp_path)
    execution = Execution(runner="local", metrics_file=metrics_file, log_json=log_json)
    config = config_of(tmp_path / "no data", tmp_path / "out", model="no.such:model")
    with pytest.raises(ConfigError, match=re.escape(told)):
        run_job(config, execution, Console(quiet=True))
    assert list(tmp_path.iterdir()) == []


def test_files_that_can_be_written_are_right(tmp_path):
    check_local_files(None, None)
    check_local_files(str(tmp_path / "x.prom"), "-")
    check_local_files(str(tmp_path / "x.prom"), str(tmp_path / "x.log"))


def test_a_file_that_cannot_be_written_is_said_at_once(tmp_path):
    with (
        pytest.raises(ConfigError, match=r"--log-json .*No such file"),
        unit_log(str(tmp_path / "a/b"), "run", None, print),
    ):
        pass


def test_standard_error_has_the_lines_and_standard_output_the_figures(tmp_path):
    data = folder_of_images(tmp_path / "in", 2, bad=False)
    job = ("--data", data, "--output", tmp_path / "out", "--model", MODEL, "--explainer", "gradcam")
    done = blocksight("explain", *job, "--runner", "local", "--json", "--log-json", "-")
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"time"')]
    assert [line["records"] for line in lines] == [2]
    assert json.loads(done.stdout)["records"] == 2
