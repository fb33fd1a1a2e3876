"""What a check finds, and where it stands while it walks a file."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a file."""

    file: str
    path: str
    """Of the value in the file, such as `spec.rayClusterSpec.rayVersion`; or a line, such as `line 3`."""
    rule: str
    why: str
    way_out: str

    def __str__(self) -> str:
        """One line: file, path, rule, why, way out."""
        line = f"{self.file}: {self.path or 'whole file'}: {self.rule}: {self.why}; {self.way_out}"
        return " ".join(line.split())


@dataclass(frozen=True)
class Place:
    """A value of a file, with the way to it. Looking for what is not there gives a place whose value is None."""

    file: str
    value: Any
    path: str = ""

    def __getitem__(self, key: str | int) -> "Place":
        if isinstance(key, int):
            found = self.value[key] if isinstance(self.value, list) and key < len(self.value) else None
            return Place(self.file, found, f"{self.path}[{key}]")
        found = self.value.get(key) if isinstance(self.value, Mapping) else None
        return Place(self.file, found, f"{self.path}.{key}" if self.path else key)

    def at(self, *keys: str | int) -> "Place":
        """The place below it, key by key."""
        place = self
        for key in keys:
            place = place[key]
        return place

    def items(self) -> Iterator["Place"]:
        """The entries of a list; none if it is no list."""
        for index in range(len(self.value) if isinstance(self.value, list) else 0):
            yield self[index]

    def entries(self) -> Iterator[tuple[str, "Place"]]:
        """The keys of a mapping with their places; none if it is no mapping."""
        for key in list(self.value) if isinstance(self.value, Mapping) else []:
            yield str(key), Place(self.file, self.value[key], f"{self.path}.{key}" if self.path else str(key))

    @property
    def text(self) -> str:
        """The value if it is a text, else an empty one."""
        return self.value if isinstance(self.value, str) else ""

    @property
    def is_there(self) -> bool:
        """True if the file has a value here."""
        return self.value is not None

    def walk(self) -> Iterator["Place"]:
        """This place and all below it."""
        yield self
        for _, below in self.entries():
            yield from below.walk()
        for below in self.items():
            yield from below.walk()

    def finding(self, rule: str, why: str, way_out: str) -> Finding:
        """What is wrong here."""
        return Finding(self.file, self.path, rule, why, way_out)


def nearest(name: str, known: Iterable[str]) -> str:
    """The way out for an unknown name: the one that was probably meant, or all of them if they are few."""
    names = sorted(known)
    close = get_close_matches(name, names, 1, 0.6)
    if close:
        return f"write {close[0]}"
    return f"known are {', '.join(names)}" if 0 < len(names) <= 12 else "leave it out"
