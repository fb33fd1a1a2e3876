"""One record as a picture: its blocks fused again, other explainers, other outputs, and what cannot be drawn."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from blocksight.engine.catalog.readouts import READOUTS
from blocksight.engine.explainers.fusion import GATES, stages
from blocksight.engine.saliency import minmax
from blocksight.jobs.cli import show
from blocksight.jobs.cli.record_tables import record_table
from blocksight.jobs.cli.show import SheetRequest, render_record
from blocksight.jobs.explain.replay import Replay, replay_error
from blocksight.jobs.ledger.output import map_of
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.plan import MODEL_KEY, DriftError, load_plan
from blocksight.jobs.plan.stored_config import NamedModel
from blocksight.jobs.worker.rows import Output, images_of, rows_of
from blocksight.storage.outputs.pictures import BAR_HEIGHT, Tile, contact_sheet, one_line, overlay
from blocksight.storage.outputs.schema import OK
from blocksight.storage.stores.local import LocalStore
from tests.jobs.jobs_of import blocksight, model_of, rows_in, run_here
from tests.jobs.tiny import MODEL, folder_of_images, make

KEEN = "tests.jobs.tiny:make_keen"


def output_of(place):
    store = LocalStore(place)
    return Output(place.name, store, load_plan(store))


@pytest.fixture
def data(tmp_path):
    return folder_of_images(tmp_path / "in", 8)


@pytest.fixture
def drawn(monkeypatch):
    """Collects the tiles of every sheet that is drawn."""
    sheets = []

    def watched(tiles, columns, **options):
        sheets.append(list(tiles))
        return contact_sheet(tiles, columns, **options)

    monkeypatch.setattr(show, "contact_sheet", watched)
    return sheets


def captions(tiles):
    return [tile.caption for tile in tiles]


def sheet(place, key, path, **wanted):
    request = SheetRequest(**{"model": model_of(place), **wanted})
    _, written = render_record(output_of(place), key, None, path, request, Console(quiet=True))
    return written


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target": "top-3"},
        {"parameters": {"gate": "soft", "mu": 0.3}},
        {"explainer": "ada-sise"},
        {"fidelity": "auto", "model": KEEN},
        {"fidelity": "preview", "model": KEEN},
        {"resize": "crop"},
    ],
)
def test_blocks_fuse_to_the_stored_map(data, tmp_path, drawn, options):
    run_here(data, tmp_path / "out", **options)
    for key in ("ant/000.png", "dog/003.png"):
        sheet(tmp_path / "out", key, tmp_path / "sheet.png", blocks=True)
    assert len(drawn) == 2 * (3 if "target" in options else 1)
    for tiles in drawn:
        assert captions(tiles)[-1].endswith("as stored\nthe fused map equals it")
        assert "kept" in captions(tiles)[1]
        assert captions(tiles)[2].startswith("fused up to ")
    assert sorted(file.name for file in tmp_path.glob("sheet*")) == (
        [f"sheet-{row['target_index']}.png" for row in sorted(rows_of(*_place(tmp_path), key), key=_index)]
        if "target" in options
        else ["sheet.png"]
    )


def _place(tmp_path):
    output = output_of(tmp_path / "out")
    return output.store, output.plan


def _index(row):
    return row["target_index"]


def test_the_strip_shows_blocks_and_stages(data, tmp_path, drawn):
    run_here(data, tmp_path / "out", parameters={"gate": "soft"})
    output, key = output_of(tmp_path / "out"), "bee/001.png"
    (row,) = rows_of(output.store, output.plan, key)
    image = dict(images_of(output.plan, None, {key}))[key]
    again = Replay(output.store, output.plan, NamedModel(MODEL), Console(quiet=True))
    (made,) = again.explanations(again.config_of_row(row), [row], image)
    fused = stages([block.saliency_hw for block in made.blocks], GATES["soft"])
    assert np.abs(minmax(fused[-1]) - map_of(row)).max() <= 0.5 / 255 + 1e-6
    sheet(tmp_path / "out", key, tmp_path / "sheet.png", blocks=True)
    (tiles,) = drawn
    assert len(tiles) == 1 + 2 * len(made.blocks) + 1
    picture = tiles[0].pixels
    wanted = [
        saliency for block, stage in zip(made.blocks, fused, strict=True) for saliency in (block.saliency_hw, stage)
    ]
    for tile, saliency in zip(tiles[1:-1], wanted, strict=True):
        small = Image.fromarray(minmax(saliency).astype(np.float32))
        bilinear = np.asarray(small.resize(picture.shape[1::-1], Image.Resampling.BILINEAR)).clip(0, 1)
        assert np.array_equal(tile.pixels, overlay(picture, bilinear))
    for tile, block, stored in zip(tiles[1:-1:2], made.blocks, row["blocks"], strict=True):
        assert tile.caption == f"{block.name}\nkept {stored['kept']} of {stored['candidates']} maps"


def test_a_replayed_map_that_differs_is_reported(data, tmp_path, drawn, monkeypatch):
    run_here(data, tmp_path / "out")
    monkeypatch.setattr("blocksight.jobs.explain.replay.map_of", lambda row: np.float32(0.25) * map_of(row))
    sheet(tmp_path / "out", "ant/000.png", tmp_path / "sheet.png", blocks=True)
    assert captions(drawn[0])[-1].endswith("the fused map differs by up to 0.750")


def test_the_error_is_compared_with_the_codecs_error(data, tmp_path):
    run_here(data, tmp_path / "out")
    output, key = output_of(tmp_path / "out"), "ant/000.png"
    (row,) = rows_of(output.store, output.plan, key)
    again = Replay(output.store, output.plan, NamedModel(MODEL), Console(quiet=True))
    (made,) = again.explanations(again.config, [row], dict(images_of(output.plan, None, {key}))[key])
    assert replay_error(made, row) is None
    made.saliency_hw[np.unravel_index(made.saliency_hw.argmin(), made.saliency_hw.shape)] += (
        0.01 * made.saliency_hw.max()
    )
    assert replay_error(made, row) == pytest.approx(0.01, abs=0.003)


def test_a_block_that_kept_nothing_is_left_out(data, tmp_path, drawn, monkeypatch):
    from blocksight.engine.explainers import sise

    original, calls = sise.select, []

    def first_is_empty(alphas, parameters):
        calls.append(len(alphas))
        return torch.empty(0, dtype=torch.int64) if len(alphas) == 6 else original(alphas, parameters)

    monkeypatch.setattr(sise, "select", first_is_empty)
    run_here(data, tmp_path / "out")
    sheet(tmp_path / "out", "ant/000.png", tmp_path / "sheet.png", blocks=True)
    assert [caption.partition("\n")[2] for caption in captions(drawn[0])[1:2]] == ["kept 0 of 6 maps: left out"]
    assert captions(drawn[0])[-1].endswith("the fused map equals it")
    assert len(drawn[0]) == 1 + 1 + 2 + 1


def test_other_explainers_and_other_outputs_are_shown_beside_it(data, tmp_path, drawn):
    run_here(data, tmp_path / "out", target="0,1")
    for name, target in (("gradcam", "1,2"), ("layercam", "0,1")):
        run_here(data, tmp_path / name, target=target, explainer=name)
    beside = (output_of(tmp_path / "gradcam"), output_of(tmp_path / "layercam"))
    sheet(
        tmp_path / "out", "cat/002.png", tmp_path / "sheet.png", explainers="layercam, gradcam,gradcam", beside=beside
    )
    first, second = drawn
    assert [caption.partition("\n")[0] for caption in captions(first)] == [
        "cat/002.png",
        "sise, as stored",
        "layercam, made now",
        "gradcam, made now",
        "gradcam",
        "layercam",
    ]
    assert captions(first)[4] == "gradcam\nholds no map of ant"
    assert captions(second)[4].startswith("gradcam\nbee, 0.")
    assert _close(first[2].pixels, first[5].pixels)  # what is made now is what the job made
    assert _close(second[3].pixels, second[4].pixels)
    assert not _close(second[2].pixels, second[3].pixels)


def _close(one, other):
    """Whether two maps are equal within the codec's error."""
    return np.abs(one.astype(int) - other.astype(int)).max() <= 2


