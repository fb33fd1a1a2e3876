"""The configuration: every key is checked, and errors say what to change."""

import json
from pathlib import Path

import pytest

from blocksight.engine.catalog.entries import BALANCED_BUDGET, FIDELITIES, POOR_MAP_ERROR
from blocksight.engine.catalog.parameters import SiseParameters
from blocksight.jobs.plan.config import (
    ConfigError,
    Execution,
    TargetChoice,
    differences,
    digest_of,
    execution_of,
    load_config,
    parse_parameters,
)
from tests.storage.loopback import served

BASE = {"data": "in", "output": "out"}


def config_of(values):
    config, _ = load_config(None, values)
    return config


def test_options_win_over_the_file(tmp_path):
    file = tmp_path / "job.toml"
    file.write_text('data = "a"\noutput = "b"\ntarget = "top-3"\n[parameters]\nmu = 0.3\ngate = "soft"\n')
    config, _ = load_config(file, {"data": "c", "target": None, "parameters": {"mu": 0.5}})
    assert (Path(config.data).name, Path(config.output).name, config.target) == ("c", "b", "top-3")
    assert config.explainer_parameters().mu == 0.5
    assert config.explainer_parameters().gate == "soft"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"outptu": "x"}, "unknown key 'outptu' in the configuration; did you mean 'output'"),
        ({"parameters": {"mo": 1}}, "explainer sise has no parameter 'mo'; did you mean 'mu'"),
        ({"parameters": {"mu": 1.5}}, r"mu must lie in \[0, 1\), got 1.5"),
        ({"parameters": {"gate": "wide"}}, "gate: .*hard.*soft"),
        ({"explainer": "sies"}, "explainer 'sies' is not known; did you mean 'sise'"),
        ({"target": "top-0"}, "target 'top-0' is not known; known: predicted, label, top-K"),
        ({"target": "top-0"}, "target 'top-0' is not known"),
        ({"resize": "stretch"}, "resize: .*squash.*crop"),
        ({"limit": 0}, "limit: .*greater than or equal to 1"),
        ({"data": None}, "--data must be given"),
        ({"parameters": 3}, "parameters is a table"),
        ({"blocks": ","}, "',' names no blocks"),
        ({"endpoint_url": "http://127.0.0.1:9"}, "neither data, output, weights nor model is an s3:// URI"),
        ({"workers": 0}, "workers: .*greater than or equal to 1, got 0"),
        ({"runner": "spark"}, "runner: .*ray.*local"),
        ({"worker": 2}, "unknown key 'worker' .*did you mean 'workers'"),
        ({"fidelity": "cheap"}, "fidelity: .*preview.*balanced.*full.*auto.*got 'cheap'"),
        (
            {"fidelity": "preview", "explainer": "gradcam"},
            "fidelity preview .* explainer gradcam has none: leave --fidelity out, or take one of sise, ada-sise",
        ),
        (
            {"fidelity": "balanced", "parameters": {"budget": 50}},
            "fidelity balanced means budget = 0.1, and budget = 50 is asked for as well: leave one of the two out",
        ),
        (
            {"fidelity": "auto", "parameters": {"complete_above": 0.9}},
            "fidelity auto means complete_above = .*, and complete_above = 0.9 is asked for",
        ),
        (
            {"fidelity": "preview", "parameters": {"complete_above": 0.9}},
            "fidelity preview means complete_above = None, and complete_above = 0.9 is asked for",
        ),
        ({"parameters": {"complete_above": 0.9}}, "complete_above 0.9 needs a budget above 0, got none"),
    ],
)
def test_each_error_is_one_sentence(values, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_config(None, {**BASE, **values})


def test_every_option_can_be_given_in_the_file(tmp_path):
    file = tmp_path / "job.toml"
    file.write_text('data = "a"\noutput = "b"\nblocks = "one, two"\ntarget = [281, 7]\nworkers = 2\nrunner = "local"\n')
    config, execution = load_config(file, {"workers": 3})
    assert config.blocks == ("one", "two")
    assert config.target == "281,7"
    assert (execution.workers, execution.runner, execution.batch_size) == (3, "local", None)
    file.write_text('data = "a"\noutput = "b"\nblocks = ["one", "two"]\ntarget = 281\n')
    config, _ = load_config(file, {})
    assert (config.blocks, config.target) == (("one", "two"), "281")


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("20m", 1200), ("1.5 h", 5400), (30, 30)])
def test_a_wait_is_seconds_minutes_or_hours(text, seconds):
    assert Execution(address="auto", wait=text).wait == seconds


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"address": "auto", "wait": "20 minutes"}, "no duration; wanted seconds"),
        ({"address": "auto", "wait": "-5"}, "no duration"),
        ({"wait": "20m"}, "name it with --address"),
        ({"py_modules": ["mine"]}, "name it with --address"),
        ({"address": "auto", "workers": 2, "min_workers": 3}, "min_workers is 3, and workers 2"),
    ],
)
def test_waiting_is_for_a_cluster(values, sentence):
    with pytest.raises(ConfigError, match=sentence):
        execution_of(values)


def test_a_file_that_is_not_there_or_broken(tmp_path):
    with pytest.raises(ConfigError, match="there is no configuration file"):
        load_config(tmp_path / "none.toml", {})
    broken = tmp_path / "broken.toml"
    broken.write_text("data = ")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(broken, {})


