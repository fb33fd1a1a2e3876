"""The memory bank: it holds the features of all labelled images and works as a model; bad data are named."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from blocksight.engine.errors import ModelError
from blocksight.engine.model.loading import load_model
from blocksight.jobs.bench.bank import class_names_of, make_bank
from blocksight.jobs.cli.main import app
from blocksight.jobs.ledger.output import map_of
from blocksight.jobs.plan.config import ConfigError
from blocksight.storage.stores.local import LocalStore
from tests.jobs.jobs_of import config_of, rows_in, run_here
from tests.jobs.tiny import (
    CLASSES,
    MODEL,
    VIT,
    bad_bodies,
    folder_of_images,
    folder_of_tables,
    folder_of_tars,
    make,
    picture,
)

QUIET = Console(quiet=True)


def bank_of(data, file, **options):
    return make_bank(config_of(data, file, **options), QUIET)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eleven pictures of five classes, bad ones among them."""
    return folder_of_images(tmp_path_factory.mktemp("bank") / "data", count=11)


@pytest.fixture(scope="module")
def file(data):
    """The pictures' bank, with the features of a transformer without its head."""
    path = data.parent / "bank.safetensors"
    bank_of(data, path, model=VIT)
    return path


def test_the_bank_holds_every_images_feature_and_label(data, tmp_path):
    made = bank_of(data, tmp_path / "bank.safetensors")
    assert made.model == f"knn({MODEL})"
    assert (made.num_images, made.num_left_out, made.dimensions) == (11, 0, 8)
    assert made.class_names == CLASSES
    tensors = safetensors.torch.load_file(tmp_path / "bank.safetensors")
    keys = sorted(path.relative_to(data) for path in data.rglob("*.png"))
    assert tensors["bank.labels"].tolist() == [CLASSES.index(key.parts[0]) for key in keys]
    adapter = make()
    for key, found in zip(keys, tensors["bank.features"], strict=True):
        pixels = np.array(Image.open(data / key).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR))
        inputs = adapter.normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None])
        with torch.no_grad():
            wanted = adapter.module.second(adapter.module.first(inputs)).mean((2, 3))[0]
        cosine = float(found @ wanted / wanted.norm())
        assert float(found.norm()) == pytest.approx(1, abs=1e-5)
        assert cosine > 0.999
    adapter = load_model(made.model, state=(tmp_path / "bank.safetensors").read_bytes())
    assert adapter.class_names == list(CLASSES)


def test_passes_set_speed_alone(data, tmp_path, monkeypatch):
    bank_of(data, tmp_path / "one.safetensors")
    monkeypatch.setattr("blocksight.jobs.bench.bank.images_at_once", lambda _: 3)
    bank_of(data, tmp_path / "other.safetensors")
    one, other = (safetensors.torch.load_file(tmp_path / f"{name}.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys()
    for name in one:
        assert torch.allclose(one[name].double(), other[name].double(), atol=1e-6)


def test_only_the_first_records_and_the_centre(data, tmp_path):
    assert bank_of(data, tmp_path / "a.safetensors", limit=4).num_images == 4
    bank_of(data, tmp_path / "b.safetensors", limit=4, resize="crop")
    one, other = (safetensors.torch.load_file(tmp_path / f"{name}.safetensors")["bank.features"] for name in "ab")
    assert not torch.allclose(one, other, atol=1e-4)


def test_labels_of_tars_and_tables_are_class_numbers(tmp_path):
    made = bank_of(folder_of_tars(tmp_path / "tars"), tmp_path / "tars.safetensors")
    assert made.class_names == ("0", "1", "2", "3", "4")
    assert made.num_images == 6
    made = bank_of(folder_of_tables(tmp_path / "tables"), tmp_path / "tables.safetensors")
    assert made.class_names == ("0", "1", "2", "3", "4")


def test_images_without_a_label_are_left_out(tmp_path):
    images = [picture(number) for number in range(4)]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"image": images, "label": ["a", None, "b", "a"]}), tmp_path / "in" / "t.parquet")
    made = bank_of(tmp_path / "in", tmp_path / "bank.safetensors")
    assert (made.num_images, made.num_left_out, made.class_names) == (3, 1, ("a", "b"))