def test_a_picture_that_cannot_be_drawn_is_refused(data, tmp_path):
    for name in ("sise", "gradcam"):
        run_here(data, tmp_path / name, explainer=name)
    path = tmp_path / "sheet.png"
    with pytest.raises(ConfigError, match=r"made by gradcam, which has none.*explain with sise"):
        sheet(tmp_path / "gradcam", "ant/000.png", path, blocks=True)
    with pytest.raises(ConfigError, match="'gradcm' is not known; did you mean 'gradcam'"):
        sheet(tmp_path / "sise", "ant/000.png", path, explainers="gradcm")
    with pytest.raises(ConfigError, match="--explainers names none"):
        sheet(tmp_path / "sise", "ant/000.png", path, explainers=" , ")
    other = folder_of_images(tmp_path / "in2", 2, bad=False)
    run_here(other, tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="cannot be compared: data is"):
        sheet(tmp_path / "sise", "ant/000.png", path, beside=(output_of(tmp_path / "elsewhere"),))
    (data / "ant" / "000.png").unlink()
    with pytest.raises(ConfigError, match="cannot be read any more"):
        sheet(tmp_path / "sise", "ant/000.png", path, blocks=True)
    sheet(tmp_path / "sise", "ant/000.png", path, beside=(output_of(tmp_path / "gradcam"),))  # needs no image
    facts = json.loads((tmp_path / "sise" / MODEL_KEY).read_text())
    (tmp_path / "sise" / MODEL_KEY).write_text(json.dumps({**facts, "weights_sha256": "0" * 64}))
    with pytest.raises(DriftError, match="weights_sha256"):
        sheet(tmp_path / "sise", "bee/001.png", path, blocks=True)


