"""The difference of two outputs: joined over any cut into units, judged, and measured by hand."""

import io
import json
from dataclasses import replace
from itertools import pairwise

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console
from scipy.stats import binomtest

from blocksight.cluster.bucket import EmbeddedBucket
from blocksight.engine.metrics.complexity import effective_area
from blocksight.engine.metrics.similarity import iou_of_tops, pearson, spearman, ssim
from blocksight.jobs.cli.metric_tables import difference_table
from blocksight.jobs.evaluate.shares import newcombe, wilson
from blocksight.jobs.ledger.output import map_of
from blocksight.jobs.plan.config import ConfigError, Execution
from blocksight.jobs.plan.plan import ensure_model, ensure_plan, load_plan, make_plan
from blocksight.jobs.plan.records import ModelFacts, Unit, UnreconciledError
from blocksight.jobs.plan.units import Workforce
from blocksight.jobs.versus import run
from blocksight.jobs.versus.joining import Joining, Overlaps, Tally
from blocksight.jobs.versus.rows import DIFFERENCE, MEASURED, map_measures, measured
from blocksight.jobs.versus.run import PICTURE, SUMMARY, write_difference
from blocksight.jobs.versus.summary import AMONG, COLUMNS, Sums
from blocksight.jobs.versus.typical_range import MIN_STAYED, TypicalRange, judged
from blocksight.jobs.worker.rows import Output
from blocksight.storage.inputs.survey import Layout
from blocksight.storage.outputs.fragments import encode_fragment
from blocksight.storage.outputs.map_codec import encode_map
from blocksight.storage.outputs.pictures import BAR_HEIGHT, resized
from blocksight.storage.outputs.schema import OK, REJECTED
from blocksight.storage.stores.local import LocalStore
from blocksight.storage.stores.store import MissingError
from tests.jobs.evaluate.test_evaluate import evaluated
from tests.jobs.jobs_of import blocksight, config_of, run_here
from tests.jobs.tiny import CLASSES, folder_of_images, folder_of_sides, folder_of_tables, folder_of_tars

QUIET = Console(quiet=True)


def blob(down, across, side=32, width=0.1):
    """A bell around a point, given as shares of the picture's side."""
    places = (np.arange(side) + 0.5) / side
    return np.exp(-((places[:, None] - down) ** 2 + (places[None] - across) ** 2) / (2 * width**2))


def row_of(key, saliency, target=0, score=0.8, rank=1, label=None, **more):
    """An explained row with given values."""
    encoded = encode_map(saliency)
    return {
        "key": key,
        "shard": "there",
        "shard_index": 0,
        "unit_id": "u",
        "status": OK,
        "sha256": f"of {key}",
        "width": 40,
        "height": 30,
        "label": label,
        "label_name": None if label is None else CLASSES[label],
        "target": str(target),
        "target_index": target,
        "target_name": CLASSES[target],
        "target_rank": rank,
        "score": score,
        "explainer": "gradcam",
        "parameters": "p",
        "map": encoded.data,
        "map_height": encoded.height,
        "map_width": encoded.width,
        "is_flat": encoded.low == encoded.high,
        "metrics": {"drop": 10.0, "increase": False, "protocol": "one"},
        **more,
    }


def rejected(key):
    return {"key": key, "shard": "there", "shard_index": 0, "unit_id": "u", "status": REJECTED, "error": "bad"}


def output_of(data, place, rows, per_unit=4, **options):
    """An output of given rows (by key), cut into units of this many records."""
    plan = make_plan(config_of(data, place, **options), weights_sha256=None, workforce=Workforce(1, False))
    objects = [info for unit in plan.units for info in unit.objects]
    cut = [tuple(objects[start : start + per_unit]) for start in range(0, len(objects), per_unit)]
    units = [
        Unit(ordinal, f"{ordinal:020x}", Layout.IMAGES, own, 0, len(own), len(own)) for ordinal, own in enumerate(cut)
    ]
    store = LocalStore(place)
    plan = ensure_plan(store, replace(plan, units=tuple(units)))
    ensure_model(store, ModelFacts("w", len(CLASSES), (32, 32)))
    for unit in plan.units:
        own = [row for info in unit.objects for row in rows.get(info.key, [rejected(info.key)])]
        store.create(unit.fragment_key, encode_fragment(own, {}))
    return Output(place.name, store, plan)


@pytest.fixture
def data(tmp_path):
    return folder_of_images(tmp_path / "in", 30, bad=False)


