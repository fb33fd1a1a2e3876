"""Exports: every form holds every explained map once, with the numbers that stand, in files that no key can name."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import save_file

from blocksight.jobs.audit.result import GRID
from blocksight.jobs.export.array_file import ArrayFile
from blocksight.jobs.export.run import ExportRequest, fresh_folder, run_export
from blocksight.jobs.export.sql import connect
from blocksight.jobs.export.virelay import _table, principal_components
from blocksight.jobs.ledger.output import map_of
from blocksight.jobs.plan.config import ConfigError
from blocksight.storage.images.decode import decode, fit
from blocksight.storage.outputs.pictures import overlay, resized
from blocksight.storage.stores.local import LocalStore
from blocksight.storage.stores.opening import open_store
from tests.jobs.jobs_of import called, model_of, rows_in, run_here
from tests.jobs.outputs import HOSTILE, audit, explained, hostile_table, measured, output_of_small_units, pooled
from tests.jobs.tiny import CLASSES, folder_of_images, folder_of_tars, make, picture

FORMS = ("fiftyone", "virelay", "spotlight", "quantus")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """Seven records with two targets each, three rejected; deletion under two protocols; an audit."""
    base = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        output = output_of_small_units(base, patch)
    measured(output, metrics="deletion,entropy", controls=True)
    measured(output, metrics="deletion", baseline="black")
    audit(LocalStore(output))
    return output


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    base = tmp_path_factory.mktemp("hostile")
    run_here(hostile_table(base / "in"), base / "out", explainer="gradcam")
    return base / "out"


def exported(output, form, folder, **options):
    if form == "quantus":
        options = {"model": model_of(output), **options}
    lines = run_export(ExportRequest(str(output), form, str(folder), **options), Console(quiet=True))
    return Path(folder), lines


def metrics_by_map(output):
    """What the view `metrics` holds of the output's own method, by key and target."""
    found = connect(str(output)).execute("SELECT * EXCLUDE (parameters) FROM metrics WHERE explainer = 'gradcam'")
    names = [column[0] for column in found.description]
    rows = [dict(zip(names, row, strict=True)) for row in found.fetchall()]
    return {(row.pop("key"), row.pop("target_index")): row for row in rows}


def plain(metrics):
    return {name: value for name, value in metrics.items() if name not in ("explainer", "target") and value is not None}


# ---------------------------------------------------------------- FiftyOne


def test_fiftyone_has_a_sample_per_map_with_its_numbers(output, tmp_path):
    folder, lines = exported(output, "fiftyone", tmp_path / "x")
    assert lines[0] == "7 records exported; left out: 3 rejected, 0 whose image is gone"
    assert "fo.types.FiftyOneDataset" in lines[-1]
    samples = json.loads((folder / "samples.json").read_text())["samples"]
    rows, values = explained(LocalStore(output)), metrics_by_map(output)
    assert len(samples) == len(rows) == 14
    named = {field["name"] for field in json.loads((folder / "metadata.json").read_text())["sample_fields"]}
    for row, sample in zip(rows, samples, strict=True):
        assert (sample["key"], sample["target_index"]) == (row["key"], row["target_index"])
        assert (sample["target"]["label"], sample["target"]["confidence"]) == (row["target_name"], row["score"])
        assert sample["ground_truth"]["label"] == row["label_name"]
        assert (folder / sample["heatmap"]["map_path"]).read_bytes() == row["map"]
        wanted = plain(values[row["key"], row["target_index"]])
        assert len([name for name in wanted if name.startswith("deletion_")]) == 2
        assert {name: sample[name] for name in wanted} == wanted
        unknown = {name for name in sample if name not in named and name != "_id"}
        assert not unknown
    first = [sample for sample, row in zip(samples, rows, strict=True) if row["target_rank"] == 1]
    for sample in samples:
        own = next(one for one in first if one["key"] == sample["key"])
        assert sample["prediction"]["label"] == own["target"]["label"]
        assert sample["filepath"] == own["filepath"]
    assert [sample["tags"] for sample in samples] == [["outlier", "right for a strange reason"], *[[]] * 13]
    ids = [sample["_id"]["$oid"] for sample in samples] + [sample["heatmap"]["_id"]["$oid"] for sample in samples]
    assert len(set(ids)) == len(ids)
    assert all(len(bytes.fromhex(one)) == 12 for one in ids)


