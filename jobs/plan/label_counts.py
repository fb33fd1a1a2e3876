"""Counts labels before any work: those of all loose images, and of the first records of tables and tar shards."""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice

from blocksight.jobs.plan.labels import FoundLabels
from blocksight.jobs.plan.plan import Plan
from blocksight.storage.inputs.survey import Layout
from blocksight.storage.inputs.tables import table_labels
from blocksight.storage.inputs.tars import tar_labels
from blocksight.storage.stores.store import ObjectStore, StoreError

MAX_COUNTED_ROWS = 100_000
"""Rows of tables whose labels are counted."""
MAX_COUNTED_SHARDS = 8


def counted_labels(source: ObjectStore, plan: Plan) -> FoundLabels:
    """The data set's labels, as far as they are cheap to read. A shard that cannot be read counts nothing."""
    if plan.layout is Layout.IMAGES:
        counts: Counter[str | int | None] = Counter(dict(plan.label_counts()))
        counts[None] += plan.num_records - counts.total()
        return FoundLabels(+counts, what="class folder")
    counts = Counter(islice(_labels(source, plan), MAX_COUNTED_ROWS))
    return FoundLabels(counts, plan.num_records)


def _labels(source: ObjectStore, plan: Plan) -> Iterator[str | int | None]:
    last = {unit.objects[0].key: unit for unit in plan.units if unit.is_counted}  # the last unit of each shard
    for unit in islice(last.values(), MAX_COUNTED_SHARDS):
        with suppress(StoreError):  # its unit says more
            if plan.layout is Layout.PARQUET:
                yield from table_labels(source, unit.objects[0], unit.stop)
            else:
                yield from tar_labels(source, unit.objects[0])
