"""The commands that need no output: demo, bench, bank and list."""

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console, RenderableType

from blocksight.jobs.cli.app import (
    AsJson,
    BatchSize,
    Blocks,
    ClassMap,
    Endpoint,
    Limit,
    Parameters,
    Weights,
    console,
    takes_features,
)
from blocksight.jobs.cli.bench_tables import benchmark_table, curve_table, host_table
from blocksight.jobs.cli.catalog_tables import catalog_table, entry_table
from blocksight.jobs.cli.figures import catalog_figures, print_json, progress_console
from blocksight.jobs.plan.config import ConfigError, load_config, parse_parameters
from blocksight.jobs.plan.text import counted, printable

commands = typer.Typer()


@commands.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for photographs, maps and pictures.")] = Path("blocksight-demo"),
    bucket: Annotated[bool, typer.Option("--bucket", help="Through a real S3 server on loopback.")] = False,
) -> None:
    """Explain six photographs with EfficientNet-Lite0: no account, no network, no data of yours."""
    from blocksight.jobs.cli.demo import run_demo

    run_demo(output, through_bucket=bucket, console=console)


@commands.command()
def bench(
    data: Annotated[
        str | None, typer.Option(help="The data set whose cost is computed.  [default: photographs, a million images]")
    ] = None,
    fidelity: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Measure the fidelity curve on these images instead; goes on where it was."),
    ] = None,
    peers: Annotated[bool, typer.Option("--peers", help="Race other libraries on the same job, in turns.")] = False,
    host: Annotated[
        bool,
        typer.Option("--host", help="Measure the CPU time beside the model instead, in one process and through Ray."),
    ] = False,
    model: Annotated[str, typer.Option(help="See `list models`.")] = "efficientnet_lite0",
    weights: Weights = None,
    blocks: Blocks = None,
    explainer: Annotated[str, typer.Option(help="See `list explainers`; some wrap another: ucag(gradcam).")] = "sise",
    param: Parameters = None,
    preset: Annotated[
        Literal["paper", "fast"], typer.Option(help="fast may take fewer steps and half precision; as in `explain`.")
    ] = "fast",
    precision: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"], typer.Option(help="Of masked forwards; as in `explain`.")
    ] = "auto",
    device: Annotated[
        Literal["auto", "gpu", "cpu"],
        typer.Option(help="gpu (an error without one), cpu: one core, or auto: the GPU if there is one."),
    ] = "auto",
    batch_size: BatchSize = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Workers that the cost is computed for; with --host Ray's actors, or 2.")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of an hour of one worker: a core, or a GPU.")] = None,
    limit: Limit = None,
    output: Annotated[Path, typer.Option(help="Folder of the fidelity curve.")] = Path("blocksight-curve"),
    truth: Annotated[str | None, typer.Option(help="Where the objects are, for EBPG; as in `evaluate`.")] = None,
    class_map: ClassMap = None,
    as_json: AsJson = False,
    endpoint_url: Endpoint = None,
) -> None:
    """Measure on this machine: the bare model's best rate, the explainer's, and the cost of a data set.

    `plan` uses the result. --peers races other libraries; --fidelity measures how near cheaper maps come to full SISE.
    --host tells what reading, decoding, coding and storing cost a record: Grad-CAM of a tiny model on small pictures,
    or on your --data; --limit says on how many.

    Example: blocksight bench --data s3://bucket/images --price 2.50
    """
    from blocksight.jobs.bench import benchmark
    from blocksight.jobs.run.workers import device_here

    places = {"data": fidelity or data or str(output), "output": str(output), "endpoint_url": endpoint_url}
    network = {"model": model, "weights": weights, "blocks": blocks, "precision": precision}
    method = {"explainer": explainer, "parameters": parse_parameters(param or []), "preset": preset}
    progress = progress_console(as_json)
    if host:
        ignored: dict[str, Any] = {
            "--model": model != "efficientnet_lite0" and model,
            "--explainer": explainer != "sise" and explainer,
            **{"--weights": weights, "--blocks": blocks, "-p": param, "--preset": preset != "fast"},
            **{"--precision": precision != "auto", "--device": device == "gpu", "--batch-size": batch_size},
            **{"--fidelity": fidelity, "--peers": peers, "--price": price, "--truth": truth, "--class-map": class_map},
        }
        _refuse_ignored("--host measures what is not the model's", ignored)
        _bench_host(data, endpoint_url, limit, workers, progress, as_json=as_json)
        return
    job, _ = load_config(None, {**places, **network, **method, "limit": limit})
    where = device_here(device)
    if fidelity is not None:
        other = explainer if explainer != "sise" else None
        ignored = {"--data": data, "--peers": peers, "--blocks": blocks, "-p": param, "--price": price}
        _refuse_ignored(
            "--fidelity measures all methods alike", {**ignored, "--workers": workers, "--explainer": other}
        )
        if str(output).startswith("s3:"):
            raise ConfigError(f"the figures of a benchmark go to a local folder, got --output {output}")
        rows = benchmark.run_curve(job, output, where, batch_size, truth, class_map, progress)
        _print_figures({"curve": rows}, curve_table(rows), as_json=as_json)
        return
    made = benchmark.run_benchmark(
        job,
        has_data=data is not None,
        device=where,
        batch_size=batch_size,
        workers=workers,
        price=price,
        with_peers=peers,
        console=progress,
    )
    _print_figures(benchmark.facts(job, made), benchmark_table(job, made), as_json=as_json)


