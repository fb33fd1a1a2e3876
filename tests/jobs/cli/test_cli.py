"""The command line: light commands import no heavy library, and every error is one clear sentence."""

import io
import json
import os
import shlex
import subprocess
import sys
from dataclasses import fields
from functools import cache
from importlib.metadata import version

import pytest
from rich.console import Console

from blocksight.engine.catalog.entries import EXPLAINERS
from blocksight.jobs.cli.catalog_tables import catalog_table
from blocksight.jobs.cli.main import main
from blocksight.jobs.plan.config import load_config, parse_parameters
from blocksight.storage.outputs.file_names import file_name
from tests.jobs.jobs_of import ROOT, blocksight, command, run_here
from tests.jobs.tiny import MODEL, folder_of_images


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A data set and its finished output."""
    base = tmp_path_factory.mktemp("finished")
    run_here(folder_of_images(base / "in"), base / "out")
    return base


def test_light_commands_import_neither_torch_nor_ray(finished):
    probe = (
        "import sys, runpy\n"
        "try:\n    runpy.run_module('blocksight', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n    code = end.code\n"
        "heavy = [name for name in ('torch', 'ray', 's3fs') if name in sys.modules]\n"
        "print('HEAVY', heavy, code)\n"
    )
    for arguments in (
        ["--help"],
        ["plan", "--data", str(finished / "in" / "ant"), "--output", str(finished / "new")],  # without labels
        ["status", str(finished / "out")],
        ["verify", str(finished / "out")],
    ):
        done = subprocess.run(
            [sys.executable, "-c", probe, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert "HEAVY [] 0" in done.stdout or "HEAVY [] None" in done.stdout, done.stdout


def test_tasks_that_read_and_commit_load_no_torch():
    """Each of Ray's processes imports the pipeline; only the actors need torch."""
    program = "import sys, blocksight.jobs.run.pipeline; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_plan_computes_and_writes_nothing(finished, tmp_path):
    done = blocksight("plan", "--data", finished / "in", "--output", tmp_path / "out", "--limit", "4")
    assert done.returncode == 0
    for words in ("records", "units", "forwards", "about", "nothing was computed or written"):
        assert words in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_plan_says_what_is_not_measured_until_it_is_probed(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("blocksight.jobs.bench.quick.PROBE_SECONDS", 0.0)
    asked = ("plan", "--data", finished / "in", "--output", tmp_path / "out", "--model", MODEL)
    assert "not measured for this model here" in blocksight(*asked).stdout
    probed = blocksight(*asked, "--probe").stdout
    assert "not measured" not in probed
    assert "measured here on" in probed
    assert blocksight(*asked).stdout == probed
    assert "ten seconds" not in probed
    assert not (tmp_path / "out").exists()


def test_the_versions_are_those_of_the_packages():
    done = blocksight("--version")
    assert done.returncode == 0
    assert done.stdout.startswith(f"blocksight {version('blocksight')} (Python ")
    assert f"torch {version('torch')}" in done.stdout


def test_a_shell_can_complete_commands_and_options():
    assert "--show-completion" in blocksight("--help").stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["explain", "--data", "nowhere", "--output", "out"], "holds no images"),
        (["explain", "--data", "{in}", "--output", "{new}", "--model", "resnet"], "unknown model 'resnet'; known:"),
        (["explain", "--data", "{in}", "--output", "{new}", "--model", MODEL, "--blocks", "frist"], "nearest: first"),
        (["explain", "--data", "{in}", "--output", "{out}", "--model", MODEL, "-p", "mu=0.5"], '"mu": 0.0'),
        (["plan", "--data", "{in}", "--output", "{new}", "-p", "mo=1"], "did you mean 'mu'"),
        (["plan", "--data", "{in}", "--output", "{new}", "--target", "bset"], "is no class of the model; nearest"),
        (["plan", "--data", "{in}"], "--output must be given"),
        (["status", "{in}"], "there is no blocksight output"),
        (["show", "{out}", "unknown-key"], "no record 'unknown-key'"),
        (["show", "{out}", "ant/00.png"], "'ant/000.png', "),
        (["plan", "--data", "gs://b/x", "--output", "{new}"], "gs:// is not known"),
        (["explain", "--data", "{in}", "--output", "{new}", "--weights", "no/where.pt"], "there is no file"),
        (["explain", "--data", "{in}", "--output", "{new}", "--weights", "nofile"], "has no weights with a name"),
        (["show", "{out}", "ant/000.png", "--picture", "/nowhere/a.png"], "/nowhere/a.png cannot be written"),
        (["show", "{out}", "ant/000.png", "--picture", "{in}"], "cannot be written: Is a directory"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_exit_2(finished, tmp_path, arguments, sentence):
    places = {"{in}": finished / "in", "{out}": finished / "out", "{new}": tmp_path / "new"}
    done = blocksight(*(places.get(argument, argument) for argument in arguments))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "new").exists()


