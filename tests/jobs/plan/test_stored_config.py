"""An output's plan can choose no import and no file to read."""

import ast
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping

import pytest
from typer.testing import CliRunner

from blocksight.engine.catalog.entries import factory_of
from blocksight.jobs.cli.main import app
from blocksight.jobs.explain.step import load
from blocksight.jobs.plan.config import ConfigError, digest_of
from blocksight.jobs.plan.plan import PLAN_KEY, existing_plan
from blocksight.jobs.plan.stored_config import NamedModel, config_of
from blocksight.storage.stores.local import LocalStore
from tests.jobs.jobs_of import ROOT, run_here
from tests.jobs.jobs_of import config_of as job_of
from tests.jobs.tiny import MODEL, folder_of_images

WITH_A_MODEL = {
    "audit": ("audit",),
    "evaluate": ("evaluate", "--metrics", "gini", "--runner", "local"),
    "blocks": ("show", "ant/000.png", "--blocks"),
    "explainers": ("show", "ant/000.png", "--explainers", "gradcam"),
    "quantus": ("export", "quantus", "made"),
}
"""The commands that load the model of an output."""
WITHOUT = {
    "show": ("show", "ant/000.png"),
    "spotlight": ("export", "spotlight", "made"),
    "report": ("report",),
    "compare": ("compare",),
    "versus": ("versus", "{out}", "--output", "difference"),
    "sql": ("sql",),
    "status": ("status",),
    "verify": ("verify",),
    "retry": ("retry",),
    "finalize": ("finalize",),
    "gc": ("gc",),
    "audit": ("audit", "--no-try"),
}
"""The commands that do not."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    base = tmp_path_factory.mktemp("recorded")
    run_here(folder_of_images(base / "in", 2, bad=False), base / "out")
    return base / "out"


@pytest.fixture
def trap(made, tmp_path, monkeypatch):
    """A module in the current folder that leaves a file when it is imported, and an output that names it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "strange_module.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")
    yield with_configuration(made, tmp_path / "out", model="strange_module:make")
    assert not (tmp_path / "ran").exists()
    sys.modules.pop("strange_module", None)


def with_configuration(made, place, **changes):
    """A copy of an output with another configuration; plan and manifest are consistent."""
    shutil.copytree(made, place)
    plan = json.loads((place / PLAN_KEY).read_text())
    plan["configuration"] |= changes
    plan["fingerprint"] = digest_of(plan["configuration"])
    (place / PLAN_KEY).write_text(json.dumps(plan))
    manifest = json.loads((place / "_job/final/manifest.json").read_text())
    (place / "_job/final/manifest.json").write_text(json.dumps({**manifest, "fingerprint": plan["fingerprint"]}))
    return place


def ran(arguments, out):
    """Runs a command on an output in this process."""
    name, *rest = (argument.format(out=out) for argument in arguments)
    return CliRunner().invoke(app, [name, str(out), *rest])


@pytest.mark.parametrize("command", WITH_A_MODEL)
def test_no_command_imports_what_an_output_names(trap, command):
    found = ran(WITH_A_MODEL[command], trap)
    assert isinstance(found.exception, ConfigError)
    assert "--model strange_module:make" in str(found.exception)


@pytest.mark.parametrize("command", WITHOUT)
def test_other_commands_import_nothing(trap, command):
    ran(WITHOUT[command], trap)


@pytest.mark.parametrize("model", ["knn(strange_module:make)", "knn( knn(strange_module:make))", "knn(:)"])
def test_a_bank_does_not_bypass_the_check_of_the_factory(trap, made, tmp_path, model):
    found = ran(WITH_A_MODEL["audit"], with_configuration(made, tmp_path / "bank", model=model))
    assert isinstance(found.exception, ConfigError)
    assert "--model 'knn(" in str(found.exception)


@pytest.mark.parametrize("command", WITH_A_MODEL)
def test_the_named_model_must_be_the_outputs_model(trap, command):
    found = ran((*WITH_A_MODEL[command], "--model", MODEL), trap)
    assert isinstance(found.exception, ConfigError)
    assert "'strange_module:make'" in str(found.exception)
    assert repr(MODEL) in str(found.exception)