def keys_of(data):
    return sorted(str(file.relative_to(data)) for file in data.rglob("*.png"))


def written(a, b, place):
    return write_difference(a, b, LocalStore(place), None, QUIET).summary


def rows_in(place):
    return {
        (row["key"], row["target_index"]): row
        for file in sorted((place / "data").rglob("*.parquet"), key=lambda file: file.name)
        for row in pq.read_table(file).to_pylist()
    }


def watched_reads(store):
    """Notes the keys that are read from now on."""
    keys, original = [], store.read

    def read(key, **options):
        keys.append(key)
        return original(key, **options)

    store.read = read
    return keys


# ---------------------------------------------------------------- joined


def pairs_in(a, b, tally):
    """All pairs of two outputs, in A's order."""
    joining = Joining(a, b)
    pairs = [pair for unit in a.plan.units for pair in joining.pairs_of(unit, tally)]
    joining.count_rest(tally)
    return pairs


def test_any_two_cuts_give_the_same_pairs_and_each_fragment_is_read_once(data, tmp_path):
    keys = keys_of(data)
    rows = {key: [row_of(key, blob(0.5, 0.5), score=number / 50)] for number, key in enumerate(keys)}
    for per_a, per_b in ((4, 7), (7, 4), (30, 1), (1, 30), (5, 5)):
        outputs = [
            output_of(data, tmp_path / f"{name}-{per_a}-{per_b}", rows, per)
            for name, per in (("a", per_a), ("b", per_b))
        ]
        reads = [watched_reads(output.store) for output in outputs]
        tally = Tally()
        pairs = pairs_in(*outputs, tally)
        assert [(pair.a["key"], pair.a["score"]) for pair in pairs] == [
            (pair.b["key"], pair.b["score"]) for pair in pairs
        ]
        assert [pair.a["key"] for pair in pairs] == keys
        assert (tally.a.explained, tally.b.explained, tally.explained_in_both) == (30, 30, 30)
        fragments = [sum(key.startswith("data/") for key in own) for own in reads]
        assert fragments == [len(output.plan.units) for output in outputs]  # none is read twice


@pytest.mark.parametrize("make", [folder_of_tars, folder_of_tables])
def test_parts_of_shards_meet_by_their_ranges(tmp_path, make, monkeypatch):
    make(tmp_path / "in")
    run_here(tmp_path / "in", tmp_path / "a", explainer="gradcam", target="0,1")
    monkeypatch.setattr("blocksight.cluster.sizing.LEAST_UNIT_SECONDS", 0.001)
    monkeypatch.setattr("blocksight.cluster.sizing.MOST_UNIT_SECONDS", 0.002)
    run_here(tmp_path / "in", tmp_path / "b", explainer="layercam", target="1,2")
    a, b = (Output(name, LocalStore(tmp_path / name), load_plan(LocalStore(tmp_path / name))) for name in "ab")
    assert len(a.plan.units) < len(b.plan.units)
    tally = Tally()
    pairs = pairs_in(a, b, tally)
    assert {pair.a["target_index"] for pair in pairs} == {1}
    assert len(pairs) == tally.a.explained == tally.b.explained == tally.explained_in_both > 0
    assert (tally.a.rejected, tally.other_targets) == (tally.b.rejected, 0)


def test_ranges_that_only_touch_do_not_overlap(data, tmp_path):
    plan = make_plan(config_of(data, tmp_path / "x"), weights_sha256=None, workforce=Workforce(1, False))
    shard = plan.units[0].objects[:1]
    edges = [0, 3, 4, 9, 20]
    units = tuple(
        Unit(n, f"{n:020x}", Layout.TAR, shard, start, stop, 1) for n, (start, stop) in enumerate(pairwise(edges))
    )
    overlaps = Overlaps(replace(plan, units=units))
    for start, stop in [(0, 3), (0, 4), (3, 4), (2, 10), (4, 9), (19, 25), (20, 25)]:
        own = replace(units[0], start=start, stop=stop)
        slow = [unit.ordinal for unit in units if unit.start < stop and start < unit.stop]
        assert [unit.ordinal for unit in overlaps.of(own)] == slow


