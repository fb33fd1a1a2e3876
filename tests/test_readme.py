"""Every README is correct: its commands and snippets run, its tables, links and figures agree with the code."""

import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, get_args, get_type_hints

import pytest
from typer.main import get_command

from blocksight.engine.catalog.entries import EXPLAINERS, FIDELITIES, METRICS, MODELS
from blocksight.engine.catalog.parameters import SiseParameters
from blocksight.engine.catalog.side_products import SideProducts
from blocksight.jobs.cli import app, main, reading_commands
from blocksight.jobs.plan.config import load_config
from blocksight.jobs.plan.records import Cause
from blocksight.storage.outputs.schema import PRODUCT_COLUMNS
from blocksight.storage.rejects import RejectCode
from tests.engine.zoo_table import ENTRIES
from tests.faults.million import BASE_RECORDS, MIB
from tests.jobs.jobs_of import blocksight
from tests.jobs.tiny import MODEL, folder_of_images, picture
from tests.plain import without_openvino
from tests.readmes import (
    INLINE,
    LINK,
    READMES,
    ROOT,
    TABLE,
    Block,
    blocks_of,
    commands_of,
    names_in,
    tables,
    without_blocks,
)

APP: Any = get_command(main.app)
COMMANDS: dict[str, Any] = APP.commands


def _parameters(command: Any) -> list[Any]:
    """The options and arguments of a command, or of the commands of a group."""
    return [*command.params, *(own for below in getattr(command, "commands", {}).values() for own in below.params)]


OPTIONS_OF_ALL = {option for parameter in APP.params for option in parameter.opts}
OPTIONS = {
    name: {one for own in _parameters(command) for one in (*own.opts, *own.secondary_opts)}
    for name, command in COMMANDS.items()
}


@pytest.fixture(scope="module", autouse=True)
def _plain_forwards() -> Iterator[None]:
    with without_openvino():
        yield


# ---------------------------------------------------------------- what a reader does, from top to bottom

PARSED_ALONE = ("bench", "demo")
"""Commands that are not run here: they take minutes and have their own tests."""
IN_A_PROCESS = re.compile(r"^(import|from) .*\bray\b|^from .*\bcluster\.bucket", re.MULTILINE)
"""Snippets that leave a session or a server running."""
ELSEWHERE = ("aws", "docker", "helm", "kubectl", "ray", "sbatch", "sky", "squeue")
"""Programs of clusters and clouds: what they are given is checked, and they are not run."""
WRITTEN = re.compile(r"# ([\w./-]+\.(?:toml|py|json))$")
"""First lines of blocks that a reader stores as a file, with the file's name."""


def follow(block: Block) -> None:
    """Does what the block asks its reader to do, in the current folder."""
    if (named := WRITTEN.match(block.code.splitlines()[0])) is not None:
        Path(named[1]).parent.mkdir(parents=True, exist_ok=True)
        Path(named[1]).write_text(block.code)
    match block.language:
        case "python" | "diff" if block.readme == "tests/README.md" and re.match("(new|change): ", block.mark or ""):
            pass  # `test_worked_example.py` applies it
        case "bash" if (block.mark or "").startswith("command: "):
            pass  # `.ci/run` runs it, see test_ci_runs_the_marked_commands
        case "bash":
            for line in commands_of(block):
                follow_command(line, block.place)
        case "python":
            follow_python(block)
        case "toml" if named is not None:
            load_config(Path(named[1]), {})
        case "text":
            pass  # what is printed, or a tree of files
        case _:
            pytest.fail(f"{block.place}: no test runs a block of {block.language or 'no language'}")


def follow_command(line: str, place: str) -> None:
    """Runs a command, or checks that it could run."""
    words = shlex.split(line, comments=True)
    match words:
        case ["blocksight", *arguments]:
            follow_blocksight(arguments, place)
        case ["python" | ".venv/bin/python", "-m", "pytest", *arguments]:
            check_pytest(arguments, place)
        case ["python" | ".venv/bin/python", "-m", module, *arguments]:
            check_module(module, arguments, place)
        case [".ci/run"]:
            assert os.access(ROOT / ".ci/run", os.X_OK), place
        case [program, *arguments] if program in ELSEWHERE:
            check_files_of(arguments, place)
        case ["ruff" | "lint-imports" | "pyright" as tool, *_]:
            assert (Path(sys.executable).parent / tool).exists(), f"{place}: {tool} is not installed"
        case _:
            pytest.fail(f"{place}: no test runs `{line}`")