@pytest.mark.parametrize("command", WITH_A_MODEL)
def test_a_command_runs_if_the_model_is_named(made, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    found = ran((*WITH_A_MODEL[command], "--model", MODEL), made)
    assert found.exception is None, found.exception


def test_models_without_code_of_others_need_not_be_named(made):
    plan = existing_plan(LocalStore(made))
    for model in ("efficientnet_lite0", "torchvision:resnet18", "no such model"):
        assert factory_of(model) is None
        changed = plan.__class__(**{**vars(plan), "identity": {**plan.identity, "model": model}})
        assert config_of(changed, "out", NamedModel()).model == model


@pytest.mark.parametrize("weights", ["/etc/passwd", "s3://strange/w.pt", "w.safetensors", "../w", "0" * 64])
def test_no_file_is_read_because_an_output_names_it(made, tmp_path, weights):
    place = with_configuration(made, tmp_path / "out", model="torchvision:resnet18", weights=weights)
    with pytest.raises(ConfigError, match=r"name it with --weights|neither a name nor a hash"):
        config_of(existing_plan(LocalStore(place)), str(place), NamedModel())


@pytest.fixture
def with_weights(made, tmp_path):
    """Makes an output whose weights came from a file of this body, and whose plan names a place for it."""

    def make(place, body):
        out = with_configuration(
            made, tmp_path / "out", model="torchvision:resnet18", weights=hashlib.sha256(body).hexdigest()
        )
        plan = json.loads((out / PLAN_KEY).read_text())
        (out / PLAN_KEY).write_text(json.dumps({**plan, "weights": str(place)}))
        return lambda: config_of(existing_plan(LocalStore(out)), str(out), NamedModel()).weights

    return make


def test_the_weights_that_a_plan_names_are_read_if_their_hash_is_the_plans(with_weights, tmp_path):
    file = tmp_path / "w.pt"
    weights = with_weights(file, b"weights")
    file.write_bytes(b"weights")
    assert weights() == str(file)
    file.write_bytes(b"others")
    with pytest.raises(ConfigError, match=r"w\.pt', which is not there now; name it with --weights"):
        weights()
    file.unlink()
    with pytest.raises(ConfigError, match="name it with --weights"):
        weights()


def test_a_plan_names_no_other_file(with_weights, tmp_path, monkeypatch):
    (tmp_path / "secret.txt").write_bytes(b"weights")
    with pytest.raises(ConfigError, match="name it with --weights"):
        with_weights(tmp_path / "secret.txt", b"weights")()


def test_a_plan_names_no_pipe_that_is_waited_for(with_weights, tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(ConfigError, match="name it with --weights"):
        with_weights(tmp_path / "pipe.pt", b"weights")()


def test_a_plan_names_no_other_bucket(with_weights, monkeypatch):
    monkeypatch.setattr("blocksight.jobs.plan.stored_config.open_file", None)
    with pytest.raises(ConfigError, match="name it with --weights"):
        with_weights("s3://other/w.pt", b"weights")()


def test_a_name_of_weights_is_no_file_that_lies_here(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = with_configuration(made, tmp_path / "out", model="torchvision:resnet18", weights="random")
    assert config_of(existing_plan(LocalStore(place)), str(place), NamedModel()).weights == "random"
    (tmp_path / "random").write_bytes(b"")
    with pytest.raises(ConfigError, match="a file of this name lies here"):
        config_of(existing_plan(LocalStore(place)), str(place), NamedModel())


def test_an_output_names_no_endpoint(made, tmp_path):
    place = with_configuration(made, tmp_path / "out", endpoint_url="http://strange.example", output="/strange")
    config = config_of(existing_plan(LocalStore(place)), str(place), NamedModel(MODEL))
    assert (config.endpoint_url, config.output) == (None, str(place))


def test_the_current_folder_is_searched_for_a_factory_alone(made, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    load(job_of("in", "out", model="torchvision:squeezenet1_1", weights="random"), None, "cpu", str(tmp_path))
    assert str(tmp_path) not in sys.path
    load(job_of("in", "out"), None, "cpu", str(tmp_path))
    assert sys.path[-1] == str(tmp_path)


def callers() -> Mapping[str, set[str]]:
    """Files of the four packages by the functions and methods that they call."""
    found: dict[str, set[str]] = {}
    for file in (
        path for package in ("cluster", "engine", "jobs", "storage") for path in (ROOT / package).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                found.setdefault(ast.unparse(node.func).rpartition(".")[2], set()).add(str(file.relative_to(ROOT)))
    return found


def test_a_configuration_comes_from_the_user_or_through_the_one_door():
    found = callers()
    assert found["model_validate"] == {"jobs/plan/config.py"}
    assert found["checked_config"] == {"jobs/plan/config.py", "jobs/plan/stored_config.py"}
    assert found["JobConfig"] == {"jobs/cli/demo.py"}
    # the second imports a name of a fixed list
    assert found["import_module"] == {"engine/model/loading.py", "jobs/api/__init__.py"}
    assert not {"__import__", "exec"} & found.keys()
