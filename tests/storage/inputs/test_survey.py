"""What a survey follows, joins and leaves out, and that it says so."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blocksight.storage.inputs.survey import Layout, Survey, survey
from blocksight.storage.stores.locations import contain_each_other, matches, split_pattern
from blocksight.storage.stores.opening import open_named
from blocksight.storage.stores.store import StoreError
from tests.storage.memory import MemoryStore


def filled(**objects: bytes) -> MemoryStore:
    store = MemoryStore()
    for key, body in objects.items():
        store.put(key, body)
    return store


def empty_files(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def table(**columns: list) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def survey_of(place: Path | str) -> Survey:
    return survey(*open_named(str(place)))


def keys_of(found: Survey) -> list[str]:
    return [info.key for info in found.objects]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    empty_files(tmp_path / "data", "red/1.png")
    return tmp_path / "data"


def test_a_class_folder_that_is_a_link_out_of_the_data_is_followed(data: Path, tmp_path: Path):
    empty_files(tmp_path / "pool", "green/1.png", "green/deep/2.png")
    (data / "green").symlink_to(tmp_path / "pool" / "green")
    found = survey_of(data)
    assert keys_of(found) == ["green/1.png", "green/deep/2.png", "red/1.png"]
    assert found.notes == ("links to folders, followed (1): green",)
    store, _ = open_named(str(data))
    assert store.read("green/deep/2.png") == b""


def test_a_link_back_or_to_a_folder_around_the_data_is_not_followed_and_named(data: Path):
    empty_files(data.parent, "beside/1.png")
    (data / "red" / "back").symlink_to(data)
    (data / "up").symlink_to(data.parent)
    found = survey_of(data)
    assert keys_of(found) == ["red/1.png"]
    assert found.notes == ("links, broken or not followed (2): red/back, up",)
    assert found.ignored == {"links to folders that hold the data themselves (not followed)": 2}


def test_no_image_is_read_twice_through_a_link(data: Path, tmp_path: Path):
    empty_files(tmp_path / "pool", "1.png")
    (data / "again").symlink_to(data / "red")
    for name in ("a", "b"):
        (data / name).symlink_to(tmp_path / "pool")
    (tmp_path / "pool" / "loop").symlink_to(tmp_path / "pool")
    found = survey_of(data)
    assert keys_of(found) == ["a/1.png", "red/1.png"]
    assert found.notes == (
        "links to folders, followed (1): a",
        "links, broken or not followed (3): a/loop, again, b",
    )


def test_a_link_to_a_hidden_folder_of_the_data_gives_it_a_name(data: Path):
    empty_files(data, "_pool/green/1.png")
    (data / "green").symlink_to(data / "_pool" / "green")
    (data / "_hidden").symlink_to(data.parent)
    found = survey_of(data)
    assert keys_of(found) == ["green/1.png", "red/1.png"]
    assert found.ignored == {"hidden (_ or .)": 2}


def test_a_broken_link_is_named(data: Path):
    (data / "green").symlink_to(data / "gone")
    found = survey_of(data)
    assert found.ignored == {"broken links": 1}
    assert found.notes == ("links, broken or not followed (1): green",)


def test_the_root_itself_may_be_a_link(data: Path):
    data.with_name("other").symlink_to(data)
    assert keys_of(survey_of(data.with_name("other"))) == ["red/1.png"]


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("*.tar", ["0.tar", "1.tar"]),
        ("0*", ["0.tar"]),
        ("[1-9]*.tar", ["1.tar"]),
        ("deep/*", ["deep/2.tar"]),
        ("*/2.tar", ["deep/2.tar"]),
        ("**/*.tar", ["0.tar", "1.tar", "deep/2.tar", "deep/er/3.tar"]),
        ("deep/**", ["deep/2.tar", "deep/er/3.tar"]),
    ],
)
def test_a_pattern_chooses_objects(tmp_path: Path, pattern: str, wanted: list[str]):
    names = ("0.tar", "1.tar", "deep/2.tar", "deep/er/3.tar", "x.parquet", "deep/_no.tar")
    empty_files(tmp_path, *names)
    root = "deep/" if pattern.startswith("deep/") else ""
    assert keys_of(survey_of(tmp_path / pattern)) == [name.removeprefix(root) for name in wanted]
    assert keys_of(survey(filled(**dict.fromkeys(names, b"")), pattern)) == wanted


def test_a_pattern_that_matches_nothing_is_named(tmp_path: Path):
    empty_files(tmp_path, "0.tar")
    with pytest.raises(StoreError, match=r"/\*\.png holds no images.* nothing is there"):
        survey_of(tmp_path / "*.png")


def test_a_folder_whose_name_has_a_wildcard_is_a_folder(tmp_path: Path):
    empty_files(tmp_path, "a*b/1.png", "axb/2.png")
    assert keys_of(survey_of(tmp_path / "a*b")) == ["1.png"]


def test_a_pattern_of_a_bucket_begins_behind_its_folder():
    assert split_pattern("s3://bucket/data/x*/*.tar") == ("s3://bucket/data", "x*/*.tar")
    assert split_pattern("s3://bucket/*.tar") == ("s3://bucket", "*.tar")
    assert split_pattern("/data/x") == ("/data/x", "")
    assert split_pattern("/*.tar") == ("/", "*.tar")
    assert not matches("deep/2.tar", "*.tar")


def test_an_output_in_the_folder_of_a_pattern_is_inside_the_data():
    assert contain_each_other("/data/out", "/data/*.tar")
    assert contain_each_other("s3://b/data/out", "s3://b/data/**/*.tar")
    assert not contain_each_other("s3://b/out", "s3://b/data/*.tar")


def test_tables_without_images_beside_shards_are_left_out_and_named():
    """img2dataset writes such a table and a file of counts beside each shard."""
    beside = table(url=["u"], key=["0"], status=["success"])
    found = survey(filled(**{"0.tar": b"", "0.parquet": beside, "0_stats.json": b"{}", "1.tar": b""}))
    assert (found.layout, keys_of(found)) == (Layout.TAR, ["0.tar", "1.tar"])
    assert found.ignored == {".json": 1, ".parquet without a column `image`": 1}
    assert found.notes == ("tables without a column `image`, left out (1): 0.parquet",)


def test_the_numbers_of_records_that_sidecars_say_are_read():
    index = b'{"shardlist": [{"url": "s3://b/deep/2.tar", "nsamples": 7}, {"url": 3}, 4]}'
    found = survey(
        filled(
            **{
                "0.tar": b"",
                "0_stats.json": b'{"count": 9, "successes": 5}',
                "1.tar": b"",
                "1_stats.json": b"{",
                "deep/2.tar": b"",
                "deep/index.json": index,
                "sizes.json": b'{"1.tar": 6, "0.tar": "many", "gone.tar": 1}',
                "notes.json": b"[1, 2]",
                "odd.json": b'{"1.tar": true}',
            }
        )
    )
    assert found.expected == {"0.tar": 5, "1.tar": 6, "deep/2.tar": 7}
    assert found.notes == ("sidecars say 18 records in 3 shards",)


def test_a_table_of_names_beside_loose_images_is_left_out():
    found = survey(filled(**{"a/1.png": b"", "metadata.parquet": table(file_name=["a/1.png"])}))
    assert (found.layout, keys_of(found)) == (Layout.IMAGES, ["a/1.png"])


@pytest.mark.parametrize("body", [table(image=[b"x"]), b"cut"])
def test_a_table_that_may_hold_images_is_not_left_out(body: bytes):
    with pytest.raises(StoreError, match="more than one layout"):
        survey(filled(**{"0.tar": b"", "0.parquet": body}))


def test_a_broken_table_among_tables_without_images_is_left_out_with_them():
    found = survey(filled(**{"0.tar": b"", "0.parquet": b"cut", "1.parquet": table(url=["u"])}))
    assert found.ignored == {".parquet without a column `image`": 2}


def test_a_table_alone_needs_no_look():
    assert survey(filled(**{"0.parquet": b"cut"})).layout is Layout.PARQUET


@pytest.mark.parametrize(
    ("log", "sentence"),
    [
        ("_delta_log/00000000000000000000.json", r"memory:// is a table of Delta .*delta_scan\('memory://'\)"),
        ("sales/_delta_log/0.json", "memory:///sales is a table of Delta"),
        ("sales/metadata/v2.metadata.json", "memory:///sales is a table of Iceberg .*iceberg_scan"),
        ("metadata/00001-ab.gz.metadata.json", "memory:// is a table of Iceberg"),
        ("metadata/v3.metadata.json.gz", "memory:// is a table of Iceberg"),
        (".hoodie/hoodie.properties", "memory:// is a table of Hudi .*Spark"),
    ],
)
def test_a_table_with_a_log_of_live_rows_is_refused(log: str, sentence: str):
    objects = {log: b"", "part=1/a.parquet": table(image=[b"x"])}
    for key in ("", "*/*.parquet"):
        with pytest.raises(StoreError, match=sentence):
            survey(filled(**objects), key)


def test_a_folder_of_metadata_is_no_iceberg_table():
    objects = {"metadata/notes.json": b"", "my_metadata/x.metadata.json": b"", "a.parquet": table(image=[b"x"])}
    assert survey(filled(**objects)).layout is Layout.PARQUET


def test_images_in_formats_that_are_not_read_are_named():
    names = ["a.png", "b.AVIF", "c.heic", "d.jp2", "e.txt", "f.mpg"]
    found = survey(filled(**dict.fromkeys(names, b"")))
    assert found.notes == (
        "images in formats that are not read, left out (3): b.AVIF, c.heic, d.jp2; convert them to PNG",
    )


def test_archives_beside_what_is_read_are_named():
    found = survey(filled(**dict.fromkeys(["0.tar", "1.tar.gz", "2.zip", "0.tar.idx"], b"")))
    assert found.notes == ("archives and containers that are not read, left out (2): 1.tar.gz, 2.zip; unpack them",)


def test_all_suffixes_of_jpeg_are_read():
    names = ["a.jpe", "b.jfif", "c.JPG", "d.jpeg"]
    found = survey(filled(**dict.fromkeys(names, b"")))
    assert keys_of(found) == names
    assert found.notes == ()


@pytest.mark.parametrize(
    ("name", "advice"),
    [("a.zip", r"left out \(1\): a.zip; unpack them"), ("a.heic", r"left out \(1\): a.heic; convert them to PNG")],
)
def test_a_folder_of_what_is_not_read_alone_says_what_to_do(name: str, advice: str):
    with pytest.raises(StoreError, match=advice):
        survey(filled(**{name: b""}))
