"""The local store under crashes, on odd file systems and with hostile timing."""

import errno
import io
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from blocksight.storage.stores.local import LocalStore, _abandoned_files
from blocksight.storage.stores.store import AlreadyExistsError, ChangedError, ObjectError, StoreError, UnavailableError

ROOT = Path(__file__).resolve().parents[3]

CRASH = """
import os, pathlib, signal, sys
from blocksight.storage.stores.local import LocalStore
die = lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL)
setattr({where}, {name!r}, die)
LocalStore(sys.argv[1]).create("data/x", b"body", metadata={{"attempt": "one"}})
"""


def crash(root, where, name):
    """Creates `data/x` in a process that is killed when it calls the named function."""
    done = subprocess.run([sys.executable, "-c", CRASH.format(where=where, name=name), str(root)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize(("where", "name"), [("os", "fsync"), ("pathlib.Path", "hardlink_to")])
def test_a_crash_before_the_link_leaves_nothing_to_be_seen(tmp_path, where, name):
    crash(tmp_path, where, name)
    store = LocalStore(tmp_path)
    assert list(store.list()) == []
    assert store.head("data/x") is None
    store.create("data/x", b"again", metadata={"attempt": "two"})
    assert store.read("data/x") == b"again"
    assert store.head("data/x").metadata == {"attempt": "two"}


def test_a_crash_after_the_link_leaves_a_whole_object_with_its_metadata(tmp_path):
    crash(tmp_path, "pathlib.Path", "replace")
    store = LocalStore(tmp_path)
    assert [info.key for info in store.list()] == ["data/x"]
    assert store.read("data/x") == b"body"
    assert store.head("data/x").metadata == {"attempt": "one"}
    with pytest.raises(AlreadyExistsError):
        store.create("data/x", b"again", metadata={"attempt": "two"})
    assert store.head("data/x").metadata == {"attempt": "one"}
    store.delete("data/x")
    assert [path for path in (tmp_path / "data").iterdir() if not path.name.startswith(".writing-")] == []


def test_deleting_and_replacing_take_the_metadata_along(tmp_path):
    store = LocalStore(tmp_path)
    store.create("x", b"1", metadata={"attempt": "one"})
    store.put("x", b"2")
    assert store.head("x").metadata == {}
    store.delete("x")
    store.create("x", b"3", metadata={"attempt": "three"})
    store.delete("x")
    assert list(tmp_path.iterdir()) == []


def test_metadata_of_an_object_removed_by_hand_do_not_come_back(tmp_path):
    store = LocalStore(tmp_path)
    store.create("x", b"1", metadata={"attempt": "one"})
    (tmp_path / "x").unlink()
    assert store.head("x") is None
    store.create("x", b"2")
    assert store.head("x").metadata == {}


def test_no_reader_of_a_folder_meets_the_metadata(tmp_path):
    body = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": [1, 2]}), body)
    LocalStore(tmp_path).create("data/x.parquet", body.getvalue().to_pybytes(), metadata={"attempt": "one"})
    (tmp_path / "data" / ".writing-0").write_bytes(b"half")
    assert duckdb.sql(f"select sum(a) from '{tmp_path}/data/*.parquet'").fetchall() == [(3,)]
    assert ds.dataset(tmp_path / "data").to_table().num_rows == 2
    assert [info.key for info in LocalStore(tmp_path).list()] == ["data/x.parquet"]


@pytest.fixture
def without_hard_links(monkeypatch):
    def refused(_path, _target):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "hardlink_to", refused)


def test_without_hard_links_a_rename_that_replaces_nothing_does_it(tmp_path, without_hard_links):
    store = LocalStore(tmp_path)
    store.create("x", b"1", metadata={"attempt": "one"})
    with pytest.raises(AlreadyExistsError):
        store.create("x", b"2", metadata={"attempt": "two"})
    assert (store.read("x"), store.head("x").metadata) == (b"1", {"attempt": "one"})
    assert sorted(path.name for path in tmp_path.iterdir()) == [".metadata-x.json", "x"]


def test_a_file_system_with_neither_is_refused(tmp_path, without_hard_links, monkeypatch):
    class Libc:
        def renameat2(self, *_arguments):
            return -1

    monkeypatch.setattr("ctypes.CDLL", lambda *_arguments, **_options: Libc())
    monkeypatch.setattr("ctypes.get_errno", lambda: errno.EINVAL)
    with pytest.raises(StoreError, match=r"neither hard links.*choose another folder"):
        LocalStore(tmp_path).create("x", b"1", metadata={"attempt": "one"})
    assert list(tmp_path.iterdir()) == []


def test_a_link_whose_reply_was_lost_counts_as_created(tmp_path, monkeypatch):
    link = Path.hardlink_to

    def twice(path, target):
        link(path, target)
        link(path, target)

    monkeypatch.setattr(Path, "hardlink_to", twice)
    LocalStore(tmp_path).create("x", b"1", metadata={"attempt": "one"})
    assert LocalStore(tmp_path).head("x").metadata == {"attempt": "one"}


@pytest.mark.parametrize("metadata", [None, {"attempt": "one"}])
def test_a_write_that_breaks_off_names_the_path_and_leaves_nothing(tmp_path, metadata):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(StoreError, match=f"{tmp_path}/data/x: File too large"):
            LocalStore(tmp_path).create("data/x", b"1" * 100_000, metadata=metadata)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "data").iterdir()) == []


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=f"{tmp_path}/x: No space left on device"):
        LocalStore(tmp_path).create("x", b"1")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    scan = os.scandir

    def closed(path):
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scan(path)

    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(StoreError, match="closed: Permission denied"):
        list(LocalStore(tmp_path).list())


