"""Changes the code at random places with mutmut, and counts how many changes the tests notice.

`python -m tests.faults.mutants storage --sample 60 --seed 1` draws 60 mutants of one group of modules, runs the
tests that reach each, and lists those that no test noticed. Groups and their tests are in pyproject.toml below
`[tool.mutants]`; without a name, all groups are worked on, and `--one` draws one of them. `survivors.toml` holds
the judgement of each survivor that a person looked at. Results stay in `.mutants/`: the same command resumes after
an interruption or the end of `--minutes`, and `--fresh` begins anew.

Mutants inside a `raise` are not drawn: they change only an error's message. Decorated functions
and module constants are not mutated by mutmut.
"""

import argparse
import ast
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.mutations import ROOT
from tests.faults.planting import FILES
from tests.installed import copy, put_together

WORK = ROOT / ".mutants"
SURVIVORS = Path(__file__).with_name("survivors.toml")
KILLED = {1: "killed", 3: "killed", 24: "timed out", -24: "timed out", 36: "timed out", 152: "timed out"}
"""mutmut's exit codes of a mutant that a test noticed. A mutant that hangs is noticed, by its time limit."""
NOT_TRIED = 255
"""mutmut's exit code if pytest itself failed, for example because it did not find a test."""
UNTRIED = "not tried"
"""The verdict of a mutant with that code: it was neither noticed, nor did it survive."""
OPERATORS = (ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context)
"""Nodes that have no meaning without their operands."""
SLICE = 0.6
"""Share of the drawn mutants that must be noticed or judged equivalent; a small draw may be unlucky."""


@dataclass(frozen=True)
class Mutant:
    """One change that mutmut made."""

    name: str
    """mutmut's name of it."""
    function: str
    """`Class.method` or `function`, without its module: code that moves keeps its judgements."""
    sound: str
    """The original statement; of a statement with a body, the part of its head."""
    broken: str
    """The same, as changed."""
    is_message: bool
    """Whether it lies inside a `raise`."""

    @property
    def key(self) -> tuple[str, str, str]:
        """The key of its judgement in `survivors.toml`."""
        return self.function, self.sound, self.broken


def groups() -> dict[str, dict[str, list[str]]]:
    """The groups by name, with their `only_mutate` and `tests`."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutants"]


def judged() -> dict[tuple[str, str, str], dict[str, str]]:
    """The judged survivors, by key."""
    entries = tomllib.loads(SURVIVORS.read_text())["survivor"]
    return {(entry["function"], entry["sound"], entry["broken"]): entry for entry in entries}


def prepare(group: str, fresh: bool) -> Path:
    """A copy of the tree whose configuration mutates only this group. An existing copy is reused unless `fresh`."""
    tree = WORK / group
    if fresh:
        shutil.rmtree(tree, ignore_errors=True)
    if tree.exists():
        return tree
    wanted = groups()[group]
    put_together(ROOT, tree, copy)
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy2(ROOT / name, tree / name)
    own = {
        "source_paths": ["blocksight"],
        "also_copy": [*FILES],
        "only_mutate": [f"blocksight/{pattern}" for pattern in wanted["only_mutate"]],
        "do_not_mutate": [f"blocksight/{pattern}" for pattern in wanted.get("do_not_mutate", [])],
        "pytest_add_cli_args_test_selection": wanted["tests"],
    }
    config = tree / "pyproject.toml"
    lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in own.items())
    config.write_text(config.read_text().replace("[tool.mutmut]\n", f"[tool.mutmut]\n{lines}"))
    return tree


def generate(tree: Path) -> None:
    """Writes all mutants, and which test reaches which function. Raises RuntimeError if mutmut fails."""
    if (tree / "mutants" / "mutmut-stats.json").exists():
        return
    # no mutant has this name: mutmut writes the mutants and the stats, and tests none
    done = _mutmut(tree, ["none"], None)
    if not (tree / "mutants" / "mutmut-stats.json").exists():
        raise RuntimeError(f"mutmut made no mutants in {tree}:\n{done}")


def mutants_in(tree: Path) -> Iterator[Mutant]:
    """Every mutant of the group that may be drawn, in a fixed order."""
    for meta in sorted((tree / "mutants").rglob("*.py.meta")):
        file = meta.with_suffix("")
        codes = json.loads(meta.read_text())["exit_code_by_key"]
        functions = {
            node.name: node
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        for name in sorted(codes):
            mutant = _mutant(name, functions)
            if not mutant.is_message:
                yield mutant


def _mutant(name: str, functions: Mapping[str, ast.AST]) -> Mutant:
    own = name.rpartition(".")[2]
    mangled = own.rpartition("__mutmut_")[0]
    whole, changed = functions[f"{mangled}__mutmut_orig"], functions[own]
    function = mangled.removeprefix("xǁ").replace("ǁ", ".") if "ǁ" in mangled else mangled.removeprefix("x_")
    path = list(_way_down(whole, changed))
    sound, broken = next((pair for pair in path if not hasattr(pair[0], "body")), path[-1])
    is_message = any(isinstance(one, ast.Raise) for one, _ in path)
    return Mutant(name, function, ast.unparse(sound), ast.unparse(broken), is_message)


def _way_down(sound: ast.AST, broken: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Pairs of nodes that hold all that differs, from two functions down to the smallest pair."""
    yield sound, broken
    ones, others = list(ast.iter_child_nodes(sound)), list(ast.iter_child_nodes(broken))
    if type(sound) is not type(broken) or len(ones) != len(others):
        return
    pairs = [pair for pair in zip(ones, others, strict=True) if ast.dump(pair[0]) != ast.dump(pair[1])]
    if len(pairs) == 1 and not isinstance(pairs[0][0], OPERATORS):
        yield from _way_down(*pairs[0])


