"""Counts labels before any work: those of all loose images, and of the first records of tables and tar shards."""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice

from blocksight.jobs.plan.labels import NUM_SHOWN, FoundLabels
from blocksight.jobs.plan.plan import Plan
from blocksight.jobs.plan.text import counted
from blocksight.storage.inputs.label_file import LabelFile
from blocksight.storage.inputs.survey import Layout
from blocksight.storage.inputs.tables import table_labels
from blocksight.storage.inputs.tars import tar_labels
from blocksight.storage.stores.store import ObjectStore, StoreError

MAX_COUNTED_ROWS = 100_000
"""Rows of tables whose labels are counted."""
MAX_COUNTED_SHARDS = 8


def counted_labels(source: ObjectStore, plan: Plan, file: LabelFile | None = None) -> FoundLabels:
    """The data set's labels, as far as they are cheap to read. A shard that cannot be read counts nothing.

    With a file of labels those count: of loose images by key, of other layouts all rows of the file.
    """
    if file is not None:
        return _from_file(plan, file)
    if plan.layout is Layout.IMAGES:
        counts: Counter[str | int | None] = Counter({**plan.label_counts()})
        counts[None] += plan.num_records - counts.total()
        return FoundLabels(+counts, what="class folder")
    counts = Counter(islice(_labels(source, plan), MAX_COUNTED_ROWS))
    return FoundLabels(counts, plan.num_records)


def _from_file(plan: Plan, file: LabelFile) -> FoundLabels:
    if plan.layout is not Layout.IMAGES:
        note = "rows of the file; they are joined with the records while these are read"
        return FoundLabels({**Counter(file.labels.values())}, note=note)
    keys = [file.key_of(info.key) for unit in plan.units for info in unit.objects]
    unused = sorted(file.labels.keys() - set(keys))
    counts: Counter[str | int | None] = Counter(None if key is None else file.labels[key] for key in keys)
    shown = ", ".join(map(repr, unused[:NUM_SHOWN])) + (", …" if len(unused) > NUM_SHOWN else "")
    note = f"{counted(len(unused), 'key')} of the file without an image: {shown}" if unused else ""
    return FoundLabels(counts, note=note)


def _labels(source: ObjectStore, plan: Plan) -> Iterator[str | int | None]:
    last = {unit.objects[0].key: unit for unit in plan.units if unit.is_counted}  # the last unit of each shard
    for unit in islice(last.values(), MAX_COUNTED_SHARDS):
        with suppress(StoreError):  # its unit says more
            if plan.layout is Layout.PARQUET:
                yield from table_labels(source, unit.objects[0], unit.stop)
            else:
                yield from tar_labels(source, unit.objects[0])
