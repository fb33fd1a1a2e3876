"""How often the model is right and how many maps are flat: exact over all units, and said loudly where it is bad."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksight.jobs.ledger import accuracy as module
from blocksight.jobs.ledger.accuracy import Accuracy, accuracy_of, is_right, label_counts
from blocksight.jobs.ledger.receipts import receipt_of
from blocksight.jobs.ledger.reconcile import check, read_job_state
from blocksight.jobs.plan.plan import load_plan
from blocksight.jobs.plan.records import Receipt
from blocksight.storage.stores.local import LocalStore
from tests.jobs.jobs_of import called, change_receipt, receipts_in, rows_in, run_here
from tests.jobs.outputs import output_of_small_units
from tests.jobs.tiny import CLASSES, folder_of_images

RECEIPT = Receipt("u", 0, "f", 1, "s", 1, 1, 1, 0, {}, 0, {})


def row(number=0, label=None, label_rank=None, target=0, rank=1, name="x", status="ok"):
    return {
        "shard": "s",
        "shard_index": number,
        "status": status,
        "label": label,
        "label_name": name,
        "label_rank": label_rank,
        "target_index": target,
        "target_rank": rank,
    }


def receipt(rows):
    return dataclasses.replace(RECEIPT, labels=label_counts(rows))


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([row(label=3, label_rank=1)], True),
        ([row(label=3, label_rank=2, target=3)], False),
        ([row(label=None)], None),
        ([row(label=3, target=3)], True),  # of an older output, as all below
        ([row(label=3, target=4)], False),
        ([row(label=3, target=3, rank=2)], False),
        ([row(label=3, target=4, rank=2)], None),
        ([row(label=3, target=4, rank=2), row(label=3, target=3)], True),
    ],
)
def test_a_record_is_right_if_its_label_is_the_prediction(rows, wanted):
    assert is_right(rows) is wanted


@settings(max_examples=25)
@given(
    records=st.lists(st.tuples(st.none() | st.integers(0, 6), st.integers(1, 7)), max_size=25),
    size=st.integers(1, 9),
)
def test_the_figures_are_the_same_in_any_units(records, size):
    rows = [
        row(number, label, None if label is None else rank, target=target, rank=target + 1)
        for number, (label, rank) in enumerate(records)
        for target in range(2)  # two rows per record: a record counts once
    ]
    cuts = [rows[start : start + 2 * size] for start in range(0, len(rows), 2 * size)]
    found = accuracy_of([receipt(own) for own in cuts], 7)
    assert found == accuracy_of([receipt(rows)], 7)
    known = [(label, rank) for label, rank in records if label is not None]
    if known:
        assert found.num_records == len(known)
        assert found.num_right == sum(rank == 1 for _, rank in known)
        assert found.num_in_first_5 == sum(rank <= 5 for _, rank in known)
        labels = [label for label, _ in known]
        assert found.majority == max(labels.count(label) for label in labels) / len(labels)
        assert found.no_class == len(records) - len(known)


def test_an_older_output_says_records_right_and_not_the_top_5():
    found = accuracy_of([receipt([row(0, 3, target=3), row(1, 2, target=0)])], 10)
    assert (found.num_right, found.num_records, found.num_in_first_5) == (1, 2, None)
    assert accuracy_of([receipt([row(0, 3, 1)]), RECEIPT], 10) is None  # its receipt counts no labels


def test_more_labels_than_a_receipt_holds_are_not_counted(monkeypatch):
    monkeypatch.setattr(module, "MAX_COUNTED_CLASSES", 2)
    assert label_counts([row(number, number, 1) for number in range(2)]) is not None
    assert label_counts([row(number, number, 1) for number in range(3)]) is None


def made(num_right, num_records, num_classes, num_labels=None):
    each, rest = divmod(num_records, num_labels or num_classes)
    labels = {label: each + (label < rest) for label in range(num_labels or num_classes)}
    return Accuracy(num_right, num_right, labels, 0, num_classes)


@pytest.mark.parametrize(
    ("num_right", "num_records", "num_classes", "is_near"),
    [
        (23, 200, 10, True),  # 11.5 %: the weights of another normalisation
        (0, 12, 10, True),
        (1, 3, 10, False),  # too few to tell
        (60, 200, 10, False),
        (80, 1000, 1000, True),
        (55, 100, 2, False),
        (52, 100, 2, True),
        (5, 10, 2, False),  # too few to tell
        (9, 10, 10, False),
    ],
)
def test_a_model_near_chance_gets_a_loud_sentence(num_right, num_records, num_classes, is_near):
    found = made(num_right, num_records, num_classes)
    assert found.is_near_chance is is_near
    assert ("NEAR CHANCE" in " ".join(found.warnings)) is is_near


def test_a_model_that_gives_one_answer_is_told_from_one_that_knows():
    labels = {0: 80, 1: 10, 2: 10}
    assert "NO BETTER THAN ONE ANSWER FOR ALL: 80.0 % right" in Accuracy(80, 90, labels, 0, 10).warnings[0]
    assert Accuracy(81, 90, labels, 0, 10).warnings == ()
    assert Accuracy(80, 80, {0: 80}, 0, 10).warnings == ()  # one class alone: every right model does that


def test_the_sentence_names_what_may_be_wrong_and_both_figures():
    (sentence,) = made(23, 200, 10).warnings
    for part in ("11.5 % right", "a guess is right in 10.0 %", "normalised", "size", "order"):
        assert part in sentence


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    base = tmp_path_factory.mktemp("accuracy")
    with pytest.MonkeyPatch.context() as patch:
        return output_of_small_units(base, patch)


def test_every_unit_adds_to_what_the_summaries_say(output):
    store = LocalStore(output)
    state = read_job_state(store, load_plan(store))
    assert len(state.receipts) > 1
    rows = {row["key"]: row for row in rows_in(store) if row["status"] == "ok"}.values()
    num_right = sum(row["label_rank"] == 1 for row in rows)
    assert (state.accuracy.num_right, state.accuracy.num_records) == (num_right, len(rows))
    assert state.num_maps == 2 * len(rows)
    line = f"{num_right} of {len(rows)} records right"
    for command in ("status", "verify"):
        printed = called(command, output)[1]
        assert line in printed
        assert "chance is 20.0 % (5 classes), the most frequent class alone" in printed
        assert f"none of {state.num_maps} maps are flat" in printed


def test_a_receipt_of_an_older_version_is_read_and_reconciled(output):
    store = LocalStore(output)
    plan = load_plan(store)
    unit = plan.units[0]
    [document] = [one for one in receipts_in(store) if one["unit_id"] == unit.unit_id]
    try:
        older = {name: value for name, value in document.items() if name not in ("num_flat", "labels")}
        change_receipt(store, unit.unit_id, lambda _: older)
        state = read_job_state(store, plan)
        assert state.accuracy is None
        assert state.flat_fact == "not counted by the version that made this output"
        assert [fault for _, faults in check(store, plan) for fault in faults] == []
    finally:
        change_receipt(store, unit.unit_id, lambda _: document)
    assert receipt_of(unit, store.read(unit.fragment_key)).labels == document["labels"]


def test_labels_without_a_class_are_said(tmp_path):
    data = folder_of_images(tmp_path / "in", 4, bad=False)
    for number, name in enumerate(CLASSES):
        if (data / name).exists():
            (data / name).rename(data / f"thing{number}")
    run_here(data, tmp_path / "out", explainer="gradcam", limit=4)
    assert "not known: the labels of 4 records mean no class of the model" in " ".join(
        called("status", tmp_path / "out")[1].split()
    )


def test_maps_that_are_all_flat_are_said_loudly(tmp_path, monkeypatch):
    monkeypatch.setattr("blocksight.jobs.explain.step.is_flat", lambda _: True)
    run_here(folder_of_images(tmp_path / "in", 2, bad=False), tmp_path / "out", explainer="gradcam")
    printed = " ".join(called("status", tmp_path / "out")[1].split())
    assert "2 of 2 maps are flat" in printed
    assert "MAPS ARE FLAT: 2 of 2 maps are flat; they say nothing about the model." in printed
