"""Breaks the commit protocol on purpose, one fault at a time, and shows that the tests go red for each.

`python -m tests.faults.mutations` copies the tree, plants each fault in the copy, runs the fast protocol tests
there and prints a table; its exit code is 0 where every fault was seen and the sound tree passes. Only a test
that fails has seen a fault: one that cannot be collected or set up has not. `python -m tests.faults.mutations
probe marker` plants those alone whose meaning holds one of the words.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.jobs.jobs_of import ROOT

TESTS = (
    "tests/faults/test_protocol.py",
    "tests/jobs/test_commit.py",
    "tests/storage/test_s3.py",
    "tests/storage/test_stores.py",
    "tests/storage/test_local.py",
    "tests/jobs/test_stopping.py",
    "tests/jobs/test_job.py",
    "tests/jobs/test_reconcile.py",
    "tests/jobs/test_attempts.py",
    "tests/faults/test_crashes.py",
)
"""In order of what they cost: the first failure ends a run."""
CHOICE = ("-m", "not servers and not faults", "--hypothesis-seed=1")
"""One seed for all: what the sound tree passes with it, a broken one does not fail by bad luck."""


@dataclass(frozen=True)
class Mutation:
    """One fault: a piece of one file and what stands in its place."""

    meaning: str
    file: str
    sound: str
    broken: str


MUTATIONS = (
    Mutation(
        "a fragment is put, not created once (no If-None-Match)",
        "jobs/unit.py",
        "output.create(unit.fragment_key, body, metadata=metadata)",
        "output.delete(unit.fragment_key), output.create(unit.fragment_key, body, metadata=metadata)",
    ),
    Mutation(
        "the receipt is written before the fragment",
        "jobs/unit.py",
        "    if _create_or_adopt(",
        "    write_receipt(output, receipt)\n    if _create_or_adopt(",
    ),
    Mutation(
        "412 is taken for a failure",
        "jobs/unit.py",
        "        if not ours and not isinstance(error, AlreadyExistsError):\n            raise",
        "        raise",
    ),
    Mutation(
        "412 always means that another attempt was first",
        "jobs/unit.py",
        'ours = standing.metadata.get("attempt") == metadata["attempt"]',
        "ours = False",
    ),
    Mutation(
        "412 always means that it was ours",
        "jobs/unit.py",
        'ours = standing.metadata.get("attempt") == metadata["attempt"]',
        "ours = True",
    ),
    Mutation(
        "counts are compared instead of sets",
        "jobs/reconcile.py",
        "        return [unit for unit in self.plan.units if unit.unit_id not in settled]",
        "        return list(self.plan.units[len(settled) + len(self.strangers):])",
    ),
    Mutation(
        "a receipt alone makes a unit committed",
        "jobs/receipts.py",
        "if unit.fragment_key in fragments]",
        "if unit.fragment_key in fragments or receipt_key(unit.unit_id) in written]",
    ),
    Mutation(
        "rows out are not counted before the commit",
        "jobs/unit.py",
        "    _check_rows(rows, result.num_records)\n",
        "",
    ),
    Mutation(
        "inputs are not pinned by their version",
        "storage/loose.py",
        "store.read(info.key, etag=info.etag)",
        "store.read(info.key)",
    ),
    Mutation(
        "a dead letter outweighs a fragment",
        "jobs/reconcile.py",
        "{unit_id: letter for unit_id, letter in letters.items() if unit_id not in receipts}",
        "letters",
    ),
    Mutation(
        "a unit is buried although its fragment stands, and the letter stays",
        "jobs/reconcile.py",
        "        store.delete(letter_key(unit_id))",
        "        pass",
    ),
    Mutation(
        "the manifest is replaced",
        "jobs/reconcile.py",
        'Raises UnreconciledError.\n    """\n    manifest = final_manifest(store)\n',
        'Raises UnreconciledError.\n    """\n    store.delete(MANIFEST_KEY)\n    manifest = None\n',
    ),
    Mutation(
        "a local file is written in place, not linked",
        "storage/local.py",
        "        path.hardlink_to(aside)",
        "        os.replace(aside, path), aside.touch()",
    ),
    Mutation(
        "the S3 store puts without a condition (no If-None-Match)",
        "storage/s3.py",
        'IfNoneMatch="*", ',
        "",
    ),
    Mutation(
        "the probe lets every store pass",
        "storage/stores.py",
        '    key = f"{prefix}{uuid.uuid4().hex}"\n',
        "    return\n",
    ),
    Mutation(
        "the probe lets nobody race",
        "storage/stores.py",
        "        _one_must_win(store, race)",
        "        pass",
    ),
    Mutation(
        "the attempt marker is never written",
        "jobs/attempts.py",
        'output.put(marker, json.dumps({"worker": worker_name()}).encode())',
        "output.uri",
    ),
    Mutation(
        "no number of deaths makes a step careful",
        "jobs/attempts.py",
        "return work(num_deaths >= CAREFUL_DEATHS)",
        "return work(False)",
    ),
    Mutation(
        "a second dead letter replaces the first",
        "jobs/dead.py",
        "output.create(letter_key(",
        "output.put(letter_key(",
    ),
    Mutation(
        "patience gives up at once",
        "storage/patient.py",
        "if time.monotonic() + pause > deadline:",
        "if True:",
    ),
    Mutation(
        "the sign to stop is not looked at",
        "jobs/attempts.py",
        "is_stopped(desk.output, desk.run_id)",
        "False",
    ),
    Mutation(
        "gc removes a fragment that counts",
        "jobs/leftovers.py",
        "*_lost_plans(store)]",
        "*_lost_plans(store), *(receipt.fragment for receipt in standing.receipts.values())]",
    ),
    Mutation(
        "retry opens nothing",
        "jobs/retry.py",
        "        output.delete(dead.letter_key(letter.unit_id))\n",
        "",
    ),
    Mutation(
        "retry leaves the markers of the attempts that died",
        "jobs/retry.py",
        "            output.delete(marker.key)",
        "            pass",
    ),
    Mutation(
        "finalize compares counts",
        "jobs/reconcile.py",
        '    faults = [f"{key} was not planned" for key in standing.strangers]\n'
        '    faults += [f"unit {unit.ordinal} is neither committed nor dead" for unit in standing.open_units]\n',
        "    settled = len(standing.receipts) + len(standing.dead) + len(standing.strangers)\n"
        '    faults = ["units are open"] if settled < len(standing.plan.units) else []\n',
    ),
)


