"""Fidelity per job and per record: which records get full SISE and why. Only the record decides it."""

import pytest

from blocksight.engine.catalog.entries import FIDELITIES
from blocksight.jobs.explain import fidelity
from blocksight.jobs.explain.fidelity import doubts_of, fidelity_columns, rare_labels
from blocksight.jobs.plan.plan import load_plan
from blocksight.jobs.plan.stored_config import NamedModel
from blocksight.jobs.plan.stored_config import config_of as config_again
from blocksight.storage.stores.local import LocalStore
from tests.jobs.jobs_of import blocksight, fragments_in, model_of, rows_in, run_here
from tests.jobs.tiny import folder_of_images, picture

KEEN = "tests.jobs.tiny:make_keen"
FOLDERS = {"ant": (0, 2, 4, 6, 7, 9, 10), "bee": (1, 3, 11, 12), "eel": (15,), "unicorn": (13,)}
"""Pictures by class folder. The model predicts ant for all but number 3, and has no class unicorn."""
REASONS = {
    "ant/00.png": "uncertain",
    "ant/07.png": "poor map",
    "bee/01.png": "wrong, uncertain",
    "bee/03.png": "uncertain",
    "bee/11.png": "wrong",
    "bee/12.png": "wrong",
    "eel/15.png": "wrong, uncertain, rare",
    "unicorn/13.png": "rare",
}
"""The records that get full SISE, by the probabilities of `Keen`."""


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Pictures, and thresholds between their probabilities, whatever the product's thresholds are."""
    monkeypatch.setattr(fidelity, "UNCERTAIN_BELOW", 0.5)  # 0.494 of number 8 and 0.523 of number 4 lie next to it
    monkeypatch.setattr(fidelity, "RARE_SHARE", 0.5)  # of 13 records in four folders: fewer than 1.6
    monkeypatch.setitem(FIDELITIES, "balanced", {"budget": 0.1})
    monkeypatch.setitem(FIDELITIES, "auto", {"budget": 0.1, "complete_above": 0.057})  # number 7: 0.069, else 0.045
    for folder, numbers in FOLDERS.items():
        (tmp_path / "in" / folder).mkdir(parents=True)
        for number in numbers:
            (tmp_path / "in" / folder / f"{number:02}.png").write_bytes(picture(number))
    return tmp_path / "in"


def rows_of(data, output, fidelity="auto", **options):
    run_here(data, output, model=KEEN, fidelity=fidelity, **options)
    return {row["key"]: row for row in rows_in(LocalStore(output))}


# ---------------------------------------------------------------- decisions in numbers


@pytest.mark.parametrize(
    ("facts", "wanted"),
    [
        ((2, 0.5, 2, False), ()),
        ((2, 0.5, None, False), ()),
        ((2, 0.9, 0, False), ("wrong",)),
        ((2, 0.49, 2, False), ("uncertain",)),
        ((2, 0.9, None, True), ("rare",)),
        ((2, 0.1, 0, True), ("wrong", "uncertain", "rare")),
    ],
)
def test_the_reasons_for_full_sise_follow_from_a_record(facts, wanted):
    predicted, probability, label, is_rare = facts
    assert doubts_of(predicted, probability, label, is_rare=is_rare) == wanted


def test_rare_is_less_than_a_quarter_of_an_even_share():
    assert rare_labels({"a": 90, "b": 6, "c": 24}) == {"b"}  # an even share is 40
    assert rare_labels({"a": 110, "b": 10}) == {"b"}
    assert rare_labels({"a": 105, "b": 15}) == frozenset()  # 15 of 60 is a quarter
    assert rare_labels({"a": 1}) == frozenset()
    assert rare_labels({}) == frozenset()


def test_what_a_row_says():
    levels = [
        fidelity_columns(level, doubts, was_completed=completed)
        for level, doubts, completed in (
            (None, (), True),
            ("preview", (), False),
            ("auto", ("wrong", "rare"), False),
            ("auto", (), True),
            ("auto", (), False),
        )
    ]
    assert [tuple(columns.values()) for columns in levels] == [
        (None, None),
        ("preview", "as asked"),
        ("full", "wrong, rare"),
        ("full", "poor map"),
        ("balanced", "sound"),
    ]


