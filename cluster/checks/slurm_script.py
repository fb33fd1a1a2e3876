"""Rules for what a script of sbatch runs: its parts, its tasks, how it hears the signal, and when it comes again."""

import re
from collections.abc import Iterator, Mapping

from blocksight.cluster.checks.findings import Finding, Place
from blocksight.cluster.checks.shell import script_lines

Options = Mapping[str, tuple[str, int]]
"""The header's options: value and line."""

RAY = "ray symmetric-run"
"""Of several nodes; a script without it runs on each node alone."""
EXPLAIN = re.compile(r"\bblocksight\s+explain\b")
OF_THE_ARRAY = re.compile(r"\$\{?SLURM_ARRAY_TASK_ID\}?/\$\{?SLURM_ARRAY_TASK_COUNT\}?")
NUMBERED = re.compile(r"\$\{?SLURM_ARRAY_TASK_ID\}?/(?P<parts>\d+)")
WORTH_A_RETRY = ("1", "4")
"""Exit codes after which the same command may end better; from 128 on it was a signal."""


def run_findings(place: Place, options: Options) -> Iterator[Finding]:
    """What is wrong with the commands of a script, where each of them alone is right."""
    lines = script_lines(place.text)
    started = next((line for line in lines if EXPLAIN.search(line) and not line.lstrip().startswith("#")), "")
    if started:
        line = Place(place.file, place.value, f"line {_number(place.text, EXPLAIN.pattern)}")
        yield from _parts(line, started, options)
        yield from _tasks(line, started, options)
        yield from _waiting(line, started, lines)
    yield from _retries(place, options)


def _parts(line: Place, started: str, options: Options) -> Iterator[Finding]:
    given = re.search(r"--part[= ][\"']?(?P<part>[^\s\"']+)", started)
    part = "" if given is None else given["part"]
    tasks = None if "array" not in options else options["array"][0].partition("%")[0]
    if tasks is None:
        if re.fullmatch(r"\d+/[2-9]\d*|\d+/1\d+", part):
            yield line.finding("part", f"only part {part} is explained", "leave --part out, or add --array")
        return
    way_out = 'write --part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"'
    whole = re.fullmatch(r"0-(?P<last>\d+)", tasks)
    count = int(whole["last"]) + 1 if whole is not None else 1 if tasks == "0" else None
    if count is None:
        why = f"tasks {tasks} are not 0, 1, 2 and so on, and parts are: some would be explained by nobody"
        yield Place(line.file, line.value, f"line {options['array'][1]}").finding("part", why, "write 0-99%20")
    numbered = NUMBERED.fullmatch(part)
    if not part:
        yield line.finding("part", "each task of the array explains everything", way_out)
    elif numbered is not None and count is not None and int(numbered["parts"]) != count:
        why = f"the array has {count} tasks, and the command counts {numbered['parts']} parts"
        yield line.finding("part", why, way_out)
    elif numbered is None and OF_THE_ARRAY.fullmatch(part) is None and "SLURM_ARRAY" in part:
        yield line.finding("part", f"{part} is not the task's number and then their count", way_out)
    elif "$" not in part:
        yield line.finding("part", f"each task of the array explains part {part}", way_out)


def _tasks(line: Place, started: str, options: Options) -> Iterator[Finding]:
    """Without Ray over the nodes, one task runs the command."""
    if RAY in started or "srun" not in started:
        return
    names = ("ntasks", "ntasks-per-node", *(["nodes"] if "array" in options else []))
    for name in names:
        value, number = options.get(name, ("1", 1))
        if value != "1" and not re.search(r"\s(-n|--ntasks)[= ]?1\b", started):
            place = Place(line.file, line.value, f"line {number}")
            yield place.finding("slurm", f"srun starts the same command for each of {value} tasks", f"write --{name}=1")


def _waiting(line: Place, started: str, lines: list[str]) -> Iterator[Finding]:
    """bash runs a trap only when no command is in front; one behind must be waited for."""
    is_behind = re.search(r"&\s*(#.*)?$", started) is not None
    if not is_behind and any(re.match(r"\s*trap\s", one) for one in lines):
        why = "bash hears a signal only after the command in front has ended"
        yield line.finding("grace", why, 'start it with & and write wait "$step"')
    after = lines[lines.index(started) + 1 :]
    waits = [one for one in after if re.match(r"\s*wait\b", one) and _indent(one) <= _indent(started)]
    if is_behind and not waits:
        yield line.finding("slurm", "the script ends while the job has just begun", 'write wait "$step"')


def _retries(place: Place, options: Options) -> Iterator[Finding]:
    """Only what may end better comes again, its log stays, and Slurm hears how it ended."""
    text = place.text
    if "no-requeue" in options:
        line = Place(place.file, place.value, f"line {options['no-requeue'][1]}")
        yield line.finding("retry", "after the loss of a node the job is not started again", "leave it out")
    if options.get("open-mode", ("", 0))[0] == "truncate":
        line = Place(place.file, place.value, f"line {options['open-mode'][1]}")
        yield line.finding("retry", "each start empties the log of the one before", "write --open-mode=append")
    before, found, _ = text.partition("scontrol requeue")
    cases = re.findall(r"^\s*\(?([\d*][\d\s|*]*)\)", before, re.MULTILINE) if found else []
    codes = [code.strip() for code in cases[-1].split("|")] if cases else []
    hopeless = [code for code in codes if code not in WORTH_A_RETRY and not (code.isdecimal() and int(code) >= 128)]
    if hopeless:
        line = Place(place.file, place.value, f"line {_number(text, 'scontrol requeue')}")
        why = f"exit code {' and '.join(hopeless)} would come again for nothing"
        yield line.finding("retry", why, "come again after 1, 4 and 143")
    last = [one.strip() for one in text.splitlines() if one.strip() and not one.lstrip().startswith("#")][-1:]
    if last in (["exit 0"], ["true"]):
        line = Place(place.file, place.value, f"line {_number(text, last[0])}")
        yield line.finding("slurm", "Slurm believes that every job ended well", 'write exit "$code"')


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _number(text: str, pattern: str) -> int:
    """The number of the first line with a pattern that is no comment."""
    return next(
        (
            number
            for number, line in enumerate(text.splitlines(), 1)
            if re.search(pattern, line) and not line.lstrip().startswith("#")
        ),
        1,
    )