def drawn(tree: Path, sample: int, seed: str) -> list[Mutant]:
    """The mutants to test; the same for the same seed and tree, and a larger sample holds the smaller one."""
    found = list(mutants_in(tree))
    random.Random(seed).shuffle(found)
    return found[:sample]


def codes_of(tree: Path) -> dict[str, int | None]:
    """mutmut's exit code of each mutant; None: not tested yet."""
    codes: dict[str, int | None] = {}
    for meta in (tree / "mutants").rglob("*.py.meta"):
        codes |= json.loads(meta.read_text())["exit_code_by_key"]
    return codes


def _mutmut(tree: Path, names: Sequence[str], minutes: float | None) -> str:
    """Runs mutmut on the named mutants and returns its output. Stops it after `minutes`."""
    command = [str(Path(sys.executable).with_name("mutmut")), "run", "--max-children", "1", *names]
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    log = tree / "mutmut.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=tree, env=environment, stdout=out, stderr=subprocess.STDOUT)
        try:
            process.wait(None if minutes is None else 60 * minutes)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            process.wait()
    return log.read_text()[-3000:]


def work_on(group: str, sample: int, seed: str, minutes: float | None, fresh: bool) -> bool:
    """Tests the drawn mutants that have no result yet, and prints the figures. Returns True if they are good."""
    tree = prepare(group, fresh)
    generate(tree)
    mutants = drawn(tree, sample, seed)
    printed = run(tree, [mutant.name for mutant in mutants], minutes)
    after = codes_of(tree)
    tested = [mutant for mutant in mutants if after[mutant.name] is not None]
    if not tested:
        print(f"{group}: no mutant was tested:\n{printed}")
        return False
    return report(group, tested, after, len(mutants))


def run(tree: Path, names: Sequence[str], minutes: float | None) -> str:
    """Tests the named mutants that have no result yet. Returns mutmut's output."""
    before = codes_of(tree)
    open_names = [name for name in names if before[name] is None]
    return _mutmut(tree, open_names, minutes) if open_names else ""


def verdict_of(mutant: Mutant, code: int | None, known: dict[tuple[str, str, str], dict[str, str]]) -> str:
    """`killed`, `timed out`, `equivalent`, `survived` or UNTRIED. `known` holds the judged survivors."""
    if code == NOT_TRIED:
        return UNTRIED
    unnoticed = "equivalent" if "equivalent" in known.get(mutant.key, {}) else "survived"
    return KILLED.get(code or 0, unnoticed)


def share_noticed(verdicts: Mapping[str, int]) -> float:
    """The share of mutants that a test noticed, of those that are not equivalent; 1 if there are none."""
    noticed = verdicts.get("killed", 0) + verdicts.get("timed out", 0)
    missed = verdicts.get("survived", 0)
    return noticed / (noticed + missed) if noticed + missed else 1.0


def report(group: str, tested: Sequence[Mutant], codes: dict[str, int | None], num_drawn: int) -> bool:
    """Prints each survivor and the group's figures. Returns True if enough mutants were noticed."""
    known = judged()
    verdicts = {mutant: verdict_of(mutant, codes[mutant.name], known) for mutant in tested}
    untried = sorted(mutant.name for mutant, verdict in verdicts.items() if verdict == UNTRIED)
    if untried:
        print(f"{group}: BROKEN, the tests of these mutants did not run: {', '.join(untried)}", flush=True)
        return False
    for mutant, verdict in verdicts.items():
        if verdict == "survived":
            print(f"{mutant.name}\n  {mutant.function}: {mutant.sound}\n  {mutant.function}: {mutant.broken}")
    counts = Counter(verdicts.values())
    share = share_noticed(counts)
    figures = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
    print(f"{group}: {share:.1%} of {len(tested)} mutants noticed ({num_drawn} drawn): {figures}", flush=True)
    return share >= SLICE


def main(arguments: Sequence[str]) -> int:
    """Works on the named groups; exit code 1 where a group's mutants were not noticed or not tested."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", help=f"of {', '.join(groups())}; all where none is named")
    parser.add_argument("--sample", type=int, default=400, help="mutants to draw of each group")
    parser.add_argument("--seed", default="1", help="what the draw depends on")
    parser.add_argument("--one", action="store_true", help="draw one of the groups")
    parser.add_argument("--minutes", type=float, help="for each group; the next call goes on")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results, as after a change of the code")
    options = parser.parse_args(arguments)
    chosen = options.groups or list(groups())
    if options.one:
        chosen = [random.Random(options.seed).choice(chosen)]
    good = [work_on(group, options.sample, options.seed, options.minutes, options.fresh) for group in chosen]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