def test_what_is_not_shared_is_counted(data, tmp_path):
    keys = keys_of(data)
    rows = {key: [row_of(key, blob(0.5, 0.5), target=t) for t in (0, 1)] for key in keys}
    others = dict(rows)
    others[keys[0]] = [row_of(keys[0], blob(0.5, 0.5), target=2)]
    others[keys[1]] = [row_of(keys[1], blob(0.5, 0.5), sha256="another")]
    del others[keys[2]], rows[keys[3]]
    others[keys[4]] = [row_of(keys[4], blob(0.5, 0.5), target=1, target_name="wasp")]
    a, b = output_of(data, tmp_path / "a", rows), output_of(data, tmp_path / "b", others, 7)
    (tmp_path / "b" / b.plan.units[-1].fragment_key).unlink()  # two records
    counts = written(a, b, tmp_path / "d")["counts"]
    assert counts["explained_in_a"] == 29
    assert counts["explained_in_b"] == 27
    assert counts["rejected_in_a"] == counts["rejected_in_b"] == 1
    assert counts["records_with_other_targets"] == counts["records_with_other_image"] == 1
    assert counts["records_only_in_a"] == 1 + 2
    assert counts["records_only_in_b"] == 1
    assert counts["records_compared"] == 30 - 2 - 2 - 2
    assert counts["rows"] == 2 * counts["records_compared"] - 1
    assert counts["rows_with_other_target_name"] == 1
    assert (counts["open_units_of_a"], counts["open_units_of_b"]) == (0, 1)


def test_evaluations_are_joined_where_both_have_one_protocol(tmp_path, monkeypatch):
    data = folder_of_images(tmp_path / "in", 6, bad=False)
    for name in ("gradcam", "layercam"):
        run_here(data, tmp_path / name, explainer=name, target="0")
        evaluated(tmp_path / name, metrics="entropy,deletion", controls=True)
    evaluated(tmp_path / "layercam", metrics="gini")
    a, b = (
        Output(name, LocalStore(tmp_path / name), load_plan(LocalStore(tmp_path / name)))
        for name in ("gradcam", "layercam")
    )
    written(a, b, tmp_path / "d")
    for (key, _), row in rows_in(tmp_path / "d").items():
        assert [own["metric"] for own in row["metrics"]] == ["deletion", "entropy"], key
        found = duckdb.sql(
            f"SELECT value FROM '{tmp_path}/layercam/evaluations/*/data/**/*.parquet' "
            f"WHERE key = '{key}' AND metric = 'deletion' AND explainer = 'layercam'"
        ).fetchall()
        assert [own["b"] for own in row["metrics"] if own["metric"] == "deletion"] == [found[0][0]]


# ---------------------------------------------------------------- measured


def pair_of(a, b, is_right_a=None, is_right_b=None):
    from blocksight.jobs.versus.joining import Pair

    return Pair(a, b, is_right_a, is_right_b, ())


def test_map_measures_are_those_of_the_stored_maps():
    one, other = row_of("k", blob(0.3, 0.3)), row_of("k", blob(0.4, 0.6, side=48, width=0.2))
    found = map_measures(one, other, "squash")
    left = np.rint(255 * map_of(one)).astype(float) / 255
    right = np.rint(255 * resized(map_of(other), (32, 32))).astype(float) / 255
    for name, measure in (("pearson", pearson), ("spearman", spearman), ("ssim", ssim), ("iou", iou_of_tops)):
        assert found[name] == pytest.approx(measure(left, right), abs=1e-9), name
    assert found["area_change"] == pytest.approx(effective_area(right) - effective_area(left))
    cells = [own.reshape(16, 2, 16, 2).sum((1, 3)) / own.sum() for own in (left, right)]
    assert found["moved"] == pytest.approx(np.abs(cells[0] - cells[1]).sum() / 2)
    places = (np.arange(32) + 0.5) / 32
    centres = [((own.sum(1) @ places) / own.sum(), (own.sum(0) @ places) / own.sum()) for own in (left, right)]
    (top, across), (low, beside) = centres
    assert found["focus_shift"] == pytest.approx(np.hypot(30 * (low - top), 40 * (beside - across)) / 50)
    cropped = map_measures(one, other, "crop")["focus_shift"]
    assert cropped == pytest.approx(np.hypot(low - top, beside - across) / np.sqrt(2))


def test_a_flat_map_is_compared_with_nothing():
    flat = row_of("k", np.zeros((32, 32)))
    assert set(map_measures(row_of("k", blob(0.5, 0.5)), flat, "squash").values()) == {None}
    row = judged(measured(pair_of(flat, flat), "squash"), 0.5)
    assert row["looks_elsewhere"] is None
    assert row["regressed_and_looks_elsewhere"] is None
    assert row["score_change"] == 0
    speck = np.zeros((448, 448))
    speck[0, 0] = 1  # it vanishes at A's size
    assert set(map_measures(row_of("k", blob(0.5, 0.5)), row_of("k", speck), "squash").values()) == {None}


