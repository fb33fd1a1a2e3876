"""The configuration: every key checked, and errors that show the way out."""

from pathlib import Path

import pytest

from jobs.config import ConfigError, TargetChoice, differences, digest_of, load_config, parse_parameters

BASE = {"data": "in", "output": "out"}


def test_options_win_over_the_file(tmp_path):
    file = tmp_path / "job.toml"
    file.write_text('data = "a"\noutput = "b"\ntarget = "top-3"\n[parameters]\nmu = 0.3\ngate = "soft"\n')
    config = load_config(file, {"data": "c", "target": None, "parameters": {"mu": 0.5}})
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
        ({"target": "best"}, "target 'best' is not known; known: predicted, label, top-K"),
        ({"target": "top-0"}, "target 'top-0' is not known"),
        ({"resize": "stretch"}, "resize: .*squash.*crop"),
        ({"limit": 0}, "limit: .*greater than or equal to 1"),
        ({"data": None}, "--data must be given"),
    ],
)
def test_what_is_wrong_is_one_sentence(values, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_config(None, {**BASE, **values})


def test_a_file_that_is_not_there_or_broken(tmp_path):
    with pytest.raises(ConfigError, match="there is no configuration file"):
        load_config(tmp_path / "none.toml", {})
    broken = tmp_path / "broken.toml"
    broken.write_text("data = ")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(broken, {})


def test_targets():
    assert TargetChoice.parse("top-3") == TargetChoice("top", 3)
    assert TargetChoice.parse("281, 7,281") == TargetChoice("given", 2, (281, 7))
    assert TargetChoice.parse("label") == TargetChoice("label")


def test_parameters_are_read_as_toml():
    assert parse_parameters(["mu=0.3", "gate=soft"]) == {"mu": 0.3, "gate": "soft"}
    with pytest.raises(ConfigError, match="not of the form name=value"):
        parse_parameters(["mu"])


def test_the_identity_holds_what_changes_bytes():
    one = load_config(None, BASE)
    assert digest_of(one.identity(None)) == digest_of(load_config(None, {**BASE, "output": "elsewhere"}).identity(None))
    for change in ({"target": "top-2"}, {"parameters": {"mu": 0.1}}, {"resize": "crop"}, {"seed": 1}, {"limit": 3}):
        other = load_config(None, {**BASE, **change})
        assert digest_of(other.identity(None)) != digest_of(one.identity(None))
    assert digest_of(one.identity("a")) != digest_of(one.identity("b"))
    explicit = load_config(None, {**BASE, "parameters": {"mu": 0.0}})
    assert digest_of(explicit.identity(None)) == digest_of(one.identity(None))


def test_local_paths_are_absolute_and_the_rest_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(None, {"data": "photos", "output": "s3://bucket/maps", "weights": "random"})
    assert config.data == str(tmp_path / "photos")
    assert (config.output, config.weights) == ("s3://bucket/maps", "random")
    assert load_config(None, {**BASE, "weights": "w/net.pt"}).weights == str(tmp_path / "w" / "net.pt")


def test_differences_show_both_sides():
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3}) == ["b: 3 in the output, 2 asked for"]
