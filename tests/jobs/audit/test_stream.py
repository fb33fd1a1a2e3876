"""Streams an output's maps once: equals a slow reading, in any order, with ground truth and with damage."""

import hashlib
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from blocksight.jobs.audit import measuring as module
from blocksight.jobs.audit import samples as samples_module
from blocksight.jobs.audit.equal_maps import EqualMaps, contains
from blocksight.jobs.audit.groups import CENSUS_COLUMNS
from blocksight.jobs.audit.measures import measured
from blocksight.jobs.audit.measuring import AuditScope
from blocksight.jobs.audit.result import GATES, GRID, MEASURES, ROWS
from blocksight.jobs.audit.samples import Candidate, Sampler
from blocksight.jobs.audit.stream import StreamResult, committed, digest_of_fragments, stream
from blocksight.jobs.evaluate.bootstrap import byte_hashes, key_hashes
from blocksight.jobs.evaluate.evaluation import ClassMap
from blocksight.jobs.ledger.output import map_of
from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.plan import Plan, load_plan
from blocksight.jobs.plan.records import Unit
from blocksight.jobs.run.unit_pass import ONE_PROCESS
from blocksight.jobs.worker.rows import Output
from blocksight.storage.inputs.annotations import open_truth
from blocksight.storage.inputs.ground_truth import Truth, region
from blocksight.storage.inputs.survey import Layout
from blocksight.storage.outputs.fragments import encode_fragment, fragment_batches, read_fragment
from blocksight.storage.outputs.map_codec import decode_levels, encode_map
from blocksight.storage.outputs.schema import SCHEMA
from blocksight.storage.stores.local import LocalStore
from blocksight.storage.stores.opening import open_store
from blocksight.storage.stores.store import DamagedError, ObjectInfo
from tests.jobs.jobs_of import rows_in, run_here
from tests.jobs.tiny import folder_of_images


def asked_of(truth: Truth | None = None, class_map: ClassMap = (), seed: int = 0) -> AuditScope:
    return AuditScope(truth, class_map, seed)


QUIET = Console(quiet=True)


def row_of(number: int, saliency: np.ndarray, *, label=None, target=0, rank=1, image=None) -> dict:
    """An explained row; `image` names its picture if it shares that of another row."""
    encoded = encode_map(saliency)
    return {
        **dict.fromkeys(SCHEMA.names),
        **{"key": f"{number:04}.png", "shard": "s", "shard_index": number, "unit_id": "u", "status": "ok"},
        "sha256": hashlib.sha256(f"{number if image is None else image}".encode()).hexdigest(),
        **{"width": 40, "height": 30, "label": label, "label_name": None if label is None else f"label {label}"},
        **{
            "target_index": target,
            "target_name": f"class {target}",
            "target_rank": rank,
            "target_source": "top",
            "score": number / 1000,
        },
        **{"map": encoded.data, "map_height": encoded.height, "map_width": encoded.width},
        **{"is_flat": encoded.low == encoded.high, "is_saturated": number % 5 == 0},
    }


def levels_in(row: dict) -> np.ndarray:
    return decode_levels(row["map"], (row["map_height"], row["map_width"]))


def rejected(number: int) -> dict:
    names = {"key": f"{number:04}.png", "shard": "s", "shard_index": number, "unit_id": "u", "status": "rejected"}
    return {**dict.fromkeys(SCHEMA.names), **names}


def noise(number: int, side: int = 20) -> np.ndarray:
    return np.random.default_rng(number).random((side, side))


def many_rows(count: int = 60) -> list[dict]:
    """Rows of several classes: with and without labels, flat, rejected, and some with equal maps."""
    rows = []
    for number in range(count):
        saliency = np.zeros((20, 20)) if number % 11 == 3 else noise(number % 50)
        label = None if number % 7 == 0 else number % 4
        rows.append(row_of(number, saliency, label=label, target=number % 3, rank=1 + number % 2))
    return rows + [rejected(number) for number in range(count, count + 3)]


def written(store: LocalStore, parts) -> Plan:
    """Writes an output with these rows as fragments; returns its plan."""
    units = []
    for ordinal, rows in enumerate(parts):
        info = ObjectInfo(f"{ordinal}.parquet", 1, "e")
        units.append(Unit(ordinal, f"{ordinal:020}", Layout.PARQUET, (info,), 0, len(rows), len(rows)))
        store.put(units[-1].fragment_key, encode_fragment(rows, {}))
    return Plan({"resize": "squash"}, Layout.PARQUET, tuple(units), 1, 1, 1, {})