def test_a_change_in_the_midst_of_a_read_shows(tmp_path, monkeypatch):
    store = LocalStore(tmp_path)
    store.put("x", b"one")
    etag = store.head("x").etag
    facts = os.fstat

    def changed(descriptor):
        (tmp_path / "x").write_bytes(b"three")
        return facts(descriptor)

    monkeypatch.setattr(os, "fstat", changed)
    with pytest.raises(ChangedError):
        store.read("x", etag=etag)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_version_is_that_of_the_bytes_that_were_read(tmp_path, monkeypatch, moment):
    """A file that changes between the check of its version and the read is refused, in either order."""
    store = LocalStore(tmp_path)
    store.put("x", b"one")
    etag = store.head("x").etag
    opened = Path.open

    class Changing:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def read(self, *size):
            data = self.file.read(*size) if moment == "after" else b""
            with opened(tmp_path / "x", "wb") as other:
                other.write(b"other")
            return data or self.file.read(*size)

    monkeypatch.setattr(Path, "open", lambda path, mode: Changing(opened(path, mode)))
    with pytest.raises(ChangedError):
        store.read("x", etag=etag)


def test_a_folder_that_cannot_be_synced_takes_objects_all_the_same(tmp_path, monkeypatch):
    synced = os.fsync

    def files_only(descriptor):
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    store = LocalStore(tmp_path / "out")
    store.create("data/x", b"1", metadata={"attempt": "one"})
    assert (store.read("data/x"), store.head("data/x").metadata) == (b"1", {"attempt": "one"})


def test_folders_are_no_objects(tmp_path):
    store = LocalStore(tmp_path)
    store.put("a/b", b"1")
    assert store.head("a") is None
    with pytest.raises(ObjectError, match="a: Is a directory"):
        store.read("a")
    store.delete("a/b/c")
    assert store.head("a/b/c") is None


@pytest.mark.parametrize("key", [".writing-1", "data/.metadata-x.json"])
def test_names_of_its_own_are_kept(tmp_path, key):
    with pytest.raises(StoreError, match="is reserved for"):
        LocalStore(tmp_path).create(key, b"1")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.EACCES, ObjectError),
        (errno.EIO, ObjectError),
        (errno.ESTALE, UnavailableError),
        (errno.EMFILE, UnavailableError),
        (errno.EINVAL, StoreError),
    ],
)
def test_one_file_that_cannot_be_read_is_no_error_of_the_folder(tmp_path, monkeypatch, code, kind):
    def refused(*_arguments):
        raise OSError(code, os.strerror(code))

    (tmp_path / "x").write_bytes(b"1")
    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(StoreError, match=os.strerror(code)) as caught:
        LocalStore(tmp_path).read("x")
    assert type(caught.value) is kind


def test_a_link_to_itself_is_one_bad_file(tmp_path):
    (tmp_path / "x").symlink_to("x")
    with pytest.raises(ObjectError, match="symbolic links"):
        LocalStore(tmp_path).read("x")


@pytest.mark.parametrize("target", ["pipe", "/dev/zero"])
def test_what_is_no_regular_file_is_not_read(tmp_path, target):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "x").symlink_to(target)
    with pytest.raises(ObjectError, match="not a regular file"):
        LocalStore(tmp_path).read("x", length=9)


@pytest.mark.parametrize("link", ["report", "report/deep"])
def test_nothing_is_written_or_removed_through_a_link_below_the_root(tmp_path, link):
    """A copied output may hold links that an attacker chose."""
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "link" / "out"
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "deep" / "index.html").write_bytes(b"mine")
    (tmp_path / "real" / "out").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")  # a link above the root is the user's own
    (root / link).parent.mkdir(parents=True, exist_ok=True)
    (root / link).symlink_to(elsewhere / "deep" if link.endswith("deep") else elsewhere)
    store, key = LocalStore(root), "report/deep/index.html"
    for change in (lambda: store.put(key, b"x"), lambda: store.create(f"{key}2", b"x"), lambda: store.delete(key)):
        with pytest.raises(StoreError, match=rf"out/{link} is a link, and nothing is written"):
            change()
    assert [path.name for path in elsewhere.rglob("*") if path.is_file()] == ["index.html"]
    assert store.read(key) == b"mine"
    store.put("data/x", b"1")


def test_the_version_is_that_of_the_bytes_that_were_read(tmp_path, monkeypatch):
    """A file that is written while its last bytes are read has another version afterwards."""
    store = LocalStore(tmp_path)
    store.put("x", b"one")
    etag = store.head("x").etag

    class WrittenMeanwhile(io.FileIO):
        def read(self, size=-1):
            data = super().read(size)
            (tmp_path / "x").write_bytes(b"three")
            return data

    monkeypatch.setattr(Path, "open", lambda path, mode: WrittenMeanwhile(path, mode.removesuffix("b")))
    with pytest.raises(ChangedError):
        store.read("x", etag=etag)


def test_files_of_writers_that_died_are_found_once_they_are_old(tmp_path):
    (tmp_path / "data").mkdir()
    for name in (".writing-1", "a.png"):
        (tmp_path / "data" / name).write_bytes(b"x")
    assert [*_abandoned_files(tmp_path, time.time() - 60)] == []
    assert [*_abandoned_files(tmp_path, time.time() + 60)] == [tmp_path / "data" / ".writing-1"]
