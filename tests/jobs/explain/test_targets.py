"""Targets as expressions through a job: rows, evaluation, what reads them, and texts with two meanings."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from blocksight.engine.catalog.target_expressions import Atom, parse_formula, quoted
from blocksight.engine.model.adapter import ModelAdapter
from blocksight.jobs.explain.target_names import formulas_of, resolved_targets
from blocksight.jobs.plan.config import ConfigError, JobConfig
from blocksight.jobs.plan.records import UnreconciledError
from blocksight.storage.stores.local import LocalStore
from tests.engine.nets import seeded
from tests.jobs.jobs_of import blocksight, called, config_of, fragments_in, rows_in, run_here
from tests.jobs.tiny import CLASSES, MODEL, Tiny, folder_of_images, make

TARGETS = ["predicted,label", "margin", "ant-bee", "0.5*0 + 0.5*cat", "logit(dog)", "logprob(predicted-label)"]
NUM_TARGETS = 7


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return folder_of_images(tmp_path_factory.mktemp("targets") / "in", 5, bad=False)


@pytest.fixture(scope="module")
def output(data):
    """Every kind of target in one job, and two evaluations' metrics."""
    place = data.parent / "out"
    run_here(data, place, target=TARGETS, explainer="layercam")
    metrics = ("--metrics", "insertion,pos,average_drop_100", "--controls", "--runner", "local", "--model", MODEL)
    done = blocksight("evaluate", place, *metrics)
    assert done.returncode == 0, done.stderr
    return place


def by_target(output):
    """Rows of each record by target."""
    found = {}
    for row in rows_in(LocalStore(output)):
        found.setdefault(row["key"], {})[row["target"]] = row
    return found


def test_each_target_has_its_row(output):
    for rows in by_target(output).values():
        label = next(iter(rows.values()))["label"]
        words = ["predicted", "label", "margin", "0-1", "0.5*0+0.5*2", "logit(3)", "logprob(predicted-label)"]
        assert list(rows) == words
        predicted = rows["predicted"]["target_index"]
        assert rows["label"]["target_index"] == label
        assert [rows[word]["target_index"] for word in words[2:]] == [None, None, None, 3, None]
        assert [rows[word]["target_rank"] is None for word in words] == [False, False, True, True, True, False, True]
        assert rows["margin"]["target_formula"].startswith(f"{predicted}-")
        assert rows["0-1"]["target_name"] == "ant - bee"
        assert rows["logit(3)"]["target_name"] == "logit(dog)"
        sources = [rows[word]["target_source"] for word in words]
        assert sources == ["predicted", "label", "expression", "expression", "expression", "given", "expression"]
        if predicted == label:
            assert rows["logprob(predicted-label)"]["is_flat"]


def test_scores_are_the_values_of_the_formulas(output, data):
    adapter = make()
    from blocksight.storage.images.decode import decode, fit

    for key, rows in by_target(output).items():
        pixels = np.array(fit(decode((data / key).read_bytes()).pixels, adapter.input_size, "squash"))
        with torch.no_grad():
            logits = adapter.logits(adapter.normalise(torch.from_numpy(pixels[None]).permute(0, 3, 1, 2))).double()[0]
        for row in rows.values():
            formula = parse_formula(row["target_formula"])
            values = {"score": logits.softmax(0), "logit": logits, "logprob": logits.log_softmax(0)}[formula.reading]
            wanted = sum(weight * float(values[index]) for weight, index in formula.terms)
            assert row["score"] == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_protocols_never_mix_what_is_read(output):
    for rows in by_target(output).values():
        protocols = {word: row["metrics"]["protocol"] for word, row in rows.items()}
        assert protocols["predicted"] == protocols["label"]
        assert protocols["margin"] == protocols["0-1"]
        assert len(set(protocols.values())) == 4
        for row in rows.values():
            assert row["metrics"]["drop"] is not None or row["score"] < 0 or row["is_flat"]


def test_an_evaluation_reads_the_same_target(output):
    store = LocalStore(output)
    from blocksight.jobs.evaluate.evaluation import evaluation_folders, value_tables

    stored = {(row["key"], row["target"]): row for row in rows_in(store)}
    (folder,) = evaluation_folders(store)
    values = [row for table in value_tables(store, folder) for row in table.to_pylist()]
    own = [row for row in values if row["explainer"] == "layercam"]
    assert {(row["key"], row["target"]) for row in own} == set(stored)
    for row in own:
        if row["metric"] == "insertion" and row["curve"]:  # its last point is the whole picture
            score = stored[row["key"], row["target"]]["score"]
            assert row["curve"][-1] == pytest.approx(score, rel=1e-4, abs=1e-5)
        if row["metric"] == "pos" and row["target"] == "margin":
            assert row["reason"] == "the target is no class, so that it cannot be the prediction"
        if row["metric"] == "average_drop_100" and stored[row["key"], row["target"]]["score"] < 0:
            assert row["reason"] == "the score is negative, and of it no share can be lost"
    assert {row["target"] for row in values if row["explainer"] != "layercam"} == {target for _, target in stored}


