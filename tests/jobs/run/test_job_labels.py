"""How a job reads labels: what plan, explain and status say, and what is refused before any work."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blocksight.jobs.plan.config import ConfigError
from blocksight.storage.stores.local import LocalStore
from tests.jobs.jobs_of import called, rows_in, run_here
from tests.jobs.tiny import CLASSES, MODEL, folder_of_images, folder_of_tables, folder_of_tars, picture, tar_bytes

NAMELESS = "tests.jobs.tiny:make_nameless"


def folders(root, *names):
    """One picture in each class folder."""
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        (root / name / f"{number}.png").write_bytes(picture(number))
    return root


def labels_in(output):
    return {row["label_name"]: row["label"] for row in rows_in(LocalStore(output))}


def line_of(text, start):
    return next(line.partition(start)[2].strip() for line in text.splitlines() if line.strip().startswith(start))


def test_plan_explain_and_status_say_the_same_of_the_labels(tmp_path):
    data, out = folders(tmp_path / "in", "ant", "Bee", "unicorn"), tmp_path / "out"
    job = ("--data", data, "--output", out, "--model", MODEL)
    said = line_of(called("plan", *job)[1], "labels")
    assert said.startswith("3 class folders of 3 records: 1 known by class name; 1 known by class name in another")
    assert not out.exists()
    code, text = called("explain", *job, "--explainer", "gradcam", "--runner", "local")
    assert code == 0
    assert said.split()[:12] == line_of(text, "labels:").split()[:12]
    assert "'unicorn' means no class of the model" in " ".join(text.split())
    assert said.split()[:12] == line_of(called("status", out)[1], "labels").split()[:12]
    assert labels_in(out) == {"ant": 0, "Bee": 1, "unicorn": None}


def test_explain_takes_a_class_map_and_another_one_is_another_job(tmp_path):
    data, out = folders(tmp_path / "in", "ape", "bear"), tmp_path / "out"
    (tmp_path / "map.json").write_text(json.dumps({"ape": 4, "bear": [2]}))
    job = ("--data", data, "--output", out, "--model", MODEL, "--explainer", "gradcam", "--runner", "local")
    code, text = called("explain", *job, "--class-map", tmp_path / "map.json", "--target", "label")
    assert (code, labels_in(out)) == (0, {"ape": 4, "bear": 2})
    assert "2 known by the class map" in " ".join(text.split())
    assert called("explain", *job, "--target", "label")[0] == 2
    (tmp_path / "map.json").write_text(json.dumps({"ape": "cat"}))
    assert (
        "gives 'ape' 'cat'; wanted class numbers" in called("plan", *job[:6], "--class-map", tmp_path / "map.json")[1]
    )


def test_a_limit_leaves_the_order_of_all_class_folders(tmp_path):
    run_here(folders(tmp_path / "in", *"abcde"), tmp_path / "out", model=NAMELESS, explainer="gradcam", limit=2)
    assert labels_in(tmp_path / "out") == {"a": 0, "b": 1}


@pytest.mark.parametrize(
    ("names", "options", "fault"),
    [
        ("abcd", {}, "4 class folders, one too few"),
        ("12345", {}, "numbers from 1 to 5"),
        ("ab", {"target": "label"}, "no label means a class"),
    ],
)
def test_labels_that_cannot_be_meant_are_refused_before_any_work(tmp_path, names, options, fault):
    data = folders(tmp_path / "in", *names)
    with pytest.raises(ConfigError, match=fault):
        run_here(data, tmp_path / "out", model=NAMELESS, explainer="gradcam", **options)
    assert not (tmp_path / "out").exists()


def test_a_target_may_be_a_class_name(tmp_path):
    data = folders(tmp_path / "in", "ant", "bee")
    run_here(data, tmp_path / "out", explainer="gradcam", target="Dog")
    rows = rows_in(LocalStore(tmp_path / "out"))
    assert [(row["target_name"], row["target_source"]) for row in rows] == [("dog", "given")] * 2
    assert called("verify", tmp_path / "out")[0] == 0


@pytest.mark.parametrize(
    ("model", "target", "fault"),
    [
        (MODEL, "bees", "'bees' is no class of the model; nearest: 'bee'; known: predicted, label"),
        (MODEL, "predict", "'predict' is no class of the model; known: predicted, label"),
        (NAMELESS, "bee", "has no class names"),
        ("tests.jobs.tiny:make_twins", "bee", r"more than one class: bee \(class 1\), bee \(class 3\); name one by"),
    ],
)
def test_a_target_of_no_class_or_of_two_is_refused(tmp_path, model, target, fault):
    data = folders(tmp_path / "in", "x")
    with pytest.raises(ConfigError, match=fault):
        run_here(data, tmp_path / "out", model=model, explainer="gradcam", target=target)
    code, text = called("plan", "--data", data, "--output", tmp_path / "out", "--model", model, "--target", target)
    assert code == 2
    assert re.search(fault, text)


@pytest.mark.parametrize("make", [folder_of_images, folder_of_tars, folder_of_tables])
def test_a_file_gives_the_labels_of_any_layout(tmp_path, make):
    data, out = make(tmp_path / "in"), tmp_path / "out"
    run_here(data, out, explainer="gradcam")
    keys = sorted(row["key"] for row in rows_in(LocalStore(out)) if row["status"] == "ok")
    wanted = {key: CLASSES[number % 3] for number, key in enumerate(keys)}
    lines = [f"{key},{name}" for key, name in wanted.items() if key != keys[0]]
    (tmp_path / "l.csv").write_text("\n".join(["key,label", *lines]))
    run_here(data, tmp_path / "own", explainer="gradcam", labels=str(tmp_path / "l.csv"), target="label")
    rows = [row for row in rows_in(LocalStore(tmp_path / "own")) if row["status"] == "ok"]
    assert {row["key"]: row["label_name"] for row in rows} == {key: wanted[key] for key in keys[1:]}
    assert all(row["label"] == row["target_index"] == CLASSES.index(row["label_name"]) for row in rows)


def test_keys_without_an_image_and_images_without_a_label_are_counted(tmp_path):
    data = folders(tmp_path / "in", "ant", "bee", "cat")
    (tmp_path / "l.csv").write_text("key,label\n0.png,dog\nbee/1.png,4\n9.png,ant\n")
    job = ("--data", data, "--output", tmp_path / "out", "--model", MODEL, "--labels", tmp_path / "l.csv")
    text = " ".join(called("plan", *job)[1].split())
    assert (
        "2 labels of 3 records: 1 known as class numbers; 1 known by class name; 1 without a label; 1 key of " in text
    )
    assert "without an image: '9.png'" in text
    run = (*job, "--explainer", "gradcam", "--runner", "local")
    assert called("explain", *run)[0] == 0
    assert "without an image: '9.png'" in " ".join(called("status", tmp_path / "out")[1].split())
    (tmp_path / "l.csv").write_text("key,label\n0.png,ant\n")
    code, text = called("explain", *run)
    assert code == 2
    assert "labels: " in text


@pytest.mark.parametrize("make", [folder_of_images, folder_of_tables])
def test_a_file_of_labels_for_other_data_is_refused_before_any_work(tmp_path, make):
    (tmp_path / "l.csv").write_text("key,label\nother,ant\n")
    with pytest.raises(ConfigError, match=r"none of the data's records has a key in the file of --labels: .*'other'"):
        run_here(make(tmp_path / "in"), tmp_path / "out", labels=str(tmp_path / "l.csv"))
    job = ("--data", tmp_path / "in", "--output", tmp_path / "out", "--labels", tmp_path / "l.csv")
    assert called("plan", *job, "--model", MODEL)[0] == 2
    assert not (tmp_path / "out").exists()


def test_a_file_of_labels_for_other_shards_is_refused_after_a_look_at_their_beginning(tmp_path):
    (tmp_path / "l.csv").write_text("key,label\nother,ant\n")
    with pytest.raises(ConfigError, match="none of the first 7 records has a key in the file"):
        run_here(folder_of_tars(tmp_path / "in"), tmp_path / "out", labels=str(tmp_path / "l.csv"))


def test_a_record_that_two_keys_of_the_file_may_mean_is_named(tmp_path):
    data = folders(tmp_path / "in", "ant", "bee")
    (tmp_path / "l.csv").write_text("key,label\nx/0.png,dog\ny/0.png,eel\n1.png,cat\n")
    (data / "0.png").write_bytes(picture(5))
    job = ("--data", data, "--output", tmp_path / "out", "--model", MODEL, "--labels", tmp_path / "l.csv")
    code, text = called("plan", *job)
    assert code == 0
    assert "record 0.png matches 'x/0.png' and 'y/0.png'" in " ".join(text.split())


def test_a_label_column_that_is_never_read_is_no_target(tmp_path):
    column = pa.array([[("a", 1)]] * 2, pa.map_(pa.string(), pa.int64()))
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"image": [picture(0), picture(1)], "label": column}), tmp_path / "in" / "t.parquet")
    with pytest.raises(ConfigError, match="the target is the label, and no label means a class"):
        run_here(tmp_path / "in", tmp_path / "out", target="label")


def test_explain_says_what_of_the_data_it_leaves_out(tmp_path):
    data = folders(tmp_path / "in", "ant")
    for name in ("ant/noname", "ant/x.jpg.bak", "_old.png"):
        (data / name).write_bytes(picture(1))
    job = ("--data", data, "--output", tmp_path / "out", "--model", MODEL)
    text = called("explain", *job, "--explainer", "gradcam", "--runner", "local")[1]
    assert line_of(text, "data:") == "no input: 1 (no suffix), 1 .bak, 1 hidden (_ or .)"


def test_a_limit_hides_nothing_of_a_shard(tmp_path):
    folder_of_tars(tmp_path / "in")
    (tmp_path / "in" / "a.tar").write_bytes(tar_bytes(0, 4, extra="json"))
    job = ("--data", tmp_path / "in", "--output", tmp_path / "out", "--model", MODEL, "--limit", "2")
    text = " ".join(called("plan", *job)[1].split())
    assert "note a.tar: members that are not read: json (000)" in text
    assert "2 labels of 2 records: 2 known as class numbers" in text


def test_numbers_of_a_table_are_read_by_its_own_names(tmp_path):
    (tmp_path / "in").mkdir()
    features = {"label": {"names": ["bee", "ant", "yak"], "_type": "ClassLabel"}}
    table = pa.table({"image": [picture(number) for number in range(3)], "label": [0, 1, 2]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "in" / "t.parquet")
    run_here(tmp_path / "in", tmp_path / "out", explainer="gradcam")
    assert labels_in(tmp_path / "out") == {"0": 1, "1": 0, "2": None}
    job = ("--data", tmp_path / "in", "--output", tmp_path / "out", "--model", MODEL, "--explainer", "gradcam")
    text = " ".join(called("plan", *job)[1].split())
    assert "2 known as numbers by the names that the table gives them" in text


def test_plan_refuses_random_weights_as_explain_does(tmp_path):
    for labels in ([], ["--labels", "none"]):
        job = ("--data", folders(tmp_path / f"in{len(labels)}", "x"), "--output", tmp_path / "out", *labels)
        code, text = called("plan", *job, "--model", "torchvision.models:mobilenet_v3_small")
        assert code == 2
        assert "its weights would be RANDOM" in text


def test_labels_may_be_left_out(tmp_path):
    data = folders(tmp_path / "in", *"abcd")
    run_here(data, tmp_path / "out", model=NAMELESS, explainer="gradcam", labels="none")
    assert labels_in(tmp_path / "out") == {None: None}