def streamed(store, plan, scratch, asked=None, execution=ONE_PROCESS) -> StreamResult:
    """The result, and in `scratch` a file of lines for each fragment."""
    found = stream(Output("here", store, plan), asked or asked_of(), QUIET, execution)
    scratch.mkdir()
    for unit in found.measured.units:
        pq.write_table(found.measured.rows(unit, found.shared), scratch / unit.fragment_key.rpartition("/")[2])
    return found


def lines_in(scratch) -> dict:
    """The lines, by record and class."""
    lines = [line for file in sorted(scratch.iterdir()) for line in pq.read_table(file, schema=ROWS).to_pylist()]
    found = {(line["key"], line["target_index"]): line for line in lines}
    assert len(found) == len(lines)
    return found


@pytest.fixture
def store(tmp_path) -> LocalStore:
    return LocalStore(tmp_path / "out")


@pytest.fixture
def output(tmp_path, monkeypatch) -> LocalStore:
    """The output of a whole job: several fragments, bad pictures among them, two targets for each picture."""
    monkeypatch.setattr("blocksight.cluster.sizing.LEAST_UNIT_SECONDS", 0.3)
    run_here(folder_of_images(tmp_path / "in", 9), tmp_path / "job", target="top-2", explainer="gradcam")
    return LocalStore(tmp_path / "job")


# ---------------------------------------------------------------- lines and counts


def test_every_map_of_a_job_has_its_line(output, tmp_path):
    plan = load_plan(output)
    found = streamed(output, plan, tmp_path / "scratch")
    rows = rows_in(output)
    sound = {(row["key"], row["target_index"]): row for row in rows if row["status"] == "ok"}
    assert len({unit.fragment_key for unit in plan.units}) > 1
    assert sorted(file.name for file in (tmp_path / "scratch").iterdir()) == [
        unit.fragment_key.rpartition("/")[2] for unit in plan.units
    ]
    lines = lines_in(tmp_path / "scratch")
    assert lines.keys() == sound.keys()
    assert (found.num_rows, found.num_maps, found.num_rejected) == (len(rows), len(sound), len(rows) - len(sound))
    assert found.num_rejected > 0
    for place, line in lines.items():
        row = sound[place]
        made = measured(levels_in(row)[None])
        for name, value in zip(MEASURES, made.values[0].tolist(), strict=True):
            assert line[name] == (None if np.isnan(value) else np.float32(value)), name
        assert line["pooled"] == made.pooled.tobytes()
        for name in ("target_name", "label_name", "score", "is_flat", "is_saturated"):
            assert line[name] == row[name]
        assert line["is_right"] == (row["target_rank"] == 1 and row["label"] == row["target_index"])
        assert line["is_own_class"] == (row["target_rank"] == 1)
        assert (line["cluster"], line["strangeness"]) == (None, None)
    assert found.num_right == sum(line["is_right"] for line in lines.values())


def test_figures_agree_with_a_slow_reading(store, tmp_path):
    rows = many_rows()
    found = streamed(store, written(store, [rows[:25], rows[25:]]), tmp_path / "scratch")
    sound, lines = rows[:-3], lines_in(tmp_path / "scratch")
    top = [row for row in sound if row["target_rank"] == 1]
    known = [row for row in top if row["label"] is not None]
    assert found.num_right == sum(row["label"] == row["target_index"] for row in known) > 0
    assert {line["is_right"] for line in lines.values()} == {True, False, None}
    wanted = {("all", None, None): len(sound)}
    for row in sound:
        if row["label_name"] is not None and row["target_rank"] == 1:
            wanted["class", row["label_name"], None] = wanted.get(("class", row["label_name"], None), 0) + 1
    for row in top:
        name = ("predicted", None, row["target_name"])
        wanted[name] = wanted.get(name, 0) + 1
    for row in known:
        if row["label"] != row["target_index"]:
            name = ("pair", row["label_name"], row["target_name"])
            wanted[name] = wanted.get(name, 0) + 1
    assert {(one.kind, one.label, one.predicted): one.count for one in found.groups} == wanted
    kinds = ["all", "class", "predicted", "pair"]
    order = [(kinds.index(one.kind), -one.count) for one in found.groups]
    assert order == sorted(order)
    cells = np.stack([np.frombuffer(line["pooled"], np.uint8) for line in lines.values()]).reshape(-1, GRID, GRID)
    assert found.groups[0].mean_map == pytest.approx((cells / 255).mean(0), abs=1e-6)
    assert found.groups[0].spreads["gini"].count == sum(not row["is_flat"] for row in sound)
    assert found.notes == ()
    assert found.gates.keys() == GATES.keys()
    columns = ["is_flat", "is_saturated", "is_border_only", "is_checkerboard", "equals_other"]
    for gate, column in zip(GATES, columns, strict=True):
        assert found.gates[gate] == sum(line[column] for line in lines.values()), gate
    assert min(found.gates[gate] for gate in ("flat", "saturated", "equal")) > 0