@pytest.mark.parametrize(
    ("scores", "ranks", "right", "verdict"),
    [
        ((0.9, 0.1), (1, 4), (True, True), "same"),  # where a label judges, scores do not
        ((0.5, 0.5), (1, 2), (True, False), "regressed"),
        ((0.5, 0.5), (2, 1), (False, True), "improved"),
        ((0.9, 0.7), (1, 1), (None, None), "regressed"),
        ((0.9, 0.71), (1, 5), (True, None), "same"),
        ((0.1, 0.05), (1, 6), (None, None), "regressed"),
        ((0.1, 0.05), (2, 501), (None, None), "same"),  # it was no prediction
        ((0.05, 0.1), (6, 1), (None, None), "improved"),
        ((0.2, 0.5), (1, 1), (None, True), "improved"),
    ],
)
def test_a_regression_follows_from_labels_or_scores(scores, ranks, right, verdict):
    saliency = blob(0.5, 0.5)
    a, b = (row_of("k", saliency, score=score, rank=rank) for score, rank in zip(scores, ranks, strict=True))
    row = measured(pair_of(a, b, *right), "squash")
    assert (row["regressed"], row["improved"]) == (verdict == "regressed", verdict == "improved")
    assert row["judged_by"] == ("label" if None not in right else "score")


def test_any_row_with_the_prediction_decides_whether_it_is_right(data, tmp_path):
    saliency = blob(0.5, 0.5)
    cases = {  # rows of (target, rank), label, is right
        0: ([(1, 1)], 1, True),
        1: ([(1, 3)], 1, False),
        2: ([(2, 2), (3, 1)], 1, False),
        3: ([(2, 2), (1, 1)], 1, True),
        4: ([(2, 4)], 1, None),
        5: ([(2, 1)], None, None),
    }
    keys = keys_of(data)
    rows = {
        keys[number]: [row_of(keys[number], saliency, target=t, rank=r, label=label) for t, r in own]
        for number, (own, label, _) in cases.items()
    }
    output = output_of(data, tmp_path / "a", rows)
    pairs = pairs_in(output, output, Tally())
    for number, (own, _, is_right) in cases.items():
        found = [pair for pair in pairs if pair.a["key"] == keys[number]]
        assert [pair.is_right_a for pair in found] == [is_right] * len(own)


# ---------------------------------------------------------------- typical range


def rows_as_alike(values, **more):
    return [{"spearman": value, "regressed": False, "improved": False, **more} for value in values]


def table_as_alike(values, **more):
    return pa.Table.from_pylist(rows_as_alike(values, **more)).cast(
        pa.schema([("spearman", pa.float64()), ("regressed", pa.bool_()), ("improved", pa.bool_())])
    )


def test_the_threshold_is_the_quantile_of_the_rows_that_stayed():
    alike = np.random.default_rng(0).random(3000) * 1.4 - 0.6
    typical = TypicalRange()
    for part in np.split(alike, 10):
        typical.add(table_as_alike(part))
        typical.add(table_as_alike([-0.99] * 30, regressed=True))
        typical.add(table_as_alike([-0.99] * 30, improved=True))
        typical.add(table_as_alike([None]))
    assert typical.num_stayed == 3000
    assert typical.threshold == pytest.approx(np.quantile(alike, 0.05), abs=0.002)
    flagged = [judged(row, typical.threshold)["looks_elsewhere"] for row in rows_as_alike(alike)]
    assert 0.045 < np.mean(flagged) <= 0.05


def test_few_rows_and_models_that_hardly_differ_have_a_threshold_of_their_own():
    few, close, same = TypicalRange(), TypicalRange(), TypicalRange()
    few.add(table_as_alike([-0.9] * (MIN_STAYED - 1)))
    close.add(table_as_alike(np.linspace(0.9, 1, 100)))
    same.add(table_as_alike([1 + 1e-15] * 100))
    assert few.threshold == 0.2
    assert close.threshold == same.threshold == 0.5


