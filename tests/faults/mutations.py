"""Breaks the commit protocol on purpose, one fault at a time, and shows that the tests go red for each.

`python -m tests.faults.mutations` copies the tree, plants each fault in the copy, runs the fast protocol tests
there and prints a table; its exit code is 0 where every fault was seen and the sound tree passes.
"""

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.jobs.jobs_of import ROOT

TESTS = (
    "tests/faults/test_protocol.py",
    "tests/jobs/test_commit.py",
    "tests/storage/test_local.py",
    "tests/jobs/test_job.py",
    "tests/jobs/test_reconcile.py",
    "tests/faults/test_crashes.py",
)


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
        "    if manifest is not None:\n        return manifest\n",
        "    store.delete(MANIFEST_KEY)\n",
    ),
    Mutation(
        "a local file is written in place, not linked",
        "storage/local.py",
        "        path.hardlink_to(aside)",
        "        os.replace(aside, path), aside.touch()",
    ),
)


def is_red(mutation: Mutation | None) -> tuple[bool, str]:
    """Whether the tests fail on a copy with this fault, and the first that does."""
    with tempfile.TemporaryDirectory(prefix="blocksight-mutation-") as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "*.egg-info", ".*_cache"))
        if mutation is not None:
            file = copy / mutation.file
            text = file.read_text()
            if text.count(mutation.sound) != 1:
                raise ValueError(f"{mutation.file} does not hold this once: {mutation.sound!r}")
            file.write_text(text.replace(mutation.sound, mutation.broken))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *TESTS]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        if done.returncode not in (0, 1) or (done.returncode == 1 and not failed):
            raise RuntimeError(f"the tests did not run: {done.stdout[-1000:]}{done.stderr[-1000:]}")
        return done.returncode == 1, failed[0].split(" - ")[0].split(" ", 1)[1] if failed else ""


def main() -> int:
    """Prints a line per fault; the sound tree comes first, and must be green."""
    red, first = is_red(None)
    print(f"{'RED' if red else 'green':6} the sound tree {first}", flush=True)
    unseen = int(red)
    for mutation in MUTATIONS:
        red, first = is_red(mutation)
        unseen += not red
        print(f"{'red' if red else 'GREEN':6} {mutation.meaning}: {first or 'no test saw it'}", flush=True)
    print(f"{len(MUTATIONS)} faults, {unseen} not as they should be")
    return 1 if unseen else 0


if __name__ == "__main__":
    sys.exit(main())