def test_gates_see_the_border_and_checkerboards(store, tmp_path):
    rows, columns = np.mgrid[:32, :32]
    frame = np.minimum(np.minimum(rows, columns), 31 - np.maximum(rows, columns)) < 2
    maps = [frame * 1.0, (rows + columns) % 2 * 1.0, np.exp(-((rows - 16) ** 2 + (columns - 16) ** 2) / 50)]
    found = streamed(store, written(store, [[row_of(n, one) for n, one in enumerate(maps)]]), tmp_path / "scratch")
    lines = list(lines_in(tmp_path / "scratch").values())
    assert [line["is_border_only"] for line in lines] == [True, False, False]
    assert [line["is_checkerboard"] for line in lines] == [False, True, False]
    assert (found.gates["border only"], found.gates["checkerboard"]) == (1, 1)


def assert_same(one: StreamResult, other: StreamResult) -> None:
    for name in ("num_rows", "num_maps", "num_rejected", "num_right", "gates", "notes"):
        assert getattr(one, name) == getattr(other, name), name
    for own, its in zip(one.groups, other.groups, strict=True):
        assert {**vars(own), "mean_map": 0, "variance_map": 0} == {**vars(its), "mean_map": 0, "variance_map": 0}
        assert np.array_equal(own.mean_map, its.mean_map)
        assert np.array_equal(own.variance_map, its.variance_map)
    assert one.samples.keys() == other.samples.keys()
    for own, its in zip(one.samples.values(), other.samples.values(), strict=True):
        assert (own.target_index, own.target_name, own.keys, own.labels) == (
            its.target_index,
            its.target_name,
            its.keys,
            its.labels,
        )
        for name in ("pooled", "scores", "is_right"):
            assert np.array_equal(getattr(own, name), getattr(its, name)), name


def test_nothing_depends_on_order_fragments_or_batches(store, tmp_path, monkeypatch):
    monkeypatch.setattr(samples_module, "MAX_OF_CLASS", 5)
    rows = many_rows()
    first = streamed(store, written(store, [rows]), tmp_path / "one")
    wanted = lines_in(tmp_path / "one")
    for name, value in {"BATCH_ROWS": 3, "PIXELS_AT_ONCE": 900}.items():
        monkeypatch.setattr(module, name, value)
    shuffled = [rows[place] for place in np.random.default_rng(0).permutation(len(rows))]
    other = LocalStore(tmp_path / "other")
    parts = [shuffled[:1], [], shuffled[1:20], shuffled[20:40], rejecting(shuffled[40:]), *accepting(shuffled[40:])]
    second = streamed(other, written(other, parts), tmp_path / "two")
    assert_same(first, second)
    assert lines_in(tmp_path / "two") == wanted
    assert first.fragments != second.fragments


def rejecting(rows) -> list:
    return [row for row in rows if row["status"] != "ok"]


def accepting(rows) -> list[list]:
    return [[row] for row in rows if row["status"] == "ok"]


def test_maps_of_several_sizes_keep_their_order(store, tmp_path):
    rows = [row_of(number, noise(number, side)) for number, side in enumerate((8, 8, 20, 8, 40, 40))]
    streamed(store, written(store, [rows]), tmp_path / "scratch")
    for (key, _), line in lines_in(tmp_path / "scratch").items():
        row = next(row for row in rows if row["key"] == key)
        assert line["pooled"] == measured(levels_in(row)[None]).pooled.tobytes()


# ---------------------------------------------------------------- equal maps


def test_equal_maps_are_those_of_several_images(store, tmp_path):
    same, flat = noise(1), np.zeros((20, 20))
    rows = [
        row_of(0, same),
        row_of(1, noise(2), image="a"),
        row_of(2, noise(2), image="a", target=1),  # the same image twice
        row_of(3, flat),
        row_of(4, flat),
        row_of(5, same),
        row_of(6, noise(3)),
    ]
    found = streamed(store, written(store, [rows[:4], rows[4:]]), tmp_path / "scratch")
    lines = lines_in(tmp_path / "scratch")
    assert [key for (key, _), line in lines.items() if line["equals_other"]] == ["0000.png", "0005.png"]
    assert {line["equals_other"] for line in lines.values()} == {True, False}
    assert (found.gates["equal"], found.gates["flat"]) == (2, 2)