# ---------------------------------------------------------------- whole jobs


def test_every_reason_is_in_its_row(data, tmp_path):
    rows = rows_of(data, tmp_path / "out")
    assert {key: row["fidelity_reason"] for key, row in rows.items() if row["fidelity"] == "full"} == REASONS
    others = [row for row in rows.values() if row["key"] not in REASONS]
    assert len(others) == 5
    assert {(row["fidelity"], row["fidelity_reason"]) for row in others} == {("balanced", "sound")}


def test_a_row_is_that_of_a_job_at_its_level(data, tmp_path):
    chosen = rows_of(data, tmp_path / "auto")
    at_level = {level: rows_of(data, tmp_path / level, level) for level in ("balanced", "full")}
    same = ("map", "score", "num_forwards", "score_r2", "map_error", "blocks", "metrics")
    for key, row in chosen.items():
        alike = at_level[row["fidelity"]][key]
        assert {name: row[name] for name in same} == {name: alike[name] for name in same}
        assert at_level["balanced"][key]["map"] != at_level["full"][key]["map"]
        assert at_level["balanced"][key]["num_forwards"] < at_level["full"][key]["num_forwards"]


def test_units_and_a_restart_do_not_change_the_rows(data, tmp_path, monkeypatch):
    parts = rows_of(data, tmp_path / "parts")
    store = LocalStore(tmp_path / "parts")
    before = fragments_in(store)
    assert len(before) == len(parts)
    for key in list(before)[::2]:
        store.delete(key)
    rows_of(data, tmp_path / "parts")
    assert fragments_in(store) == before
    for place in ("blocksight.cluster.sizing", "blocksight.jobs.plan.units"):
        monkeypatch.setattr(f"{place}.LEAST_UNIT_SECONDS", 1e4)
    whole = rows_of(data, tmp_path / "whole")
    assert len(fragments_in(LocalStore(tmp_path / "whole"))) == 1
    for key, row in whole.items():
        assert {**row, "unit_id": ""} == {**parts[key], "unit_id": ""}


def test_levels_have_different_digests_of_their_parameters(data, tmp_path):
    rows = [rows_of(data, tmp_path / level, level, limit=1)["ant/00.png"] for level in FIDELITIES]
    assert len({row["parameters"] for row in rows}) == len(FIDELITIES) == 4
    assert [row["fidelity_reason"] for row in rows] == ["as asked", "as asked", "as asked", "uncertain"]
    assert [row["fidelity"] for row in rows] == ["preview", "balanced", "full", "full"]
    assert [row["num_forwards"] for row in rows] == [0, 2, 19, 19]


@pytest.mark.parametrize(
    "asked", [{"explainer": "gradcam"}, {"parameters": {"budget": 4}}, {"parameters": {"budget": "auto"}}]
)
def test_other_methods_and_own_budgets_have_no_level(data, tmp_path, asked):
    (row,) = rows_of(data, tmp_path / "out", "full", limit=1, **asked).values()
    assert row["map"] is not None
    assert (row["fidelity"], row["fidelity_reason"]) == (None, None)


def test_a_rejected_record_has_no_level(tmp_path):
    rows = rows_of(folder_of_images(tmp_path / "in", 3), tmp_path / "out")
    assert {row["status"]: row["fidelity"] for row in rows.values()} == {"ok": "full", "rejected": None}


def test_an_output_is_read_back_at_its_level(data, tmp_path):
    rows_of(data, tmp_path / "out", limit=1)
    plan = load_plan(LocalStore(tmp_path / "out"))
    again = config_again(plan, str(tmp_path / "out"), NamedModel(model_of(tmp_path / "out")))
    assert again.level == "auto"
    assert again.explainer_parameters().complete_above == 0.057


def test_the_option_reaches_the_plan(tmp_path):
    data = folder_of_images(tmp_path / "in", 2, bad=False)
    common = ("plan", "--data", data, "--output", tmp_path / "out", "--fidelity")
    assert "(1 a record" in blocksight(*common, "preview").stdout
    refused = blocksight(*common, "auto", "--budget", "0.2")
    assert refused.returncode == 2
    assert "fidelity auto means budget = 0.1, and budget = 0.2 is asked for as well" in refused.stderr
