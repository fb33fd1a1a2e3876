"""The commands `cluster print` and `cluster check`: files that start clusters."""

import sys
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.main import get_group

from blocksight.jobs.cli.app import USAGE, Endpoint, app, console, existing
from blocksight.jobs.cli.tables import facts_table
from blocksight.jobs.ledger.stop_request import GRACE_SECONDS
from blocksight.jobs.observe.catalogue import HISTOGRAM, METRICS
from blocksight.jobs.plan.config import ConfigError, load_config, nearest
from blocksight.jobs.plan.text import counted, printable

if TYPE_CHECKING:  # a check imports what reads YAML
    from blocksight.cluster.checks.commands import Product
    from blocksight.cluster.checks.fits import PlanFigures

USAGE_ERROR: Any = typer.BadParameter.__base__
"""Of a command line. Newer versions of typer bring the class themselves, older ones have it from click."""

DRIVER_BYTES = 1 << 30
"""Of a driver without a plan: Python, Ray's client and pyarrow."""
DRIVER_BYTES_PER_OBJECT = 1_800
"""Of each object of the input, at the peak of planning; measured on 300,000 loose images."""

commands = typer.Typer()
cluster = typer.Typer(name="cluster", help="Files that start clusters: print them, check them.", no_args_is_help=True)
commands.add_typer(cluster)


@cluster.command("print")
def print_file(
    name: Annotated[
        str | None, typer.Argument(help="Of the file, or of an overlay.  [default: all are listed]")
    ] = None,
) -> None:
    """Print a file of this package that starts a cluster: KubeRay, Slurm, AWS, SkyPilot, the image, policies.

    Without a name, list them. An overlay of KubeRay is printed as one YAML with all of its objects.

    Example: blocksight cluster print kuberay/overlays/gpu > job.yaml
    """
    from blocksight.cluster import files

    if name is None:
        console.print(facts_table([*files.FILES.items(), *files.OVERLAYS.items()]))
    else:
        sys.stdout.write(files.text_of(name))


@cluster.command()
def check(
    file: Annotated[
        list[str], typer.Argument(help="Files, or folders with a kustomization.yaml; - is standard input.")
    ],
    plan: Annotated[
        str | None,
        typer.Option(
            metavar="OUTPUT", help="An output of `explain`: also say whether what is planned there fits the machines."
        ),
    ] = None,
    endpoint_url: Endpoint = None,
) -> None:
    """Check files that start a cluster: exit code 2 and a line for each thing that is wrong. Nothing is sent anywhere.

    Kubernetes objects that name each other must be given together.

    Example: blocksight cluster check cluster/kuberay/overlays/gpu
    """
    from blocksight.cluster.checks.check import findings_in, placeholders_in, read_files

    figures = None if plan is None else _figures_of(plan, endpoint_url)
    files = read_files(file)
    found = findings_in(files, product(), figures)
    for finding in found:
        sys.stdout.write(f"{printable(finding)}\n")
    if found:
        raise typer.Exit(USAGE)
    own = ", ".join(placeholders_in(files))
    console.print(f"nothing is wrong with {counted(len(file), 'file')}" + (f"; yours to fill in: {own}" if own else ""))


def product() -> "Product":
    """What the checks must know of this program."""
    from blocksight.cluster.checks.commands import Product

    metrics = {name: metric.labels for name, metric in METRICS.items()}
    histograms = [name for name, metric in METRICS.items() if metric.kind == HISTOGRAM]
    return Product(command_fault, configuration_fault, GRACE_SECONDS, metrics, histograms)


def _figures_of(output: str, endpoint_url: str | None) -> "PlanFigures":
    from blocksight.cluster.checks.fits import PlanFigures

    _, plan = existing(output, endpoint_url)
    rate = plan.rate
    return PlanFigures(
        data=plan.identity["data"],
        output=output,
        num_units=len(plan.units),
        driver_bytes=DRIVER_BYTES + plan.num_objects * DRIVER_BYTES_PER_OBJECT,
        work_seconds=None if rate is None else rate.seconds_per_record * plan.num_records,
    )


def command_fault(words: Sequence[str]) -> str | None:
    """Why the command line refuses these arguments; None if it takes them."""
    known = _known_commands()
    if not words or words[0] not in known:
        return f"there is no command {' '.join(words[:1])!r}; {nearest(' '.join(words[:1]), known)}"
    try:
        with known[words[0]].make_context(words[0], list(words[1:])):
            return None
    except USAGE_ERROR as error:
        return error.format_message()


@cache
def _known_commands() -> Mapping[str, Any]:
    return get_group(app).commands


READ_LATER = ("class_names", "class_map", "labels")
"""Keys that may name a file, which the job reads and the check does not."""


def configuration_fault(text: str) -> str | None:
    """What is wrong with the text of a file for `explain --config`; None if nothing is."""
    try:
        values = {key: value for key, value in tomllib.loads(text).items() if key not in READ_LATER}
        if "@" in str(values.get("target", "")):  # a file of prompts
            del values["target"]
        load_config(None, values)
    except (ConfigError, tomllib.TOMLDecodeError) as error:
        return str(error)
    return None