def test_a_map_that_becomes_sharper_moves_and_does_not_look_elsewhere():
    wide, narrow, away = (row_of("k", blob(*place)) for place in ((0.4, 0.4, 32, 0.3), (0.4, 0.4), (0.8, 0.8)))
    sharper, other = (measured(pair_of(wide, one), "squash") for one in (narrow, away))
    assert sharper["moved"] > 0.5
    assert not judged(sharper, 0.5)["looks_elsewhere"]
    assert judged(other, 0.2)["looks_elsewhere"]


# ---------------------------------------------------------------- shares


@pytest.mark.parametrize("of", [1, 2, 7, 40, 5000])
@pytest.mark.parametrize("part", [0.0, 0.3, 1.0])
def test_a_share_has_wilsons_interval(part, of):
    count = round(part * of)
    found, wanted = wilson(count / of, of, of), binomtest(count, of).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    assert 0 <= found.low <= found.mean <= found.high <= 1


@pytest.mark.parametrize(
    ("one", "other", "wanted"),  # method 10 in table II of Newcombe (1998)
    [
        ((56, 70), (48, 80), (0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.1705, 0.8090)),
        ((5, 56), (0, 29), (-0.0381, 0.1926)),
        ((0, 10), (0, 20), (-0.1611, 0.2775)),
        ((10, 10), (0, 20), (0.6791, 1.0)),
    ],
)
def test_a_difference_of_shares_has_newcombes_interval(one, other, wanted):
    shares = [wilson(count / of, of, of) for count, of in (one, other)]
    found, back = newcombe(*shares), newcombe(*reversed(shares))
    assert (found.low, found.high) == pytest.approx(wanted, abs=1e-4)
    assert (back.low, back.high) == pytest.approx((-wanted[1], -wanted[0]), abs=1e-4)
    assert found.count == one[1] + other[1]


def test_none_of_seven_is_not_certainly_fewer_than_a_few_in_a_hundred():
    found = newcombe(wilson(0.0, 7, 7), wilson(0.062, 1000, 1000))
    assert found.mean == pytest.approx(-0.062)
    assert found.low < 0 < found.high
    assert found.high > 0.2


def test_rows_of_one_image_are_no_further_evidence():
    once = [{"key": str(one), "looks_elsewhere": one < 4, "regressed": one % 2 == 0} for one in range(12)]
    found = []
    for rows in (once, once * 3):
        sums = Sums()
        blank = dict.fromkeys([*COLUMNS, "is_right_a", "is_right_b"])
        sums.add([{**blank, **row} for row in sorted(rows, key=lambda row: row["key"])])
        found.append(sums.estimates())
    for name in ("looks_elsewhere", *AMONG):
        ends = [(own[name].mean, own[name].low, own[name].high) for own in found]
        assert ends[0] == pytest.approx(ends[1]), name
        assert found[1][name].count == 3 * found[0][name].count
    assert found[0]["looks_elsewhere"].mean == pytest.approx(1 / 3)


def test_shares_of_nothing_are_none():
    nothing, some = wilson(None, 0, 0), wilson(0.5, 2, 2)
    assert (nothing.mean, nothing.low, nothing.count) == (None, None, 0)
    for gap in (newcombe(nothing, some), newcombe(some, nothing)):
        assert (gap.mean, gap.low, gap.high, gap.count) == (None, None, None, 2)


# ---------------------------------------------------------------- the whole


@pytest.fixture
def planted(data, tmp_path):
    """Of thirty records, ten regress. Nine of these look elsewhere, and one of the others."""
    keys = keys_of(data)
    a = {key: [row_of(key, blob(0.3, 0.3), target=1, label=1)] for key in keys}
    b = {}
    for number, key in enumerate(keys):
        is_wrong, is_away = number < 10, number < 9 or number == 29
        near = 0.3 + number / 2000
        saliency = blob(0.75, 0.75) if is_away else blob(0.3, near)
        b[key] = [row_of(key, saliency, target=1, label=1, rank=1 + is_wrong, score=0.3 if is_wrong else 0.8)]
    return output_of(data, tmp_path / "a", a), output_of(data, tmp_path / "b", b, 7), keys


