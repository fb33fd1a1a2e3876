"""Side products are read back: damage is named, large ones are bounded, and the pictures agree with the rows."""

import re

import numpy as np
import pytest
from PIL import Image

from blocksight.engine.catalog.side_products import Crop, Fixation, GridMap, SideProducts
from blocksight.jobs.plan.records import UnreconciledError
from blocksight.jobs.report.products import (
    MAX_BEST,
    MAX_CROPS,
    MAX_FIXATIONS,
    Sizes,
    figure,
    parts_of,
    products_of,
    said_of,
)
from blocksight.storage.outputs.drawings import FIRST_COLOUR, Cell, bars, framed, with_cells, with_path
from blocksight.storage.outputs.pictures import colours, overlay
from blocksight.storage.outputs.schema import PRODUCT_COLUMNS, SCHEMA
from blocksight.storage.stores.local import LocalStore
from tests.jobs import jobs_of
from tests.jobs.jobs_of import model_of, rows_in, run_here
from tests.jobs.side_products import OF_METHODS, blocks, crops, family, grids, path, rewrite, with_products
from tests.jobs.tiny import folder_of_images

SIZES = Sizes(film=64, single=128, most=6)
NAN = float("nan")


def row_with(**columns):
    empty = dict.fromkeys(SCHEMA.names)
    return {**empty, "key": "k.png", "target_index": 3, "map_height": 32, "map_width": 32, **columns}


