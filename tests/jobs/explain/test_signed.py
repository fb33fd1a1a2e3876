"""Signed maps: what speaks against a target, in columns and colours of its own."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from blocksight import explain
from blocksight.jobs.export.selection import Selection
from blocksight.jobs.ledger.output import map_of, negative_map_of, signed_maps_of
from blocksight.jobs.plan.config import ConfigError
from blocksight.storage.outputs.pictures import AGAINST_STOPS, COLOUR_STOPS, LUMINANCE, colours, in_panels
from blocksight.storage.stores.local import LocalStore
from tests.jobs.jobs_of import called, config_of, rows_in, run_here
from tests.jobs.tiny import MODEL, folder_of_images


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The same job with and without signs, and of the opposite difference."""
    root = tmp_path_factory.mktemp("signed")
    folder_of_images(root / "in", 3, bad=True)
    for name, more in {
        "plain": {"target": "0-1,predicted"},
        "signed": {"target": "0-1,predicted", "signed": True},
        "opposite": {"target": "1-0"},
    }.items():
        run_here(root / "in", root / name, explainer="gradcam", **more)
    return root


def rows_of(root, name):
    return {(row["key"], row["target"]): row for row in rows_in(LocalStore(root / name)) if row["status"] == "ok"}


def test_the_map_itself_is_the_same_and_the_negative_is_that_of_the_opposite(outputs):
    plain, signed, opposite = (rows_of(outputs, name) for name in ("plain", "signed", "opposite"))
    assert plain.keys() == signed.keys()
    added = ("map_negative", "map_negative_low", "map_negative_high")
    for place, row in signed.items():
        differing = {name for name, value in row.items() if value != plain[place][name]}
        assert differing == {*added, "unit_id"}
        assert all(plain[place][name] is None for name in added)
        if place[1] == "0-1":
            other = opposite[place[0], "1-0"]
            assert row["map_negative"] == other["map"]
            assert (row["map_negative_low"], row["map_negative_high"]) == (other["map_low"], other["map_high"])


def test_both_are_drawn_on_one_scale(outputs):
    for row in rows_of(outputs, "signed").values():
        own, against = signed_maps_of(row)
        assert max(own.max(), against.max()) == pytest.approx(1.0, abs=1e-6) or own.max() == 0
        greatest = max(row["map_high"], row["map_negative_high"])
        wanted = (row["map_low"] + (row["map_high"] - row["map_low"]) * map_of(row)) / greatest
        assert np.allclose(own, wanted, atol=1e-6)
    one, other = np.array([[1.0, 0.0, 0.2]]), np.array([[0.0, 1.0, 0.2]])
    drawn = colours(one, other)
    assert (drawn[0, 0] == colours(one)[0, 0]).all()
    assert (drawn[0, 1] == AGAINST_STOPS[-1]).all()
    assert (drawn[0, 2] == colours(one)[0, 2]).all()
    bright = [ramp @ LUMINANCE for ramp in (COLOUR_STOPS, AGAINST_STOPS)]
    assert np.allclose(*bright, atol=1)  # neither looks stronger
    assert (AGAINST_STOPS[1:-1, 2] > AGAINST_STOPS[1:-1, 0] + 50).all()  # never the reds of what speaks for it


def test_the_second_colour_is_shown(outputs, tmp_path):
    pictures = []
    for name in ("plain", "signed"):
        assert called("show", outputs / name, "ant/000.png", "--picture", tmp_path / f"{name}.png")[0] == 0
        pictures.append((tmp_path / f"{name}-0-1.png").read_bytes())
    assert pictures[0] != pictures[1]


def picture_of(folder, number=0):
    with Image.open(sorted(folder.glob("*.png"))[number]) as drawn:
        return np.asarray(drawn).astype(int)