def test_planted_regressions_are_found(planted, tmp_path):
    a, b, keys = planted
    document = written(a, b, tmp_path / "d")
    rows = rows_in(tmp_path / "d")
    assert {key for (key, _), row in rows.items() if row["regressed"]} == set(keys[:10])
    assert {key for (key, _), row in rows.items() if row["regressed_and_looks_elsewhere"]} == set(keys[:9])
    assert {key for (key, _), row in rows.items() if row["looks_elsewhere"]} == {*keys[:9], keys[29]}
    assert document["confusion"] == {
        "right to right": 20,
        "right to wrong": 10,
        "wrong to right": 0,
        "wrong to wrong": 0,
    }
    shares = document["shares"]
    assert shares["elsewhere_of_regressed"]["mean"] == pytest.approx(0.9)
    assert shares["elsewhere_of_others"]["mean"] == pytest.approx(1 / 20)
    assert document["elsewhere_gap"]["mean"] == pytest.approx(0.85)
    for name, count, of in (("elsewhere_of_regressed", 9, 10), ("elsewhere_of_others", 1, 20), ("improved", 0, 30)):
        wanted = binomtest(count, of).proportion_ci(method="wilson")
        assert (shares[name]["low"], shares[name]["high"]) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    assert 0 < document["elsewhere_gap"]["low"] < 0.85 < document["elsewhere_gap"]["high"] <= 1
    assert set(document["intervals"]) == {"means", "shares", "elsewhere_gap"}
    assert document["means"]["score_change"]["mean"] == pytest.approx(-0.5 / 3)
    assert document["means"]["moved"]["mean"] == pytest.approx(np.mean([row["moved"] for row in rows.values()]))
    assert json.loads((tmp_path / "d" / SUMMARY).read_text()) == document
    with Image.open(tmp_path / "d" / PICTURE) as picture:
        assert picture.width == 3 * (320 + 8) + 8
        assert picture.height == 9 * (240 + 48) + BAR_HEIGHT + 16
    for file in (tmp_path / "d" / "data").rglob("*.parquet"):
        assert pq.read_schema(file).equals(DIFFERENCE)


@pytest.mark.parametrize("explainer", ["gradcam", "sise"])
def test_a_model_that_is_lured_away_regresses_and_looks_elsewhere(tmp_path, explainer):
    data = folder_of_sides(tmp_path / "in", 32, marked=8)
    for model in ("sided", "lured"):
        run_here(data, tmp_path / model, model=f"tests.jobs.tiny:make_{model}", explainer=explainer, target="label")
    outputs = [
        Output(name, LocalStore(tmp_path / name), load_plan(LocalStore(tmp_path / name))) for name in ("sided", "lured")
    ]
    document = written(*outputs, tmp_path / "d")
    rows = rows_in(tmp_path / "d")
    lured = {key for key, _ in rows if int(key[4:7]) < 8}
    assert len(rows) == 32
    assert {key for (key, _), row in rows.items() if row["regressed_and_looks_elsewhere"]} == lured
    assert {key for (key, _), row in rows.items() if row["looks_elsewhere"] or row["regressed"]} == lured
    assert document["elsewhere_gap"]["mean"] == 1
    if explainer == "gradcam":  # their maps lie only on the half that the model sees
        shifts = [row["focus_shift"] for (key, _), row in rows.items() if key in lured]
        assert np.mean(shifts) == pytest.approx(0.5 / np.sqrt(2), abs=0.05)
        assert min(row["moved"] for (key, _), row in rows.items() if key in lured) > 0.9


def test_without_a_regression_the_sheet_shows_what_is_least_alike(planted, tmp_path):
    a, _, _ = planted
    document = written(a, a, tmp_path / "same")
    assert document["picture"].startswith("the least alike maps")
    assert document["means"]["moved"]["mean"] == 0
    assert document["means"]["ssim"]["mean"] == pytest.approx(1)
    assert document["shares"]["looks_elsewhere"]["mean"] == 0
    assert (tmp_path / "same" / PICTURE).exists()


def test_a_second_run_replaces_its_own_files_and_touches_no_others(planted, tmp_path):
    a, b, _ = planted
    first = written(a, b, tmp_path / "d")
    names = sorted(str(file) for file in (tmp_path / "d").rglob("*"))
    (tmp_path / "d" / "data" / f"000099-{0:020x}.parquet").write_bytes(b"of an older cut")
    assert written(a, b, tmp_path / "d") == first
    assert sorted(str(file) for file in (tmp_path / "d").rglob("*")) == names
    with pytest.raises(ConfigError, match="holds the difference of"):
        written(b, a, tmp_path / "d")
    (tmp_path / "d" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"'notes\.txt'; choose an empty place"):
        written(a, b, tmp_path / "d")
    assert (tmp_path / "d" / SUMMARY).exists()
    mine = tmp_path / "fragments" / "data"
    mine.mkdir(parents=True)
    (mine / f"000000-{0:020x}.parquet").write_bytes(b"a copy of an output's data")
    with pytest.raises(ConfigError, match="no difference"):
        written(a, b, tmp_path / "fragments")
    for place in (tmp_path / "a", tmp_path / "a" / "d", tmp_path / "in" / "d", tmp_path):
        with pytest.raises(ConfigError, match="contain each other"):
            written(a, b, place)


