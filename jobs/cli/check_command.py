"""The command `check`: one model on one picture, before any job."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from blocksight.engine.catalog.readouts import READOUTS
from blocksight.jobs.cli.app import AsJson, console, takes_model
from blocksight.jobs.cli.figures import print_json, progress_console
from blocksight.jobs.cli.tables import facts_table, grid_table
from blocksight.jobs.plan.config import load_config
from blocksight.jobs.plan.text import printable

if TYPE_CHECKING:  # it imports torch
    from blocksight.jobs.bench.model_check import ModelCheck

commands = typer.Typer()

DEVICES = {"cpu": "one thread of the CPU", "cuda": "the GPU"}


@commands.command()
@takes_model
def check(
    named: dict[str, Any],
    *,
    data: Annotated[
        str | None,
        typer.Option(
            help="One picture: a file, an s3:// URI, or a folder, whose first is taken.  [default: a photograph of "
            "the demo, or a drawn picture]"
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="PNG file for the map over the picture.")] = Path("blocksight-check.png"),
    as_json: AsJson = False,
) -> None:
    """Check a model on one picture: how it is fed and read, its proved blocks, what explainers would cost.

    A model that no job could take is refused as `explain` refuses it, with exit code 2.

    Example: blocksight check --model torchvision:resnet50 --weights random --data photo.jpg
    """
    from blocksight.jobs.bench.model_check import check_model_on
    from blocksight.jobs.plan.model_input import with_model_file

    job, _ = load_config(None, {**named, "data": data or ".", "output": str(output.parent / "unused")})
    found = check_model_on(with_model_file(job), data, output, progress_console(as_json))
    if as_json:
        print_json(found.figures())
    else:
        _print(found, console)


def _print(found: "ModelCheck", console: Console) -> None:
    """The facts, the blocks and the costs as tables."""
    console.print(facts_table(list(_rows(found))))
    if found.blocks:
        console.print(_blocks(found))
    console.print(_costs(found))


def _rows(found: "ModelCheck") -> list[tuple[str, str]]:
    names = "; ".join(found.class_names)
    more = "; ..." if found.num_classes > len(found.class_names) > 0 else ""
    loud = [("[bold red]warning[/]", f"[bold red]{printable(one)}[/]") for one in found.preflight.findings]
    return [
        ("model", printable(found.model)),
        *(("note", printable(note)) for note in found.notes),
        ("input", f"{found.input_size[0]} x {found.input_size[1]} pixels (height x width)"),
        ("mean, std", f"{_numbers(found.mean)} and {_numbers(found.std)} of RGB in 0..1"),
        ("classes", printable(f"{found.num_classes:,}" + (f" ({names}{more})" if names else ", without names"))),
        ("score", READOUTS[found.preflight.readout]),
        ("model check", printable(found.preflight)),
        *loud,
        ("network", "traced" if found.is_traced else "not traced: places are outputs of its modules"),
        *([("no blocks", printable(found.refusal))] if found.refusal else []),
        *([("no block", printable(f"the deeper {found.beyond}"))] if found.beyond else []),
        ("forward", f"{found.forward_seconds * 1e3:,.1f} ms a picture, on {DEVICES.get(found.device, found.device)}"),
        ("auto", f"--explainer auto takes {found.auto}"),
        ("picture", printable(f"{found.picture}: {found.target}, {found.score:.3f}, by {found.explainer}")),
    ]


def _numbers(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:.4g}" for value in values)


def _blocks(found: "ModelCheck") -> Table:
    return grid_table(
        ("block", "maps", "grid", "layout", "proved by"),
        [(one.name, f"{one.channels:,}", f"{one.height} x {one.width}", one.layout, one.proof) for one in found.blocks],
    )


def _costs(found: "ModelCheck") -> Table:
    """What takes the model comes first."""
    rows = [
        (one.explainer, "not for this model", one.fault)
        if one.forwards is None
        else (one.explainer, f"{'at most ' * one.is_most}{one.forwards:,.0f}", _duration(one.seconds or 0.0))
        for one in sorted(found.costs, key=lambda one: one.forwards is None)
    ]
    return grid_table(("explainer", "forwards a picture", "about, or why not"), rows)


def _duration(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
