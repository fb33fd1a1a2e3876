"""Every command that loads a model examines it, and proves that it is the one that made the output."""

import ast
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from blocksight.engine.model.adapter import ModelAdapter
from blocksight.jobs.plan.preflight import PREFLIGHT_KEY, stored_preflight
from blocksight.storage.stores.opening import open_store
from tests.engine.nets import seeded
from tests.jobs.jobs_of import called, run_here
from tests.jobs.tiny import CLASSES, MODEL, Tiny, folder_of_images
from tests.storage.memory import MemoryStore

ROOT = Path(__file__).parents[3]
LOADERS = {
    "jobs/explain/preflight.py",  # and examines it
    "jobs/explain/stored_model.py",  # the same, and compares it with an output
    "jobs/run/job.py",  # the same
    "jobs/explain/forward_choice.py",  # a worker, after its driver: the one that chooses the forward setting
    "jobs/bench/bank.py",  # examines its features
    "jobs/explain/step.py",  # a worker, after its driver; it compares the weights with the driver's
    "jobs/evaluate/step.py",
    "jobs/run/one_picture.py",  # of no output, and examines it
    "jobs/run/explainer_choice.py",  # a new job: `preflight.py` examines it again
    "jobs/run/labels.py",  # a plan, which computes nothing: only names and number of classes
}


class Changed(Tiny):
    """The tiny model after its code was changed; the weights are the same."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(super().forward(x))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return folder_of_images(tmp_path_factory.mktemp("data"), bad=False)


@pytest.fixture(scope="module")
def output(data, tmp_path_factory):
    """A complete output of the tiny model."""
    place = tmp_path_factory.mktemp("explained") / "out"
    run_here(data, place, explainer="gradcam")
    return place


@pytest.fixture
def change(monkeypatch):
    """Changes what the code of the tiny model does to its outputs."""

    def put(function):
        changed = ModelAdapter(seeded(lambda: Changed(function)), input_size=(32, 32), class_names=CLASSES)
        monkeypatch.setattr("tests.jobs.tiny.make", lambda: changed)

    return put


AGAIN = {
    "evaluate": ("evaluate", "OUTPUT", "--metrics", "drop", "--runner", "local"),
    "audit": ("audit", "OUTPUT"),
    "show": ("show", "OUTPUT", "ant/000.png", "--explainers", "gradcam", "--picture", "DRAWN"),
    "quantus": ("export", "OUTPUT", "quantus", "EXPORTED"),
}


def again(command, output, folder):
    """The exit code and the text of a command that loads the model of an output."""
    places = {"OUTPUT": output, "DRAWN": folder / "drawn.png", "EXPORTED": folder / "exported"}
    code, text = called(*(places.get(word, word) for word in AGAIN[command]), "--model", MODEL)
    return code, " ".join(text.split())


@pytest.mark.parametrize("command", AGAIN)
@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (functional.dropout, "changes from call to call"),
        (lambda z: z - z.mean(0), "with the other images of the pass"),
        (lambda z: z * torch.nan, "NaN or infinity for each"),
        (lambda z: 1.1 * z, "on the same pictures differ from those of the time when the output was begun, by 6"),
    ],
)
def test_a_model_whose_code_was_changed_is_refused_by(command, function, sentence, output, change, tmp_path):
    change(function)
    code, text = again(command, output, tmp_path)
    assert code == 2, text
    assert sentence in text


@pytest.mark.parametrize("command", AGAIN)
def test_the_same_model_passes(command, output, tmp_path):
    code, text = again(command, output, tmp_path)
    assert code == 0, text
    assert "WARNING" not in text


def test_explain_refuses_it_when_it_resumes(data, output, change, tmp_path):
    run_here(data, tmp_path / "out", explainer="gradcam")
    for path in (tmp_path / "out" / "data").rglob("*.parquet"):
        path.unlink()  # the unit is open again
    change(lambda z: 1.1 * z)
    code, text = called(
        *("explain", "--data", data, "--output", tmp_path / "out", "--model", MODEL),
        *("--explainer", "gradcam", "--runner", "local"),
    )
    assert code == 2, text
    assert "on the same pictures differ" in text


def test_bank_refuses_features_that_change_from_call_to_call(data, change, tmp_path):
    change(functional.dropout)
    code, text = called("bank", "--data", data, "--model", MODEL, "--output", tmp_path / "bank.safetensors")
    assert code == 2, text
    assert "changes from call to call" in text


def test_an_output_of_an_earlier_version_has_no_outputs_to_compare(output, change, tmp_path):
    store = open_store(str(output))
    body = store.read(PREFLIGHT_KEY)
    store.delete(PREFLIGHT_KEY)
    try:
        change(lambda z: 1.1 * z)
        assert again("audit", output, tmp_path)[0] == 0
    finally:
        store.create(PREFLIGHT_KEY, body)
    assert stored_preflight(store).outputs[0]


def test_a_preflight_of_an_earlier_version_is_readable(output):
    stored = json.loads(open_store(str(output)).read(PREFLIGHT_KEY))
    del stored["outputs"]
    old = MemoryStore()
    old.create(PREFLIGHT_KEY, json.dumps(stored).encode())
    assert stored_preflight(old).outputs == ()


def test_only_listed_files_load_a_model():
    found = set()
    for path in (ROOT / "jobs").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = {one.name for one in node.names} if isinstance(node, ast.ImportFrom) else set()
            if names & {"load", "load_model"} and str(getattr(node, "module", "")).endswith((".step", ".loading")):
                found.add(path.relative_to(ROOT).as_posix())
    assert found == LOADERS
