"""Receipts in batches: a driver writes those of many units as one object; readers ask fragments for what is missing.

A batch has a receipt per line. It is a cache: what a batch lacks is read from the fragment's metadata, or its bytes.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from typing import Self

from blocksight.jobs.ledger.receipts import committed_receipt
from blocksight.jobs.plan.documents import parsed
from blocksight.jobs.plan.records import Receipt, Unit
from blocksight.storage.limits import MAX_RECEIPT_BATCH_BYTES, MAX_RECEIPT_BYTES
from blocksight.storage.stores.retrying import is_probe
from blocksight.storage.stores.store import MissingError, ObjectStore, OutputError, StoreError

FOLDER = "_job/receipts/"
SUFFIX = ".jsonl"
"""Of a batch; outputs of earlier versions have a `.json` object per unit."""
BATCH_UNITS = 1_000
BATCH_SECONDS = 60.0
"""The oldest receipt that is not written waits about so long for others."""
READERS = 16
"""Small objects read at the same time."""


class ReceiptBatches:
    """Collects the receipts of a run, and writes them as `_job/receipts/<run>-<k>.jsonl`, each batch once."""

    def __init__(self, output: ObjectStore, run_id: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.output, self.run_id, self.clock = output, run_id, clock
        self._lines: list[bytes] = []
        self._num_bytes = 0
        self._num_batches = 0
        self._last = clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Writes what is collected, however the run ends."""
        self.flush()

    def add(self, receipt: Receipt) -> None:
        """Takes a receipt, and writes the batch if it is full or old enough."""
        line = json.dumps(asdict(receipt), separators=(",", ":"), sort_keys=True).encode() + b"\n"
        if len(line) > MAX_RECEIPT_BYTES:  # its fragment says it
            return
        if self._num_bytes + len(line) > MAX_RECEIPT_BATCH_BYTES:
            self.flush()
        self._lines.append(line)
        self._num_bytes += len(line)
        if len(self._lines) >= BATCH_UNITS or self.clock() >= self._last + BATCH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what is collected. A batch that the store does not take is left out: the fragments say the same."""
        self._last = self.clock()
        if not self._lines:
            return
        key = f"{FOLDER}{self.run_id}-{self._num_batches}{SUFFIX}"
        with suppress(StoreError):  # also that it exists: only this run knows the key, and the first reply was lost
            self.output.create(key, b"".join(self._lines))
        self._lines.clear()
        self._num_bytes = 0
        self._num_batches += 1


def receipt_key(unit_id: str) -> str:
    """The key of a unit's receipt below the root of an output of an earlier version."""
    return f"{FOLDER}{unit_id}.json"


def read_receipts(store: ObjectStore, units: Iterable[Unit]) -> tuple[dict[str, Receipt], list[str]]:
    """The receipts of committed units by unit id, and the ids of those that no batch holds.

    A unit is committed if its fragment is under `data/`: the listing decides, never a receipt. Where two batches say
    different things of a unit, because somebody deleted its first fragment, the present fragment decides.
    """
    fragments = {info.key for info in store.list("data/")}
    committed = {unit.unit_id: unit for unit in units if unit.fragment_key in fragments}
    stored: dict[str, Receipt] = {}
    doubtful: set[str] = set()
    for unit_id, receipt in stored_receipts(store, committed):
        if stored.setdefault(unit_id, receipt).sha256 != receipt.sha256:
            doubtful.add(unit_id)
    unbatched = committed.keys() - stored.keys()
    others = [unit for unit_id, unit in committed.items() if unit_id in unbatched or unit_id in doubtful]
    with ThreadPoolExecutor(READERS) as readers:
        found = readers.map(lambda unit: committed_receipt(store, unit), others)
        stored.update({receipt.unit_id: receipt for receipt in found if receipt is not None})
    receipts = {unit_id: stored[unit_id] for unit_id in committed if unit_id in stored}
    return receipts, [unit.unit_id for unit in others if unit.unit_id in receipts and unit.unit_id in unbatched]


def stored_receipts(store: ObjectStore, units: Mapping[str, Unit]) -> Iterator[tuple[str, Receipt]]:
    """The receipts of these units, by unit id, in batches and objects of their own; a damaged one is left out."""
    ours = {receipt_key(unit_id) for unit_id in units}
    keys = [info.key for info in store.list(FOLDER) if not is_probe(info.key)]
    keys = [key for key in keys if key.endswith(SUFFIX) or key in ours]
    with ThreadPoolExecutor(READERS) as readers:
        for receipts in readers.map(lambda key: _receipts_in(store, key), keys):
            for receipt in receipts:
                unit = units.get(receipt.unit_id)
                if unit is not None and (receipt.ordinal, receipt.fragment) == (unit.ordinal, unit.fragment_key):
                    yield receipt.unit_id, receipt


def _receipts_in(store: ObjectStore, key: str) -> list[Receipt]:
    """The receipts of one object; none if it cannot be read or is damaged: they are read from the fragments."""
    most = MAX_RECEIPT_BATCH_BYTES if key.endswith(SUFFIX) else MAX_RECEIPT_BYTES
    try:
        body = store.read(key, length=most + 1)
        lines = body.splitlines() if key.endswith(SUFFIX) else [body]
        return [parsed(line, Receipt, MAX_RECEIPT_BYTES) for line in lines] if len(body) <= most else []
    except (MissingError, OutputError, ValueError):
        return []
