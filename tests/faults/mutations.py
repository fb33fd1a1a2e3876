"""Plants the faults of the table, one at a time, and shows that the tests go red for each.

`python -m tests.faults.mutations` plants every fault of the table in a copy of the tree and prints a line for
each; its exit code is 0 if every fault was seen and the sound tree passes the same tests. With words, it plants
only the faults whose meaning contains one of them; `--sample 8 --seed WORD` draws eight of them.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.faults.planting import Mutation, copied, judge, load_heavy, run_tests
from tests.faults.table import MUTATIONS

ROOT = Path(__file__).resolve().parents[2]


def drawn(words: Sequence[str], sample: int | None, seed: str) -> list[Mutation]:
    """The faults to plant, in the order of the table; the same for the same seed."""
    found = [each for each in MUTATIONS if not words or any(word in each.meaning for word in words)]
    if sample is None or sample >= len(found):
        return found
    lots = sorted(random.Random(seed).sample(range(len(found)), sample))
    return [found[lot] for lot in lots]


def tests_of(mutations: Sequence[Mutation]) -> list[str]:
    """The tests of all these faults, each once."""
    return sorted({test for mutation in mutations for test in mutation.tests})


def main(arguments: Sequence[str]) -> int:
    """Prints a line per fault; the sound tree comes first, and must be green."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--sample", type=int, help="how many faults to draw; all where it is not given")
    parser.add_argument("--seed", default="", help="what the draw depends on")
    options = parser.parse_args(arguments)
    chosen = drawn(options.words, options.sample, options.seed)
    print(f"{len(chosen)} of {len(MUTATIONS)} faults, seed {options.seed!r}", flush=True)
    load_heavy()
    with copied(ROOT) as tree:
        sound = run_tests(tree, tests_of(chosen))
        print(f"{sound.seen} the sound tree {sound.detail}", flush=True)
        odd = sound.seen != "green"
        for mutation in chosen:
            odd += not _is_seen(tree, mutation)
    print(f"{len(chosen)} faults, {odd} lines not as they should be")
    return 1 if odd else 0


def _is_seen(tree: Path, mutation: Mutation) -> bool:
    started = time.monotonic()
    verdict = judge(tree, mutation)
    is_red = verdict.seen == "red"
    seen = verdict.seen if is_red else verdict.seen.upper()
    print(
        f"{seen:6} {time.monotonic() - started:4.0f} s  {mutation.meaning}: {verdict.detail or 'NO TEST SAW IT'}",
        flush=True,
    )
    return is_red


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
