"""Makes an export unit by unit, in any process, each part once; then puts them together in the plan's order."""

import json
import os
import shutil
import socket
import uuid
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from typing_extensions import TypedDict

from blocksight.cluster.errors import ClusterError
from blocksight.jobs.export.records import ExplainedRecord, ExplainedRecords
from blocksight.jobs.export.selection import Selection
from blocksight.jobs.export.sql import MetricColumns
from blocksight.jobs.plan.config import ConfigError, Execution
from blocksight.jobs.plan.documents import parsed
from blocksight.jobs.plan.records import Count, Unit
from blocksight.jobs.plan.text import counted
from blocksight.jobs.run.unit_pass import Reopening, in_order
from blocksight.jobs.worker.progress import Tally, progress
from blocksight.jobs.worker.rows import existing_output
from blocksight.storage.limits import MAX_DOCUMENT_BYTES

PARTS, REQUEST, FACTS = ".parts", ".export.json", "part.json"
"""Names in the folder of an export that is not complete, and in each of its parts."""


class PartFacts(TypedDict):
    """What a part holds."""

    records: list[tuple[Count, Count, Count]]
    """After each record the maps so far, and the rejected records and missing images that were left out so far."""
    num_rejected: Count
    num_gone: Count


@dataclass(frozen=True)
class Part:
    """One unit's part of an export, up to the limit."""

    folder: Path
    num_records: int
    num_maps: int
    ends: bool
    """True if the limit is reached in it."""


@dataclass
class Account:
    """What is exported and left out, added up over the parts."""

    limit: int | None
    num_records: int = 0
    num_maps: int = 0
    num_rejected: int = 0
    num_gone: int = 0

    def add(self, folder: Path, facts: PartFacts) -> Part:
        """Adds a part, cut to what the limit leaves."""
        records = facts["records"]
        left = len(records) if self.limit is None else self.limit - self.num_records
        ends = self.limit is not None and left <= len(records)
        taken = records[:left]
        last = taken[-1] if taken else (0, 0, 0)
        self.num_records += len(taken)
        self.num_maps += last[0]
        self.num_rejected += last[1] if ends else facts["num_rejected"]
        self.num_gone += last[2] if ends else facts["num_gone"]
        return Part(folder, len(taken), last[0], ends)

    def __str__(self) -> str:
        until = "" if self.limit is None else " before the limit"
        left_out = f"{self.num_rejected:,} rejected, {self.num_gone:,} whose image is gone"
        return f"{counted(self.num_records, 'record')} exported; left out{until}: {left_out}"


class Form(ABC):
    """A format that is made of parts. Its parts are made in any process, so that its fields are pickled."""

    @abstractmethod
    def write_part(self, reader: ExplainedRecords, unit: Unit, folder: Path) -> PartFacts:
        """Writes the part of a unit into an empty folder."""

    def told(self, account: Account) -> str:
        """What was exported and left out, in a line; or that there was nothing to export."""
        return str(account)

    @abstractmethod
    def join(self, parts: Iterator[Part], reader: ExplainedRecords, folder: Path) -> Sequence[str]:
        """Writes the export from its parts, in the plan's order; returns lines for the user."""


class FormOfRecords(Form):
    """A format that draws the images, record by record."""

    @abstractmethod
    def write_records(self, records: Iterator[ExplainedRecord], reader: ExplainedRecords, folder: Path) -> None:
        """Writes the part of these records of one unit into an empty folder."""

    def write_part(self, reader: ExplainedRecords, unit: Unit, folder: Path) -> PartFacts:
        facts: PartFacts = {"records": [], "num_rejected": 0, "num_gone": 0}
        self.write_records(self._noted(reader, unit, facts), reader, folder)
        return facts

    def _noted(self, reader: ExplainedRecords, unit: Unit, facts: PartFacts) -> Generator[ExplainedRecord, None, None]:
        num_maps, rejected, gone = 0, reader.num_rejected, reader.num_gone
        for record in reader.of(unit):
            num_maps += len(record.maps)
            facts["records"].append((num_maps, reader.num_rejected - rejected, reader.num_gone - gone))
            yield record
            if len(facts["records"]) == reader.limit:
                return
        facts["num_rejected"], facts["num_gone"] = reader.num_rejected - rejected, reader.num_gone - gone