def test_shared_hashes_agree_with_a_slow_search():
    rng = np.random.default_rng(0)
    maps, images = rng.integers(0, 40, 90).astype(np.uint64), rng.integers(0, 30, 90).astype(np.uint64)
    equals = EqualMaps(90)
    equals.put(50, maps[50:], images[50:])
    equals.put(0, maps[:50], images[:50])
    slow = {
        int(own) for own in maps if own and len({int(i) for m, i in zip(maps, images, strict=True) if m == own}) > 1
    }
    assert equals.shared().tolist() == sorted(slow)
    assert contains(equals.shared(), maps).tolist() == [int(own) in slow for own in maps]
    assert EqualMaps(0).shared().tolist() == []
    assert byte_hashes([b"a"]).tolist() == key_hashes(["a"]).tolist()


# ---------------------------------------------------------------- samples


def test_a_sample_holds_the_smallest_hashes_of_its_class(store, tmp_path, monkeypatch):
    monkeypatch.setattr(samples_module, "MAX_OF_CLASS", 6)
    rows = many_rows()
    found = streamed(store, written(store, [rows[:30], rows[30:]]), tmp_path / "scratch", asked_of(seed=7)).samples
    lines = lines_in(tmp_path / "scratch")
    assert list(found) == [0, 1, 2]
    for target, sample in found.items():
        own = [row for row in rows[:-3] if row["target_index"] == target and row["target_rank"] == 1]
        able = [row for row in own if not row["is_flat"]]
        able.sort(key=lambda row: int(key_hashes([f"7/{row['target_index']}/{row['key']}"])[0]))
        assert sample.keys == tuple(row["key"] for row in able[:6])
        assert sample.target_name == f"class {target}"
        assert sample.labels == tuple(row["label_name"] for row in able[:6])
        assert sample.scores.tolist() == [row["score"] for row in able[:6]]
        own = [lines[row["key"], target] for row in able[:6]]
        assert [cells.tobytes() for cells in sample.pooled] == [line["pooled"] for line in own]
        assert sample.is_right.tolist() == [bool(line["is_right"]) for line in own]
    again = streamed(store, written(store, [rows]), tmp_path / "again", asked_of(seed=8)).samples
    assert again[0].keys != found[0].keys


@pytest.mark.parametrize(
    ("num_classes", "size"), [(0, 256), (1, 256), (390, 256), (391, 255), (1000, 100), (100_001, 0)]
)
def test_samples_of_many_classes_are_smaller(num_classes, size):
    sampler = Sampler(0, num_classes)
    assert sampler.size == size
    assert sampler.wants(3, 2**64 - 1) is (size > 0)


def test_a_full_sample_wants_smaller_hashes_alone(monkeypatch):
    monkeypatch.setattr(samples_module, "MAX_OF_CLASS", 2)
    sampler = Sampler(0, 1)
    for hashed in (9, 5, 7):
        sampler.add(3, "class 3", Candidate(hashed, f"{hashed}.png", 0.5, None, False, bytes(GRID * GRID)))
    assert sampler.samples()[3].keys == ("5.png", "7.png")
    assert [sampler.wants(3, hashed) for hashed in (6, 7, 8)] == [True, True, False]


# ---------------------------------------------------------------- ground truth


def boxes_file(tmp_path, names, **size):
    coco = {
        "images": [{"id": number, "file_name": name, **size} for number, name in enumerate(names)],
        "categories": [{"id": 7, "name": "thing"}],
        "annotations": [
            {"id": number, "image_id": number, "category_id": 7, "bbox": [0, 0, 10, 24], "iscrowd": 0}
            for number in range(len(names))
        ],
    }
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps(coco))
    return open_truth(str(file))


def test_ground_truth_says_how_much_lies_on_the_object(output, tmp_path):
    sound = [row for row in rows_in(output) if row["status"] == "ok"]
    chosen = sound[0]["target_index"]
    truth = boxes_file(tmp_path, ["000.png", "001.png"])
    asked = asked_of(truth, (("thing", (chosen,)),))
    found = streamed(output, load_plan(output), tmp_path / "scratch", asked)
    lines, known = lines_in(tmp_path / "scratch"), 0
    for row in sound:
        line, image = lines[row["key"], row["target_index"]], truth.find(row["key"])
        shares = [line[name] for name in ("on_object", "on_context", "elsewhere")]
        if image is None or row["target_index"] != chosen or row["is_flat"]:
            assert shares == [None] * 3
            continue
        where = region(image, {"thing"}, (row["height"], row["width"]), (32, 32), "squash")
        saliency = map_of(row).astype(float)
        assert shares[0] == pytest.approx(saliency[where].sum() / saliency.sum(), abs=1e-6)
        assert sum(shares) == pytest.approx(1, abs=1e-6)
        known += 1
    assert known > 0
    assert found.groups[0].spreads["on_object"].count == known


