"""A local folder as an object store, with a bucket's promise: an object appears whole, once, and does not change."""

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

from blocksight.storage.stores.folder_walk import FolderWalk
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

UNFINISHED = ".writing-"
"""Prefix of an unfinished file's name. Readers and listings skip it."""
SIDECAR = ".metadata-"
"""Prefix of the name of the file with an object's user metadata."""
PENDING = ".metadata+"
"""Prefix of the sidecar's name until its object exists."""
RESERVED_PREFIXES = (UNFINISHED, SIDECAR, PENDING)

NO_HARD_LINK_ERRNOS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}
"""errno of a file system without hard links (FAT: EPERM)."""
NO_FOLDER_SYNC_ERRNOS = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}
"""errno of a share that cannot sync folders (CIFS, FUSE)."""
NO_FILE_ERRNOS = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
"""errno of a path without a file."""
SPECIAL_FILES = {stat.S_IFIFO: "pipes", stat.S_IFSOCK: "sockets", stat.S_IFCHR: "devices", stat.S_IFBLK: "devices"}
ONE_FILE_ERRNOS = {errno.EACCES, errno.EPERM, errno.EIO, errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENAMETOOLONG}
"""errno of one file that cannot be read, while others may be."""
TRANSIENT_ERRNOS = {
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.ENOTCONN,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
}
"""errno of a share that is away for a while, or of a machine that lacks memory or handles: a retry may succeed."""
AT_FDCWD = -100
MAX_METADATA_BYTES = 64 << 10
"""User metadata of one object; a bucket allows 2 KiB."""
RENAME_NOREPLACE = 1