def _refuse_ignored(why: str, options: dict[str, Any]) -> None:
    """Raises ConfigError for options that would be ignored."""
    given = [name for name, value in options.items() if value]
    if given:
        raise ConfigError(f"{why}: leave {', '.join(given)} out")


def _bench_host(
    data: str | None,
    endpoint_url: str | None,
    limit: int | None,
    actors: int | None,
    progress: Console,
    *,
    as_json: bool,
) -> None:
    from blocksight.jobs.bench.host import measure_host

    found = measure_host(data, endpoint_url, limit, actors, progress)
    _print_figures(found.figures(), host_table(found), as_json=as_json)


def _print_figures(figures: dict[str, Any], table: RenderableType, *, as_json: bool) -> None:
    if as_json:
        print_json(figures)
    else:
        console.print(table)


@commands.command()
@takes_features
def bank(
    named: dict[str, Any],
    *,
    data: Annotated[str, typer.Option(help="Labelled images: folder, file or s3:// prefix, as for `explain`.")],
    model: Annotated[str, typer.Option(help="Model of the features; of a classifier, the input of its last layer.")],
    output: Annotated[str, typer.Option(help="Weights file to write: a path or s3:// URI, such as bank.safetensors.")],
    limit: Limit = None,
) -> None:
    """Make a classifier without training from features of labelled images; the nearest vote for a new image's class.

    The file is the weights of the model knn(MODEL), which every other command takes.

    Example: blocksight bank --data labelled/ --model mine.models:backbone --output bank.safetensors
    """
    from blocksight.jobs.bench.bank import make_bank

    job, _ = load_config(None, {**named, "data": data, "model": model, "output": output, "limit": limit})
    made = make_bank(job, console)
    left_out = f", {counted(made.num_left_out, 'image')} left out" if made.num_left_out else ""
    console.print(
        f"bank: {counted(made.num_images, 'image')} of {counted(len(made.class_names), 'class')}, "
        f"{made.dimensions} dimensions{left_out}"
    )
    again = {name: value for name, value in named.items() if value is not None and name != "weights"}
    fed = "".join(f" --{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in again.items())
    use = f"--model {shlex.quote(made.model)} --weights {shlex.quote(output)}{fed}"
    console.print(f"to use it: blocksight explain {printable(use)} --explainer daam")


@commands.command("list")
def list_entries(
    what: Annotated[Literal["explainers", "metrics", "models"], typer.Argument(help="What to list.")],
    name: Annotated[str | None, typer.Argument(help="One of them alone, with its parameters.")] = None,
    as_json: AsJson = False,
) -> None:
    """List explainers, metrics or models, with what they need and cost.

    Example: blocksight list explainers sise
    """
    table = catalog_table(what) if name is None else entry_table(what, name)
    if as_json:
        print_json(catalog_figures(what, name))
    else:
        console.print(table)