def files_in(place):
    return {str(file.relative_to(place)): file.read_bytes() for file in sorted(place.rglob("*")) if file.is_file()}


def test_processes_write_the_same_bytes(planted, tmp_path, monkeypatch):
    a, b, _ = planted
    one = written(a, b, tmp_path / "one")
    monkeypatch.setattr("blocksight.jobs.run.unit_pass.LEAST_RECORDS", 0)
    two = write_difference(a, b, LocalStore(tmp_path / "two"), None, QUIET, execution=Execution(workers=2)).summary
    assert two == one
    assert files_in(tmp_path / "two") == files_in(tmp_path / "one")


@pytest.mark.parametrize("place", ["measured", "judged"])
def test_a_call_that_broke_off_is_gone_on_with(planted, tmp_path, monkeypatch, place):
    a, b, _ = planted
    whole = written(a, b, tmp_path / "whole")
    calls, original = [], getattr(run, place)

    def breaks(*given):
        calls.append(given)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return original(*given)

    with monkeypatch.context() as broken:
        broken.setattr(run, place, breaks)
        with pytest.raises(KeyboardInterrupt):
            written(a, b, tmp_path / "d")
    kept = {file.name for file in (tmp_path / "d" / "_measured").rglob("*.parquet")}
    assert kept
    units = {unit.fragment_key.split("/")[-1] for unit in a.plan.units}
    assert (kept < units) if place == "measured" else (kept == units)
    made, measure = [], run.Measuring.__call__
    monkeypatch.setattr(run.Measuring, "__call__", lambda own, unit: (made.append(unit), measure(own, unit)))
    assert written(a, b, tmp_path / "d") == whole
    assert files_in(tmp_path / "d") == files_in(tmp_path / "whole")
    assert {a.plan.units[unit].fragment_key.split("/")[-1] for unit in made} == units - kept
    assert len(made) == len(units - kept)


@pytest.mark.parametrize(
    ("spoil", "error", "told"),
    [
        (lambda store, key, _: store.delete(key), MissingError, "is gone; the same `versus` measures it again"),
        (
            lambda store, key, body: (store.delete(key), store.create(key, body)),  # without its counts
            UnreconciledError,
            "is damaged, delete it, and the same `versus` measures it again",
        ),
    ],
)
def test_measured_rows_that_are_gone_or_damaged_are_told(planted, tmp_path, monkeypatch, spoil, error, told):
    a, b, _ = planted
    over_units = run.over_units

    def spoils(work, *given):
        over_units(work, *given)
        key = run.measured_key(a.plan.units[3])
        spoil(work.store, key, work.store.read(key))

    with monkeypatch.context() as broken:
        broken.setattr(run, "over_units", spoils)
        with pytest.raises(error, match=told):
            written(a, b, tmp_path / "d")
    key = run.measured_key(a.plan.units[3])
    (tmp_path / "d" / key).unlink(missing_ok=True)
    assert written(a, b, tmp_path / "d") == written(a, b, tmp_path / "whole")


