"""Paths and URIs: one spelling for a place, no secret is repeated, and places that contain each other are seen."""

from pathlib import Path

import pytest

from blocksight.storage.stores.locations import contain_each_other, is_whole_bucket, normal_place, split_place
from blocksight.storage.stores.opening import open_file, open_store
from blocksight.storage.stores.store import StoreError


@pytest.mark.parametrize("spelling", ["s3://b/d", "s3://b/d/", "s3://b/d//", "S3://b/d"])
def test_a_prefix_has_one_spelling(spelling):
    assert normal_place(spelling) == "s3://b/d"
    assert open_store(spelling).uri == "s3://b/d"


@pytest.mark.parametrize(
    "spelling", ["{}/d", "{}/d/", "{}//d", "{}/./d", "{}/e/../d", "file://{}/d", "FILE://{}/d//", "/{}/d", "~/d", "d"]
)
def test_a_folder_has_one_spelling(tmp_path, monkeypatch, spelling):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert normal_place(spelling.format(tmp_path)) == f"{tmp_path}/d"


def test_parent_folders_are_those_of_the_system(tmp_path):
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "deep")
    assert normal_place(f"{tmp_path}/link/../d") == f"{tmp_path}/a/d"
    assert normal_place(f"{tmp_path}/link/d") == f"{tmp_path}/link/d"


@pytest.mark.parametrize(
    ("place", "parts"),
    [
        ("s3://b", ("s3://b", "")),
        ("s3://b/x", ("s3://b", "x")),
        ("s3://b/x/y", ("s3://b/x", "y")),
        ("/x", ("/", "x")),
        ("/x/y", ("/x", "y")),
        ("/", ("/", "")),
    ],
)
def test_places_are_split(place, parts):
    assert split_place(place) == parts


def test_a_file_in_the_root_folder_is_not_sought_in_this_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store, name = open_file("/w.pt")
    assert (store.uri, name) == ("/", "w.pt")
    with pytest.raises(StoreError, match="names no file"):
        open_file("s3://b/")


SECRET = "wJalrXUtnFEMI"


@pytest.mark.parametrize(
    "uri",
    [
        f"s3://user:{SECRET}@b/d",
        f"s3://user:{SECRET}/more@b/d",
        f"S3://{SECRET}@b",
        f"s3://b/d?X-Amz-Signature={SECRET}",
        f"https://user:{SECRET}@host/d",
        f"https://host/d?X-Amz-Signature={SECRET}",
        f"user:{SECRET}@s3://b/d",
        f"s3:///{SECRET}@b",
        f"s3:/{SECRET}@b/d",
        f"s3:user:{SECRET}@b/d",
        f"gs://{SECRET}@b/d",
    ],
)
def test_a_secret_in_a_uri_is_refused_and_not_repeated(uri):
    for opened in (open_store, open_file, normal_place):
        with pytest.raises(StoreError) as caught:
            opened(uri)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3://b/../d", "write it out"),
        ("s3://b/./d", "write it out"),
        ("s3://", "no bucket"),
        ("file://host/d", "has no path on this machine"),
        ("gs://b/d", "gs:// is not known"),
        ("a\0b", "zero byte"),
    ],
)
def test_what_names_no_place_is_refused(uri, words):
    with pytest.raises(StoreError, match=words):
        normal_place(uri)


@pytest.mark.parametrize(
    ("first", "second", "meet"),
    [
        ("s3://b/d", "s3://b/d/out", True),
        ("s3://b/d/out/", "s3://B/d//", True),
        ("s3://b", "s3://b/out", True),
        ("s3://b/d", "s3://b/d2", False),
        ("s3://b/d", "s3://c/d", False),
        ("s3://b/d", "{0}/b/d", False),
        ("{0}/in", "{0}/in/out", True),
        ("{0}/in/out", "file://{0}/in/", True),
        ("{0}/in", "{0}/other/../in/out", True),
        ("{0}/in", "{0}/link/out", True),
        ("{0}/link", "{0}/in", True),
        ("{0}/in", "{0}/in2", False),
        ("{0}/in/x.tar", "{0}/in", True),
    ],
)
def test_places_that_contain_each_other_are_seen(tmp_path, first, second, meet):
    (tmp_path / "in").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    one, other = first.format(tmp_path), second.format(tmp_path)
    assert contain_each_other(one, other) is meet
    assert contain_each_other(other, one) is meet


def test_one_folder_of_two_names_is_one(tmp_path, monkeypatch):
    """For example a folder that is mounted twice, or a file system that ignores case."""
    monkeypatch.setattr(Path, "samefile", lambda path, other: str(path).lower() == str(other).lower())
    assert contain_each_other(f"{tmp_path}/in", f"{tmp_path}/IN/out")


@pytest.mark.parametrize(("place", "wanted"), [("s3://b", True), ("s3://b/d", False), ("/b", False), ("b", False)])
def test_a_whole_bucket_differs_from_a_prefix(place, wanted):
    assert is_whole_bucket(place) is wanted