def test_a_second_run_has_the_same_bytes_and_a_rest_is_resumed(output, data, tmp_path):
    again = tmp_path / "again"
    run_here(data, again, target="\n".join(TARGETS), explainer="layercam")
    wanted = fragments_in(LocalStore(output))
    assert fragments_in(LocalStore(again)) == wanted
    for file in (again / "data").rglob("*.parquet"):
        file.unlink()
    for file in (again / "_job/receipts").iterdir():
        file.unlink()
    run_here(data, again, target=TARGETS, explainer="layercam")
    assert fragments_in(LocalStore(again)) == wanted


KEY = "ant/000.png"
READERS = {
    "verify": ["verify", "OUT"],
    "status": ["status", "OUT"],
    "show": ["show", "OUT", KEY, "--picture", "TMP/one.png"],
    "show again": ["show", "OUT", KEY, "--explainers", "gradcam", "--model", MODEL, "--picture", "TMP/one.png"],
    "compare": ["compare", "OUT"],
    "versus": ["versus", "OUT", "OUT2", "--output", "TMP/versus"],
    "audit": ["audit", "OUT", "--model", MODEL],
    "report": ["report", "OUT"],
    "virelay": ["export", "OUT", "virelay", "TMP/x"],
    "quantus": ["export", "OUT", "quantus", "TMP/x", "--model", MODEL],
    "fiftyone": ["export", "OUT", "fiftyone", "TMP/x"],
    "spotlight": ["export", "OUT", "spotlight", "TMP/x"],
    "sql": ["sql", "OUT", "SELECT target, count(*) AS maps FROM metrics JOIN maps USING (key, target) GROUP BY target"],
}


@pytest.fixture(scope="module")
def copied(output):
    """An output of the same targets, to compare with."""
    place = output.parent / "out2"
    run_here(output.parent / "in", place, target=TARGETS, explainer="gradcam")
    return place


@pytest.mark.parametrize("name", READERS)
def test_every_command_reads_every_kind_of_target(name, output, copied, tmp_path):
    places = {"OUT2": str(copied), "OUT": str(output), "TMP": str(tmp_path)}
    arguments = list(READERS[name])
    for short, place in places.items():
        arguments = [one.replace(short, place) if one.startswith(short) else one for one in arguments]
    code, text = called(*arguments)
    assert code == 0, text


def test_tools_that_know_classes_alone_say_so(data, tmp_path):
    run_here(data, tmp_path / "out", target="margin", explainer="layercam")
    code, text = called("export", tmp_path / "out", "virelay", tmp_path / "x")
    assert code == 2
    assert "virelay knows maps of classes alone" in text


def test_versus_joins_by_what_is_explained(output, copied, tmp_path):
    import pyarrow.parquet as pq

    assert called("versus", output, copied, "--output", tmp_path / "v")[0] == 0
    rows = pq.read_table(tmp_path / "v/data").to_pylist()
    assert len({(row["key"], row["target"]) for row in rows}) == len(rows) == 5 * NUM_TARGETS
    assert {row["rank_a"] is None for row in rows if row["target"] == "margin"} == {True}


# ---------------------------------------------------------------- names


def named(*names):
    return ModelAdapter(seeded(Tiny), input_size=(32, 32), class_names=names)


AGES = ("0-2", "3-9", "black-and-tan", "tench, Tinca tinca", "tench")


def texts_of(text, adapter, tmp_path):
    return [one.text for one in resolved_targets(config_of(tmp_path, tmp_path / "x", target=text), adapter).expressions]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("3-9", ["1"]),  # there is no class 9: only the name has a meaning
        ("black-and-tan", ["2"]),
        ("logit(black-and-tan)", None),
        ('logit("black-and-tan")', ["logit(2)"]),
        ('"black-and-tan"-"0-2"', ["-0+2"]),
        ('"0-2"', ["0"]),
        ("logit(0-2)", ["0-2"]),
        ("black-and-tan,3-9", ["2", "1"]),
        ("Tinca tinca", ["3"]),
        (["tench, Tinca tinca", "margin"], ["3", "margin"]),
        ("eel", None),
        ("9", None),
        ("1-9", None),
        ("top-6", None),
        ('0,"0-2"', None),
    ],
)
def test_names_are_found_where_one_reading_has_a_meaning(text, wanted, tmp_path):
    adapter = named(*AGES[:4], "goby")
    if wanted is None:
        with pytest.raises(ConfigError, match="target"):
            texts_of(text, adapter, tmp_path)
    else:
        found = texts_of(text, adapter, tmp_path)
        assert found == [one if one != "-0+2" else "2-0" for one in wanted]