def check_files_of(arguments: list[str], place: str) -> None:
    """Each file of this project that a program of a cluster is given exists, and kustomize builds what is applied."""
    for word in arguments:
        if (file := word.removeprefix("file://")).startswith("cluster/"):
            assert (ROOT / file).exists(), f"{place}: no {file}"
            if (ROOT / file / "kustomization.yaml").exists() and shutil.which("kubectl") is not None:
                built = subprocess.run(["kubectl", "kustomize", ROOT / file], capture_output=True, check=False)
                assert built.returncode == 0, built.stderr


def follow_blocksight(arguments: list[str], place: str) -> None:
    """Runs the real command line on the folder's small images, model and output."""
    if ">" in arguments:
        *arguments, _, file = arguments
        Path(file).write_text(blocksight(*arguments).stdout)
        return
    name, *given = arguments
    with COMMANDS[name].make_context(name, list(given)):
        pass
    if name in PARSED_ALONE or "--address" in given:  # the failure tests have a cluster
        return
    if "--model" in OPTIONS[name] and "--model" not in given and name != "export":
        given += ["--model", MODEL]
    if "--runner" in OPTIONS[name] and "--runner" not in given:
        given = [*_without("--workers", given), "--runner", "local"]
    done = blocksight(name, *given)
    assert done.returncode == 0, f"{place}: {shlex.join(arguments)}\n{done.stdout}{done.stderr}"


def _without(option: str, words: list[str]) -> list[str]:
    """The words without an option and its value."""
    if option not in words:
        return words
    at = words.index(option)
    return [*words[:at], *words[at + 2 :]]


def check_pytest(arguments: list[str], place: str) -> None:
    """Each path exists, and each marker is declared."""
    settings = (ROOT / "pyproject.toml").read_text()
    for before, word in zip(["", *arguments], arguments, strict=False):
        if before == "-m":
            for marker in set(re.findall(r"\w+", word)) - {"not", "and", "or"}:
                assert f'"{marker}: ' in settings, f"{place}: no marker {marker}"
        elif not word.startswith("-") and not before.startswith("-"):
            assert (ROOT / word.partition("::")[0]).exists(), f"{place}: no {word}"


def check_module(module: str, arguments: list[str], place: str) -> None:
    """The module exists, and its help knows each option."""
    assert find_spec(module) is not None, f"{place}: no module {module}"
    options = [word for word in arguments if word.startswith("--")]
    if options:
        help_text = help_of(module)
        assert all(option in help_text for option in options), f"{place}: {options}\n{help_text}"


def help_of(module: str) -> str:
    out, before = io.StringIO(), sys.argv
    sys.argv = [module, "--help"]
    try:
        with redirect_stdout(out), pytest.raises(SystemExit):
            runpy.run_module(module, run_name="__main__", alter_sys=False)
    finally:
        sys.argv = before
    return out.getvalue()


def follow_python(block: Block) -> None:
    """Runs a snippet; one with `print(` must print something."""
    if IN_A_PROCESS.search(block.code):
        environment = {**os.environ, "RAY_ADDRESS": "local"}  # use no cluster that is already running
        environment.pop("RAY_ENABLE_AUTO_CONNECT", None)  # `cluster.session` sets it where another test imports it
        command = [sys.executable, "-c", block.code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block.place}\n{done.stderr}"
        printed = done.stdout
    else:
        names: dict[str, Any] = {"__name__": "snippet"}
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(block.code, block.place, "exec"), names)
        printed = printed.getvalue()
        CHECKS.get(block.mark or "", lambda _: None)(names)
    assert printed.strip() or "print(" not in block.code, block.place
    assert EXPECTED.get(block.mark or "", "") in printed


def check_rows(names: dict[str, Any]) -> None:
    assert len(names["rows"]) == NUM_PHOTOS
    assert names["saliency"].shape == (32, 32)
    assert (names["saliency"].min(), names["saliency"].max()) == (0, 1)


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {"python: pyarrow": check_rows}
EXPECTED = {"python: duckdb": "mean_drop", "python: pandas": "truncated"}
"""Files that some snippets leave, or text that they print."""

NUM_PHOTOS = 6


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder in which a reader works: images, labelled images, boxes, and a finished output `maps`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as in a reader's Python
    (tmp_path / "cluster").symlink_to(ROOT / "cluster")
    photos = folder_of_images(tmp_path / "photos", NUM_PHOTOS - 1)
    (photos / "cats").mkdir()
    (photos / "cats" / "tabby.jpg").write_bytes(picture(100, "JPEG"))
    folder_of_images(tmp_path / "labelled", 5, bad=False)
    (tmp_path / "boxes.json").write_text(json.dumps(boxes_of(photos)))
    follow_blocksight(["explain", "--data", "photos/", "--output", "maps/"], "the desk")
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("mine"):
            del sys.modules[name]