def grey(side):
    return np.full((side * 3 // 4, side, 3), 100, np.uint8)


def parts(**columns):
    row = row_with(**columns)
    return parts_of(products_of(row), (row["map_height"], row["map_width"]), grey, SIZES)


def lines_of(**columns):
    return dict(said_of(products_of(row_with(**columns))))


# ---------------------------------------------------------------- read back


def test_what_an_explainer_stores_is_what_is_read():
    stored = SideProducts(
        channel_importance=np.array([0.5, -1.0], np.float32),
        crops=(Crop(0, 8, 16, 24, 0.25, 0.5), Crop(16, 0, 16, 32, 1.0, 1.0)),
        scan_path=(Fixation(-1.0, 1.0, 2.5), Fixation(0.25, -0.5, 0.0)),
        accumulated_maps=(GridMap("a", np.ones((2, 3), np.float32)), GridMap("b", np.ones((2, 3), np.float32))),
        map_family=(GridMap("blur", np.zeros((1, 2), np.float32), 0.5),),
        selected_by="insertion",
        edge_detector="scharr",
    )
    row = row_with(**stored.as_columns())
    assert products_of(row).as_columns() == stored.as_columns()
    assert list(stored.as_columns()) == PRODUCT_COLUMNS
    assert products_of(row_with()) == SideProducts()
    assert list(said_of(SideProducts())) == parts() == []


def spoilt(name, **changes):
    """A side product whose first element is changed."""
    made = {"crops": crops(3, 16, 8), "scan_path": path(3), "accumulated_maps": blocks(3), "map_family": family(3)}
    first, *others = made[name]
    return {name: [{**first, **changes}, *others]}


DAMAGE = {
    "an empty list": [{name: []} for name in ("crops", "scan_path", "accumulated_maps", "map_family")],
    "no importance": [{"channel_importance": []}],
    "not finite": [
        {"channel_importance": [1.0, NAN]},
        {"channel_importance": [1.0, None]},
        spoilt("crops", score=NAN),
        spoilt("crops", weight=float("inf")),
        spoilt("scan_path", loss=NAN),
        spoilt("scan_path", row=NAN),
        spoilt("map_family", value=NAN),
        spoilt("accumulated_maps", values=[NAN] * 16),
    ],
    "a wrong size": [
        spoilt("accumulated_maps", height=5),
        spoilt("accumulated_maps", height=0, width=0, values=[]),
        spoilt("accumulated_maps", height=-4, width=-4),
        spoilt("map_family", values=[1.0]),
        spoilt("map_family", height=2**31 - 1, width=2**31 - 1),
        {**spoilt("crops"), "map_height": 31},
        {**spoilt("crops"), "map_height": None},
        spoilt("crops", top=-1),
        spoilt("crops", width=0),
        spoilt("crops", left=2**31 - 1),
    ],
    "out of range": [
        spoilt("scan_path", column=1.5),
        spoilt("crops", score=-1e300),
        {"selected_by": "no metric \x1b[31m"},
        {"crops": [None]},
        {"map_family": [None]},
    ],
}


@pytest.mark.parametrize(
    "columns", [columns for kind in DAMAGE.values() for columns in kind], ids=lambda own: str(own)[:60]
)
def test_what_is_damaged_is_named(columns):
    name = next(iter(columns))
    wanted = f"the column {name} of 'k.png' for class 3 is damaged, `blocksight verify` names its fragment: "
    with pytest.raises(UnreconciledError, match=wanted) as refused:
        products_of(row_with(**columns))
    assert len(str(refused.value)) < 300


def test_thousands_of_entries_are_bounded():
    many = {
        "channel_importance": [float(number) for number in range(100_000)],
        "crops": crops(60, 2, 0) + crops(40, 2, 0),
        "scan_path": 3000 * path(1),
        "accumulated_maps": blocks(2000, 2),
        "map_family": grids(["x" * 5000 + str(n) for n in range(3000)], [float(n) for n in range(3000)], 2),
        "selected_by": "insertion",
    }
    drawn = {part.title: part for part in parts(**many)}
    assert {title: len(part.tiles) for title, part in drawn.items()} == {
        "Accumulated maps": SIZES.most,
        "Scan path": 1,
        "Crops": 1,
        "Map family": MAX_BEST,
        "Channel importance": 1,
    }
    assert drawn["Accumulated maps"].summary == "6 of 2,000 blocks, evenly spaced"
    assert drawn["Scan path"].summary == f"{MAX_FIXATIONS} of 3,000 fixations, the first ones"
    assert drawn["Crops"].summary == f"{MAX_CROPS:,} of 5,200 crops, the best"
    assert drawn["Map family"].summary == "12 of 3,000 maps, the best by insertion"
    assert all(len(text) < 1200 for text in lines_of(**many).values())
    for part in drawn.values():
        assert all(tile.pixels.shape[1] in (SIZES.film, SIZES.single) for tile in part.tiles)


# ---------------------------------------------------------------- in words


def test_each_has_a_line():
    assert lines_of(scan_path=path(5)) == {"scan path": "5 fixations, loss 2.31 at the first, 0.46 at the last"}
    assert lines_of(scan_path=path(1)) == {"scan path": "1 fixation, loss 2.31 at the first, 2.31 at the last"}
    assert lines_of(crops=crops(3, 16, 8)) == {"crops": "9 crops, score 0.90 at best, 0.10 at worst"}
    assert lines_of(channel_importance=[0.5, -0.25, 0.0, 2.0]) == {
        "channel importance": "2 of 4 channels above 0; the most important: 3 (2)"
    }
    assert lines_of(edge_detector="hed") == {"edges": "by hed"}
    assert lines_of(selected_by="pos") == {"selected by": "pos, which therefore says nothing about its quality"}


def test_where_half_of_the_mass_comes_from():
    def maps(*masses):
        return [
            {"name": f"b{place}", "value": None, "height": 1, "width": 1, "values": [own]}
            for place, own in enumerate(masses)
        ]

    line = "of 3 blocks; half of the map's mass is there from b1 on"
    assert lines_of(accumulated_maps=maps(1.0, 2.0, 4.0)) == {"accumulated maps": line}
    assert lines_of(accumulated_maps=maps(0.0, 0.0)) == {"accumulated maps": "of 2 blocks"}


def test_the_chosen_map_is_the_best_by_the_metrics_direction():
    def line(metric):
        return lines_of(map_family=family(8), selected_by=metric)["selected by"]

    assert line("average_drop_100") == "average_drop_100 among 8 maps, of normal (4), blur (4); chosen: blur (0.10)"
    assert line("insertion") == "insertion among 8 maps, of normal (4), blur (4); chosen: normal (7.10)"
    assert lines_of(map_family=family(8))["selected by"] == "no metric among 8 maps, of normal (4), blur (4)"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00"), (2.314, "2.31"), (-0.25, "-0.25"), (0.0000312, "3.1e-05"), (1e300, "1e+300"), (999.4, "999.40")],
)
def test_a_figure_is_short(value, text):
    assert figure(value) == text


# ---------------------------------------------------------------- as tiles


def test_accumulated_maps_are_displayed_by_the_papers_rule():
    made = blocks(3)
    (part,) = parts(accumulated_maps=made)
    assert [tile.caption.partition("\n")[0] for tile in part.tiles] == ["block 0", "block 1", "block 2"]
    top, mass = max(made[-1]["values"]), sum(made[-1]["values"])
    for one, tile in zip(made, part.tiles, strict=True):
        lifted = np.array([1 / (1 + np.exp(-5 * value / top)) - 0.5 for value in one["values"]]).reshape(4, 4)
        scaled = (lifted - lifted.min()) / (lifted.max() - lifted.min())
        large = Image.fromarray(scaled.astype(np.float32)).resize((64, 48), Image.Resampling.BILINEAR)
        assert np.array_equal(tile.pixels, overlay(grey(64), np.asarray(large).clip(0, 1)))
        assert tile.caption.endswith(f"\n{100 * sum(one['values']) / mass:.1f} % of the mass")
    faint = [{**one, "values": [value * 0.01 for value in one["values"]]} for one in made[:1]]
    (dim,) = parts(accumulated_maps=[*faint, *made[1:]])
    assert dim.tiles[0].pixels.max() > 200  # an early block is seen all the same


def test_maps_of_nothing_and_of_one_value_are_drawn():
    flat = [{**one, "values": [0.0] * 16} for one in blocks(2)]
    (part,) = parts(accumulated_maps=flat)
    assert [tile.caption for tile in part.tiles] == ["block 0\n0.0 % of the mass", "block 1\n0.0 % of the mass"]
    below = [{**one, "values": [-1.0] * 16} for one in family(2)]
    (part,) = parts(map_family=below, selected_by="insertion")
    assert np.array_equal(part.tiles[1].pixels, overlay(grey(64), np.zeros((48, 64))))


def test_blocks_are_named_shortly_where_that_is_clear():
    def names(*full):
        (part,) = parts(accumulated_maps=grids(list(full), [None] * len(full)))
        return [tile.caption.partition("\n")[0] for tile in part.tiles]

    assert names("encoder.layers.layer_0", "encoder.layers.layer_1") == ["layer_0", "layer_1"]
    assert names("blocks.0", "blocks.1") == ["block 0", "block 1"]
    assert names("a.attn", "b.attn") == ["a", "b"]
    assert names("a\nb\x1b") == ["a?b?"]


def test_of_many_blocks_evenly_spaced_ones_are_drawn():
    (part,) = parts(accumulated_maps=blocks(11))
    assert [tile.caption.partition("\n")[0] for tile in part.tiles] == [
        f"block {place}" for place in (0, 2, 4, 6, 8, 10)
    ]


def test_a_path_goes_from_place_to_place_and_the_first_is_marked():
    ends = [{"row": -0.5, "column": -0.5, "loss": 2.0}, {"row": 0.5, "column": 0.5, "loss": 1.0}]
    (part,) = parts(scan_path=ends)
    (tile,) = part.tiles
    assert tile.caption == "loss 2.00 at the first, 1.00 at the last\n2.00 1.00"
    assert (tile.pixels[47, 63] == 255).all()  # the line, through the middle
    assert (tile.pixels[10, 100] == tile.pixels[90, 20]).all()  # and nothing beside it
    red = (tile.pixels == FIRST_COLOUR).all(-1)
    rows, columns = np.nonzero(red)
    assert abs(rows.mean() - 0.25 * 95) < 1.5
    assert abs(columns.mean() - 0.25 * 127) < 1.5
    turned = with_path(grey(128), [(95.0, 71.0), (31.0, 24.0)])
    assert np.nonzero((turned == FIRST_COLOUR).all(-1))[1].mean() > 80


def test_marks_at_the_edge_are_seen_whole():
    corner = with_path(np.zeros((96, 128, 3), np.uint8), [(127.0, 95.0)])
    middle = with_path(np.zeros((96, 128, 3), np.uint8), [(60.0, 40.0)])
    assert (corner == FIRST_COLOUR).all(-1).sum() == pytest.approx((middle == FIRST_COLOUR).all(-1).sum(), rel=0.1)


def test_crops_are_coloured_by_their_scores_and_drawn_at_their_middles():
    (part,) = parts(crops=crops(3, 16, 8))
    (tile,) = part.tiles
    assert tile.caption == "9 crops: each one's score at its middle\nbest 0.90 (framed), worst 0.10"
    ramp = colours(np.linspace(0, 1, 9)[None])[0].astype(int)
    for number, crop in enumerate(crops(3, 16, 8)[:-1]):
        x = (crop["left"] + 8) * 4 - 14  # beside the text
        y = (crop["top"] + 8) * 3 - 10
        assert np.abs(tile.pixels[y, x].astype(int) - ramp[number]).max() <= 2
    assert tile.pixels[72 - 10, 96 - 15].tolist() == [255] * 3  # the best cell is marked
    assert tile.pixels[5, 60].tolist() == [55, 55, 55]  # the picture, dimmed, where no middle is
    below = (tile.pixels[93] == 255).all(-1)  # the best one's frame, whose last row is 31 of 32
    assert (below[66:122].all(), below[:62].any()) == (True, False)


def test_one_crop_is_its_own_cell():
    (part,) = parts(crops=crops(1, 32, 1))
    assert (part.tiles[0].pixels[40, 20] == colours(np.zeros((1, 1)))[0, 0]).all()
    (part,) = parts(crops=crops(30, 2, 1))
    assert part.summary == "900 crops"


def test_texts_that_do_not_fit_are_left_out():
    wide, tall = ((0, 0, 60, 60), (70, 0, 74, 60))
    drawn = with_cells(
        np.zeros((64, 128, 3), np.uint8), [Cell(wide, 0.0, ".98"), Cell(tall, 0.0, ".98")], (0, 0, 99, 63)
    )
    assert (drawn[20:40, 15:45] == 255).all(-1).any()
    assert not (drawn[5:55, 72] == 255).all(-1).any()


def test_the_best_candidates_are_drawn_and_the_chosen_one_is_framed():
    made = family(15)
    (part,) = parts(map_family=made, selected_by="average_drop_100")
    assert (len(part.tiles), part.summary) == (12, "12 of 15 maps, the best by average_drop_100")
    values = sorted(one["value"] for one in made)
    assert [tile.caption.partition("\n")[2] for tile in part.tiles] == [figure(value) for value in values[:12]]
    assert part.tiles[0].caption == "chosen: blur\n0.10"
    assert ["chosen" in tile.caption for tile in part.tiles].count(True) == 1
    best = made[3]
    positive = np.array(best["values"]).reshape(4, 4) / max(best["values"])
    large = Image.fromarray(positive.astype(np.float32)).resize((64, 48), Image.Resampling.BILINEAR)
    assert np.array_equal(part.tiles[0].pixels, framed(overlay(grey(64), np.asarray(large).clip(0, 1))))
    assert (part.tiles[0].pixels[0] == FIRST_COLOUR).all()
    assert not (part.tiles[1].pixels == FIRST_COLOUR).all(-1).any()


def test_equal_candidates_stay_in_the_order_of_their_draws_and_those_without_a_value_come_last():
    made = grids(["a", "b", "c", "d"], [1.0, None, 2.0, 2.0])
    (part,) = parts(map_family=made, selected_by="insertion")
    assert [tile.caption for tile in part.tiles] == ["chosen: c\n2.00", "d\n2.00", "a\n1.00", "b\nno value"]
    (part,) = parts(map_family=made)
    assert [tile.caption.partition("\n")[0] for tile in part.tiles] == ["a", "b", "c", "d"]
    (part,) = parts(map_family=grids(["a", "b"], [None, None]), selected_by="insertion")
    assert not any("chosen" in tile.caption for tile in part.tiles)


def test_bars_rise_and_fall_from_the_axis():
    drawn = bars(np.array([3.0, 1.0, -1.0]), [], (120, 90))
    coloured = (np.abs(drawn.astype(int) - 250).max(-1) > 20) & (drawn.astype(int).max(-1) > 40)
    heights = [coloured[:, start + 5 : start + 20].any(1).sum() for start in (0, 30, 60)]
    assert heights[0] > 2.5 * heights[1] > 0
    assert heights[1] == pytest.approx(heights[2], abs=2)
    assert coloured[:, 5].argmax() < coloured[:, 65].argmax()  # above, and below
    assert np.array_equal(bars(np.zeros(4), ["x"], (120, 90))[20, 40], [250, 250, 250])


def test_channels_are_named_by_their_numbers():
    (part,) = parts(channel_importance=[0.5, -0.25, 0.0, 0.125, 2.0])
    assert part.tiles[0].caption == "3 of 5 channels above 0\nall, sorted; below, the most important"
    (other,) = parts(channel_importance=[0.5, -0.25, 0.0, 2.0, 0.125])
    assert not np.array_equal(part.tiles[0].pixels, other.tiles[0].pixels)  # the numbers alone differ


# ---------------------------------------------------------------- the commands


@pytest.fixture
def output(tmp_path):
    run_here(folder_of_images(tmp_path / "in", 3), tmp_path / "out", explainer="gradcam", target="top-2")
    return tmp_path / "out"


@pytest.fixture
def called(monkeypatch, tmp_path):
    """Runs a command in this process; returns its exit code and output."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code, printed = jobs_of.called(*arguments)
        return code, " ".join(printed.split())

    return run


@pytest.mark.parametrize("method", OF_METHODS)
def test_show_draws_what_there_is_beside_the_usual_picture(output, called, tmp_path, method):
    with_products(LocalStore(output), method)
    code, printed = called("show", output, "ant/000.png")
    assert code == 0, printed
    made = sorted(file.name for file in tmp_path.glob("*.png"))
    kinds = {name.split(".")[-2].partition("-")[0] for name in made}
    assert kinds == ({"map"} if method == "feature-cam" else {"map", "products"})
    assert len(made) == 2 * len(kinds)
    for name, text in lines_of(**OF_METHODS[method]).items():
        assert printed.count(f"{name} {text}") == 2  # once for each target
    targets = {re.search(r"-(\d+)\.png$", name)[1] for name in made}
    assert len(targets) == 2


def test_a_picture_that_is_named_has_its_products_beside_it(output, called, tmp_path):
    with_products(LocalStore(output), "daam", "bee")
    code, printed = called(
        "show",
        output,
        "ant/000.png",
        "--model",
        model_of(output),
        "--explainers",
        "layercam",
        "--picture",
        tmp_path / "x.png",
    )
    assert code == 0, printed
    targets = [row["target_index"] for row in rows_in(LocalStore(output)) if row["key"] == "ant/000.png"]
    wanted = {f"{name}-{target}.png" for name in ("x", "x.products") for target in targets}
    assert {file.name for file in tmp_path.glob("*.png")} == wanted
    with Image.open(tmp_path / f"x.products-{targets[0]}.png") as sheet:
        assert sheet.size == (
            7 * (288 + 8) + 8,
            2 * (216 + 48) + 8 + 24,
        )  # a legend below; the map, 5 blocks and 8 candidates


@pytest.mark.parametrize("command", ["show", "report"])
def test_a_damaged_side_product_is_named_by_each_command(output, called, command):
    rewrite(LocalStore(output), lambda _: {"scan_path": [{"row": NAN, "column": 0.0, "loss": 1.0}]})
    code, printed = called(*{"show": ("show", output, "ant/000.png"), "report": ("report", output)}[command])
    assert code == 5
    assert "NOT RECONCILED: the column scan_path of '" in printed
    assert "is damaged, `blocksight verify` names its fragment" in printed


def test_hostile_names_are_one_harmless_line(output, called):
    hostile = "[red]\x1b[31m\n\u202e" + "x" * 500
    with_products(LocalStore(output), accumulated_maps=grids([hostile], [None]), edge_detector=hostile)
    code, printed = called("show", output, "ant/000.png")
    assert code == 0, printed
    assert "from [red]?[31m??xxx" in printed
    assert "\x1b" not in printed
    assert "x" * 100 not in printed
