"""Exports of pictures and of arrays: what is in them, which maps are taken, names from strangers, refusals."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from blocksight.jobs.export import arrays
from blocksight.jobs.ledger.output import map_of
from blocksight.storage.images.decode import decode, fit
from blocksight.storage.outputs.pictures import overlay, resized
from blocksight.storage.stores.local import LocalStore
from tests.jobs.jobs_of import called, rows_in, run_here
from tests.jobs.outputs import HOSTILE, explained, hostile_table, output_of_small_units
from tests.jobs.tiny import MODEL, folder_of_images


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven records with two targets each, three rejected, in several fragments."""
    with pytest.MonkeyPatch.context() as patch:
        return output_of_small_units(tmp_path_factory.mktemp("pictures"), patch)


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two records by SISE, of the same kind of data."""
    root = tmp_path_factory.mktemp("fused")
    run_here(folder_of_images(root / "in", 2, bad=False), root / "out")
    return root / "out"


def exported(output: object, form: str, folder: Path, *options: object) -> Path:
    code, printed = called("export", output, form, folder, *options)
    assert code == 0, printed
    return folder


def index_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]


def by_map(rows: list[dict]) -> list[tuple]:
    return [(row["key"], row["target_index"], row["target_name"]) for row in rows]


# ---------------------------------------------------------------- pictures


def test_each_map_is_drawn_over_its_picture(output, tmp_path):
    index = index_of(exported(output, "pictures", tmp_path / "x"))
    rows = explained(LocalStore(output))
    assert by_map(index) == by_map(rows)
    assert {path.name for path in (tmp_path / "x").iterdir()} == {"index.jsonl", *(one["file"] for one in index)}
    for one, row in zip(index, rows, strict=True):
        shown = fit(decode((output.parent / "in" / row["key"]).read_bytes()).pixels, (336, 448), "squash")
        wanted = overlay(shown, resized(map_of(row), (336, 448)))
        with Image.open(tmp_path / "x" / one["file"]) as drawn:
            assert np.array_equal(np.asarray(drawn), wanted)
        assert one["score"] == row["score"]
        assert one["drop"] == row["metrics"]["drop"]


def test_boxes_of_the_ground_truth_are_drawn(output, tmp_path):
    truth = {
        "images": [{"id": 0, "file_name": "ant/000.png"}],
        "categories": [{"id": 0, "name": "ant"}],
        "annotations": [{"id": 0, "image_id": 0, "category_id": 0, "bbox": [5, 5, 20, 15]}],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(truth))
    picked = ("--key", "ant/000.png", "--truth", tmp_path / "boxes.json")
    (name,) = {one["file"] for one in index_of(exported(output, "pictures", tmp_path / "x", *picked))[:1]}
    with Image.open(tmp_path / "x" / name) as drawn:
        assert (90, 230, 255) in {colour for _, colour in drawn.getcolors(1 << 24) or ()}


def test_names_of_strangers_are_no_paths(tmp_path):
    run_here(hostile_table(tmp_path / "in"), tmp_path / "out", explainer="gradcam")
    folder = exported(tmp_path / "out", "pictures", tmp_path / "deep" / "x")
    index = index_of(folder)
    assert {one["key"] for one in index} == {f"t.parquet/{key}" for key in HOSTILE}
    assert all(re.fullmatch(r"\d{6}-[A-Za-z0-9._-]+\.png", one["file"]) for one in index)
    assert {path.name for path in (tmp_path / "deep").rglob("*") if path.is_file()} == {
        "index.jsonl",
        *(one["file"] for one in index),
    }
    assert "\x1b" not in (folder / "index.jsonl").read_text()


def frames_of(file: Path) -> list[np.ndarray]:
    with Image.open(file) as gif:
        assert gif.format == "GIF"
        assert gif.info["loop"] == 0
        frames = []
        for number in range(gif.n_frames):  # pyright: ignore[reportAttributeAccessIssue]
            gif.seek(number)
            frames.append(np.asarray(gif.convert("RGB")))
        return frames


def test_a_gif_goes_over_the_blocks(fused, tmp_path):
    """The picture, the stored map, and each of two blocks with the fusion up to it, whose last is the stored map."""
    options = ("--gif", "blocks", "--model", MODEL, "--limit", 1)
    (one,) = index_of(exported(fused, "pictures", tmp_path / "x", *options))
    frames = frames_of(tmp_path / "x" / one["file"])
    assert len(frames) == 2 + 2 * 2
    inner = slice(8, 8 + 300), slice(8, 8 + 400)  # without caption and margin
    off = np.abs(frames[1][inner].astype(int) - frames[-1][inner])
    assert off.mean() < 2  # 256 colours each
    assert np.abs(frames[0][inner].astype(int) - frames[1][inner]).mean() > 10


def test_a_gif_goes_over_outputs(fused, tmp_path):
    data = fused.parent / "in"
    run_here(data, tmp_path / "other", explainer="gradcam", target="top-2")
    options = ("--gif", "outputs", "--beside", fused, "--limit", 1)
    index = index_of(exported(tmp_path / "other", "pictures", tmp_path / "x", *options))
    assert len(index) == 2
    assert {len(frames_of(tmp_path / "x" / one["file"])) for one in index} == {3}  # also where it holds no map


# ---------------------------------------------------------------- which maps


def test_keys_a_condition_and_a_limit_pick_maps(output, tmp_path):
    rows = explained(LocalStore(output))
    best = max(row["score"] for row in rows)
    cases = {
        ("--key", "bee/001.png", "--key", "dog/003.png"): [
            r for r in rows if r["key"] in ("bee/001.png", "dog/003.png")
        ],
        ("--where", f"score >= {best!r}"): [r for r in rows if r["score"] == best],
        ("--where", "target_rank = 1 -- a comment"): [r for r in rows if r["target_rank"] == 1],
        ("--where", "\"drop\" IS NOT NULL AND label_name = 'ant'"): [r for r in rows if r["label_name"] == "ant"],
        ("--where", "target_rank = 2", "--key", "bee/001.png"): [
            r for r in rows if r["target_rank"] == 2 and r["key"] == "bee/001.png"
        ],
        ("--limit", 2): rows[:4],
        ("--where", "target_rank = 2", "--limit", 3): [r for r in rows if r["target_rank"] == 2][:3],
    }
    for number, (options, wanted) in enumerate(cases.items()):
        index = pq.read_table(exported(output, "numpy", tmp_path / f"n{number}", *options) / "index.parquet")
        assert by_map([row for row in index.to_pylist() if row["status"] == "ok"]) == by_map(wanted)
    options, wanted = next(iter(cases.items()))
    assert by_map(index_of(exported(output, "pictures", tmp_path / "x", *options))) == by_map(wanted)
    code, text = called("export", output, "pictures", tmp_path / "y", "--key", "bee/001.png")
    assert code == 0
    assert "exported: 1/1 image" in text


# ---------------------------------------------------------------- arrays


def zarr_maps(folder: Path) -> np.ndarray:
    zarr = pytest.importorskip("zarr")
    return np.asarray(zarr.open_array(str(folder / "maps.zarr"), mode="r"))


@pytest.mark.parametrize("form", ["numpy", "zarr"])
def test_arrays_hold_every_map_and_the_index_every_row(output, tmp_path, monkeypatch, form):
    monkeypatch.setattr(arrays, "MAPS_PER_FILE", 4)
    monkeypatch.setattr(arrays, "MAPS_PER_CHUNK", 4)
    folder = exported(output, form, tmp_path / "x")
    index = pq.read_table(folder / "index.parquet").to_pylist()
    stored = rows_in(LocalStore(output))
    assert len({row["unit_id"] for row in stored}) > 1
    assert [{name: row[name] for name in arrays.KEPT} for row in index] == [
        {name: row[name] for name in arrays.KEPT} for row in stored
    ]
    read = {path.name: np.load(path) for path in folder.glob("*.npy")} or {"maps.zarr": zarr_maps(folder)}
    assert sum(map(len, read.values())) == 14
    assert {array.dtype for array in read.values()} == {np.dtype("float32")}
    for row, own in zip(index, stored, strict=True):
        if own["status"] == "ok":
            assert np.array_equal(read[row["file"]][row["row"]], map_of(own))
        else:
            assert (row["file"], row["row"]) == (None, None)


def test_arrays_need_no_images(output, tmp_path):
    shutil.copytree(output, tmp_path / "out")
    code, printed = called("export", tmp_path / "out", "numpy", tmp_path / "x")
    assert code == 0, printed
    assert "14 maps of 7 records exported; 3 rejected" in printed
    lines = printed[printed.index("import numpy") :].splitlines()
    names: dict = {}
    exec("\n".join(line for line in lines if line.strip()), names)
    assert names["maps"].shape == (14, 32, 32)


def test_a_damaged_map_is_named(output, tmp_path):
    shutil.copytree(output, tmp_path / "out")
    file = sorted((tmp_path / "out/data").rglob("*.parquet"))[-1]
    file.write_bytes(file.read_bytes()[:200])
    code, printed = called("export", tmp_path / "out", "numpy", tmp_path / "x")
    assert (code, file.name in printed) == (5, True)


def test_an_output_without_a_map_is_an_error(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(b"text")
    run_here(tmp_path / "in", tmp_path / "out", explainer="gradcam")
    code, printed = called("export", tmp_path / "out", "numpy", tmp_path / "x")
    assert code == 2
    assert "it has no map, and 1 rejected record" in " ".join(printed.split())


def test_zarr_says_what_to_install(output, tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "find_spec", lambda _: None)
    code, printed = called("export", output, "zarr", tmp_path / "x")
    assert code == 2
    assert "pip install '.[export]', or take numpy" in printed
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("form", "options", "told"),
    [
        ("pictures", ("--key", "ant/00.png"), "no map of a record 'ant/00.png'"),
        ("pictures", ("--key", "cat/bad-truncated.jpg"), "no map of a record"),
        ("numpy", ("--where", "score > 2"), "--where score > 2 holds for no map"),
        ("numpy", ("--where", "colour = 'red'"), "colour"),
        ("numpy", ("--where", "1; DROP VIEW maps"), "syntax error"),
        ("numpy", ("--gif", "blocks"), "--gif blocks is for pictures only: numpy moves nothing"),
        ("spotlight", ("--beside", "maps"), "--beside maps is for pictures only"),
        ("zarr", ("--truth", "x.json"), "--truth x.json is for fiftyone and pictures only"),
        ("pictures", ("--gif", "outputs"), "give both, or neither"),
        ("pictures", ("--beside", "maps"), "give both, or neither"),
        ("pictures", ("--gif", "blocks"), "gradcam, which has none"),
        ("pictures", ("--model", MODEL), "is for quantus only, and for pictures with --gif blocks"),
    ],
)
def test_what_is_of_no_use_is_refused_before_any_work(output, tmp_path, form, options, told):
    code, printed = called("export", output, form, tmp_path / "x", *options)
    assert code == 2
    assert told in " ".join(printed.split())
    assert not (tmp_path / "x").exists()


def test_outputs_of_other_data_are_not_compared(output, fused, tmp_path):
    code, printed = called("export", output, "pictures", tmp_path / "x", "--gif", "outputs", "--beside", fused)
    assert (code, "cannot be compared" in printed) == (2, True)