def boxes_of(photos: Path) -> dict[str, Any]:
    """COCO annotations: in each picture one object, of the class that its folder is named after."""
    files = sorted(path for path in photos.rglob("*.*") if "bad" not in path.name)
    names = sorted({path.parent.name for path in files})
    return {
        "images": [{"id": at, "file_name": path.name, "width": 40, "height": 30} for at, path in enumerate(files)],
        "categories": [{"id": at, "name": name} for at, name in enumerate(names)],
        "annotations": [
            {"id": at, "image_id": at, "category_id": names.index(path.parent.name), "bbox": [5, 5, 20, 15]}
            for at, path in enumerate(files)
        ],
    }


def _readme(name: str) -> Any:
    in_a_process = any(block.language == "python" and IN_A_PROCESS.search(block.code) for block in blocks_of(name))
    return pytest.param(name, marks=[pytest.mark.servers] if in_a_process else [])


@pytest.mark.parametrize("readme", [_readme(name) for name in READMES if blocks_of(name)])
def test_a_reader_can_do_all_that_a_readme_says(readme, desk):
    for block in blocks_of(readme):
        follow(block)


@pytest.mark.parametrize("readme", READMES)
def test_no_block_is_overlooked(readme):
    assert READMES[readme].count("```") == 2 * len(blocks_of(readme))
    indented = re.findall(r"^ {4,}(?:\$ *)?([\w./-]+)", without_blocks(readme), re.MULTILINE)
    assert not {"blocksight", "python", "python3", "pip", "pytest", "ruff", ".ci/run"} & set(indented)


@pytest.mark.parametrize("line", ["make all", "blocksight explian --data photos/", "python -m pytest -m slow tests"])
def test_a_command_that_cannot_run_is_seen(line):
    with pytest.raises((pytest.fail.Exception, AssertionError, KeyError)):
        follow_command(line, "here")


@pytest.mark.parametrize("language", ["", "sh", "yaml"])
def test_a_block_that_is_not_run_is_seen(language):
    with pytest.raises(pytest.fail.Exception, match="no test runs"):
        follow(Block("README.md", 1, None, language, "something\n"))


def test_ci_runs_the_marked_commands():
    marks = {block.mark for name in READMES for block in blocks_of(name) if (block.mark or "").startswith("command: ")}
    assert marks == {"command: demo", "command: test"}
    assert marks <= {block.mark for block in blocks_of("README.md")}
    asked = re.findall(r"\$\(command_of (\w+)\)", (ROOT / ".ci/run").read_text())
    assert {f"command: {name}" for name in asked} == marks


# ---------------------------------------------------------------- code within a line


def links() -> Iterator[Any]:
    for name in READMES:
        for found in LINK.finditer(without_blocks(name)):
            if "://" not in found["target"]:
                yield pytest.param(name, found["target"], id=f"{name}->{found['target']}")


@pytest.mark.parametrize(("readme", "target"), list(links()))
def test_a_link_leads_somewhere(readme, target):
    path, _, heading = target.partition("#")
    file = (ROOT / readme).parent / path if path else ROOT / readme
    assert file.exists()
    if heading:
        titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
        assert heading in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("readme", READMES)
def test_commands_and_options_within_a_line_exist(readme):
    known = set().union(*OPTIONS.values()) | {"--help", "--option"}
    for code in INLINE.findall(without_blocks(readme)):
        words = code.split()
        if words[0] == "blocksight" and len(words) == 2 and words[1].startswith("-"):
            assert words[1] in OPTIONS_OF_ALL, code
        elif words[0] == "blocksight" and len(words) > 1 and words[1].islower():
            assert words[1] in COMMANDS, code
            assert {word for word in words if re.fullmatch("--[a-z-]+", word)} <= OPTIONS[words[1]] | {"--help"}, code
        elif words[0].startswith("--") and not readme.startswith("tests"):
            assert words[0] in known, f"{readme}: {code}"


@pytest.mark.parametrize("readme", READMES)
def test_files_and_tests_within_a_line_exist(readme):
    here = (ROOT / readme).parent
    for code in INLINE.findall(without_blocks(readme)):
        if re.fullmatch(r"(\.\./)?([a-z]\w*/)+[a-z_][\w.-]*\.(py|md|toml|json|txt|ipynb)", code) and "NAME" not in code:
            assert (here / code).exists() or (ROOT / code).exists(), f"{readme}: {code}"
        elif re.fullmatch(r"[a-z_]\w*\.py", code):
            assert list(here.rglob(code)), f"{readme}: {code}"
        elif re.fullmatch(r"test_\w+", code):
            assert list((ROOT / "tests").rglob(f"{code}.py")), f"{readme}: {code}"