@pytest.mark.parametrize("text", ["0-2", "margin"])
def test_two_readings_are_refused_with_both(text, tmp_path):
    adapter = named("0-2", "margin", "cat", "dog", "eel")
    with pytest.raises(ConfigError, match=rf"'{text}' has two meanings: the class of this name .*double quotes"):
        texts_of(text, adapter, tmp_path) if text == "0-2" else texts_of(f"{text},0", adapter, tmp_path)


def test_a_name_with_a_comma_means_what_it_did(tmp_path):
    assert texts_of("tench, Tinca tinca", named("tench, Tinca tinca", *CLASSES[:4]), tmp_path) == ["0"]
    with pytest.raises(ConfigError, match="has two meanings"):
        texts_of("tench, Tinca tinca", named("tench, Tinca tinca", "tench", "Tinca tinca", "cat", "dog"), tmp_path)


def test_a_row_that_names_no_target_is_damaged():
    adapter = make()
    for formula in ("no formula", "99", "0-99", None):
        with pytest.raises(UnreconciledError, match="rows of record 'k'"):
            formulas_of([{"key": "k", "target_formula": formula}], adapter)


@pytest.mark.parametrize(
    ("explainer", "target", "reason"),
    [("bee", "margin", "bee picks a map by the probability of a class")],
)
def test_what_a_method_cannot_explain_is_refused_before_the_first_record(explainer, target, reason, data, tmp_path):
    parameters = ("-p", "choice=even", "-p", "families=normal")
    code, text = called(
        "explain",
        "--data",
        data,
        "--output",
        tmp_path / "o",
        "--model",
        MODEL,
        "--runner",
        "local",
        "--explainer",
        explainer,
        *parameters,
        "--target",
        target,
    )
    assert (code, reason in text) == (2, True), text
    assert not list((tmp_path / "o").glob("data/**/*.parquet"))


def test_a_condition_sees_the_metrics_of_sums_and_takes_maps_by_target(output, tmp_path):
    import pyarrow.parquet as pq

    from blocksight.jobs.export.sql import columns_in, connect

    columns = [name for (metric, _), name in columns_in(connect(str(output))).items() if metric == "insertion"]
    where = f"coalesce({', '.join(columns)}) IS NOT NULL AND target IN ('margin', '0-1')"
    code, text = called("export", output, "numpy", tmp_path / "x", "--where", where)
    assert code == 0, text
    (index,) = (tmp_path / "x").glob("*.parquet")
    taken = pq.read_table(index).to_pylist()
    assert {row["target"] for row in taken} == {"margin", "0-1"}
    assert len(taken) == 2 * 5


# ---------------------------------------------------------------- what users type


NUMBERED = ("1", "0", "2", "4", "three")
RESERVED = ("predicted", "label", "top-2", "T-shirt", "text:a dog")