@dataclass
class Exporting(Reopening):
    """Writes the part of a unit, in any process."""

    output: str
    endpoint_url: str | None
    columns: MetricColumns
    limit: int | None
    selection: Selection
    form: Form
    folder: str

    @cached_property
    def reader(self) -> ExplainedRecords:
        """The records, opened where they are read."""
        found = existing_output(self.output, self.endpoint_url)
        return ExplainedRecords(found.store, found.plan, self.columns, self.endpoint_url, self.limit, self.selection)

    def __call__(self, ordinal: int) -> PartFacts:
        """The facts of the part of the unit at this place of the plan; writes it if it is not there, once and whole.

        Raises ClusterError if this machine does not see the folder, StoreError, and UnreconciledError.
        """
        root = Path(self.folder)
        if not (root / REQUEST).is_file():
            raise ClusterError(
                f"{socket.gethostname()} does not see {root}: with --address the folder lies on a file system that all "
                "nodes share; or leave --address out"
            )
        place = part_folder(root, ordinal)
        if not place.is_dir():
            made = place.with_name(f"{place.name}.{uuid.uuid4().hex}")
            made.mkdir(parents=True)
            facts = self.form.write_part(self.reader, self.reader.plan.units[ordinal], made)
            (made / FACTS).write_text(json.dumps(facts), encoding="utf-8")
            _rename(made, place)
        return parsed((place / FACTS).read_bytes(), PartFacts, MAX_DOCUMENT_BYTES)


def _rename(made: Path, place: Path) -> None:
    """Gives a part its name, unless another call was first."""
    try:
        made.rename(place)
    except OSError:
        if not place.is_dir():
            raise
        shutil.rmtree(made)


def part_folder(root: Path, ordinal: int) -> Path:
    """Where a unit's part lies, by its place in the plan."""
    return root / PARTS / f"{ordinal:06d}"


def begin(folder: Path, request: Mapping[str, Any]) -> None:
    """Begins an export in this folder, or goes on with one of the same request that broke off.

    Raises ConfigError if the folder holds anything else.
    """
    present = {path.name for path in folder.iterdir()}
    if not present:
        (folder / REQUEST).write_text(json.dumps(request, sort_keys=True), encoding="utf-8")
        (folder / PARTS).mkdir()
        return
    if REQUEST not in present:
        raise ConfigError(f"{folder} holds files already; name a folder that is empty or not there yet")
    if (folder / REQUEST).read_text(encoding="utf-8") != json.dumps(request, sort_keys=True):
        raise ConfigError(
            f"{folder} holds an export that broke off, of another request or of other maps; remove the folder, or name "
            "another one"
        )
    for path in folder.iterdir():
        if path.name not in (PARTS, REQUEST):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / PARTS).mkdir(exist_ok=True)


def export_parts(work: Exporting, units: Sequence[Unit], execution: Execution, console: Console) -> list[str]:
    """Makes the parts of these units that are not there yet, joins them, and returns lines for the user.

    Raises ConfigError if no record can be exported, and as `in_order`.
    """
    folder, account, parts = Path(work.folder), Account(work.limit), list[Part]()
    expected = [sum(unit.num_records for unit in units), work.limit, work.selection.num_records]
    num_records = min(count for count in expected if count is not None)
    made = closing(in_order(work, [unit.ordinal for unit in units], num_records, execution, console))
    with made as arriving, progress(console, Tally(num_records, None, verb="export")) as update:
        for unit, facts in zip(units, arriving, strict=False):
            parts.append(account.add(part_folder(folder, unit.ordinal), facts))
            update(parts[-1].num_records)
            if parts[-1].ends:
                break
    if not account.num_records:
        _end(folder)
        raise ConfigError(f"nothing of {work.output} can be exported: {work.form.told(account)}")
    lines = work.form.join(iter(parts), work.reader, folder)
    _end(folder)
    return [work.form.told(account), *lines]


def _end(folder: Path) -> None:
    """Removes the parts, then what says that the export is not complete."""
    shutil.rmtree(folder / PARTS)
    (folder / REQUEST).unlink()


def place(source: Path, target: Path) -> None:
    """Gives a part's file its place in the export, by a link where the file system has them; the part keeps it too."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