@pytest.mark.parametrize("readme", READMES)
def test_modules_within_a_line_exist(readme):
    for code in INLINE.findall(without_blocks(readme)):
        if re.fullmatch(r"(blocksight|cluster|engine|jobs|storage|tests)(\.\w+)+", code) and not (ROOT / code).exists():
            assert resolve_name(code) is not None, readme


def test_the_first_page_is_short_and_its_picture_small():
    assert READMES["README.md"].count("\n") <= 150
    assert (FIGURES / "demo.jpg").stat().st_size <= 200_000


# ---------------------------------------------------------------- tables


def _plain(name: str) -> str:
    """`smoothgrad(BASE)` is listed as smoothgrad, `top-3` as itself."""
    return name.removesuffix("(BASE)")


FORMATS = get_args(get_type_hints(reading_commands.export_output)["form"])
CODES = (
    *(app.COMPLETE, app.USAGE, app.OVER_BUDGET, app.INCOMPLETE, app.UNRECONCILED, app.WEAK_STORE, app.FINDING),
    app.INTERRUPTED,
)
NAMED: dict[str, list[str]] = {
    "command | what it does": list(COMMANDS),
    "rejected record": list(RejectCode),
    "dead unit": list(Cause),
    "`--explainer`": list(EXPLAINERS),
    "`--metrics`": list(METRICS),
    "`--model`": list(MODELS),
    "`--fidelity`": list(FIDELITIES),
    "`FORMAT`": list(FORMATS),
    "parameter of `sise`": [own.name for own in fields(SiseParameters)],
}
"""Headers of tables, and the names that their first column must list, each once."""


@pytest.mark.parametrize(("head", "known"), NAMED.items(), ids=NAMED)
def test_a_table_lists_what_the_code_has(head, known):
    found = tables(head)
    assert found, f"no README has a table that begins with | {head} |"
    for rows in found:
        assert sorted(_plain(name) for row in rows for name in names_in(row[0])) == sorted(known)


def test_exit_codes():
    (rows,) = tables("exit code | meaning")
    assert [int(row[0]) for row in rows] == sorted(CODES)


def test_defaults_of_parameters_and_configuration():
    (rows,) = tables("parameter of `sise`")
    own = {f"`{one.name}`": f"`{one.default}`" for one in fields(SiseParameters)}
    assert {row[0]: row[1] for row in rows} == own


def test_presets():
    (rows,) = tables("parameter | paper | fast")
    assert [[*names_in(row[0]), *row[1:]] for row in rows] == [
        [name, own.name, f"`{own.default}`", f"`{entry.fast[own.name]}`"]
        for name, entry in EXPLAINERS.items()
        for own in fields(entry.parameters)
        if own.name in entry.fast
    ]


@pytest.mark.parametrize("package", ["engine", "jobs", "storage"])
def test_rooms_are_the_layers_that_are_checked(package):
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [one["layers"] for one in contracts if one.get("containers") == [f"blocksight.{package}"]]
    heads = ("| room | holds |", "| folder, from the top | holds |")
    (found,) = [one for one in TABLE.finditer(READMES[f"{package}/README.md"]) if one["head"] in heads]
    listed = [re.findall(r"`(\w+)(?:/|\.py)?`", row.split(" | ")[0]) for row in found["body"].splitlines()]
    assert [sorted(row) for row in listed] == [sorted(one.split(" | ")) for one in layers]


def test_columns_of_methods():
    (products,) = tables("column | method | holds")
    listed = sorted(names_in(row[0])[0] for row in products)
    assert listed == sorted(PRODUCT_COLUMNS) == sorted(own.name for own in fields(SideProducts))


# ---------------------------------------------------------------- measured figures

FIGURES = ROOT / "tests" / "figures"


def curve_lines(rows) -> list[str]:
    """The table of a fidelity curve."""
    head = "| method | forwards | images | blocks | SSIM | top 15 % | ins - del, less SISE's | Drop, less SISE's | |"
    return [head, "| --- " * 9 + "|", *map(_curve_line, rows)]


def _curve_line(row) -> str:
    similar = [row[name][0] for name in ("block_correlation", "ssim", "iou_15")]
    cells = ["-" if mean is None else f"{mean:.3f}" for mean in similar]
    cells += [_difference(row, "insertion_minus_deletion", 3), _difference(row, "drop", 1)]
    verdict = "no loss" if row.get("loses_nothing") else ""
    return f"| {row['method']} | {row['forwards']:.0f} | {row['images']} | {' | '.join(cells)} | {verdict} |"