@pytest.mark.parametrize(
    ("names", "size"), [(["000.png"], {"width": 7, "height": 9}), (["a/0000.png", "b/0000.png"], {})]
)
def test_an_unusable_annotation_leaves_no_share(store, tmp_path, names, size):
    truth = boxes_file(
        tmp_path, [name.replace("000.png", "0000.png") if len(name) == 7 else name for name in names], **size
    )
    found = streamed(
        store, written(store, [[row_of(0, noise(1))]]), tmp_path / "scratch", asked_of(truth, (("thing", (0,)),))
    )
    assert "on_object" not in found.groups[0].spreads
    assert found.groups[0].spreads["entropy"].count == 1


# ---------------------------------------------------------------- damage


def test_an_output_without_maps_is_refused(store, tmp_path):
    with pytest.raises(ConfigError, match=r"there is no map in .* to audit: run `blocksight explain` first"):
        streamed(store, written(store, [[rejected(0)], []]), tmp_path / "scratch")


def test_fragments_of_no_unit_are_not_read(store, tmp_path):
    plan = written(store, [[row_of(0, noise(0))], [row_of(1, noise(1))]])
    store.put("data/000009-unplanned.parquet", b"whatever")
    store.delete(plan.units[1].fragment_key)
    assert streamed(store, plan, tmp_path / "scratch").num_rows == 1


@pytest.mark.parametrize("body", [b"whatever", b""])
def test_a_damaged_fragment_is_named(store, tmp_path, body):
    plan = written(store, [[row_of(0, noise(0))], [row_of(1, noise(1))]])
    store.put(plan.units[1].fragment_key, body)
    with pytest.raises(
        DamagedError, match=f"{plan.units[1].fragment_key} is no readable fragment, `blocksight verify`"
    ):
        streamed(store, plan, tmp_path / "scratch")


@pytest.mark.parametrize(
    "damage",
    [
        lambda row: row | {"map": row["map"][:90]},
        lambda row: row | {"map": b"text"},
        lambda row: row | {"map": None},
        lambda row: row | {"map_height": 9},
        lambda row: row | {"map_width": None},
    ],
)
def test_a_damaged_map_is_named(store, tmp_path, damage):
    plan = written(store, [[row_of(0, noise(0)), damage(row_of(1, noise(1)))]])
    with pytest.raises(DamagedError, match=r"holds a damaged map \(record '0001.png'\), `blocksight verify`"):
        streamed(store, plan, tmp_path / "scratch")


# ---------------------------------------------------------------- fragments


@pytest.mark.servers
def test_through_a_bucket(tmp_path, bucket):
    rows = many_rows(20)
    here, there = LocalStore(tmp_path / "out"), open_store(f"{bucket.uri}/audit", bucket.endpoint_url)
    found = [
        streamed(store, written(store, [rows[:9], rows[9:]]), tmp_path / name)
        for name, store in (("here", here), ("there", there))
    ]
    assert_same(*found)
    assert lines_in(tmp_path / "here") == lines_in(tmp_path / "there")


class Counting(LocalStore):
    """Counts the bytes that are read."""

    num_bytes = 0

    def read(self, key, **part):
        data = super().read(key, **part)
        self.num_bytes += len(data)
        return data


def test_a_fragment_is_read_in_parts(tmp_path):
    store = Counting(tmp_path)
    rows = [row_of(number, noise(number, 64)) for number in range(100)]
    plan = written(store, [rows])
    (info,) = committed(store, plan)
    whole = read_fragment(store.read(info.key))
    for window in (100, 10_000, 2**23):
        batches = list(fragment_batches(store, info, SCHEMA.names, 7, window))
        assert max(len(batch) for batch in batches) == 7
        assert [row for batch in batches for row in batch.to_pylist()] == whole.to_pylist()
    store.num_bytes = 0
    assert sum(len(batch) for batch in fragment_batches(store, info, CENSUS_COLUMNS, 1000, 2**12)) == 100
    assert store.num_bytes < info.size / 4


def test_the_digest_of_fragments_knows_their_versions_and_no_order():
    infos = [ObjectInfo("data/a", 1, "x"), ObjectInfo("data/b", 2, "y")]
    assert digest_of_fragments(infos) == digest_of_fragments(infos[::-1])
    assert digest_of_fragments(infos) != digest_of_fragments([infos[0], ObjectInfo("data/b", 2, "z")])
