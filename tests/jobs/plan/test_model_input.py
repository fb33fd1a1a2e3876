"""How a model is fed: options over `model.toml` over the model's own, said by the plan, the run and the report."""

import io
import json
import re
from dataclasses import asdict, replace

import pytest
import torch
from rich.console import Console

from blocksight.jobs.plan.config import ConfigError, Execution, load_config
from blocksight.jobs.plan.documents import read_document
from blocksight.jobs.plan.model_input import MODEL_FILE, with_model_file
from blocksight.jobs.plan.plan import MODEL_KEY, DriftError, ensure_model, existing_plan
from blocksight.jobs.plan.records import ModelFacts
from blocksight.jobs.plan.stored_config import NamedModel, config_of
from blocksight.jobs.run.job import run_job
from blocksight.storage.limits import MAX_MODEL_FILE_BYTES
from blocksight.storage.stores.local import LocalStore
from tests.jobs import tiny
from tests.jobs.jobs_of import called, rows_in
from tests.storage.loopback import served

BASE = {"data": "in", "output": "out"}
NAMES = ["one", "two", "three", "four", "five"]


def asked(**values):
    config, _ = load_config(None, {**BASE, **values})
    return config


@pytest.mark.parametrize(
    ("given", "read"),
    [(64, (64, 64)), ("64", (64, 64)), ("48x64", (48, 64)), ("48, 64", (48, 64)), ([48, 64], (48, 64)), ([9], (9, 9))],
)
def test_an_input_size_is_one_side_or_two(given, read):
    assert asked(input_size=given).input_size == read


@pytest.mark.parametrize(
    ("given", "read"), [("0.5", (0.5,) * 3), (0.5, (0.5,) * 3), ("0.1,0.2,0.3", (0.1, 0.2, 0.3)), ([0, 0, 0], (0,) * 3)]
)
def test_a_normalisation_is_one_number_or_three(given, read):
    assert asked(mean=given).mean == read


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"input_size": "big"}, "input_size: wanted pixels from 1 to .*, got 'big'"),
        ({"input_size": 0}, "input_size: wanted pixels"),
        ({"input_size": True}, "input_size: wanted pixels"),
        ({"input_size": [1, 2, 3]}, "input_size: wanted pixels"),
        ({"input_size": "9999999999999"}, "input_size: wanted pixels"),
        (
            {"mean": "123.675,116.28,103.53"},
            "mean: wanted the mean of RGB.*values of 0..255 are divided by 255",
        ),
        ({"mean": "a,b,c"}, "mean: wanted the mean of RGB"),
        ({"mean": "0.1,0.2"}, "mean: wanted the mean of RGB"),
        ({"mean": "nan"}, "mean: wanted the mean of RGB"),
        ({"std": "0"}, "std: wanted the standard deviation of RGB"),
        ({"std": 58.4}, "std: .*values of 0..255 are divided by 255"),
        ({"class_names": ["one"]}, "class_names: wanted a list of 2 or more names"),
        ({"class_names": ["one", 2]}, "class_names: wanted a list of 2 or more names"),
        ({"class_names": "no-such-file"}, "class_names: .*no-such-file"),
    ],
)
def test_what_is_wrong_is_one_sentence(values, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=sentence):
        asked(**values)


@pytest.mark.parametrize(
    "text",
    [
        "a\nb\n\nc\n",
        "\ufeffa\r\nb\r\nc",
        '["a", "b", "c"]',
        '{"0": "a", "2": "c", "1": "b"}',
        '{"0": ["n1", "a"], "1": ["n2", "b"], "2": ["n3", "c"]}',
        '{"b": 1, "a": 0, "c": 2}',
    ],
)
def test_class_names_come_from_the_usual_files(text, tmp_path):
    (tmp_path / "names").write_text(text, encoding="utf-8")
    assert asked(class_names=str(tmp_path / "names")).class_names == ("a", "b", "c")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"0": "a", "2": "b"}', "its 2 classes are not numbered 0 to 1, each once"),
        ('{"a": "b"}', "'a' is neither the number nor the name of a class"),
        ('{"0": []}', "'0' is neither"),
        ('["a"', "cannot be read"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_class_names_that_cannot_be_read_are_one_sentence(text, sentence, tmp_path):
    (tmp_path / "names").write_text(text)
    with pytest.raises(ConfigError, match=f"class_names: .*{sentence}"):
        asked(class_names=str(tmp_path / "names"))


# ---------------------------------------------------------------- model.toml


@pytest.fixture
def beside(tmp_path):
    """Writes `model.toml` beside a weights file, and returns the option that names the weights."""

    def write(text):
        (tmp_path / MODEL_FILE).write_bytes(text.encode() if isinstance(text, str) else text)
        torch.save(tiny.make().module.state_dict(), tmp_path / "w.pt")
        return {"weights": str(tmp_path / "w.pt")}

    return write


def test_the_command_line_wins_over_the_file_beside_the_weights(beside):
    weights = beside(f"input_size = 16\nmean = 0.5\nstd = [0.2, 0.3, 0.4]\nclass_names = {NAMES}\n")
    config = with_model_file(asked(**weights, mean="0.1", input_size="20x24"))
    assert (config.input_size, config.mean, config.std) == ((20, 24), (0.1,) * 3, (0.2, 0.3, 0.4))
    assert config.class_names == tuple(NAMES)
    assert with_model_file(config) == config


def test_without_weights_or_without_the_file_nothing_is_set(tmp_path):
    for weights in (None, "random", str(tmp_path / "w.pt")):
        config = asked(weights=weights)
        assert with_model_file(config) == config
        assert not {"input_size", "mean", "std", "class_names"} & config.identity(None).keys()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("means = 0.5", "unknown key 'means'; did you mean 'mean'"),
        ("weights = 'other.pt'", "unknown key 'weights'"),
        ("mean = 300", "mean: wanted the mean of RGB in 0..1"),
        ("mean = {a = 1}", "mean: wanted the mean of RGB"),
        ("class_names = 'names.txt'", "class_names: wanted a list"),
        ("mean 0.5", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        ("a = " + "[" * 5000, "cannot be read"),
        (b"#" * (MAX_MODEL_FILE_BYTES + 1), "is larger than"),
    ],
)
def test_a_file_from_a_stranger_is_one_sentence(text, sentence, beside):
    with pytest.raises(ConfigError, match=f"^{re.escape(MODEL_FILE)} beside the weights.*{sentence}"):
        with_model_file(asked(**beside(text)))