def test_fiftyone_shows_the_image_at_the_maps_place(output, tmp_path):
    folder, _ = exported(output, "fiftyone", tmp_path / "x", limit=1)
    image = decode((folder / "data" / "00000000.jpg").read_bytes()).pixels
    key = explained(LocalStore(output))[0]["key"]
    original = decode((output.parent / "in" / key).read_bytes()).pixels
    assert image.shape == (336, 448, 3)
    assert np.abs(fit(image, original.shape[:2], "squash").astype(int) - original).mean() < 4


# ---------------------------------------------------------------- ViRelAy


def test_virelay_has_images_maps_and_the_audits_clusters(output, tmp_path):
    folder, lines = exported(output, "virelay", tmp_path / "x")
    rows = explained(LocalStore(output))
    project = yaml.safe_load((folder / "project.yaml").read_text())["project"]
    assert lines[-1] == f"virelay {folder / 'project.yaml'}"
    labels = json.loads((folder / project["label_map"]).read_text())
    names = {one["index"]: one["name"] for one in labels}
    assert {one["word_net_id"] for one in labels} == {str(index) for index in names}
    with (
        h5py.File(folder / project["dataset"]["path"]) as images,
        h5py.File(folder / project["attributions"]["sources"][0]) as maps,
    ):
        assert images["data"].shape == maps["attribution"].shape == (14, 3, 32, 32)
        assert list(maps["index"]) == list(range(14))
        for place, row in enumerate(rows):
            original = decode((output.parent / "in" / row["key"]).read_bytes()).pixels
            assert (images["data"][place].transpose(1, 2, 0) == fit(original, (32, 32), "squash")).all()
            assert maps["attribution"][place].sum(0) == pytest.approx(map_of(row), abs=1e-6)
            assert names[images["label"][place]] == row["label_name"]
            assert names[maps["label"][place]] == row["target_name"]
            known = {own["target_index"]: own["score"] for own in rows if own["key"] == row["key"]}
            wanted = [known.get(target, 0) for target in range(len(CLASSES))]
            assert maps["prediction"][place] == pytest.approx(wanted)
            assert maps["prediction"].dtype == np.float32
    with h5py.File(folder / project["analyses"][0]["sources"][0]) as analysis:
        audited = {
            (row["key"], row["target_index"]): row
            for file in (output / "audit" / "rows").iterdir()
            for row in pq.read_table(file).to_pylist()
        }
        for target in {row["target_index"] for row in rows}:
            about = [
                (place, audited[row["key"], target])
                for place, row in enumerate(rows)
                if row["target_index"] == target and audited[row["key"], target]["cluster"] is not None
            ]
            if not about:
                assert str(target) not in analysis
                continue
            category = analysis[str(target)]
            assert list(category["index"]) == [place for place, _ in about]
            assert list(category["cluster"]["audit"]) == [row["cluster"] for _, row in about]
            assert category["embedding"]["pca"].shape == (len(about), 8)
            assert len(category["embedding"]["pca"].attrs["eigenvalue"]) == 8


