"""Targets of features through a job: similarity to a picture, a bank's class, a unit, a direction of a file."""

import shutil

import numpy as np
import pytest
import torch

from blocksight import explain
from blocksight.engine.errors import ModelError
from blocksight.jobs.plan.plan import MODEL_KEY, DriftError
from blocksight.storage.images.decode import decode, fit
from blocksight.storage.stores.local import LocalStore
from tests.jobs.jobs_of import called, fragments_in, rows_in, run_here
from tests.jobs.tiny import MODEL, folder_of_images, make

DIMENSIONS = 8
"""Of the tiny model's feature vector."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures, and files that targets name."""
    root = tmp_path_factory.mktemp("features")
    folder_of_images(root / "in", 5, bad=False)
    shutil.copy(root / "in/bee/001.png", root / "a-bee.png")
    shutil.copy(root / "in/ant/000.png", root / "ant.png")
    np.save(root / "d.npy", np.arange(DIMENSIONS)[None])
    return root


def targets_of(root):
    bee, ant = f'similar:"{root}/a-bee.png"', f'similar:"{root}/ant.png"'
    return ["predicted", f"{bee} - {ant}", "feature:3", f'direction:"{root}/d.npy"', f'{bee}-0.5*"cat"']


@pytest.fixture(scope="module")
def output(data):
    place = data / "out"
    run_here(data / "in", place, target=targets_of(data), explainer="layercam")
    return place


def features_at(root, file):
    adapter = make()
    pixels = fit(decode((root / file).read_bytes()).pixels, adapter.input_size, "squash")
    inputs = adapter.normalise(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])
    with torch.no_grad():
        own = (adapter.module.second(adapter.module.first(inputs)).mean((2, 3)) * 4)[0].double()
        return own, adapter.logits(inputs)[0].double()


def cosine(one, other):
    return float(one @ other / one.norm() / other.norm())


def test_rows_hold_the_values(output, data):
    bee, ant = (features_at(data, name)[0] for name in ("a-bee.png", "ant.png"))
    direction = torch.arange(DIMENSIONS).double()
    records = {}
    for row in rows_in(LocalStore(output)):
        records.setdefault(row["key"], []).append(row)
    assert len(records) == 5
    for key, rows in records.items():
        own, logits = features_at(data, f"in/{key}")
        wanted = [
            float(logits.softmax(0).max()),
            cosine(own, bee) - cosine(own, ant),
            float(own[3]),
            float(own @ direction / direction.norm()),
            cosine(own, bee) - 0.5 * float(logits[2]),
        ]
        assert [row["score"] for row in rows] == pytest.approx(wanted, rel=1e-4, abs=1e-6)
        assert [row["target_index"] for row in rows] == [int(logits.argmax()), *[None] * 4]
        assert [row["target_rank"] for row in rows] == [1, *[None] * 4]
        assert rows[0]["label_rank"] is not None
        assert [row["target_source"] for row in rows[1:]] == ["expression", "given", "given", "expression"]
    words = [row["target"] for row in rows[1:]]
    assert words == [one.replace(" - ", "-").replace('"cat"', "2") for one in targets_of(data)[1:4]] + [words[3]]
    assert [row["target_formula"] for row in rows[1:]] == words
    assert rows[2]["target_name"] == "feature 3"
    assert rows[1]["target_name"] == f"similar to {data}/a-bee.png - similar to {data}/ant.png"


def test_the_job_without_them_has_the_same_classes(output, data, tmp_path):
    run_here(data / "in", tmp_path / "o", target="predicted", explainer="layercam")
    columns = ("score", "map", "target_index", "target_rank", "label_rank", "metrics")
    plain = {row["key"]: row for row in rows_in(LocalStore(tmp_path / "o"))}
    mine = {row["key"]: row for row in rows_in(LocalStore(output)) if row["target_source"] == "predicted"}
    for key, row in plain.items():
        assert {name: row[name] for name in columns} == {name: mine[key][name] for name in columns}


def test_vectors_are_stored_and_other_files_are_drift(output, data):
    wanted = fragments_in(LocalStore(output))
    assert b'"features": [' in LocalStore(output).read(MODEL_KEY)
    for folder in ("data", "_job/receipts"):
        for file in (output / folder).rglob("*.parquet"):
            file.unlink()
    run_here(data / "in", output, target=targets_of(data), explainer="layercam")
    assert fragments_in(LocalStore(output)) == wanted
    picture = (data / "a-bee.png").read_bytes()
    shutil.copy(data / "in/cat/002.png", data / "a-bee.png")
    try:
        with pytest.raises(DriftError, match="target_files"):
            run_here(data / "in", output, target=targets_of(data), explainer="layercam")
    finally:
        (data / "a-bee.png").write_bytes(picture)


KEY = "cat/002.png"
READERS = {
    "verify": ["verify", "OUT"],
    "show": ["show", "OUT", KEY, "--picture", "TMP/one.png"],
    "show again": ["show", "OUT", KEY, "--explainers", "gradcam", "--model", MODEL, "--picture", "TMP/one.png"],
    "evaluate": ["evaluate", "OUT", "--metrics", "insertion,pos", "--controls", "--runner", "local", "--model", MODEL],
    "compare": ["compare", "OUT"],
    "versus": ["versus", "OUT", "OUT", "--output", "TMP/versus"],
    "audit": ["audit", "OUT", "--model", MODEL],
    "report": ["report", "OUT"],
    "regions": ["regions", "OUT"],
    "sql": ["sql", "OUT", "SELECT target, count(*) FROM metrics JOIN maps USING (key, target) GROUP BY target"],
}