def test_a_weights_file_that_has_moved_must_be_named_again(data, tmp_path, drawn):
    state = {name: tensor.contiguous() for name, tensor in make(seed=3).module.state_dict().items()}
    save_file(state, tmp_path / "right.safetensors")
    save_file({name: 2 * tensor for name, tensor in state.items()}, tmp_path / "wrong.safetensors")
    factory = {"model": MODEL, "weights": str(tmp_path / "right.safetensors")}
    run_here(data, tmp_path / "out", **factory)
    (tmp_path / "right.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.raises(ConfigError, match=r"came from a file.*name it with --weights"):
        sheet(tmp_path / "out", "ant/000.png", tmp_path / "sheet.png", blocks=True)
    with pytest.raises(DriftError, match="weights"):
        sheet(
            tmp_path / "out",
            "ant/000.png",
            tmp_path / "s.png",
            blocks=True,
            weights=str(tmp_path / "wrong.safetensors"),
        )
    sheet(
        tmp_path / "out",
        "ant/000.png",
        tmp_path / "sheet.png",
        blocks=True,
        weights=str(tmp_path / "moved.safetensors"),
    )
    assert captions(drawn[-1])[-1].endswith("the fused map equals it")
    (tmp_path / "moved.safetensors").rename(tmp_path / "right.safetensors")
    sheet(tmp_path / "out", "ant/000.png", tmp_path / "sheet.png", blocks=True)


def test_a_rejected_record_has_no_sheet(data, tmp_path):
    run_here(data, tmp_path / "out")
    assert sheet(tmp_path / "out", "cat/bad-empty_file.jpg", tmp_path / "sheet.png", blocks=True) == []


def test_captions_are_cut_to_their_tiles():
    hostile = Tile(np.zeros((8, 90, 3), np.uint8), "\x1b[31m" + "wide" * 4000 + "\nshort")
    marks = []
    for caption in (hostile.caption, "\nshort"):
        tiles = [Tile(hostile.pixels, caption), Tile(hostile.pixels, "")]
        drawn = np.asarray(contact_sheet(tiles, 2).convert("L"))
        marks.append((drawn[18:56] < 128).any(0))
    assert not marks[0][8 + 90 + 8 :].any()
    assert one_line("a\nb\x1b\u202e") == "a?b??"
    three = [Tile(hostile.pixels, "one\ntwo" + more) for more in ("", "\nthree")]
    assert contact_sheet(three[:1], 1) == contact_sheet(three[1:], 1)
    assert marks[0][: 8 + 90].sum() > marks[1][: 8 + 90].sum()


def test_the_command(data, tmp_path):
    run_here(data, tmp_path / "out")
    run_here(data, tmp_path / "gc", explainer="gradcam", target="0,1,2,3,4")
    done = blocksight(
        *("show", tmp_path / "out", "ant/000.png", "--model", MODEL, "--blocks", "--explainers", "layercam"),
        *("--beside", tmp_path / "gc", "--picture", tmp_path / "sheet.png"),
    )
    assert done.returncode == 0, done.stderr
    assert "sheet.png" in done.stdout
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.size == (6 * (288 + 8) + 8, 2 * (216 + 48) + BAR_HEIGHT + 16)
    refused = blocksight("show", tmp_path / "gc", "ant/000.png", "--blocks")
    assert refused.returncode == 2
    assert "--blocks draws the block maps that sise and ada-sise fuse" in refused.stderr


def test_the_table_of_a_record_fits_80_columns_and_cuts_no_heading(data, tmp_path):
    run_here(data, tmp_path / "maps", explainer="gradcam")
    row = next(row for row in rows_in(LocalStore(tmp_path / "maps")) if row["status"] == OK)
    for readout in READOUTS:
        console = Console(record=True, width=80, file=io.StringIO(), soft_wrap=True)
        console.print(record_table([row], readout))
        printed = console.export_text()
        assert max(map(len, printed.splitlines())) <= 80
        assert "…" not in printed
