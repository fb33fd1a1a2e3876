"""An export is made of parts: the same bytes by any number of processes, gone on with after a break, refusals."""

from pathlib import Path

import pytest
from rich.console import Console

from blocksight.cluster.errors import ClusterError
from blocksight.jobs.export import parts, run
from blocksight.jobs.export.arrays import Arrays
from blocksight.jobs.export.fiftyone import FiftyOne
from blocksight.jobs.export.overlays import Pictures
from blocksight.jobs.export.parts import Account, Exporting
from blocksight.jobs.export.run import ExportRequest, run_export
from blocksight.jobs.export.selection import Selection
from blocksight.jobs.export.spotlight import Spotlight
from blocksight.jobs.plan.config import ConfigError, Execution
from blocksight.jobs.run.unit_pass import ONE_PROCESS
from tests.jobs.outputs import output_of_small_units

KINDS = {"pictures": Pictures, "numpy": Arrays, "fiftyone": FiftyOne, "spotlight": Spotlight}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven records with two targets each, three rejected, in several fragments."""
    with pytest.MonkeyPatch.context() as patch:
        return output_of_small_units(tmp_path_factory.mktemp("parts"), patch)


def exported(output: Path, form: str, folder: Path, execution: Execution = ONE_PROCESS, **asked) -> list[str]:
    return list(run_export(ExportRequest(str(output), form, str(folder), **asked), Console(quiet=True), execution))


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def num_units(output: Path) -> int:
    return len(list((output / "data").rglob("*.parquet")))


EACH = ["numpy", "fiftyone", *(pytest.param(form, marks=pytest.mark.sweep) for form in ("pictures", "spotlight"))]
"""The slower ones, of the same kinds, in the lane of further cases."""


@pytest.mark.parametrize("form", EACH)
def test_processes_write_the_same_bytes(output, tmp_path, monkeypatch, form):
    monkeypatch.setattr("blocksight.jobs.run.unit_pass.LEAST_RECORDS", 0)
    assert num_units(output) > 2
    exported(output, form, tmp_path / "one")
    exported(output, form, tmp_path / "two", Execution(workers=2))
    assert files_in(tmp_path / "two") == files_in(tmp_path / "one")
    assert not [path for path in tmp_path.rglob("*") if path.name in (parts.PARTS, parts.REQUEST)]


@pytest.mark.parametrize("form", EACH)
@pytest.mark.parametrize("step", ["write_part", "join"])
def test_a_call_that_broke_off_is_gone_on_with(output, tmp_path, monkeypatch, form, step):
    whole = exported(output, form, tmp_path / "whole")
    kind = KINDS[form]
    original, calls = getattr(kind, step), []

    def breaks(own, *given):
        calls.append(given)
        if step == "join":
            original(own, *given)
        if step == "join" or len(calls) == 3:
            raise KeyboardInterrupt
        return original(own, *given)

    with monkeypatch.context() as broken:
        broken.setattr(kind, step, breaks)
        with pytest.raises(KeyboardInterrupt):
            exported(output, form, tmp_path / "x")
    kept = 2 if step == "write_part" else num_units(output)
    made, write_part = [], kind.write_part
    monkeypatch.setattr(kind, "write_part", lambda own, *given: (made.append(given), write_part(own, *given))[1])
    lines = exported(output, form, tmp_path / "x")
    assert len(made) == num_units(output) - kept
    assert [line.replace(str(tmp_path / "x"), "F") for line in lines] == [
        line.replace(str(tmp_path / "whole"), "F") for line in whole
    ]
    assert files_in(tmp_path / "x") == files_in(tmp_path / "whole")


def test_what_another_request_has_begun_is_refused(output, tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(run, "export_parts", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            exported(output, "numpy", tmp_path / "x")
    with pytest.raises(ConfigError, match="broke off, of another request or of other maps; remove the folder"):
        exported(output, "numpy", tmp_path / "x", limit=3)
    exported(output, "numpy", tmp_path / "x")
    with pytest.raises(ConfigError, match="holds files already"):
        exported(output, "numpy", tmp_path / "x")


def test_a_node_that_does_not_see_the_folder_says_what_to_do(output, tmp_path):
    work = Exporting(str(output), None, {}, None, Selection(), Spotlight(), str(tmp_path / "elsewhere"))
    with pytest.raises(ClusterError, match="file system that all nodes share; or leave --address out"):
        work(0)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("form", "execution", "more", "told"),
    [
        ("virelay", Execution(workers=2), {}, "--workers 2 is of no use: one process writes virelay"),
        ("quantus", Execution(address="auto"), {}, "--address auto is of no use: one process writes quantus"),
        ("pictures", Execution(workers=3), {"gif": "blocks"}, "--workers 3 is of no use: one process writes --gif"),
    ],
)
def test_what_one_process_writes_takes_no_others(output, tmp_path, form, execution, more, told):
    with pytest.raises(ConfigError, match=told):
        exported(output, form, tmp_path / "x", execution, **more)


def test_a_limit_ends_within_a_part_and_counts_what_is_left_out_before_it():
    account = Account(3)
    facts = {"records": [(2, 0, 0), (4, 1, 0)], "num_rejected": 2, "num_gone": 1}
    first, second = account.add(Path("a"), facts), account.add(Path("b"), facts)
    assert (first.num_records, first.num_maps, first.ends) == (2, 4, False)
    assert (second.num_records, second.num_maps, second.ends) == (1, 2, True)
    assert str(account) == "3 records exported; left out before the limit: 2 rejected, 1 whose image is gone"
    assert account.num_maps == 6


def test_parts_without_links_are_copied(output, tmp_path, monkeypatch):
    exported(output, "pictures", tmp_path / "linked")
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    exported(output, "pictures", tmp_path / "copied")
    assert files_in(tmp_path / "copied") == files_in(tmp_path / "linked")
