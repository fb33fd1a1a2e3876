"""The stored result of a lane in `tests/figures`: its format, what is wrong with it, and how old it is."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "tests" / "figures"
DIGEST_LENGTH = 16

Digest = Annotated[str, Field(pattern=f"^[0-9a-f]{{{DIGEST_LENGTH}}}$")]
Count = Annotated[int, Field(ge=0)]


class Record(BaseModel):
    """The result of a lane, and the version of the code it belongs to."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    lane: str
    """Its name, as `python -m tests.lanes` takes it."""
    commit: Annotated[str, Field(pattern="^[0-9a-f]{40}$")]
    """The commit that was checked out when the result was stored."""
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    seed: str
    """The seed of the draw and of the order of the pieces."""
    minutes: Annotated[float, Field(ge=0)]
    """The time of all calls together."""
    done: Count
    """Pieces that have a verdict."""
    total: Count
    """Pieces of the whole lane. It was cut short if `done` is less."""
    verdicts: dict[str, Count]
    """Pieces by verdict."""
    failed: list[str]
    """Pieces whose verdict is a failure."""
    files: dict[str, Digest]
    """The files that the lane tests or runs, with the digest of their bytes."""


def path_of(lane: str, folder: Path = FIGURES) -> Path:
    """The file that holds the lane's stored result."""
    return folder / f"lane-{lane}.json"


def stored(lane: str, folder: Path = FIGURES) -> Record | None:
    """The lane's stored result; None if there is none. Raises pydantic.ValidationError if it is malformed."""
    path = path_of(lane, folder)
    return Record.model_validate_json(path.read_text()) if path.exists() else None


def store(record: Record, folder: Path = FIGURES) -> Path:
    """Writes the result in place of the lane's last one."""
    path = path_of(record.lane, folder)
    path.write_text(record.model_dump_json(indent=1) + "\n")
    return path


def digests(files: Iterable[str], root: Path = ROOT) -> dict[str, str]:
    """The digest of each file, by its path below the root."""
    return {name: hashlib.sha256((root / name).read_bytes()).hexdigest()[:DIGEST_LENGTH] for name in sorted(set(files))}


def problems(record: Record) -> Iterator[str]:
    """A sentence for each thing that is wrong with a stored result. Its age is none: `changed_since` says it."""
    if record.failed:
        yield f"these pieces failed: {', '.join(record.failed)}"
    if not record.done == sum(record.verdicts.values()) <= record.total:
        yield f"{record.done} of {record.total} pieces are done, and {sum(record.verdicts.values())} have a verdict"


def changed_since(record: Record, now: dict[str, str]) -> list[str]:
    """The files of the lane that are new, gone or other than the result's. `now` holds the present digests."""
    return sorted(name for name in now.keys() | record.files.keys() if now.get(name) != record.files.get(name))


def result_lines(results: Mapping[str, Record | None]) -> Iterator[str]:
    """The table of the lanes' stored results; None: there is none."""
    yield from ("| lane | pieces tried | found | on | at commit |", "| --- | --- | --- | --- | --- |")
    for name, record in results.items():
        if record is None:
            yield f"| `{name}` | none stored | | | |"
        else:
            found = ", ".join(f"{count} {verdict}" for verdict, count in record.verdicts.items())
            share = f"{record.done} of {record.total}"
            yield f"| `{name}` | {share} | {found} | {record.date} | `{record.commit[:12]}` |"
