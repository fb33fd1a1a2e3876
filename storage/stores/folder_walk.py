"""Walks through a local folder: every folder once, also behind links, and what became of each link to a folder."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from blocksight.storage.stores.store import FOLLOWED_LINKS, is_hidden

NOT_FOLLOWED = "links to folders (not followed)"
LINKS_BACK = "links to folders that hold the data themselves (not followed)"
READ_ELSEWHERE = "links to folders that are read under another name (not followed)"

Identity = tuple[int, int]
"""Device and inode of a folder."""


@dataclass
class FolderWalk:
    """The folders below a root. A link to a folder is followed if `follows_links`, and each real folder is read once.

    A folder is read under its own name if it lies below the root and is not hidden, else under the first link to it,
    in order of names. A link to a folder around the root is never followed, so the walk always ends.
    """

    root: Path
    follows_links: bool
    on_error: Callable[[OSError], None]
    links: list[tuple[Path, str]] = field(default_factory=list)
    """Each link to a folder that was found, and its kind: `FOLLOWED_LINKS`, or why it was not followed."""
    _seen: set[Identity] = field(default_factory=set)
    _waiting: list[Path] = field(default_factory=list)

    def folders(self) -> Iterator[tuple[Path, list[str]]]:
        """Each folder and the names of its files and links to files."""
        yield from self._below(self.root)
        while self._waiting:
            self._waiting.sort()
            link = self._waiting.pop(0)
            kind = self._kind(link)
            self.links.append((link, kind))
            if kind == FOLLOWED_LINKS:
                yield from self._below(link)

    def _below(self, top: Path) -> Iterator[tuple[Path, list[str]]]:
        for parent, folders, files in os.walk(top, onerror=self.on_error):
            self._waiting += [Path(parent, name) for name in folders if Path(parent, name).is_symlink()]
            if self.follows_links:
                folders[:] = [name for name in folders if _identity(Path(parent, name)) not in self._seen]
                self._note(Path(parent))
            yield Path(parent), files

    def _note(self, folder: Path) -> None:
        """Counts the folder as read, unless readers skip its name: a link may then give it another."""
        if folder == self.root or not is_hidden(folder.relative_to(self.root).as_posix()):
            self._seen.add(_identity(folder))

    def _kind(self, link: Path) -> str:
        if not self.follows_links or is_hidden(link.relative_to(self.root).as_posix()):
            return NOT_FOLLOWED
        if link.resolve() in (real := self.root.resolve(), *real.parents):
            return LINKS_BACK
        return READ_ELSEWHERE if _identity(link) in self._seen else FOLLOWED_LINKS


def _identity(folder: Path) -> Identity:
    found = folder.stat()
    return found.st_dev, found.st_ino