@pytest.mark.parametrize("name", READERS)
def test_every_command_reads_them_without_the_files(name, output, data, tmp_path):
    for file in ("a-bee.png", "ant.png", "d.npy"):
        (data / file).rename(data / f"{file}.away")
    try:
        places = {"OUT": str(output), "TMP": str(tmp_path)}
        arguments = list(READERS[name])
        for short, place in places.items():
            arguments = [one.replace(short, place) if one.startswith(short) else one for one in arguments]
        code, text = called(*arguments)
    finally:
        for file in ("a-bee.png", "ant.png", "d.npy"):
            (data / f"{file}.away").rename(data / file)
    assert code == 0, text


def test_an_output_has_no_file_read_that_its_plan_names(output, tmp_path):
    shutil.copytree(output, tmp_path / "o")
    (tmp_path / "o" / MODEL_KEY).unlink()
    metrics = ("--metrics", "deletion", "--runner", "local")
    code, text = called("evaluate", tmp_path / "o", *metrics, "--model", MODEL)
    assert (code, "holds no vectors of its targets yet" in text) == (2, True), text


def test_metrics_never_mix_a_class_with_a_feature(output):
    found = {}
    for row in rows_in(LocalStore(output)):
        found.setdefault(row["target"], set()).add(row["metrics"]["protocol"])
    protocols = [next(iter(own)) for own in found.values() if len(own) == 1]
    assert len(set(protocols)) == len(found)


@pytest.mark.parametrize(("explainer", "is_rejected"), [("gradcam", True), ("occlusion", False)])
def test_a_picture_beside_itself_has_no_gradient(explainer, is_rejected, data, tmp_path):
    run_here(
        data / "in", tmp_path / "o", target=f'similar:"{data}/a-bee.png"', explainer=explainer,
        parameters={"window": 8, "stride": 8} if explainer == "occlusion" else {}, max_reject_fraction=1,
    )  # fmt: skip
    rows = {row["key"]: row for row in rows_in(LocalStore(tmp_path / "o"))}
    assert [key for key, row in rows.items() if row["reject_code"] == "no_gradient"] == ["bee/001.png"] * is_rejected
    if is_rejected:
        assert "take an explainer that masks" in rows["bee/001.png"]["error"]
        with pytest.raises(ModelError, match="its similarity to itself has no gradient"):
            explain(make(), data / "in/bee/001.png", f'similar:"{data}/a-bee.png"', explainer)


def test_one_picture_equals_the_job(output, data):
    wanted = next(row for row in rows_in(LocalStore(output)) if row["key"] == KEY and row["target"] == "feature:3")
    found = explain(make(), data / "in" / KEY, "feature:3", "layercam")
    assert found.row["map"].tobytes() == wanted["map"] or np.array_equal(found.row["map"], decoded(wanted))
    assert (found.score, found.target, found.target_index) == (wanted["score"], "feature 3", None)


def decoded(row):
    from blocksight.jobs.ledger.output import map_of

    return np.rint(map_of(row) * 255).astype(np.uint8)


def test_a_bank_has_prototypes(data, tmp_path):
    bank = tmp_path / "bank.safetensors"
    assert called("bank", "--data", data / "in", "--output", bank, "--model", MODEL)[0] == 0
    common = {"model": f"knn({MODEL})", "weights": str(bank), "explainer": "layercam"}
    run_here(data / "in", tmp_path / "o", target="predicted,prototype:bee,prototype:3", **common)
    rows = rows_in(LocalStore(tmp_path / "o"))
    bees = [row for row in rows if row["target"] == "prototype:1" and row["key"] == "bee/001.png"]
    assert [row["target_name"] for row in rows[:3]][1:] == ["prototype of bee", "prototype of dog"]
    assert bees[0]["score"] == pytest.approx(1.0, abs=1e-5)  # the class's only picture
    again = ("evaluate", tmp_path / "o", "--metrics", "insertion", "--runner", "local", "--model", f"knn({MODEL})")
    assert called(*again)[0] == 0


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("similar:nowhere.png", "there is no file nowhere.png"),
        ("similar:my-photo.png", 'write similar:"my-photo.png" if it is part of it'),
        ("feature:8", "has 8 numbers, from 0"),
        ("feature:-1", "cannot be read"),
        ("prototype:ant", "has no memory bank"),
        ("prototype:wolf", "is no class of the model"),
        ("prototype:9", "is of no class"),
        ("logprob(feature:3)", "a log-probability is of classes"),
        ("direction:ROOT/ant.png", "is no .npy file"),
        ("direction:ROOT/endless.npy", "is no .npy file"),
        ("direction:ROOT/short.npy", "holds 3 numbers, and the feature vector has 8"),
        ("direction:ROOT/zero.npy", "it is 0, or not finite"),
        ("similar:ROOT/d.npy", "cannot be read"),
    ],
)
def test_what_has_no_meaning_is_refused_before_work(target, reason, data, tmp_path):
    np.save(tmp_path / "short.npy", np.arange(3))
    endless = (tmp_path / "short.npy").read_bytes().replace(b"(3,), }" + 15 * b" ", b"(" + 15 * b"9" + b",), } ")
    (tmp_path / "endless.npy").write_bytes(endless)
    np.save(tmp_path / "zero.npy", np.zeros(DIMENSIONS))
    shutil.copy(data / "ant.png", tmp_path)
    shutil.copy(data / "d.npy", tmp_path)
    prefix, _, rest = target.partition(":ROOT/")
    target = f'{prefix}:"{tmp_path}/{rest}"' if rest else target
    code, text = called(
        "explain", "--data", data / "in", "--output", tmp_path / "o", "--model", MODEL, "--runner", "local",
        "--explainer", "gradcam", f"--target={target}",
    )  # fmt: skip
    assert (code, reason in text) == (2, True), text
    assert not list((tmp_path / "o").glob("data/**/*.parquet"))
