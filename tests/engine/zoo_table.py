"""The zoo's table: which models are in it, at which size, and what the oracle of `zoo.py` said of each.

`python -m tests.lanes zoo` judges them, and writes each verdict to `tests/figures/zoo.json`.
"""

import json
import multiprocessing
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tests.engine.zoo import verdict
from tests.engine.zoo_models import LEFT_OUT, made

TABLE = Path(__file__).parents[1] / "figures" / "zoo.json"
_LINES = Path(__file__).with_name("zoo.txt").read_text().splitlines()
ENTRIES = {name: int(side) for name, side in (line.split() for line in _LINES)}
"""The side of the pictures of each model, in pixels."""
WHAT = "blocks of models with random weights, judged by tests/engine/zoo.py; seconds are of one core"
LIMIT_SECONDS = 300
"""For one model, its making included."""
FORK = multiprocessing.get_context("fork")
FAULTY = frozenset({"wrong", "worse"})
CHEAP_SECONDS = 1.5
"""`.ci/run` draws among models that take no longer."""


@dataclass(frozen=True)
class Row:
    """What was said of a model."""

    verdict: str
    """`right`, `refused`, `unjudged`, `wrong`, `not made`, or `left out`."""
    why: str
    side: int
    seconds: float = 0.0


def judged(name: str) -> Row:
    """The oracle's verdict of a model."""
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = made(name, ENTRIES[name])
        found, why = verdict(one.module, one.side, one.prefix, is_last=one.is_last)
    return Row(found, why[:300], one.side, round(time.process_time() - start, 1))


def judged_apart(name: str, limit_seconds: float = LIMIT_SECONDS) -> Row:
    """The same in a process of its own, whose memory and faults end with it."""
    reading, writing = FORK.Pipe(duplex=False)
    child = FORK.Process(target=lambda: writing.send(_judged_or_not(name)))
    child.start()
    writing.close()
    try:
        if reading.poll(limit_seconds):
            return reading.recv()
        return Row("not made", f"no verdict in {limit_seconds:g} s", ENTRIES[name])
    except EOFError:
        return Row("not made", "its process ended without a word", ENTRIES[name])
    finally:
        child.kill()
        child.join()


def _judged_or_not(name: str) -> Row:
    torch.set_num_threads(1)
    try:
        return judged(name)
    except Exception as error:  # noqa: BLE001 - a library raises anything over its own models
        where = traceback.extract_tb(error.__traceback__)[-1]
        told = f"{type(error).__name__}: {error} at {Path(where.filename).name}:{where.lineno}"
        return Row("not made", told[:300], ENTRIES[name])


def stored() -> dict[str, Row]:
    """The table, by the model's name."""
    return {name: Row(**row) for name, row in json.loads(TABLE.read_text())["models"].items()}


def store(rows: Mapping[str, Row]) -> None:
    """Writes the table, with the models that are left out and why."""
    rows = dict(sorted((rows | {f"hf:{name}": Row("left out", why, 0) for name, why in LEFT_OUT.items()}).items()))
    counts = dict(sorted(Counter(row.verdict for row in rows.values()).items()))
    models = {name: asdict(row) for name, row in rows.items()}
    TABLE.write_text(json.dumps({"what": WHAT, "counts": counts, "models": models}, indent=1) + "\n")


def renewed(name: str) -> str:
    """Judges a model, writes its row, and returns its verdict: `worse` if it was right before and is no more."""
    rows = stored()
    before, row = rows.get(name), judged_apart(name)
    store({name: row for name, row in rows.items() if name in ENTRIES} | {name: row})
    return "worse" if before is not None and before.verdict == "right" != row.verdict else row.verdict
