"""Counts how an output's records and the images of a ground truth find each other."""

from collections.abc import Iterable, Iterator
from itertools import islice

from blocksight.jobs.plan.plan import Plan
from blocksight.jobs.plan.text import counted, plain
from blocksight.storage.inputs.ground_truth import AmbiguousTruthError, Truth
from blocksight.storage.inputs.survey import Layout
from blocksight.storage.outputs.fragments import fragment_batches
from blocksight.storage.stores.store import DamagedError, ObjectStore

MAX_FRAGMENTS = 200
"""Fragments whose keys are read: with more of them nothing is counted for tables and tar shards."""
KEY_WINDOW_BYTES = 64 << 10
BATCH_ROWS = 4096
NUM_SHOWN = 3


def truth_line(store: ObjectStore, plan: Plan, truth: Truth) -> str | None:
    """One line: records with an annotated image, and annotated images without a record.

    None if they are not counted: there are many fragments, or one cannot be read. Raises StoreError.
    """
    try:
        keys = _keys(store, plan)
        return None if keys is None else _line(truth, set(keys))
    except DamagedError:  # its unit fails, and says more
        return None


def _keys(store: ObjectStore, plan: Plan) -> Iterator[str] | None:
    if plan.layout is Layout.IMAGES:
        return (info.key for unit in plan.units for info in unit.objects)
    infos = list(islice(store.list("data/"), MAX_FRAGMENTS + 1))
    if len(infos) > MAX_FRAGMENTS:
        return None
    batches = (
        batch for info in infos for batch in fragment_batches(store, info, ["key"], BATCH_ROWS, KEY_WINDOW_BYTES)
    )
    return (key for batch in batches for key in batch.column("key").to_pylist())


def _line(truth: Truth, keys: Iterable[str]) -> str:
    used: set[str] = set()
    num_keys = num_found = num_respelled = num_ambiguous = 0
    for key in keys:
        num_keys += 1
        try:
            exact = truth.find_exactly(key)
            image = exact or truth.find(key)
        except AmbiguousTruthError:
            num_ambiguous += 1
            continue
        if image is not None:
            used.add(image.name)
            num_found += 1
            num_respelled += exact is None
    unused = [image.name for image in truth.images if image.name not in used]
    parts = [f"{num_found:,} of {counted(num_keys, 'record')} have an annotated image"]
    parts += [f"{num_respelled:,} of them by a name in another spelling"] if num_respelled else []
    parts += [f"{counted(num_ambiguous, 'record')} with more than one match"] if num_ambiguous else []
    shown = ", ".join(plain(repr(name)) for name in unused[:NUM_SHOWN])
    more = ", …" if len(unused) > NUM_SHOWN else ""
    parts += [f"{counted(len(unused), 'annotated image')} without a record: {shown}{more}"] if unused else []
    return f"ground truth: {'; '.join(parts)}"