def test_what_was_measured_of_other_fragments_is_not_taken(planted, tmp_path, monkeypatch):
    a, b, _ = planted
    with monkeypatch.context() as broken:
        broken.setattr(run, "judged", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            written(a, b, tmp_path / "d")
    first = a.plan.units[0].fragment_key
    rows = pq.read_table(tmp_path / "a" / first).to_pylist()
    (tmp_path / "a" / first).unlink()
    a.store.create(first, encode_fragment([{**row, "score": 0.123} for row in rows], {}))
    written(a, b, tmp_path / "d")
    assert {0.123} <= {row["score_a"] for row in rows_in(tmp_path / "d").values()}


def test_outputs_that_share_nothing_are_refused_with_the_reason(data, tmp_path):
    keys = keys_of(data)
    a = output_of(data, tmp_path / "a", {key: [row_of(key, blob(0.5, 0.5))] for key in keys})
    others = {key: [row_of(key, blob(0.5, 0.5), target=1)] for key in keys}
    with pytest.raises(ConfigError, match=r"30 records explained in both, for other targets.*--target label"):
        written(a, output_of(data, tmp_path / "b", others), tmp_path / "d")
    changed = {key: [row_of(key, blob(0.5, 0.5), sha256="new")] for key in keys}
    with pytest.raises(ConfigError, match="30 images changed between the two"):
        written(a, output_of(data, tmp_path / "c", changed), tmp_path / "d")
    with pytest.raises(ConfigError, match="30 records explained in the one"):
        written(a, output_of(data, tmp_path / "e", {}), tmp_path / "d")
    assert not (tmp_path / "d" / SUMMARY).exists()
    elsewhere = output_of(folder_of_images(tmp_path / "in2", 3), tmp_path / "f", {})
    with pytest.raises(ConfigError, match="cannot be compared: data is"):
        written(a, elsewhere, tmp_path / "g")
    assert not (tmp_path / "g").exists()


def test_hostile_names_stay_text(tmp_path):
    data = tmp_path / "in"
    names = ["[red]x[/red].png", "a'b\"c.png", "\x1b[31mred.png", "line\nbreak.png", "\u202egnp.png", "ü" * 90 + ".png"]
    folder_of_images(data, len(names), bad=False)
    for file, name in zip(sorted(data.rglob("*.png")), names, strict=True):
        (data / name).parent.mkdir(exist_ok=True)
        file.rename(data / name)
    for place in ("a", "b"):
        run_here(data, tmp_path / place, explainer="gradcam", target="0")
    done = blocksight("versus", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "d[bold]")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "d[bold]/data" in done.stdout
    assert {key for key, _ in rows_in(tmp_path / "d[bold]")} == set(names)


def test_counts_of_one_are_singular(data, tmp_path):
    keys = keys_of(data)
    rows = {key: [row_of(key, blob(0.5, 0.5))] for key in keys}
    a = output_of(data, tmp_path / "a", {key: rows[key] for key in keys[:2]}, per_unit=29)
    b = output_of(data, tmp_path / "b", {key: rows[key] for key in keys[1:3]}, per_unit=29)
    console = Console(file=io.StringIO(), width=200)
    console.print(difference_table(written(a, b, tmp_path / "d"), "d"))
    printed = " ".join(console.file.getvalue().split())
    for words in ("1 record, 1 row", "1 record explained in A alone", "28 records rejected in B"):
        assert words in printed


def test_two_models_on_the_command_line(tmp_path):
    data = folder_of_images(tmp_path / "in", 8)
    for name, model in (("old", "make"), ("new", "make_other")):
        run_here(data, tmp_path / name, model=f"tests.jobs.tiny:{model}", explainer="gradcam", target="label")
        run_here(data, tmp_path / f"{name}-seen", model=f"tests.jobs.tiny:{model}", explainer="gradcam")
    done = blocksight("versus", tmp_path / "old", tmp_path / "new", "--output", tmp_path / "d")
    assert done.returncode == 0, done.stderr
    assert "8 records, 8 rows" in done.stdout
    assert "3 records rejected in A" in done.stdout
    document = json.loads((tmp_path / "d" / SUMMARY).read_text())
    assert sum(document["confusion"].values()) == 8
    assert "unknown to unknown" not in document["confusion"]
    seen = blocksight("versus", tmp_path / "old-seen", tmp_path / "new-seen", "--output", tmp_path / "e")
    assert seen.returncode in (0, 2)
    assert "with --target label" in seen.stdout + seen.stderr
    missing = blocksight("versus", tmp_path / "old", tmp_path / "nowhere", "--output", tmp_path / "f")
    assert missing.returncode == 2
    assert "no blocksight output" in missing.stderr


@pytest.mark.servers
def test_a_bucket_holds_the_difference_as_a_folder_does(planted, tmp_path, bucket: EmbeddedBucket):
    from blocksight.storage.stores.opening import open_store

    a, b, _ = planted
    store = open_store(f"{bucket.uri}/difference", bucket.endpoint_url)
    there = write_difference(a, b, store, bucket.endpoint_url, QUIET).summary
    assert there == written(a, b, tmp_path / "d")
    for info in store.list("data/"):
        assert store.read(info.key) == (tmp_path / "d" / info.key).read_bytes()
    with Image.open(io.BytesIO(store.read(PICTURE))) as picture:
        assert picture.format == "PNG"


def test_columns_say_what_they_mean():
    assert set(MEASURED.names) < set(DIFFERENCE.names)
    assert all(field.metadata[b"meaning"] for field in DIFFERENCE)
