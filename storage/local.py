"""Local folders with the same promise as a bucket: an object appears whole, once, and stays as it is."""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from storage.store import AlreadyExistsError, ChangedError, MissingError, ObjectInfo, StoreError

SIDECAR = ".metadata"
"""Ends the name of the dot-file that holds an object's user metadata: no reader's `*.parquet` matches it."""
ASIDE = ".writing-"
"""Begins the name of a file that is not finished; readers and listings skip it."""


class LocalStore:
    """A folder as an object store.

    `create` writes aside, syncs, and hard-links to the final name, which fails if that stands: readers
    see nothing or everything. The user metadata are written before, in a dot-file whose name holds the
    inode number, so that the loser of a race cannot change the winner's; the winner then takes the number
    off, so that a copy of the folder keeps them.
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
        with self._explained(path), path.open("rb") as file:
            found = _etag(os.fstat(file.fileno()))
            if etag is not None and found != etag:
                raise ChangedError(f"{path} has changed: version {found}, wanted {etag}")
            file.seek(start)
            return file.read() if length is None else file.read(length)

    def head(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        with self._explained(path):
            try:
                stat = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
            sidecars = (_sidecar(path, stat.st_ino), _sidecar(path))
            metadata = next((json.loads(own.read_text()) for own in sidecars if own.exists()), {})
            return ObjectInfo(key, stat.st_size, _etag(stat), metadata)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        folder = self._path(PurePosixPath(f"{prefix}x").parent.as_posix())
        with self._explained(folder):
            found = sorted(
                path.relative_to(self.root).as_posix()
                for path in (folder.rglob("*") if folder.is_dir() else [])
                if path.is_file() and not _is_ours(path.name)
            )
        for key in found:
            if key.startswith(prefix):
                stat = self._path(key).stat()
                yield ObjectInfo(key, stat.st_size, _etag(stat))

    def create(self, key: str, data: bytes, *, metadata: Mapping[str, str] | None = None) -> None:
        path = self._path(key)
        with self._explained(path), self._aside(path, data) as aside:
            sidecar = _sidecar(path, aside.stat().st_ino)
            if metadata:
                sidecar.write_text(json.dumps(dict(metadata)))
            try:
                path.hardlink_to(aside)
            except FileExistsError as error:
                sidecar.unlink(missing_ok=True)
                raise AlreadyExistsError(f"{path} stands already") from error
            if metadata:
                sidecar.replace(_sidecar(path))

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with self._explained(path), self._aside(path, data) as aside:
            aside.replace(path)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._explained(path), contextlib.suppress(FileNotFoundError):
            sidecars = (_sidecar(path, path.stat().st_ino), _sidecar(path))
            path.unlink()
            for sidecar in sidecars:
                sidecar.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        parts = PurePosixPath(key).parts
        if key.startswith("/") or ".." in parts or "\0" in key:
            raise StoreError(f"key {key!r} leaves the folder {self.root}")
        return self.root.joinpath(*parts)

    @contextlib.contextmanager
    def _aside(self, path: Path, data: bytes) -> Iterator[Path]:
        """A synced file beside the final one, gone afterwards; the folder is synced once it has its name."""
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{ASIDE}{uuid.uuid4().hex}")
        try:
            with aside.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield aside
            _sync_folder(path.parent)
        finally:
            aside.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _explained(self, path: Path) -> Iterator[None]:
        """Turns the system's errors into sentences that name the path."""
        try:
            yield
        except FileNotFoundError as error:
            raise MissingError(f"there is no file {path}") from error
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror or error}") from error


def _etag(stat: os.stat_result) -> str:
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def _sidecar(path: Path, inode: int | None = None) -> Path:
    return path.with_name(f".{path.name}{SIDECAR}" if inode is None else f".{path.name}.{inode}{SIDECAR}")


def _is_ours(name: str) -> bool:
    """Whether a file belongs to the store's own workings and is no object."""
    return name.startswith(ASIDE) or (name.startswith(".") and name.endswith(SIDECAR))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