def test_a_value_that_the_command_line_replaces_is_checked_as_well(beside):
    with pytest.raises(ConfigError, match="mean: wanted"):
        with_model_file(asked(**beside("mean = 300"), mean="0.5"))


def test_the_file_is_found_in_a_bucket():
    with served() as (bucket, _):
        bucket.objects["models/model.toml"] = b"input_size = 48"
        config = asked(weights="s3://b/models/w.pt", endpoint_url=bucket.url)
        assert with_model_file(config).input_size == (48, 48)
        assert with_model_file(asked(weights="s3://b/other/w.pt", endpoint_url=bucket.url)).input_size is None


# ---------------------------------------------------------------- whole jobs


@pytest.fixture(scope="module")
def fed(tmp_path_factory):
    """A job whose weights have a `model.toml`, with what it printed."""
    root = tmp_path_factory.mktemp("fed")
    tiny.folder_of_images(root / "in", 3, bad=False)
    (root / "models").mkdir()
    torch.save(tiny.make().module.state_dict(), root / "models" / "w.pt")
    (root / "models" / MODEL_FILE).write_text(f"input_size = 16\nmean = 0.5\nclass_names = {NAMES}\n")
    options = {"model": tiny.MODEL, "weights": str(root / "models" / "w.pt"), "explainer": "gradient", "std": "0.25"}
    config, _ = load_config(None, {"data": str(root / "in"), "output": str(root / "out"), **options})
    printed = io.StringIO()
    run_job(config, Execution(runner="local"), Console(file=printed, width=200))
    return root, printed.getvalue()


def test_a_job_is_fed_as_the_file_says(fed):
    root, printed = fed
    rows = rows_in(LocalStore(root / "out"))
    assert {(row["map_height"], row["map_width"]) for row in rows} == {(16, 16)}
    assert {row["target_name"] for row in rows} <= set(NAMES)
    assert "fed: 16 x 16 pixels, mean 0.5 0.5 0.5, std 0.25 0.25 0.25, resize squash" in printed
    facts = json.loads((root / "out" / MODEL_KEY).read_text())
    assert (facts["mean"], facts["std"]) == ([0.5] * 3, [0.25] * 3)


def test_the_plan_names_the_source_of_each_value(fed):
    root, _ = fed
    line = ["plan", "--data", root / "in", "--output", root / "new", "--model", tiny.MODEL, "--explainer", "gradient"]
    code, text = called(*line, "--weights", root / "models" / "w.pt", "--std", "0.25")
    assert code == 0, text
    assert (
        "input size 16 x 16 (model.toml says so), mean 0.5 0.5 0.5 (model.toml says so), std 0.25 0.25 0.25 (as" in text
    )
    code, text = called(*line)
    assert re.search(r"model is fed\s+as its own configuration says", text)


def test_an_output_is_read_as_its_plan_says_whatever_lies_beside_the_weights_now(fed):
    root, _ = fed
    plan = existing_plan(LocalStore(root / "out"))
    config = config_of(plan, str(root / "out"), NamedModel(tiny.MODEL, str(root / "models" / "w.pt")))
    assert (config.input_size, config.mean, config.class_names) == ((16, 16), (0.5,) * 3, tuple(NAMES))


def test_other_feeding_is_another_job(fed):
    root, _ = fed
    line = ["explain", "--runner", "local", "--data", root / "in", "--output", root / "out", "--model", tiny.MODEL]
    line += ["--explainer", "gradient", "--weights", root / "models" / "w.pt", "--std", "0.25"]
    code, text = called(*line, "--input-size", "20")
    assert code == 2
    assert "input_size: [16, 16] in the output, [20, 20] asked for" in text
    assert called(*line)[0] == 0


def test_an_output_of_an_earlier_version_goes_on(fed, tmp_path):
    """Its facts of the model have no normalisation, and notes may be in other words."""
    root, _ = fed
    facts = read_document(LocalStore(root / "out"), MODEL_KEY, ModelFacts)
    store = LocalStore(tmp_path)
    earlier = ("weights_sha256", "num_classes", "input_size", "blocks")
    store.put(MODEL_KEY, json.dumps({name: value for name, value in asdict(facts).items() if name in earlier}).encode())
    ensure_model(store, facts)
    ensure_model(LocalStore(root / "out"), replace(facts, notes=("in other words",)))
    with pytest.raises(DriftError, match=r"mean: \[0.5, 0.5, 0.5\] in the output"):
        ensure_model(LocalStore(root / "out"), replace(facts, mean=(0.0, 0.0, 0.0)))


def test_a_wrong_number_of_names_is_one_sentence(fed, tmp_path):
    root, _ = fed
    (tmp_path / "names.txt").write_text("a\nb\n")
    line = ["explain", "--runner", "local", "--data", root / "in", "--output", tmp_path / "out", "--model", tiny.MODEL]
    code, text = called(*line, "--class-names", tmp_path / "names.txt")
    assert code == 2
    assert "2 class names are given, and model 'tests.jobs.tiny:make' has 5 outputs" in text