def test_a_chunk_of_a_table_is_small_whatever_a_row_holds(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for shape, rows in (((), 4096), ((5,), 819), ((1000,), 4), ((5000,), 1), ((3, 224, 224), 1)):
            assert _table(file, str(shape), shape, np.float32).chunks == (rows, *shape)


def test_components_are_those_of_a_singular_value_decomposition():
    cells = np.stack([pooled(number) for number in range(40)])
    places = np.array([3, 5, 7, *range(10, 40)])
    embedding, variances = principal_components(cells, places)
    centred = cells[places] / 255.0
    centred -= centred.mean(0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    assert variances == pytest.approx(sizes[:8] ** 2 / len(places), rel=1e-4)
    assert np.abs(embedding) == pytest.approx(np.abs(left[:, :8] * sizes[:8]), abs=1e-4)
    assert embedding.mean(0) == pytest.approx(0, abs=1e-5)


def test_components_do_not_depend_on_how_many_rows_are_read_at_once(monkeypatch):
    cells = np.stack([pooled(number) for number in range(20)])
    once = principal_components(cells, np.arange(20))
    monkeypatch.setattr("blocksight.jobs.export.virelay.ROWS_AT_ONCE", 3)
    parts = principal_components(cells, np.arange(20))
    for one, other in zip(once, parts, strict=True):
        assert other == pytest.approx(one, abs=1e-5)


def test_virelay_without_an_audit_says_so(hostile, tmp_path):
    folder, lines = exported(hostile, "virelay", tmp_path / "x")
    assert "it has no analysis" in lines[1]
    assert not (folder / "analysis.h5").exists()
    assert "analyses" not in yaml.safe_load((folder / "project.yaml").read_text())["project"]
    names = {one["index"]: one["name"] for one in json.loads((folder / "label-map.json").read_text())}
    with h5py.File(folder / "dataset.h5") as images:
        assert {names[label] for label in images["label"]} == {"no known label"}
    assert len(CLASSES) in names


def test_virelay_needs_h5py(output, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[export\]'"):
        exported(output, "virelay", tmp_path / "x")
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------- Spotlight


def test_spotlight_has_a_row_per_map_with_pictures_and_embedding(output, tmp_path):
    folder, lines = exported(output, "spotlight", tmp_path / "x")
    assert len(lines) == 3
    assert "spotlight.Embedding" in lines[-1]
    table = pq.read_table(folder / "maps.parquet").to_pylist()
    rows, values = explained(LocalStore(output)), metrics_by_map(output)
    assert len(table) == len(rows)
    for row, shown in zip(rows, table, strict=True):
        for name in ("key", "label_name", "target_name", "score", "is_flat"):
            assert shown[name] == row[name]
        wanted = plain(values[row["key"], row["target_index"]])
        assert {name: shown[name] for name in wanted} == wanted
        assert len(shown["embedding"]) == GRID * GRID
        assert shown["strangeness"] == 1.5
        image, laid_over = (decode(shown[name]).pixels for name in ("image", "overlay"))
        assert image.shape == laid_over.shape == (336, 448, 3)
    cells = np.array(table[0]["embedding"]) * 255
    assert cells == pytest.approx(pooled(0), abs=1e-3)


def test_spotlight_without_an_audit_has_no_embedding(hostile, tmp_path):
    folder, lines = exported(hostile, "spotlight", tmp_path / "x")
    assert "embedding" not in pq.read_schema(folder / "maps.parquet").names
    assert "Embedding" not in lines[-1]


def test_the_overlay_lies_where_the_map_is(output, tmp_path):
    folder, _ = exported(output, "spotlight", tmp_path / "x", limit=1)
    shown, row = pq.read_table(folder / "maps.parquet").to_pylist()[0], explained(LocalStore(output))[0]
    original = fit(decode((output.parent / "in" / row["key"]).read_bytes()).pixels, (336, 448), "squash")
    saliency = resized(map_of(row), (336, 448))
    laid_over = decode(shown["overlay"]).pixels.astype(int)
    assert np.abs(overlay(original, saliency) - laid_over).mean() < 3
    for other in (saliency[::-1], saliency[:, ::-1]):
        assert np.abs(overlay(original, other) - laid_over).mean() > 6


# ---------------------------------------------------------------- Quantus


def test_quantus_gets_what_the_model_saw(output, tmp_path):
    folder, lines = exported(output, "quantus", tmp_path / "x")
    inputs, classes, maps = (np.load(folder / f"{name}_batch.npy", mmap_mode="r") for name in "xya")
    assert (inputs.shape, inputs.dtype) == ((14, 3, 32, 32), np.float32)
    assert (classes.shape, classes.dtype) == ((14,), np.int64)
    assert (maps.shape, maps.dtype) == ((14, 1, 32, 32), np.float32)
    rows, keys = explained(LocalStore(output)), json.loads((folder / "keys.json").read_text())
    with torch.inference_mode():
        scores = make().module.eval()(torch.from_numpy(np.array(inputs))).softmax(1).numpy()
    for place, (row, key) in enumerate(zip(rows, keys, strict=True)):
        assert (key["key"], key["target_index"]) == (row["key"], classes[place])
        assert scores[place, classes[place]] == pytest.approx(row["score"], abs=1e-6)
        assert (maps[place, 0] == map_of(row)).all()
    names: dict = {}
    exec("\n".join(lines[1:]), names)
    assert names["x"].shape == inputs.shape


def weights_file(path, seed):
    save_file({name: tensor.contiguous() for name, tensor in make(seed).module.state_dict().items()}, path)
    return path


def test_quantus_asks_for_a_weights_file_that_has_moved(tmp_path):
    weights = weights_file(tmp_path / "w.safetensors", 3)
    data = folder_of_images(tmp_path / "in", 2, bad=False)
    run_here(data, tmp_path / "out", explainer="gradcam", weights=str(weights))
    weights = weights.rename(tmp_path / "moved.safetensors")
    with pytest.raises(ConfigError, match="name it with --weights"):
        exported(tmp_path / "out", "quantus", tmp_path / "x")
    other = weights_file(tmp_path / "other.safetensors", 4)
    with pytest.raises(ConfigError, match="another configuration"):
        exported(tmp_path / "out", "quantus", tmp_path / "x", weights=str(other))
    with pytest.raises(ConfigError, match="is for quantus only"):
        exported(tmp_path / "out", "spotlight", tmp_path / "x", weights=str(weights))
    assert not (tmp_path / "x").exists()
    exported(tmp_path / "out", "quantus", tmp_path / "x", weights=str(weights))
    assert len(np.load(tmp_path / "x" / "y_batch.npy")) == 2


@pytest.mark.parametrize("count", [0, 1, 9, 10, 12345])
def test_an_array_file_is_what_numpy_reads(tmp_path, count):
    with ArrayFile(tmp_path / "a.npy", (2, 3), np.float32) as file:
        for number in range(count):
            file.append(np.full((2, 3), number))
    read = np.load(tmp_path / "a.npy")
    assert (read.shape, read.dtype) == ((count, 2, 3), np.float32)
    assert (read[:, 1, 2] == np.arange(count)).all()
    with ArrayFile(tmp_path / "b.npy", (2, 3), np.float32) as file, pytest.raises(ValueError, match="reshape"):
        file.append(np.zeros(5))


# ---------------------------------------------------------------- all forms


@pytest.mark.parametrize("form", FORMS)
def test_no_key_names_a_file_and_every_label_arrives(hostile, tmp_path, form):
    folder, lines = exported(hostile, form, tmp_path / "deep" / "x")
    assert set(files_in(tmp_path)) == set(files_in(folder))
    assert all(re.fullmatch(r"[a-z0-9_-]+\.[a-z0-9]+", path.name) for path in files_in(folder))
    assert lines[0].startswith(f"{len(HOSTILE)} records exported")
    keys = {f"t.parquet/{key}" for key in HOSTILE}
    if form == "fiftyone":
        samples = json.loads((folder / "samples.json").read_text())["samples"]
        assert {sample["key"] for sample in samples} == keys
        assert {sample["ground_truth"]["label"] for sample in samples} == set(HOSTILE)
        assert all(not Path(sample["filepath"]).is_absolute() for sample in samples)
    if form == "spotlight":
        assert set(pq.read_table(folder / "maps.parquet")["label_name"].to_pylist()) == set(HOSTILE)
    if form == "quantus":
        assert {one["key"] for one in json.loads((folder / "keys.json").read_text())} == keys


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("form", FORMS)
def test_the_same_export_has_the_same_bytes(output, tmp_path, form):
    first, second = (exported(output, form, tmp_path / name)[0] for name in ("a", "b"))
    for path in files_in(first):
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes()


def test_images_that_are_gone_and_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("blocksight.cluster.sizing.LEAST_UNIT_SECONDS", 0.3)
    run_here(folder_of_images(tmp_path / "in"), tmp_path / "out", explainer="gradcam")
    gone, *_, changed = explained(LocalStore(tmp_path / "out"))
    (tmp_path / "in" / gone["key"]).unlink()
    (tmp_path / "in" / changed["key"]).write_bytes(picture(77))
    folder, lines = exported(tmp_path / "out", "quantus", tmp_path / "x")
    assert lines[0] == "5 records exported; left out: 3 rejected, 2 whose image is gone"
    keys = {one["key"] for one in json.loads((folder / "keys.json").read_text())}
    assert keys == {row["key"] for row in explained(LocalStore(tmp_path / "out"))} - {gone["key"], changed["key"]}
    assert len(np.load(folder / "x_batch.npy")) == 5
    folder, lines = exported(tmp_path / "out", "quantus", tmp_path / "y", limit=3)
    assert lines[0].startswith("3 records exported")
    assert len(np.load(folder / "x_batch.npy")) == 3


def test_tar_shards_are_exported_as_well(tmp_path):
    run_here(folder_of_tars(tmp_path / "in"), tmp_path / "out", explainer="gradcam")
    folder, _ = exported(tmp_path / "out", "spotlight", tmp_path / "x")
    table = pq.read_table(folder / "maps.parquet").to_pylist()
    assert [row["key"] for row in table] == [row["key"] for row in explained(LocalStore(tmp_path / "out"))]
    assert len(table) > 4


def test_an_output_without_a_single_map(tmp_path):
    run_here(folder_of_images(tmp_path / "in", 1, bad=False), tmp_path / "out", explainer="gradcam")
    for file in (tmp_path / "out" / "data").rglob("*.parquet"):
        file.unlink()
    for form in FORMS:
        with pytest.raises(ConfigError, match=r"nothing of .* can be exported: 0 records"):
            exported(tmp_path / "out", form, tmp_path / form)
        assert not files_in(tmp_path / form)


def test_an_output_whose_images_are_all_gone(tmp_path):
    run_here(folder_of_images(tmp_path / "in"), tmp_path / "out", explainer="gradcam")
    for file in (tmp_path / "in").rglob("*.png"):
        file.unlink()
    with pytest.raises(ConfigError, match="left out: 3 rejected, 7 whose image is gone"):
        exported(tmp_path / "out", "spotlight", tmp_path / "x")


def test_what_is_left_out_is_counted_as_far_as_was_looked(tmp_path):
    """Ten records in one unit: three of class `cat` are rejected, the second of all is gone."""
    run_here(folder_of_images(tmp_path / "in"), tmp_path / "out", explainer="gradcam")
    rows = rows_in(LocalStore(tmp_path / "out"))
    gone = [row["key"] for row in rows if row["status"] == "ok"][1]
    (tmp_path / "in" / gone).unlink()
    left = [row["key"] for row in rows if row["status"] == "ok" and row["key"] != gone]
    for limit in range(1, 7):
        _, lines = exported(tmp_path / "out", "spotlight", tmp_path / f"x{limit}", limit=limit)
        before = rows[: [row["key"] for row in rows].index(left[limit - 1])]
        num_rejected = sum(row["status"] == "rejected" for row in before)
        num_gone = sum(row["key"] == gone for row in before)
        left_out = f"left out before the limit: {num_rejected} rejected, {num_gone} whose image is gone"
        assert lines[0] == f"{limit} record{'s' if limit > 1 else ''} exported; {left_out}"
    _, lines = exported(tmp_path / "out", "spotlight", tmp_path / "all", limit=7)
    assert lines[0].endswith("3 rejected, 1 whose image is gone")


def test_a_destination_that_is_none(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "file").touch()
    for destination, sentence in (
        ("s3://bucket/x", "goes to a local folder"),
        (tmp_path / "full", "holds files already"),
        (tmp_path / "file", "cannot be made: File exists"),
        (tmp_path / "file" / "x", "cannot be made: Not a directory"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            fresh_folder(str(destination), {})
    (tmp_path / "empty").mkdir()
    assert fresh_folder(str(tmp_path / "empty"), {"data": "s3://bucket/x"}) == tmp_path / "empty"
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for place in ("out/x", "out", "link/x", "empty/../out/x", "."):
        with pytest.raises(ConfigError, match=r"and output '.*/out' contain each other; choose another place"):
            fresh_folder(str(tmp_path / place), {"output": str(tmp_path / "out")})
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("place", ["out/x", "in/x"])
def test_no_export_goes_into_the_output_or_the_data(output, place):
    with pytest.raises(ConfigError, match="contain each other"):
        exported(output, "spotlight", output.parent / place)
    assert not (output.parent / place).exists()


def test_the_command(output, tmp_path):
    code, printed = called("export", output, "spotlight", tmp_path / "x", "--limit", 2)
    assert code == 0, printed
    assert "2 records exported" in printed
    assert 'dtype={"image": spotlight.Image' in printed
    code, printed = called("export", output, "spotlight", tmp_path / "x")
    assert (code, "holds files already" in printed) == (2, True)
    code, printed = called("export", tmp_path, "spotlight", tmp_path / "y")
    assert (code, "no blocksight output" in printed) == (2, True)
    code, printed = called("export", output, "excel", tmp_path / "y")
    assert (code, "fiftyone" in printed) == (2, True)


def test_other_forms_need_no_model():
    source = "import sys, blocksight.jobs.export.run; print({'torch', 'ray', 'h5py'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.servers
def test_through_a_bucket(tmp_path, bucket):
    prefix = f"{bucket.uri}/{os.urandom(4).hex()}"
    source = open_store(f"{prefix}/in", bucket.endpoint_url)
    for number in range(3):
        source.create(f"ant/{number}.png", picture(number))
    run_here(f"{prefix}/in", f"{prefix}/out", explainer="gradcam", endpoint_url=bucket.endpoint_url)
    folder, lines = exported(f"{prefix}/out", "spotlight", tmp_path / "x", endpoint_url=bucket.endpoint_url)
    assert lines[0].startswith("3 records exported")
    table = pq.read_table(folder / "maps.parquet").to_pylist()
    stored = rows_in(open_store(f"{prefix}/out", bucket.endpoint_url))
    assert [(row["key"], row["score"], row["drop"]) for row in table] == [
        (row["key"], row["score"], row["metrics"]["drop"]) for row in stored
    ]
