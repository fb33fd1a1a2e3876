"""Local folders with the same promise as a bucket: an object appears whole, once, and stays as it is."""

import ctypes
import errno
import json
import os
import stat
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from blocksight.storage.stores.store import (
    AlreadyExistsError,
    ChangedError,
    MissingError,
    ObjectError,
    ObjectInfo,
    StoreError,
    UnavailableError,
    checked_key,
)

ASIDE = ".writing-"
"""Begins the name of a file that is not finished; readers and listings skip it."""
SIDECAR = ".metadata-"
"""Begins the name of the file that holds an object's user metadata."""
PENDING = ".metadata+"
"""Begins the sidecar's name until its object stands."""
OURS = (ASIDE, SIDECAR, PENDING)

NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}
"""What a file system without hard links says to one (FAT: EPERM)."""
NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}
"""What a share says that syncs files and no folders (CIFS, FUSE): it has no way to make a name last."""
NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
"""What it says of a path that leads to no file."""
ODD_KINDS = {stat.S_IFIFO: "pipes", stat.S_IFSOCK: "sockets", stat.S_IFCHR: "devices", stat.S_IFBLK: "devices"}
ONE_FILE_ONLY = {errno.EACCES, errno.EPERM, errno.EIO, errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENAMETOOLONG}
"""What the system says of one file that cannot be read."""
PASSING = {errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENOTCONN, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""What it says of a share that is away for a while, or of a machine that is short of something."""
AT_FDCWD = -100
MAX_METADATA_BYTES = 64 << 10
"""Of one object; a bucket allows 2 KiB."""
RENAME_NOREPLACE = 1


class LocalStore:
    """A folder as an object store.

    `create` writes aside, syncs, and hard-links to the final name, which fails if that stands: readers
    see nothing or everything. Where there are no hard links, a rename that replaces nothing does the same;
    `O_EXCL` would not, for readers would see half a file. The user metadata are written before, in a
    dot-file whose name holds the inode number, so that the loser of a race cannot change the winner's; the
    winner then takes the number off, so that a copy of the folder keeps them. That file's name ends in
    .json, for a `*.parquet` pattern matches dot-files in some readers.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).expanduser().absolute()

    def __repr__(self) -> str:
        return f"LocalStore({str(self.root)!r})"

    @property
    def uri(self) -> str:
        return str(self.root)

    def read(self, key: str, *, etag: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        path = self._path(key)
        with _explained(path, reading=True), _regular_file(path) as file:
            file.seek(start)
            data = file.read() if length is None else file.read(length)
            found = _etag(os.fstat(file.fileno()))  # after the read: a change in its midst shows too
        if etag is not None and found != etag:
            raise ChangedError(f"{path} has changed: version {found}, wanted {etag}")
        return data

    def head(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        with _explained(path):
            found = _regular(path)
            if found is None:
                return None
            return ObjectInfo(key, found.st_size, _etag(found), _metadata(path, found.st_ino))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        folder = self.root.joinpath(checked_key(f"{prefix}x")).parent
        with _explained(folder):
            for path in _files(folder):
                key = path.relative_to(self.root).as_posix()
                found = _regular(path) if key.startswith(prefix) else None
                if found is not None:
                    yield ObjectInfo(key, found.st_size, _etag(found))

    def unlisted(self) -> Iterator[tuple[str, str]]:
        """Links to folders are told and not followed: they may lead back, or out of the root."""
        with _explained(self.root):
            for parent, folders, files in os.walk(self.root, onerror=_unlisted):
                for name in (*folders, *(name for name in files if not name.startswith(OURS))):
                    path = Path(parent, name)
                    kind = _odd_kind(path)
                    if kind is not None:
                        yield path.relative_to(self.root).as_posix(), kind

    def create(self, key: str, data: bytes, *, metadata: Mapping[str, str] | None = None) -> None:
        path = self._own_path(key)
        with _explained(path), _aside(path, data) as aside, _described(path, aside, metadata):
            try:
                _name_once(aside, path)
            except FileExistsError as error:
                raise AlreadyExistsError(f"{path} stands already") from error

    def put(self, key: str, data: bytes) -> None:
        path = self._own_path(key)
        with _explained(path), _aside(path, data) as aside:
            _forget(path)
            aside.replace(path)

    def delete(self, key: str) -> None:
        path = self._own_path(key)
        with _explained(path), suppress(FileNotFoundError, NotADirectoryError):
            _forget(path)
            path.unlink()

    def sweep(self, older_than_seconds: float, *, dry_run: bool = False) -> Sequence[str]:
        """Removes unfinished files and the metadata of objects that never stood; a young one may have a writer."""
        swept = []
        for path in _left_over(self.root, time.time() - older_than_seconds):
            swept.append(path.relative_to(self.root).as_posix())
            if not dry_run:
                path.unlink(missing_ok=True)
        return swept

    def _path(self, key: str) -> Path:
        parts = PurePosixPath(checked_key(key)).parts
        if parts[-1].startswith(OURS):
            raise StoreError(f"key {key!r} has a name that is kept for unfinished files and metadata")
        return self.root.joinpath(*parts)

    def _own_path(self, key: str) -> Path:
        """The path of what is to be written or removed. Raises StoreError where a link below the root leads to it."""
        path = self._path(key)
        for folder in path.relative_to(self.root).parents:
            if folder.parts and self.root.joinpath(folder).is_symlink():
                raise StoreError(
                    f"{self.root / folder} is a link, and nothing is written or removed through one: it may lead out "
                    f"of {self.root}; put a folder in its place"
                )
        return path


def _regular_file(path: Path) -> BinaryIO:
    """The file, open for reading. Raises ObjectError for what is none: a pipe would wait, and a device never end."""
    if ODD_KINDS.get(stat.S_IFMT(path.stat().st_mode)) is not None:
        raise ObjectError(f"{path} is no regular file")
    return path.open("rb")


@contextmanager
def _explained(path: Path, *, reading: bool = False) -> Iterator[None]:
    """Turns the system's errors into sentences that name the path."""
    try:
        yield
    except FileNotFoundError as error:
        raise MissingError(f"there is no file {path}") from error
    except OSError as error:
        if reading and error.errno == errno.ENOTDIR:
            raise MissingError(f"there is no file {path}") from error
        kind = StoreError
        if reading and error.errno in ONE_FILE_ONLY:
            kind = ObjectError
        elif error.errno in PASSING:
            kind = UnavailableError
        raise kind(f"{path}: {error.strerror or error}") from error


@contextmanager
def _aside(path: Path, data: bytes) -> Iterator[Path]:
    """A synced file beside the final one, gone afterwards; the folder is synced once it has its name."""
    _make_folder(path.parent)
    aside = path.with_name(f"{ASIDE}{uuid.uuid4().hex}")
    try:
        _write(aside, data)
        yield aside
        _sync_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def _described(path: Path, aside: Path, metadata: Mapping[str, str] | None) -> Iterator[None]:
    """The metadata stand before the object does and go with it where it fails: none ever lacks its own."""
    pending = _pending(path, aside.stat().st_ino)
    pending.unlink(missing_ok=True)  # a crashed writer's, whose inode number has come back
    if metadata:
        _write(pending, json.dumps(dict(metadata)).encode())
    try:
        yield
    except (OSError, StoreError):
        pending.unlink(missing_ok=True)
        raise
    if metadata:
        pending.replace(_sidecar(path))
    else:
        _sidecar(path).unlink(missing_ok=True)  # of an object that was removed by hand


def _name_once(aside: Path, path: Path) -> None:
    """Gives the finished file its name. Raises FileExistsError where that stands."""
    try:
        path.hardlink_to(aside)
    except FileExistsError:
        if aside.stat().st_nlink == 1:
            raise
        # two names: the link is ours, and the network file system asked twice because a reply was lost
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        _rename_once(aside, path)


def _rename_once(aside: Path, path: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, os.fsencode(aside), AT_FDCWD, os.fsencode(path), RENAME_NOREPLACE) == 0:
        return
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):
        raise StoreError(
            f"the file system of {path.parent} has neither hard links nor renames that replace nothing: "
            "output there could not be exactly-once; choose another folder or a bucket"
        )
    raise OSError(code, os.strerror(code), str(path))


def _forget(path: Path) -> None:
    """Removes the metadata of what stands at the path, before the object itself goes: none outlives it."""
    with suppress(FileNotFoundError):
        _pending(path, path.stat().st_ino).unlink(missing_ok=True)
    _sidecar(path).unlink(missing_ok=True)


def _metadata(path: Path, inode: int) -> dict[str, str]:
    """What stands beside an object: a writer that died between link and rename left it pending."""
    for sidecar in (_pending(path, inode), _sidecar(path)):
        with suppress(FileNotFoundError):
            return _read_metadata(sidecar)
    return {}


def _read_metadata(sidecar: Path) -> dict[str, str]:
    """The names and values; none where the file is damaged: `verify` then says what is missing."""
    try:
        with sidecar.open("rb") as file:
            found = json.loads(file.read(MAX_METADATA_BYTES))
    except (ValueError, RecursionError):
        return {}
    is_sound = isinstance(found, dict) and all(isinstance(value, str) for value in found.values())
    return found if is_sound else {}


def _pending(path: Path, inode: int) -> Path:
    return path.with_name(f"{PENDING}{inode}-{path.name}.json")


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{SIDECAR}{path.name}.json")


def _regular(path: Path) -> os.stat_result | None:
    """The facts of a file; None where there is none, or something else."""
    try:
        found = path.stat()
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def _odd_kind(path: Path) -> str | None:
    """What a path is that is neither a file nor a folder; None: it is one of the two."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        return "links to themselves" if error.errno == errno.ELOOP else "broken links"
    if stat.S_ISDIR(mode):
        return "links to folders (not followed)" if path.is_symlink() else None
    return None if stat.S_ISREG(mode) else ODD_KINDS.get(stat.S_IFMT(mode), "special files")


def _etag(found: os.stat_result) -> str:
    return f"{found.st_size}-{found.st_mtime_ns}"


def _files(folder: Path) -> Iterator[Path]:
    """Every finished file below the folder. Raises StoreError where one cannot be looked into."""
    for parent, _, names in os.walk(folder, onerror=_unlisted):
        yield from (Path(parent, name) for name in names if not name.startswith(OURS))


def _left_over(root: Path, before: float) -> Iterator[Path]:
    """Files of writers that died: unfinished ones, and pending metadata whose object does not stand."""
    for parent, _, names in os.walk(root):
        for name in names:
            path = Path(parent, name)
            left = name.startswith(ASIDE) or (name.startswith(PENDING) and not _has_object(path))
            with suppress(FileNotFoundError):
                if left and path.stat().st_mtime < before:
                    yield path


def _has_object(pending: Path) -> bool:
    """Whether the pending metadata are those of the object that stands."""
    inode, _, name = pending.name.removeprefix(PENDING).removesuffix(".json").partition("-")
    found = _regular(pending.with_name(name))
    return found is not None and str(found.st_ino) == inode


def _unlisted(error: OSError) -> None:
    """A folder that is not there holds nothing; one that is closed must not be left out in silence."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise StoreError(f"{error.filename}: {error.strerror}") from error


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _make_folder(folder: Path) -> None:
    """Makes the folder and what is missing above it, each synced into its parent."""
    try:
        folder.mkdir()
    except FileExistsError:
        return
    except FileNotFoundError:
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)