def test_a_configuration_in_a_bucket_is_read():
    with served() as (bucket, _):
        bucket.objects["jobs/job.toml"] = b'data = "a"\noutput = "b"\nworkers = 2\n'
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", bucket.url)
            config, execution = load_config("s3://b/jobs/job.toml", {"output": "c"})
            with pytest.raises(ConfigError, match="there is no configuration file s3://b/none"):
                load_config("s3://b/none.toml", {})
    assert (config.output.rpartition("/")[2], execution.workers) == ("c", 2)


def test_targets():
    assert TargetChoice.parse("top-3") == TargetChoice("top", 3)
    assert TargetChoice.parse("281, 7,281") == TargetChoice("given", 2, (281, 7))
    assert TargetChoice.parse("label") == TargetChoice("label")
    assert TargetChoice.parse("tench, Tinca tinca") == TargetChoice("given", name="tench, Tinca tinca")


def test_parameters_are_read_as_toml():
    assert parse_parameters(["mu=0.3", "gate=soft"]) == {"mu": 0.3, "gate": "soft"}
    with pytest.raises(ConfigError, match="not of the form name=value"):
        parse_parameters(["mu"])


def test_the_identity_holds_what_changes_bytes():
    one = config_of(BASE)
    assert digest_of(one.identity(None)) == digest_of(config_of({**BASE, "output": "elsewhere"}).identity(None))
    for change in (
        {"target": "top-2"},
        {"fidelity": "auto"},
        {"parameters": {"mu": 0.1}},
        {"resize": "crop"},
        {"seed": 1},
        {"limit": 3},
    ):
        other = config_of({**BASE, **change})
        assert digest_of(other.identity(None)) != digest_of(one.identity(None))
    assert digest_of(one.identity("a")) != digest_of(one.identity("b"))
    explicit = config_of({**BASE, "parameters": {"mu": 0.0}})
    assert digest_of(explicit.identity(None)) == digest_of(one.identity(None))


def test_local_paths_are_absolute_and_the_rest_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_of({"data": "photos", "output": "s3://bucket/maps", "weights": "random"})
    assert config.data == str(tmp_path / "photos")
    assert (config.output, config.weights) == ("s3://bucket/maps", "random")
    assert config_of({**BASE, "weights": "w/net.pt"}).weights == str(tmp_path / "w" / "net.pt")


def test_a_fidelity_sets_parameters(tmp_path):
    file = tmp_path / "job.toml"
    file.write_text('data = "a"\noutput = "b"\nfidelity = "balanced"\n[parameters]\nmu = 0.3\n')
    config, _ = load_config(file, {})
    assert (config.explainer_parameters().budget, config.explainer_parameters().mu) == (BALANCED_BUDGET, 0.3)
    config, _ = load_config(file, {"fidelity": "preview", "explainer": "ada-sise"})
    assert config.explainer_parameters().budget == 0
    assert config.explainer_parameters().complete_above is None
    config, _ = load_config(file, {"fidelity": "full", "parameters": {"budget": 5}})
    assert config.explainer_parameters().budget == 5
    config, _ = load_config(file, {"fidelity": "auto"})
    assert config.explainer_parameters().complete_above == POOR_MAP_ERROR
    assert config.in_full().explainer_parameters() == SiseParameters(mu=0.3)


@pytest.mark.parametrize("level", FIDELITIES)
def test_a_parameter_that_repeats_its_fidelitys_value_is_no_conflict(level):
    config = config_of({**BASE, "fidelity": level})
    read_back = config_of({**BASE, "fidelity": level, "parameters": config.identity(None)["parameters"]})
    assert read_back.identity(None) == config.identity(None)
    assert read_back.in_full().explainer_parameters() == SiseParameters()


def test_differences_show_both_sides():
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3}) == ["b: 3 in the output, 2 asked for"]


def test_the_identity_is_what_a_plan_reads_back():
    """A parameter of many values too: otherwise no output could be resumed."""
    config, _ = load_config(
        None, {"data": "d", "output": "o", "explainer": "extremal_perturbation", "parameters": {"areas": [0.1, 0.2]}}
    )
    identity = config.identity(None)
    assert identity == json.loads(json.dumps(identity))
    assert identity["parameters"]["areas"] == [0.1, 0.2]


def test_none_is_no_value_where_a_parameter_may_have_none():
    for explainer, name in (("daam", "rectify"), ("a-fmi", "channels"), ("sise", "budget")):
        given = parse_parameters([f"{name}=none"])
        assert (
            getattr(config_of({**BASE, "explainer": explainer, "parameters": given}).explainer_parameters(), name)
            is None
        )
    with pytest.raises(ConfigError, match=r"crops: .*integer.*'none'"):
        config_of({**BASE, "explainer": "ucag", "parameters": {"crops": "none"}})
    inner = parse_parameters(["base.budget=none", "enlarge=native"])
    parameters = config_of(
        {**BASE, "explainer": "ucag(sise)", "preset": "paper", "parameters": inner}
    ).explainer_parameters()
    assert (parameters.enlarge, parameters.crops, parameters.base.budget) == ("native", 6, None)


def test_the_papers_preset_and_a_lower_precision_exclude_each_other():
    with pytest.raises(ConfigError, match="preset paper means float32, and precision bfloat16 is asked for"):
        load_config(None, {**BASE, "preset": "paper", "precision": "bfloat16"})
    for preset, precision in (("paper", "float32"), ("fast", "bfloat16")):
        config, _ = load_config(None, {**BASE, "preset": preset, "precision": precision})
        assert config.identity(None)["precision"] == precision
    with pytest.raises(ConfigError, match="precision"):
        load_config(None, {**BASE, "precision": "float8"})