@pytest.mark.parametrize(
    ("names", "text", "wanted"),
    [
        (NUMBERED, '"1"', ["0"]),
        (NUMBERED, '"0" - "1"', ["1-0"]),
        (NUMBERED, "2", ["2"]),
        (NUMBERED, "-2", ["-2"]),
        (NUMBERED, "predicted", ["predicted"]),
        (NUMBERED, "1", "1 has two meanings: the class of this name (0), and the class of this number, '0'"),
        (NUMBERED, "2-1", "1 has two meanings"),
        (NUMBERED, "4", "4 has two meanings: the class of this name (3), and the class of this number, 'three'"),
        (NUMBERED, "-0", "0 has two meanings"),
        (CLASSES, "-0", ["-0"]),
        (RESERVED, "predicted,label", ["predicted", "label"]),
        (RESERVED, '"predicted"', ["0"]),
        (RESERVED, "top-2", ["predicted", "top-2"]),
        (RESERVED, '"top-2"', ["2"]),
        (RESERVED, "T-shirt", ["3"]),
        (RESERVED, "T-shirt - 0", "a class is named 'T-shirt': write it in double quotes"),
        (RESERVED, "logit(T-shirt)", "a class is named 'T-shirt': write it in double quotes"),
        (RESERVED, "'t-shirt'", "a class is named 'T-shirt': write it in double quotes"),
        (RESERVED, "text:a dog", "write it in double quotes for the class, and write logit(text:a dog) for the other"),
        (RESERVED, '"text:a dog"', ["4"]),
        (("-3", *CLASSES[:4]), '"-3"', ["0"]),
        (("-3", *CLASSES[:4]), "-3", "target '-3' has two meanings: the class of this name (0), and -3 by the grammar"),
        (("-9", *CLASSES[:4]), "-9", ["0"]),
        (CLASSES, '"3"', "target '3' is no class of the model; a class number stands without quotes: 3"),
        (CLASSES, '"text:a dog"', 'what begins with a quote is a class\'s name: write text:"a dog"'),
        (CLASSES, '"similar:q.png"', 'write similar:"q.png"'),
        (CLASSES, "text:red, black", 'a comma separates targets: write text:"red, black" if it is part of it'),
        (("\u65e5\u672c", "na\u00efve", *CLASSES[:3]), "\u65e5\u672c - nai\u0308ve", ["0-1"]),
        (CLASSES, "NaN*1", "is no number"),
        (CLASSES, "1e400*1", "is no number"),
        (CLASSES, "9" * 300 + "*1", ["1" + "0" * 300 + "*1"]),
        (CLASSES, "0*1", "is 0 for every image"),
        (CLASSES, "0*1+2", ["0*1+2"]),
        (CLASSES, "top-6", "asks for more than 5 classes"),
        (CLASSES, "margin-1", "margin stands alone"),
    ],
)
def test_names_that_look_like_something_else(names, text, wanted, tmp_path):
    adapter = named(*names)
    if isinstance(wanted, list):
        assert texts_of(text, adapter, tmp_path) == wanted
        return
    with pytest.raises(ConfigError) as refused:
        texts_of(text, adapter, tmp_path)
    assert wanted in str(refused.value)


ODD_NAMES = ("predicted", "label", "margin", "top-3", "-5", "2", "text:x", "similar:q", "logit(1)", 'q"x', "a, b")


@given(st.lists(st.sampled_from(ODD_NAMES) | st.text(st.characters(codec="utf-8"), min_size=1), min_size=5, max_size=5))
@settings(max_examples=60, deadline=None)
def test_a_quoted_name_is_always_that_class(names):
    assume(len(set(names)) == len(names) and all(name.strip() and "\n" not in name for name in names))
    adapter = named(*names)
    for index, name in enumerate(names):
        (found,) = resolved_targets(JobConfig(data="in", output="out", target=quoted(name)), adapter).expressions
        assert found.atom == Atom("class", index)


@pytest.mark.parametrize("text", ["(" * 5000, '"' * 1001, "logit(" * 3000, ",".join(["text:a-b"] * 2000), "a," * 500])
def test_a_refusal_is_a_line(text, tmp_path):
    with pytest.raises(ConfigError) as refused:
        texts_of(text, named(*CLASSES), tmp_path)
    assert len(str(refused.value)) < 1000


def test_a_file_of_too_many_prompts_is_said(tmp_path):
    (tmp_path / "p.txt").write_text("".join(f"prompt {number}\n" for number in range(10_000)))
    with pytest.raises(ConfigError, match=r"holds 10,000 prompts, and a record has 100 targets at most"):
        config_of(tmp_path, tmp_path / "x", target=f"text:@{tmp_path}/p.txt")


class One(Tiny):
    """One sigmoid's logit."""

    def forward(self, x):
        return super().forward(x)[:, :1]


@pytest.mark.parametrize(
    ("target", "scores"),
    [("predicted", "p"), ("0", "p"), ("logit(0)", "z"), ("logprob(0)", "logp"), ("-0", "-z"), ("margin", "2 classes"),
     ("1", "it has 1, from 0")],
)  # fmt: skip
def test_one_sigmoid_has_its_targets(target, scores, data):
    from blocksight import explain

    adapter = ModelAdapter(seeded(One), input_size=(32, 32))
    ask = {"explainer": "gradcam", "readout": "sigmoid"}
    if " " in scores:
        with pytest.raises(ConfigError, match="class"):
            explain(adapter, data / "ant/000.png", target, **ask)
        return
    found = explain(adapter, data / "ant/000.png", target, **ask)
    z = explain(adapter, data / "ant/000.png", "logit(0)", **ask).score
    p = 1 / (1 + np.exp(-z))
    assert found.score == pytest.approx({"p": p, "z": z, "logp": np.log(p), "-z": -z}[scores], rel=1e-6)