class LocalStore:
    """A folder as an object store.

    `create` writes an unfinished file, syncs it, and hard-links it to the final name, which fails if that exists:
    readers see nothing or everything. Without hard links, a rename that replaces nothing does the same; `O_EXCL`
    would show readers half a file. The user metadata are written first, in a dot-file whose name holds the inode
    number, so the loser of a race cannot change the winner's. The winner then removes the number from the name, so
    a copy of the folder keeps the metadata. The name ends in .json, as a `*.parquet` pattern matches dot-files in
    some readers.
    """

    def __init__(self, root: Path | str, *, follows_links: bool = False) -> None:
        """`follows_links`: listings hold the files behind links to folders too. Only for a store that is read."""
        self.root = Path(root).expanduser().absolute()
        self.follows_links = follows_links

    def __repr__(self) -> str:
        return f"LocalStore({str(self.root)!r})"

    @property
    def uri(self) -> str:
        return str(self.root)

    def read(self, key: str, *, etag: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        path = self._path(key)
        with _errors_naming(path, reading=True), _open_regular(path) as file:
            file.seek(start)
            data = file.read() if length is None else file.read(length)
            found = _etag(os.fstat(file.fileno()))  # after the read, to notice a change during it
        if etag is not None and found != etag:
            raise ChangedError(f"{path} has changed: version {found}, wanted {etag}")
        return data

    def head(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        with _errors_naming(path):
            found = _file_stat(path)
            if found is None:
                return None
            return ObjectInfo(key, found.st_size, _etag(found), _metadata(path, found.st_ino))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        folder = self.root.joinpath(checked_key(f"{prefix}x")).parent
        with _errors_naming(folder):
            for path in self._files(folder):
                key = path.relative_to(self.root).as_posix()
                found = _file_stat(path) if key.startswith(prefix) else None
                if found is not None:
                    yield ObjectInfo(key, found.st_size, _etag(found))

    def unlisted(self) -> Iterator[tuple[str, str]]:
        walk = FolderWalk(self.root, self.follows_links, _refuse_closed_folder)
        with _errors_naming(self.root):
            for parent, files in walk.folders():
                for name in (name for name in files if not name.startswith(RESERVED_PREFIXES)):
                    kind = _special_kind(parent / name)
                    if kind is not None:
                        yield parent.joinpath(name).relative_to(self.root).as_posix(), kind
            yield from ((link.relative_to(self.root).as_posix(), kind) for link, kind in walk.links)

    def _files(self, folder: Path) -> Iterator[Path]:
        """Every finished file below the folder. Raises StoreError if a folder cannot be read."""
        top = self.root if self.follows_links else folder  # a link's kind depends on all folders
        for parent, names in FolderWalk(top, self.follows_links, _refuse_closed_folder).folders():
            yield from (parent / name for name in names if not name.startswith(RESERVED_PREFIXES))

    def create(self, key: str, data: bytes, *, metadata: Mapping[str, str] | None = None) -> None:
        path = self._own_path(key)
        with (
            _errors_naming(path),
            _unfinished_file(path, data) as unfinished,
            _with_metadata(path, unfinished, metadata),
        ):
            try:
                _link_once(unfinished, path)
            except FileExistsError as error:
                raise AlreadyExistsError(f"{path} already exists") from error

    def put(self, key: str, data: bytes) -> None:
        path = self._own_path(key)
        with _errors_naming(path), _unfinished_file(path, data) as unfinished:
            _remove_metadata(path)
            unfinished.replace(path)

    def delete(self, key: str) -> None:
        path = self._own_path(key)
        with _errors_naming(path), suppress(FileNotFoundError, NotADirectoryError):
            _remove_metadata(path)
            path.unlink()

    def delete_many(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.delete(key)

    def sweep(self, older_than_seconds: float, *, dry_run: bool = False) -> Sequence[str]:
        """Removes old unfinished files and metadata without object; returns them. A newer one may have a writer."""
        swept = []
        for path in _abandoned_files(self.root, time.time() - older_than_seconds):
            swept.append(path.relative_to(self.root).as_posix())
            if not dry_run:
                path.unlink(missing_ok=True)
        return swept

    def _path(self, key: str) -> Path:
        parts = PurePosixPath(checked_key(key)).parts
        if parts[-1].startswith(RESERVED_PREFIXES):
            raise StoreError(f"key {key!r} has a name that is reserved for unfinished files and metadata")
        return self.root.joinpath(*parts)

    def _own_path(self, key: str) -> Path:
        """The path of an object to write or remove. Raises StoreError if a folder of it below the root is a link."""
        path = self._path(key)
        for folder in path.relative_to(self.root).parents:
            if folder.parts and self.root.joinpath(folder).is_symlink():
                raise StoreError(
                    f"{self.root / folder} is a link, and nothing is written or removed through one: it may lead out "
                    f"of {self.root}; put a folder in its place"
                )
        return path


def _open_regular(path: Path) -> BinaryIO:
    """The file, open for reading. Raises ObjectError for a special file: a pipe would block, a device never end."""
    if SPECIAL_FILES.get(stat.S_IFMT(path.stat().st_mode)) is not None:
        raise ObjectError(f"{path} is not a regular file")
    return path.open("rb")


@contextmanager
def _errors_naming(path: Path, *, reading: bool = False) -> Iterator[None]:
    """Turns the system's errors into StoreErrors that name the path."""
    try:
        yield
    except FileNotFoundError as error:
        raise MissingError(f"there is no file {path}") from error
    except OSError as error:
        if reading and error.errno == errno.ENOTDIR:
            raise MissingError(f"there is no file {path}") from error
        kind = StoreError
        if reading and error.errno in ONE_FILE_ERRNOS:
            kind = ObjectError
        elif error.errno in TRANSIENT_ERRNOS:
            kind = UnavailableError
        raise kind(f"{path}: {error.strerror or error}") from error


@contextmanager
def _unfinished_file(path: Path, data: bytes) -> Iterator[Path]:
    """A synced file beside the final one, removed afterwards; the folder is synced after the body."""
    _make_folder(path.parent)
    unfinished = path.with_name(f"{UNFINISHED}{uuid.uuid4().hex}")
    try:
        _write(unfinished, data)
        yield unfinished
        _sync_folder(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def _with_metadata(path: Path, unfinished: Path, metadata: Mapping[str, str] | None) -> Iterator[None]:
    """Writes the metadata before the object, and removes them if it fails: no object ever lacks its metadata."""
    pending = _pending(path, unfinished.stat().st_ino)
    pending.unlink(missing_ok=True)  # from a crashed writer, if the inode number was reused
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
        _sidecar(path).unlink(missing_ok=True)  # from an object that a user removed


def _link_once(unfinished: Path, path: Path) -> None:
    """Gives the finished file its final name. Raises FileExistsError if that exists."""
    try:
        path.hardlink_to(unfinished)
    except FileExistsError:
        if unfinished.stat().st_nlink == 1:
            raise
        # two names: the link is ours; the network file system repeated the call because a reply was lost
    except OSError as error:
        if error.errno not in NO_HARD_LINK_ERRNOS:
            raise
        _rename_once(unfinished, path)


def _rename_once(unfinished: Path, path: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, os.fsencode(unfinished), AT_FDCWD, os.fsencode(path), RENAME_NOREPLACE) == 0:
        return
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):
        raise StoreError(
            f"the file system of {path.parent} has neither hard links nor renames that replace nothing: "
            "output there could not be exactly-once; choose another folder or a bucket"
        )
    raise OSError(code, os.strerror(code), str(path))


def _remove_metadata(path: Path) -> None:
    """Removes the metadata of the object at the path. Call it before the object is removed, so none outlive it."""
    with suppress(FileNotFoundError):
        _pending(path, path.stat().st_ino).unlink(missing_ok=True)
    _sidecar(path).unlink(missing_ok=True)


def _metadata(path: Path, inode: int) -> dict[str, str]:
    """The object's metadata; they are still pending if the writer died between link and rename."""
    for sidecar in (_pending(path, inode), _sidecar(path)):
        with suppress(FileNotFoundError):
            return _read_metadata(sidecar)
    return {}


def _read_metadata(sidecar: Path) -> dict[str, str]:
    """The names and values; {} if the file is damaged, and `verify` then says what is missing."""
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


def _file_stat(path: Path) -> os.stat_result | None:
    """The file's status; None if there is not a regular file."""
    try:
        found = path.stat()
    except OSError as error:
        if error.errno not in NO_FILE_ERRNOS:
            raise
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def _special_kind(path: Path) -> str | None:
    """The kind of a path that is neither file nor folder; None for a file."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno not in NO_FILE_ERRNOS:
            raise
        return "links to themselves" if error.errno == errno.ELOOP else "broken links"
    return None if stat.S_ISREG(mode) else SPECIAL_FILES.get(stat.S_IFMT(mode), "special files")


def _etag(found: os.stat_result) -> str:
    return f"{found.st_size}-{found.st_mtime_ns}"


def _abandoned_files(root: Path, before: float) -> Iterator[Path]:
    """Files of dead writers that are older than `before`: unfinished files, and pending metadata without an object."""
    for parent, _, names in os.walk(root):
        for name in names:
            path = Path(parent, name)
            left = name.startswith(UNFINISHED) or (name.startswith(PENDING) and not _has_object(path))
            with suppress(FileNotFoundError):
                if left and path.stat().st_mtime < before:
                    yield path


def _has_object(pending: Path) -> bool:
    """True if the pending metadata belong to the object of that name."""
    inode, _, name = pending.name.removeprefix(PENDING).removesuffix(".json").partition("-")
    found = _file_stat(pending.with_name(name))
    return found is not None and str(found.st_ino) == inode


def _refuse_closed_folder(error: OSError) -> None:
    """Raises StoreError for a folder that cannot be read; a missing folder holds nothing."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise StoreError(f"{error.filename}: {error.strerror}") from error


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _make_folder(folder: Path) -> None:
    """Makes the folder and its missing parents, and syncs each into its parent."""
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
        if error.errno not in NO_FOLDER_SYNC_ERRNOS:
            raise
    finally:
        os.close(descriptor)
