"""Dead letters: units that are given up, each with its cause, until a retry."""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict

from blocksight.jobs.ledger.receipt_batches import READERS
from blocksight.jobs.ledger.receipts import committed_receipt
from blocksight.jobs.plan.documents import damaged, read_document
from blocksight.jobs.plan.records import Cause, DeadLetter, Receipt, Unit
from blocksight.storage.limits import MAX_RECEIPT_BYTES
from blocksight.storage.outputs.schema import MAX_ERROR_LENGTH
from blocksight.storage.stores.store import AlreadyExistsError, ObjectStore

FOLDER = "_job/dead/"


def letter_key(unit_id: str) -> str:
    """The key of a unit's dead letter below the output's root."""
    return f"{FOLDER}{unit_id}.json"


def give_up(output: ObjectStore, unit: Unit, stage: str, cause: Cause, error: str) -> DeadLetter | Receipt:
    """Writes the unit's dead letter, or returns its receipt if another attempt has committed its fragment.

    If the output is unwritable the fragment is not looked for; a fragment outweighs the dead letter anyway.
    """
    receipt = committed_receipt(output, unit) if cause is not Cause.OUTPUT_UNWRITABLE else None
    if receipt is not None:
        return receipt
    inputs, text = unit.objects[0].key, error[:MAX_ERROR_LENGTH]
    letter = DeadLetter(unit.unit_id, unit.ordinal, inputs, str(cause), stage, text, unit.num_records)
    write_letter(output, letter)
    return letter


def write_letter(output: ObjectStore, letter: DeadLetter) -> None:
    """Writes the dead letter, unless the unit already has one."""
    with suppress(AlreadyExistsError):
        output.create(letter_key(letter.unit_id), json.dumps(asdict(letter), indent=1, sort_keys=True).encode())


def read_letters(output: ObjectStore, units: Iterable[Unit]) -> dict[str, DeadLetter]:
    """The dead letters of these units, by unit id."""
    stored = {info.key for info in output.list(FOLDER)}
    keys = [key for key in (letter_key(unit.unit_id) for unit in units) if key in stored]
    with ThreadPoolExecutor(READERS) as readers:
        letters = list(readers.map(lambda key: _letter(output, key), keys))
    return {letter.unit_id: letter for letter in letters}


def _letter(output: ObjectStore, key: str) -> DeadLetter:
    letter = read_document(output, key, DeadLetter, MAX_RECEIPT_BYTES)
    if letter_key(letter.unit_id) != key:
        raise damaged(output.uri, key, f"it is of unit {letter.unit_id!r}")
    return letter
