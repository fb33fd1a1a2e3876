"""Rules for scripts of sbatch: the header's options, the signal, the token, and the commands."""

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from difflib import get_close_matches

from blocksight.cluster.checks.commands import Product
from blocksight.cluster.checks.findings import Finding, Place, nearest
from blocksight.cluster.checks.literals import secret_findings
from blocksight.cluster.checks.quantities import slurm_bytes, slurm_seconds
from blocksight.cluster.checks.ray_options import START_OPTIONS
from blocksight.cluster.checks.shell import INSTALLS, our_command_findings, script_lines, unset_variables
from blocksight.cluster.checks.slurm_script import RAY, run_findings
from blocksight.cluster.checks.variables import SLURM_VARIABLES, assigned_findings

MARK = "#SBATCH"
SHORT = {
    **{"A": "account", "a": "array", "C": "constraint", "c": "cpus-per-task", "D": "chdir", "d": "dependency"},
    **{"e": "error", "G": "gpus", "J": "job-name", "L": "licenses", "M": "clusters", "N": "nodes", "n": "ntasks"},
    **{"o": "output", "p": "partition", "q": "qos", "t": "time", "w": "nodelist", "x": "exclude"},
}
FLAGS = (
    "exclusive",
    "requeue",
    "no-requeue",
    "overcommit",
    "oversubscribe",
    "spread-job",
    "contiguous",
    "parsable",
    "hold",
)
COUNTS = ("nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "cpus-per-gpu")
TEXTS = (
    *(
        "account",
        "job-name",
        "output",
        "error",
        "input",
        "partition",
        "qos",
        "constraint",
        "chdir",
        "comment",
        "export",
    ),
    *("nodelist", "exclude", "dependency", "licenses", "clusters", "reservation", "mail-type", "mail-user", "begin"),
    *("deadline", "gres", "gpu-bind", "hint", "priority", "nice", "wckey", "container", "exclusive", "switches"),
    *(
        "distribution",
        "cpu-bind",
        "mem-bind",
        "tmp",
        "get-user-env",
        "wait-all-nodes",
        "kill-on-invalid-dep",
        "profile",
    ),
)
MEMORY = ("mem", "mem-per-cpu", "mem-per-gpu")
GPUS = ("gpus", "gpus-per-node", "gpus-per-task")
OTHERS = ("time", "time-min", "signal", "array", "open-mode", *MEMORY, *GPUS)
KNOWN = frozenset({*FLAGS, *COUNTS, *TEXTS, *OTHERS})
SIGNAL = re.compile(r"((?P<flags>[RB]+):)?(?P<name>[A-Z]+\d*|\d+)(@(?P<seconds>\d+))?")
SIGNALS = ("TERM", "INT", "USR1", "USR2", "HUP")
ARRAY = re.compile(r"(?P<ranges>\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*)(%(?P<together>\d+))?")
GPU_COUNT = re.compile(r"([A-Za-z][\w.-]*:)?[1-9]\d*")


def slurm_findings(place: Place, product: Product) -> Iterator[Finding]:
    """What is wrong with a script for sbatch."""
    text = place.text
    yield from secret_findings(place)
    yield from _lines(place)
    options = header(text)
    yield from _names(place, options)
    yield from _values(place, options, product)
    yield from _script(place, options)
    yield from run_findings(place, options)
    yield from our_command_findings(_at(place, _line_of(text, r"^(?!\s*#).*\bblocksight ")), text, product)


def header(text: str) -> dict[str, tuple[str, int]]:
    """The options of a header with the numbers of their lines; sbatch reads up to the first command."""
    found: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            break
        if line.startswith(MARK):
            words = re.sub(r"\s#.*", "", line.removeprefix(MARK)).split()
            found.update({name: (value, number) for name, value in _options(words)})
    return found


def _options(words: list[str]) -> Iterator[tuple[str, str]]:
    skip = False
    for at, word in enumerate(words):
        following = words[at + 1] if at + 1 < len(words) and not words[at + 1].startswith("-") else ""
        if skip:
            skip = False
        elif word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            skip = not equals and name not in FLAGS and bool(following)
            yield name, value if equals else following if skip else ""
        elif word.startswith("-") and len(word) > 1:
            name = SHORT.get(word[1], word)
            skip = len(word) == 2 and bool(following)
            yield name, word[2:] or (following if skip else "")
        else:
            yield word, ""


def _at(place: Place, number: int) -> Place:
    return Place(place.file, place.value, f"line {number}")


def _line_of(text: str, pattern: str) -> int:
    """The number of the first line with a pattern; 1 without one."""
    found = re.search(pattern, text, re.MULTILINE)
    return 1 if found is None else text.count("\n", 0, found.start()) + 1


def _lines(place: Place) -> Iterator[Finding]:
    lines = place.text.splitlines()
    if not lines or not lines[0].startswith("#!"):
        yield _at(place, 1).finding("slurm", "sbatch wants to know the shell", "write #!/bin/bash first")
    is_over = False
    for number, line in enumerate(lines, 1):
        is_over = is_over or bool(line.strip() and not line.startswith("#"))
        if line.startswith(MARK) and is_over:
            why = "sbatch reads no option after the first command"
            yield _at(place, number).finding("slurm", why, "move it to the top")
        elif _is_misspelt(line):
            why = f"sbatch reads lines that begin with {MARK!r}, so this is a comment"
            yield _at(place, number).finding("slurm", why, f"write {MARK} --option=value")
        elif line.startswith(MARK) and "$" in line:
            yield _at(place, number).finding("shell", "sbatch replaces no variable here", "write the value")


def _is_misspelt(line: str) -> bool:
    """True for a comment that was meant as a line of the header."""
    found = re.match(r"#\s*(\w+)\s+-", line)
    word = found[1].upper() if found is not None else ""
    return bool(get_close_matches(word, ["SBATCH"], 1, 0.8)) and not line.startswith(f"{MARK} ")


def _names(place: Place, options: Mapping[str, tuple[str, int]]) -> Iterator[Finding]:
    for name, (_, number) in options.items():
        if name not in KNOWN:
            yield _at(place, number).finding("slurm", f"sbatch has no option {name!r}", nearest(name, KNOWN))


def _values(place: Place, options: Mapping[str, tuple[str, int]], product: Product) -> Iterator[Finding]:
    for name, (value, number) in options.items():
        fault = _fault(name, value)
        if fault is not None:
            yield _at(place, number).finding("quantity", f"--{name}: {value!r} is {fault[0]}", fault[1])
    yield from _signal(place, options, product)
    time = options.get("time")
    if time is None:
        yield _at(place, 1).finding(
            "slurm", "the partition's own limit ends the job, often after an hour", "add --time"
        )
    if "requeue" not in options:
        why = "after the loss of a node the job is not started again"
        yield _at(place, 1).finding("retry", why, f"add {MARK} --requeue")
    if not {*MEMORY} & {*options}:
        yield _at(place, 1).finding("amount", "nothing says how much memory a node gives", "add --mem")


def _fault(name: str, value: str) -> tuple[str, str] | None:
    """What a value is instead, and the way out; None if it is right."""
    if name in COUNTS and re.fullmatch(r"[1-9]\d*(-[1-9]\d*)?", value) is None:
        return "no count", "write a whole number"
    if name in ("time", "time-min") and not slurm_seconds(value):
        return "no time", "write days-hours:minutes:seconds"
    if name in MEMORY and slurm_bytes(value) is None:
        return "no memory", "write a whole number with K, M, G or T"
    if name in GPUS and GPU_COUNT.fullmatch(value) is None:
        return "no number of GPUs", "write a whole number, or KIND:NUMBER"
    if name == "open-mode" and value not in ("append", "truncate"):
        return "no mode", "write append"
    if name == "array":
        found = ARRAY.fullmatch(value)
        if found is None or found["together"] == "0":
            return "no list of numbers", "write 0-99%20"
        if not re.match(r"0\b", value):
            return "a list that does not begin at 0, where parts do", "write 0-99%20"
    return None


def _signal(place: Place, options: Mapping[str, tuple[str, int]], product: Product) -> Iterator[Finding]:
    value, number = options.get("signal", ("", 1))
    found = SIGNAL.fullmatch(value)
    line = _at(place, number)
    if not value:
        yield line.finding("grace", "the job is killed at its limit, in the middle of a unit", "add --signal=B:TERM@90")
        return
    if found is None or found["name"].removeprefix("SIG") not in SIGNALS:
        yield line.finding("enum", f"{value!r} is no signal", "write B:TERM@90")
        return
    if "B" not in (found["flags"] or ""):
        why = "the signal goes to the steps alone, and the script does not hear it"
        yield line.finding("grace", why, "write B:TERM@90")
    seconds = int(found["seconds"] or 60)
    if seconds <= product.commit_seconds:
        why = f"{seconds} s before the end, while a commit may take {product.commit_seconds:g} s"
        yield line.finding("grace", why, "write B:TERM@90")
    limit = slurm_seconds(options["time"][0]) if "time" in options else None
    if limit is not None and limit <= seconds:
        yield line.finding("grace", "the signal comes before the job has begun", "give the job more time")
    name = found["name"].removeprefix("SIG")
    trap = rf"""^\s*trap\s+('[^']*'|"[^"]*"|[^\s'\"]\S*)\s.*\b(SIG)?{name}\b"""
    trapped = re.search(trap, place.text, re.MULTILINE)
    if trapped is None:
        yield line.finding("grace", f"the script has no trap for {name}, and dies of it", f"add trap '...' {name}")
    elif re.search(r"(?<![\w-])kill\s", trapped[1]) is not None and "srun" in place.text:
        why = "srun kills its step at once where it is told to end, in the middle of a unit"
        yield line.finding("grace", why, f'write scancel --signal={name} "$SLURM_JOB_ID.0" in the trap')


def _script(place: Place, options: Mapping[str, tuple[str, int]]) -> Iterator[Finding]:
    text = place.text
    if re.search(r"^\s*set -[a-z]*e[a-z]*u|^\s*set -[a-z]*u[a-z]*e", text, re.MULTILINE) is None:
        yield _at(place, 1).finding("shell", "the script goes on after a failure", "write set -euo pipefail")
    for name in unset_variables(text, iter(())):
        if not name.startswith(("SLURM_", "BASH_")):
            number = _line_of(text, rf"\$\{{?{name}\b")
            yield _at(place, number).finding("reference", f"nothing sets ${name}", "set it, or write ${NAME:?...}")
    yield from _syntax(place)
    for number, line in enumerate(text.splitlines(), 1):
        bare = re.sub(r"(^|\s)#.*", "", line)
        yield from assigned_findings(_at(place, number), bare)
        for name in dict.fromkeys(re.findall(r"\bSLURM_\w+", bare)):
            if name not in SLURM_VARIABLES:
                way_out = nearest(name, SLURM_VARIABLES)
                yield _at(place, number).finding("reference", f"Slurm sets no {name}", way_out)
        if INSTALLS.search(line) and not line.lstrip().startswith("#"):
            why = "each node installs at its start, and may get other bytes"
            yield _at(place, number).finding("runtime-env", why, "install it once, on the shared home")
        if re.search(r"scontrol\s+requeue", line) and "SLURM_RESTART_COUNT" not in text:
            why = "a job that fails each time is started again for ever"
            yield _at(place, number).finding("retry", why, "count by SLURM_RESTART_COUNT")
    nodes = options.get("nodes", ("1", 1))
    if RAY in text:
        yield from _of_several_nodes(place, options)
    elif nodes[0] != "1" and "array" not in options:
        why = "Ray is started on one of several nodes, the others stand idle"
        yield _at(place, nodes[1]).finding("slurm", why, f"write srun ray {RAY} ..., as the script of this package")


def _of_several_nodes(place: Place, options: Mapping[str, tuple[str, int]]) -> Iterator[Finding]:
    """Ray listens on the network there, and stops every Ray of a node at the end."""
    text = place.text
    line = _at(place, _line_of(text, RAY))
    if "exclusive" not in options:
        why = "at its end Ray stops every Ray of the node, also that of another job"
        yield line.finding("slurm", why, f"add {MARK} --exclusive")
    if options.get("ntasks-per-node", ("", 0))[0] != "1":
        yield line.finding("slurm", "Ray starts once for each task of a node", "add --ntasks-per-node=1")
    if re.search(r"^\s*umask 0?77\b", text, re.MULTILINE) is None:
        yield line.finding("token", "others may read the token's file", "write umask 077")
    if "RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT" not in text:
        why = "the nodes have 30 s to arrive, which busy clusters do not keep"
        yield line.finding("slurm", why, "export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600")
    yield from _token_file(place, line)
    started = next(one for one in script_lines(text) if RAY in one)
    if re.search(rf"\bsrun\b.*{RAY}", started) is None:
        yield line.finding("slurm", "it runs on the first node alone", f"write srun {RAY}")
    given, dashes, _ = started.partition(RAY)[2].partition(" -- ")
    names = re.findall(r"\s--([a-z][\w-]*)", given)
    for option in ("address", "min-nodes"):
        if option not in names:
            yield line.finding("ray-start", f"{RAY} has no --{option}", f"add --{option}")
    if "temp-dir" in names and re.search(r"^\s*export\s.*\bRAY_ADDRESS=", text, re.MULTILINE) is None:
        why = "what counts the nodes finds no cluster outside of /tmp/ray, starts another, and waits for nodes in vain"
        yield line.finding("ray-start", why, "export RAY_ADDRESS, with the value of --address")
    for name in names if dashes else []:
        if name not in (*START_OPTIONS, "min-nodes"):
            yield line.finding("ray-start", f"ray start has no option --{name}", nearest(name, START_OPTIONS))
    gpus, has = re.search(r"--num-gpus[= ](\d+)", given), options.get("gpus-per-node", ("", 0))[0].rpartition(":")[2]
    if gpus is not None and has.isdecimal() and int(gpus[1]) > int(has):
        why = f"Ray is told of {gpus[1]} GPUs a node, and the job has {has}"
        yield line.finding("amount", why, 'write --num-gpus "${SLURM_GPUS_ON_NODE:-0}"')
    if dashes and "--address" not in started.partition(" -- ")[2]:
        why = "without an address the command starts a Ray of its own on the first node"
        yield line.finding("ray-start", why, "give it the --address of the others")
    if not dashes:
        yield line.finding("ray-start", f"{RAY} does not know where its command begins", "write -- before it")


def _token_file(place: Place, line: Place) -> Iterator[Finding]:
    """The token must be written where Ray reads it, and both variables must reach Ray."""
    path = re.search(r"""^\s*export\s.*RAY_AUTH_TOKEN_PATH=("[^"]*"|\S+)""", place.text, re.MULTILINE)
    mode = re.search(r"^\s*export\s.*\bRAY_AUTH_MODE=token\b", place.text, re.MULTILINE)
    if path is None or mode is None:
        yield line.finding("token", "Ray does not see the token", "export RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH")
    elif re.search(rf">\s*{re.escape(path[1])}", place.text) is None:
        yield line.finding("reference", f"nothing is written to {path[1]}", "write the token there, before Ray starts")


def _syntax(place: Place) -> Iterator[Finding]:
    """What bash cannot read. It runs nothing of it."""
    bash = shutil.which("bash")
    if bash is None:
        return
    done = subprocess.run([bash, "-n"], input=place.text, capture_output=True, text=True, check=False)
    if done.returncode:
        found = re.search(r"line (\d+): (.*)", done.stderr)
        number, why = (int(found[1]), found[2]) if found is not None else (1, done.stderr)
        yield _at(place, number).finding("shell", f"bash cannot read it: {why}", "mend the line, or one before it")