def test_an_interrupted_command_says_that_it_can_be_repeated(finished, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("blocksight.jobs.worker.rows.existing_output", interrupted)
    ran = blocksight("status", finished)
    assert ran.returncode == 130
    assert "interrupted: what is written is whole; the same command goes on from there" in ran.stderr


def test_a_configuration_file_with_a_wrong_key(tmp_path):
    (tmp_path / "job.toml").write_text('data = "x"\noutptu = "y"\n')
    done = blocksight("plan", "--config", tmp_path / "job.toml")
    assert done.returncode == 2
    assert "unknown key 'outptu' in the configuration; did you mean 'output'?" in done.stderr


def test_status_and_verify_tell_open_from_wrong(finished, tmp_path):
    import shutil

    shutil.copytree(finished / "out", tmp_path / "out")
    assert blocksight("verify", tmp_path / "out").returncode == 0
    printed = "".join(blocksight("status", tmp_path / "out").stdout.split())  # a long path is folded
    assert f"data{finished / 'in'}" in printed  # where images will be read
    first, second = sorted((tmp_path / "out" / "data").rglob("[0-9]*.parquet"))[:2]
    first.unlink()
    assert blocksight("status", tmp_path / "out").returncode == 4
    gone = blocksight("verify", tmp_path / "out")
    assert gone.returncode == 5
    assert f"{first.name} is in the final manifest and does not exist" in gone.stdout
    (tmp_path / "out/_job/final/manifest.json").unlink()
    assert blocksight("verify", tmp_path / "out").returncode == 4
    second.write_bytes(second.read_bytes()[:-10] + b"x" * 10)
    wrong = blocksight("verify", tmp_path / "out")
    assert wrong.returncode == 5
    assert second.name in wrong.stdout
    assert "Traceback" not in wrong.stderr


def test_show_writes_a_picture_and_lists_say_what_there_is(finished, tmp_path):
    from PIL import Image

    done = blocksight("show", finished / "out", "ant/000.png", "--picture", tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (3 * 448 + 32, 416)
    rejected = blocksight("show", finished / "out", "cat/bad-empty_file.jpg", "--picture", tmp_path / "b.png")
    assert rejected.returncode == 0
    assert "empty_file" in rejected.stdout
    assert not (tmp_path / "b.png").exists()
    unnamed = subprocess.run(
        command("show", finished / "out", "ant/000.png"),
        cwd=tmp_path,
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
    )
    assert f"{file_name('ant/000.png')}.map.png".encode() in unnamed.stdout
    assert (tmp_path / f"{file_name('ant/000.png')}.map.png").exists()
    for what, name in (("explainers", "sise"), ("metrics", "drop"), ("models", "efficientnet_lite0")):
        assert name in blocksight("list", what).stdout
        assert name in blocksight("list", what, name).stdout
        near = blocksight("list", what, name[:-1])
        assert (near.returncode, name in near.stderr) == (2, True)
    assert "mu" in blocksight("list", "explainers", "sise").stdout
    assert "num_masks" not in blocksight("list", "explainers", "sise").stdout


def test_a_resumed_command_line_is_a_no_op(finished):
    before = json.loads((finished / "out/_job/final/manifest.json").read_text())
    done = blocksight("explain", "--data", finished / "in", "--output", finished / "out", "--model", MODEL)
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stdout
    assert json.loads((finished / "out/_job/final/manifest.json").read_text()) == before


def test_the_hint_after_an_audit_can_be_pasted(monkeypatch, capsys):
    monkeypatch.setattr("blocksight.jobs.audit.run.run_audit", lambda *_: None)
    monkeypatch.setattr("blocksight.jobs.cli.analysis_commands.audit_table", lambda *_: "")
    monkeypatch.setattr("sys.argv", ["blocksight", "audit", "my maps/it's"])
    with pytest.raises(SystemExit):
        main()
    hint = capsys.readouterr().out.strip().splitlines()[-1]
    assert shlex.split(hint.removeprefix("to look at it: ")) == ["blocksight", "report", "my maps/it's"]


@cache
def listed(width):
    console = Console(width=width, file=io.StringIO(), highlight=False, soft_wrap=True)
    console.print(catalog_table("explainers"))
    return console.file.getvalue()


def rows_of(table):
    """An explainer's parameters by name, each as a dict of its row's cells by column."""
    head, below = listed(400).split(f"┃{table}: -p")[1].split("\n", 1)
    names = ["name", *(cell.strip() for cell in head.strip("┃").split("┃")[1:])]
    rows = (line.strip("│").split("│") for line in below.split("└")[0].splitlines() if line.startswith("│"))
    return {row[0].strip(): dict(zip(names, map(str.strip, row), strict=True)) for row in rows}


def test_the_list_of_explainers_fits_a_narrow_window_and_names_every_parameter():
    text = listed(100)
    assert max(map(len, text.splitlines())) <= 100
    for name, entry in EXPLAINERS.items():
        shown = f"{name}{'(...)' if entry.wraps else ''}"
        assert f"│{shown} " in text
        assert (f"│{shown} * " in text) == (name in ("a-fmi", "feature-cam"))
    assert "smoothgrad(gradient), ucag(gradcam), libra(chefer), feature-cam(gradcam)" in text
    assert "* a reconstruction from the abstract" in text


def test_each_parameter_has_the_default_of_both_presets():
    for name, entry in EXPLAINERS.items():
        own = fields(entry.parameters)
        found = rows_of(name) if own else {}
        assert list(found) == [field.name for field in own]
        for parameter, row in found.items():
            assert set(row) == {"name", "meaning", *(("paper", "fast") if entry.fast else ("default",))}
            assert bool(row.get("fast")) == (parameter in entry.fast)
    ucag = [rows_of("ucag")[name] for name in ("crops", "side", "enlarge", "weighted")]
    assert [(row["paper"], row["fast"]) for row in ucag] == [("6", "3"), ("124", ""), ("2.6", "native"), ("true", "")]


@pytest.mark.parametrize("preset", ["paper", "fast"])
@pytest.mark.parametrize("explainer", [name for name, entry in EXPLAINERS.items() if fields(entry.parameters)])
def test_the_listed_values_of_a_preset_can_be_given_as_options(explainer, preset):
    rows = {name: row for name, row in rows_of(explainer).items() if name != "base"}
    options = [f"{name}={row.get(preset) or row.get('paper') or row['default']}" for name, row in rows.items()]
    job = {"data": "in", "output": "out", "explainer": explainer}
    given, _ = load_config(None, {**job, "preset": "paper", "parameters": parse_parameters(options)})
    usual, _ = load_config(None, {**job, "preset": preset})
    ours, theirs = given.explainer_parameters(), usual.explainer_parameters()
    assert {name: getattr(ours, name) for name in rows} == {name: getattr(theirs, name) for name in rows}


def test_help_teaches_wrappers_their_parameters_and_the_preset():
    help_text = " ".join(blocksight("explain", "--help").stdout.split())
    for sentence in (
        "some wrap another, as in ucag(gradcam)",
        "of what it wraps: base.mu=0.3",
        "fast: fewer steps for the dearest explainers",
        "paper: the papers' constants in float32",
        '--explainer "ucag(sise)" -p crops=4 -p base.mu=0.3',
    ):
        assert sentence in help_text