def test_exports_have_the_second_map(outputs, tmp_path):
    for name in ("plain", "signed"):
        assert called("export", outputs / name, "pictures", tmp_path / name)[0] == 0
    assert np.abs(picture_of(tmp_path / "plain") - picture_of(tmp_path / "signed")).max() > 20
    code, text = called("export", outputs / "signed", "numpy", tmp_path / "arrays", "--where", "target = '0-1'")
    assert code == 0, text
    assert "maps_negative" in text
    index = pq.read_table(tmp_path / "arrays" / "index.parquet").to_pylist()
    stored, against = rows_of(outputs, "signed"), np.load(tmp_path / "arrays" / "maps_negative-00000.npy")
    assert len(against) == len(index) == 3
    for row in index:
        assert (against[row["row"]] == negative_map_of(stored[row["key"], "0-1"])).all()


def test_one_picture_has_the_second_map(outputs, tmp_path):
    image = outputs / "in" / "ant" / "000.png"
    options = {"target": "0-1", "explainer": "gradcam", "key": "ant/000.png"}
    plain, signed = (explain(MODEL, image, **options, signed=is_signed) for is_signed in (False, True))
    assert plain.map_negative is None
    assert (signed.map_negative == negative_map_of(rows_of(outputs, "signed")["ant/000.png", "0-1"])).all()
    assert plain.save(tmp_path / "plain.png").read_bytes() != signed.save(tmp_path / "signed.png").read_bytes()
    assert plain._repr_png_() != signed._repr_png_()


def test_the_legend_names_both_colours():
    panel = np.full((40, 700, 3), 90, np.uint8)
    plain, signed = (np.asarray(in_panels((panel,) * 3, is_signed=is_signed)) for is_signed in (False, True))
    bright = AGAINST_STOPS[-1].astype(np.uint8)
    assert [bool((one == bright).all(-1).any()) for one in (plain, signed)] == [False, True]


def test_targets_of_one_name_are_two_maps():
    chosen = Selection(frozenset({("a.png", "margin")}))
    row = {"key": "a.png", "target_index": None, "target_name": "ant - bee"}
    assert chosen.takes({**row, "target": "margin"})
    assert not chosen.takes({**row, "target": "0-1"})


@pytest.mark.parametrize(
    "arguments", [["show", "OUT", "ant/000.png", "--picture", "TMP/p.png"], ["report", "OUT"], ["verify", "OUT"]]
)
def test_signed_outputs_are_read(arguments, outputs, tmp_path):
    given = [one.replace("OUT", str(outputs / "signed")).replace("TMP", str(tmp_path)) for one in arguments]
    code, text = called(*given)
    assert code == 0, text


@pytest.mark.parametrize(
    "explainer", ["gradient", "ucag(gradcam)", "smoothgrad", "smoothgrad(rise)", "fullgrad", "a-fmi", "auto"]
)
def test_methods_without_a_sign_are_refused(explainer, tmp_path):
    with pytest.raises(ConfigError, match="have no sign"):
        config_of(tmp_path, tmp_path / "x", explainer=explainer, signed=True)


def test_signed_is_in_the_identity_only_if_asked(tmp_path):
    plain = config_of(tmp_path, tmp_path / "x", explainer="gradcam")
    assert "signed" not in plain.identity(None)
    signed = config_of(tmp_path, tmp_path / "x", explainer="libra(gradcam)", signed=True, model=MODEL)
    assert signed.identity(None)["signed"] is True


def test_a_method_of_masks_says_that_its_signed_map_is_another(outputs, tmp_path):
    parameters = {"num_masks": 20, "grid": 4}
    for name, signed in (("plain", False), ("signed", True)):
        run_here(outputs / "in", tmp_path / name, explainer="rise", parameters=parameters, target="0-1", signed=signed)
    plain, signed = (rows_of(tmp_path, name) for name in ("plain", "signed"))
    for place, row in signed.items():
        assert row["parameters"] != plain[place]["parameters"]
        assert row["map_negative"] is not None
        assert row["score"] == plain[place]["score"]


def test_other_explainers_are_shown_beside_a_signed_map_as_they_are(outputs, tmp_path):
    shown = ("show", outputs / "signed", "ant/000.png", "--explainers", "gradient,rise", "--model", MODEL)
    code, text = called(*shown, "--picture", tmp_path / "p.png")
    assert code == 0, text
