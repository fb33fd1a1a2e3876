"""Maps are measured once, in any process: the same audit, gone on with after a break, and damage told."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from blocksight.jobs.audit import measuring, stream
from blocksight.jobs.audit.measuring import MEASURED_FOLDER, Measuring
from blocksight.jobs.audit.run import AuditRequest, run_audit
from blocksight.jobs.plan.config import Execution
from blocksight.jobs.plan.records import UnreconciledError
from blocksight.jobs.run.unit_pass import ONE_PROCESS
from blocksight.storage.stores.store import MissingError
from tests.jobs.jobs_of import run_here
from tests.jobs.tiny import folder_of_images


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Several units with rejected records and two targets each."""
    monkeypatch.setattr("blocksight.cluster.sizing.LEAST_UNIT_SECONDS", 0.001)
    monkeypatch.setattr("blocksight.cluster.sizing.MOST_UNIT_SECONDS", 0.002)
    run_here(folder_of_images(tmp_path / "in", 12), tmp_path / "out", explainer="gradcam", target="top-2")
    return tmp_path / "out"


def audited(output: Path, execution: Execution = ONE_PROCESS, **asked) -> dict[str, bytes]:
    """Audits without a trial; the files of the audit."""
    run_audit(AuditRequest(str(output), tries=False, **asked), Console(quiet=True), execution)
    return {
        str(file.relative_to(output)): file.read_bytes() for file in (output / "audit").rglob("*") if file.is_file()
    }


def counted_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The units that are measured from now on."""
    calls, measure = [], Measuring.__call__
    monkeypatch.setattr(Measuring, "__call__", lambda own, unit: (calls.append(unit), measure(own, unit)))
    return calls


def measured_files(output: Path) -> list[Path]:
    return sorted((output / MEASURED_FOLDER).rglob("*.parquet"))


def break_while_it_sums_up(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(stream, "_Summing", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            audited(output)


def test_processes_write_the_same_bytes_and_leave_no_measured_rows(output, monkeypatch):
    one = audited(output)
    monkeypatch.setattr("blocksight.jobs.run.unit_pass.LEAST_RECORDS", 0)
    assert audited(output, Execution(workers=2)) == one
    assert len([name for name in one if "/rows/" in name]) > 2
    assert not measured_files(output)


def test_a_call_that_broke_off_is_gone_on_with(output, monkeypatch):
    whole, original, made = audited(output), measuring.measured, []

    def breaks(*given):
        made.append(given)
        if len(made) == 3:
            raise KeyboardInterrupt
        return original(*given)

    with monkeypatch.context() as broken:
        broken.setattr(measuring, "measured", breaks)
        with pytest.raises(KeyboardInterrupt):
            audited(output)
    kept, num_units = len(measured_files(output)), len(list((output / "data").rglob("*.parquet")))
    assert 0 < kept < num_units
    calls = counted_calls(monkeypatch)
    assert audited(output) == whole
    assert len(calls) == len(set(calls)) == num_units - kept


def test_what_was_measured_with_other_ground_truth_is_not_taken(output, tmp_path, monkeypatch):
    break_while_it_sums_up(output, monkeypatch)
    truth = tmp_path / "boxes.json"
    coco = {
        "images": [{"id": 1, "file_name": "000.png"}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5], "iscrowd": 0}],
    }
    truth.write_text(json.dumps(coco))
    calls = counted_calls(monkeypatch)
    audited(output, truth=str(truth))
    assert len(calls) == len(list((output / "data").rglob("*.parquet")))


def test_what_was_measured_is_taken_for_another_seed(output, monkeypatch):
    break_while_it_sums_up(output, monkeypatch)
    calls = counted_calls(monkeypatch)
    audited(output, seed=3)
    assert calls == []


def test_damaged_and_lost_rows_are_told_with_the_way_out(output, monkeypatch):
    whole = audited(output)
    break_while_it_sums_up(output, monkeypatch)
    file = measured_files(output)[1]
    rows = pq.read_table(file)
    place = rows.schema.get_field_index("pooled")
    pq.write_table(rows.set_column(place, rows.schema.field(place), pa.nulls(len(rows), pa.binary(256))), file)
    with pytest.raises(
        UnreconciledError, match="delete it, and the same `audit` measures it again: a map lacks pooled"
    ):
        audited(output)
    file.unlink()
    assert audited(output) == whole
    over_units = stream.over_units
    monkeypatch.setattr(stream, "over_units", lambda *given: (over_units(*given), measured_files(output)[0].unlink()))
    with pytest.raises(MissingError, match="is gone; the same `audit` measures it again"):
        audited(output)
