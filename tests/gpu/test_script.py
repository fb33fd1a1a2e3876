"""`python -m tests.gpu` without a GPU: a refusal, the whole script on small models, and what a cut leaves."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.gpu import __main__ as script
from tests.gpu import stages
from tests.gpu.figures import Figures, Line, read_lines, summary
from tests.gpu.pretended import pretended_gpu
from tests.gpu.stages import STAGES, TROUBLES, Stage

ROOT = Path(__file__).resolve().parents[2]
ABSENT = (
    "ray",
    "pydantic",
    "pyarrow",
    "s3fs",
    "fsspec",
    "PIL",
    "typer",
    "rich",
    "sklearn",
    "duckdb",
    "jinja2",
    "openvino",
)
"""What a machine with a GPU at hand may lack."""


def test_without_a_gpu_it_refuses_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        script.main(["--output", str(tmp_path / "figures.jsonl")])
    assert ended.value.code == 2
    assert "no GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_smoke_run_measures_something_in_every_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "figures.jsonl"
    script.main(["--smoke", "--output", str(path)])
    lines = read_lines(path)
    assert [line for line in lines if {"error", "cut", "device_lost"} & line.keys()] == []
    ended = [line["stage"] for line in lines if "done_after" in line]
    assert ended == [stage.name for stage in STAGES]
    assert all(sum(line["stage"] == name for line in lines) > 1 for name in ended)
    assert {line["what"] for line in lines if line["stage"] == "errors" and "what" in line} == set(TROUBLES)
    assert "extrapolated from one GPU" in capsys.readouterr().out


@pytest.mark.parametrize("measure", [stages.facts, stages.correctness, stages.batches, stages.others])
def test_a_stage_measures_a_gpu(tmp_path: Path, measure: Callable[[Figures], None]):
    run = Figures(tmp_path / "figures.jsonl", "cuda", is_smoke=True, stage="here")
    with pretended_gpu() as counts:
        measure(run)
        assert counts.launches.total() > 0
    assert [line for line in read_lines(run.path) if "error" in line] == []


def run_with(chosen: list[Stage], path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Line], list[list[str]]]:
    """The lines of a smoke run of these stages, and the command lines by which it began again."""
    begun: list[list[str]] = []
    monkeypatch.setattr(script, "STAGES", chosen)
    monkeypatch.setattr("os.execv", lambda _, command: begun.append(command))
    script.main(["--smoke", "--output", str(path)])
    return read_lines(path), begun


def test_a_lost_device_loses_one_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def lose(_: Figures) -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    path = tmp_path / "figures.jsonl"
    lines, begun = run_with([Stage("first", 9, lose), Stage("second", 9, lambda _: None)], path, monkeypatch)
    assert "device-side assert" in lines[0]["error"]
    assert "new process" in lines[1]["device_lost"]
    [command] = begun
    assert command[command.index("--only") + 1] == "second"
    assert {"--append", "--smoke", str(path)} <= set(command)


def test_a_stage_ends_with_its_time_and_keeps_its_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def lasting(run: Figures) -> None:
        run.say(rate=1)
        try:
            time.sleep(100)
        except Exception as error:
            raise AssertionError from error

    lines, begun = run_with([Stage("lasting", 0.1, lasting)], tmp_path / "figures.jsonl", monkeypatch)
    assert lines[0]["rate"] == 1
    assert "after 0 s" in lines[1]["cut"]
    assert begun == []


def test_a_stage_that_hangs_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    begun: list[bool] = []
    monkeypatch.setattr(script, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr("signal.setitimer", lambda *_: None)  # as in a call that no signal ends
    run = Figures(tmp_path / "figures.jsonl", "cpu", is_smoke=True, ends=time.monotonic())
    with script._deadline(run, lambda: begun.append(True)):
        while not begun:
            time.sleep(0.01)
    assert "hangs" in read_lines(run.path)[0]["error"]


def test_an_unknown_stage_is_named(tmp_path: Path):
    with pytest.raises(SystemExit, match="no stage 'lader': the stages are facts"):
        script.main(["--smoke", "--only", "lader", "--output", str(tmp_path / "figures.jsonl")])


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path):
    path = tmp_path / "figures.jsonl"
    path.write_text('{"stage": "facts", "at": 0.1, "torch": "2.11"}\n{"stage": "ladder", "a')
    assert summary(read_lines(path)) == "== facts\n  torch 2.11\n"


def test_hours_by_hand():
    line = {"stage": "passes", "model": "m", "fidelity": "full", "images_per_second": 500.0}
    assert "m, full, ImageNet-val: 0.0278 h on 1, 0.00347 h on 8, 0.000434 h on 64" in summary([line])


def test_every_trouble_is_provoked_by_valid_python():
    for provoked in TROUBLES.values():
        body = "\n".join(f"    {line}" for line in provoked.code.splitlines())
        compile(stages.PRELUDE + body + stages.EPILOGUE, "provoked", "exec")


def test_engine_and_script_need_neither_ray_nor_pydantic_nor_pyarrow():
    """Each module of the engine, and the script, in a process in which importing the others fails."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r}))\n"
        "import pkgutil, importlib, blocksight.engine, tests.gpu.__main__\n"
        "for found in pkgutil.walk_packages(blocksight.engine.__path__, 'blocksight.engine.'):\n"
        "    importlib.import_module(found.name)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