def _difference(row, measure, digits) -> str:
    paired = row.get(f"{measure}_difference")
    if paired is None:
        return f"({row[measure][0]:.{digits}f})"
    mean, low, high = paired
    return "-" if mean is None or low is None else f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def race_lines(rows) -> list[str]:
    """The table of a race."""
    head = "| one image | job | how | forwards | forwards/s | seconds | we are ahead per forward |"
    lines = [
        f"| {row['name']} | {row['job']} | {row['how']} | {row['forwards']} | {row['forwards_per_second']:.1f} "
        f"| {row['forwards'] / row['forwards_per_second']:.1f} | {row['we_are_ahead']:.2f} x |"
        for row in rows
    ]
    return [head, "| --- " * 7 + "|", *lines]


def planted_lines(rows) -> list[str]:
    """The table of planted evidence: each network's methods from the most energy to the least."""
    head = "| network | method | energy in the object | right one of two | deletion | insertion |"
    ordered = sorted(rows, key=lambda row: (row["network"], -row["energy"][0]))
    return [head, "| --- " * 6 + "|", *map(_planted_line, ordered)]


def _planted_line(row) -> str:
    figures = " | ".join(map(_over_seeds, (row[name] for name in ("energy", "right", "deletion", "insertion"))))
    return f"| {row['network'].upper()} | `{row['method']}` | {figures} |"


def _over_seeds(figure) -> str:
    """The mean, and the least and greatest of several seeds."""
    mean, low, high = figure
    return f"{mean:.3f}" if low == high else f"{mean:.3f} ({low:.2f} to {high:.2f})"


LIBRARIES = {"timm": "timm", "torchvision": "torchvision", "hf": "transformers", "parallel": "under `DataParallel`"}


def zoo_lines(table) -> list[str]:
    """The counts of the zoo's verdicts."""
    verdicts = ("right", "refused", "unjudged", "left out", "not run")
    found = dict.fromkeys(ENTRIES, "not run") | {name: row["verdict"] for name, row in table["models"].items()}
    counts = Counter((name.split(":")[0], verdict) for name, verdict in found.items())
    rows = [[shown, *(str(counts[own, one]) for one in verdicts)] for own, shown in LIBRARIES.items()]
    return [f"| {' | '.join(row)} |" for row in (["library", *verdicts], ["---"] * 6, *rows)]


def million_lines(table) -> list[str]:
    """The most memory of the processes of each command, by the number of records, and what a further record takes."""
    reading = [(name, "driver") for name in ("verify", "report", "audit")]
    columns = [("explain", "driver"), ("explain", "actor"), *reading, ("audit", "worker")]
    heads = ["records", "driver", "actor", "`verify`", "`report`", "`audit`", "its processes"]
    sizes = {size["records"]: {step["command"]: step["own_mib"] for step in size["steps"]} for size in table["sizes"]}
    rows = [[f"{size:,}", *(_mib(own, *column) for column in columns)] for size, own in sizes.items()]
    growth = [_growth(sizes, *column) for column in columns]
    rows.append([f"bytes a further record, {BASE_RECORDS:,} to {max(sizes):,}", *growth])
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * 7, *rows)]


def _mib(own, command, role) -> str:
    return f"{own[command][role]:.0f} MiB" if role in own.get(command, {}) else "-"


def _growth(sizes, command, role) -> str:
    small, large = sizes[BASE_RECORDS], sizes[max(sizes)]
    if role not in large.get(command, {}) or role not in small.get(command, {}):
        return "-"
    return f"{(large[command][role] - small[command][role]) * MIB / (max(sizes) - BASE_RECORDS):.0f}"


@pytest.mark.parametrize(
    ("name", "file", "lines"),
    [
        ("million", "million", million_lines),
        ("zoo", "zoo", zoo_lines),
        ("efficientnet_lite0", "curve-efficientnet_lite0", curve_lines),
        ("tiny_darknet", "curve-tiny_darknet", curve_lines),
        ("race", "race", race_lines),
        ("planted", "planted", planted_lines),
    ],
)
def test_figures_are_the_stored_ones(name, file, lines):
    stored = json.loads((FIGURES / f"{file}.json").read_text())
    wanted = f"<!-- figures: {name} -->\n" + "\n".join(lines(stored)) + "\n"
    marked = [text for text in READMES.values() if f"<!-- figures: {name} -->" in text]
    assert marked
    assert all(wanted in text for text in marked)