# ---------------------------------------------------------------- its use


def test_daam_explains_the_neighbours_vote(data, file, tmp_path):
    asked = {"model": f"knn({VIT})", "weights": str(file), "target": "label"}
    outcome = run_here(data, tmp_path / "out", explainer="daam", **asked)
    assert outcome.manifest["num_ok"] == 11
    rows = [row for row in rows_in(LocalStore(tmp_path / "out")) if row["status"] == "ok"]
    for row in rows:
        assert row["label"] == row["target_index"] == CLASSES.index(row["label_name"])
        assert row["target_name"] == row["label_name"]
        assert [one["name"] for one in row["accumulated_maps"]] == [
            f"backbone.blocks.{block}.attention" for block in range(2)
        ]
        for one in row["accumulated_maps"]:
            assert (one["height"], one["width"], len(one["values"])) == (8, 8, 64)
        assert map_of(row).shape == (32, 32)
    assert any(not row["is_flat"] for row in rows)


@pytest.mark.parametrize("explainer", ["gradcam", "rise"])
def test_other_methods_explain_it_too(data, file, tmp_path, explainer):
    parameters = {"num_masks": 8, "grid": 4} if explainer == "rise" else {}
    asked = {"model": f"knn({VIT})", "weights": str(file), "parameters": parameters}
    outcome = run_here(data, tmp_path / "out", explainer=explainer, **asked)
    assert outcome.manifest["num_ok"] == 11


def test_without_the_file_the_model_says_what_makes_it(data, tmp_path):
    with pytest.raises(ModelError, match=r"needs --weights: a memory bank, as `blocksight bank --model"):
        run_here(data, tmp_path / "out", model=f"knn({VIT})", explainer="daam")


def typed(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_the_command_prints_the_next_command(data, tmp_path):
    file = tmp_path / "bank.safetensors"
    ran = typed("bank", "--data", data, "--model", VIT, "--output", file, "--limit", 9)
    assert ran.exit_code == 0
    assert "bank: 7 images of 3 classes, 12 dimensions" in ran.output  # of nine records two are no pictures
    assert f"blocksight explain --model 'knn({VIT})' --weights {file}" in ran.output
    assert file.exists()


# ---------------------------------------------------------------- what is wrong


def test_pictures_that_lie_in_no_folder_have_no_labels(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "one.png").write_bytes(picture(0))
    with pytest.raises(ConfigError, match="has a label: put images into a folder per class"):
        bank_of(tmp_path / "in", tmp_path / "bank.safetensors")
    assert not (tmp_path / "bank.safetensors").exists()


def test_a_bank_of_one_class_is_refused(data, tmp_path):
    with pytest.raises(ConfigError, match="have the label 'ant'; a bank tells at least two classes apart"):
        bank_of(data, tmp_path / "bank.safetensors", limit=2)


def test_files_that_are_no_pictures_are_refused(tmp_path):
    for label in "ab":
        (tmp_path / "in" / label).mkdir(parents=True)
        (tmp_path / "in" / label / "x.png").write_bytes(bad_bodies()["not_an_image"])
    with pytest.raises(ConfigError, match=r"no image of .* that can be read has a label"):
        bank_of(tmp_path / "in", tmp_path / "bank.safetensors")


def test_the_bank_does_not_lie_among_its_images(data):
    with pytest.raises(ConfigError, match="contain each other"):
        bank_of(data, data / "bank.safetensors")


def test_an_unknown_store_is_refused(data):
    with pytest.raises(ConfigError, match="output: ftp:// is not known"):
        bank_of(data, "ftp://somewhere/bank.safetensors")


def test_names_of_classes():
    assert class_names_of(["b", "a", "b"], "d") == ["a", "b"]
    assert class_names_of(["3", "1"], "d") == ["0", "1", "2", "3"]
    with pytest.raises(ConfigError, match="numbers and names, such as 3 and 'cat'; wanted one kind"):
        class_names_of(["3", "cat"], "d")
    with pytest.raises(ConfigError, match="label 4000000 of d is no class number"):
        class_names_of(["3", "4000000"], "d")
