"""Counts labels before any work: those of all loose images, and of the first records of tables and tar shards."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice

from blocksight.jobs.plan.config import ConfigError
from blocksight.jobs.plan.labels import NUM_SHOWN, FoundLabels
from blocksight.jobs.plan.plan import Plan
from blocksight.jobs.plan.text import counted
from blocksight.storage.inputs.ground_truth import AmbiguousTruthError
from blocksight.storage.inputs.label_file import LabelFile
from blocksight.storage.inputs.labels import folder_label
from blocksight.storage.inputs.survey import Layout
from blocksight.storage.inputs.tables import table_labels
from blocksight.storage.inputs.tars import tar_labels
from blocksight.storage.stores.store import ObjectStore, StoreError

MAX_COUNTED_ROWS = 100_000
"""Rows of tables whose labels are counted."""
MAX_COUNTED_SHARDS = 8


def counted_labels(source: ObjectStore, plan: Plan, file: LabelFile | None = None) -> FoundLabels:
    """The data set's labels, as far as they are cheap to read. A shard that cannot be read counts nothing.

    With a file of labels those of its keys count. Raises ConfigError if no record has a key in the file.
    """
    if file is None and plan.layout is Layout.IMAGES:
        counts: Counter[str | int | None] = Counter({**plan.label_counts()})
        counts[None] += plan.num_records - counts.total()
        return FoundLabels(+counts, what="class folder")
    found = _labels(source, plan)
    if file is not None:
        return _joined(plan, [key for key, _ in found], file)
    return FoundLabels(Counter(label for _, label in found), plan.num_records)


def _joined(plan: Plan, records: Sequence[str], file: LabelFile) -> FoundLabels:
    """The file's labels of the records. `records`: keys, of loose images all."""
    keys, unclear = _keys_of(records, file)
    is_whole = plan.layout is Layout.IMAGES or (plan.is_exact and len(records) == plan.num_records)
    if records and not any(keys) and not unclear:
        _refuse_strangers(records, file, is_whole=is_whole)
    notes = [f"{unclear[0]} ({counted(len(unclear), 'such record')})"] if unclear else []
    unused = sorted(file.labels.keys() - set(keys)) if is_whole else []
    if unused:
        notes.append(f"{counted(len(unused), 'key')} of the file without an image: {_examples(unused)}")
    if not is_whole:
        notes.append(f"the file has {counted(len(file.labels), 'key')}; the other records find theirs as they are read")
    counts: Counter[str | int | None] = Counter(None if key is None else file.labels[key] for key in keys)
    return FoundLabels(counts, plan.num_records, note="; ".join(notes))


def _keys_of(records: Iterable[str], file: LabelFile) -> tuple[list[str | None], list[str]]:
    """The file's key of each record, and a sentence for each record that several keys may mean."""
    keys: list[str | None] = []
    unclear: list[str] = []
    for record in records:
        try:
            keys.append(file.key_of(record))
        except AmbiguousTruthError as error:
            keys.append(None)
            unclear.append(str(error))
    return keys, unclear


def _refuse_strangers(records: Sequence[str], file: LabelFile, *, is_whole: bool) -> None:
    which = "none of the data's" if is_whole else f"none of the first {len(records):,}"
    raise ConfigError(
        f"{which} records has a key in the file of --labels: records are such as {_examples(records)}, and keys such "
        f"as {_examples(sorted(file.labels))}; a key is a record's name, or the end of its path"
    )


def _examples(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:NUM_SHOWN])) + (", …" if len(names) > NUM_SHOWN else "")


def _labels(source: ObjectStore, plan: Plan) -> Iterator[tuple[str, str | int | None]]:
    """Key and label of all loose images, and of the first records of tables and tar shards."""
    if plan.layout is Layout.IMAGES:
        yield from ((info.key, folder_label(info.key)) for unit in plan.units for info in unit.objects)
        return
    yield from islice(_shard_labels(source, plan), MAX_COUNTED_ROWS)


def _shard_labels(source: ObjectStore, plan: Plan) -> Iterator[tuple[str, str | int | None]]:
    last = {unit.objects[0].key: unit for unit in plan.units if unit.is_counted}  # the last unit of each shard
    for unit in islice(last.values(), MAX_COUNTED_SHARDS):
        with suppress(StoreError):  # its unit says more
            if plan.layout is Layout.PARQUET:
                yield from table_labels(source, unit.objects[0], unit.stop)
            else:
                yield from tar_labels(source, unit.objects[0], unit.stop)