def verdict(mutation: Mutation | None) -> tuple[str, str]:
    """What the tests make of a copy with this fault: red, green or broken; and the first that fails, or why not."""
    with tempfile.TemporaryDirectory(prefix="blocksight-mutation-") as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "*.egg-info", ".*_cache"))
        if mutation is not None:
            file = copy / mutation.file
            text = file.read_text()
            if text.count(mutation.sound) != 1:
                return "broken", f"{mutation.file} does not hold this once: {mutation.sound!r}"
            file.write_text(text.replace(mutation.sound, mutation.broken))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *CHOICE, *TESTS]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines()
        failed = [line.split(" ")[1] for line in lines if line.startswith("FAILED tests/")]
        if done.returncode == 1 and failed:
            return "red", failed[0].removeprefix("tests/")
        if done.returncode == 0:
            return "green", ""
        return "broken", f"the tests did not run: {' | '.join(lines[-5:])}{done.stderr[-1000:]}"


def main(words: Sequence[str]) -> int:
    """Prints a line per fault; the sound tree comes first, and must be green."""
    chosen = [each for each in MUTATIONS if not words or any(word in each.meaning for word in words)]
    seen, first = verdict(None)
    print(f"{seen:6} the sound tree {first}", flush=True)
    odd = seen != "green"
    for mutation in chosen:
        seen, first = verdict(mutation)
        odd += seen != "red"
        print(
            f"{seen if seen == 'red' else seen.upper():6} {mutation.meaning}: {first or 'NO TEST SAW IT'}", flush=True
        )
    print(f"{len(chosen)} faults, {odd} lines not as they should be")
    return 1 if odd else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
