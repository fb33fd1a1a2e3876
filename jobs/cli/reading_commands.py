"""The commands that show an output: show, report, sql, regions and export."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from blocksight.jobs.cli.app import (
    INCOMPLETE,
    AsJson,
    ClusterOfTasks,
    Cores,
    Endpoint,
    Existing,
    OutputModel,
    OutputWeights,
    ShownTruth,
    console,
    existing,
)
from blocksight.jobs.cli.figures import print_json, progress_console
from blocksight.jobs.cli.tables import MEBIBYTE
from blocksight.jobs.plan.config import ConfigError, Execution
from blocksight.jobs.plan.text import counted, printable

commands = typer.Typer()


@commands.command()
def show(
    output: Existing,
    key: Annotated[str, typer.Argument(help="The record's key, as in the column `key`.")],
    picture: Annotated[Path | None, typer.Option(help="PNG file to write.  [default: named after the key]")] = None,
    blocks: Annotated[bool, typer.Option("--blocks", help="Of sise: draw the block maps and how they fuse.")] = False,
    explainers: Annotated[
        str | None, typer.Option(help="Draw maps by these explainers too, made now: names joined by commas.")
    ] = None,
    beside: Annotated[
        list[str] | None, typer.Option(help="Draw the map of another output of the same data too; repeatable.")
    ] = None,
    model: OutputModel = None,
    weights: OutputWeights = None,
    truth: ShownTruth = None,
    as_json: AsJson = False,
    endpoint_url: Endpoint = None,
) -> None:
    """Show one record: its facts, and a picture of image, overlay and map for every target.

    Side products of the explainer (a scan path, crops, accumulated maps and the like) are drawn on a second picture,
    named *.products.png.

    With --blocks, --explainers or --beside the picture is a sheet of captioned overlays instead.
    """
    from blocksight.jobs.cli.show import SheetRequest, render_record
    from blocksight.jobs.evaluate.known_truth import known_truth
    from blocksight.jobs.worker.rows import Output, rows_of

    store, made = existing(output, endpoint_url)
    others = tuple(Output(name, *existing(name, endpoint_url)) for name in beside or ())
    known = known_truth(store, truth, endpoint_url)
    request = SheetRequest(blocks, explainers, others, weights, model, known.truth)
    notes = progress_console(as_json)
    with notes.status("drawing"):
        facts, written = render_record(Output(output, store, made), key, endpoint_url, picture, request, notes)
    if known.note is not None:
        notes.print(printable(known.note))
    if as_json:
        print_json({"rows": rows_of(store, made, key), "pictures": written})
        return
    console.print(facts)
    for path in written:
        console.print(f"picture: {printable(path)}")


@commands.command()
def report(output: Existing, truth: ShownTruth = None, endpoint_url: Endpoint = None) -> None:
    """Write one page that says what was run, what the maps show and how far to trust them: OUTPUT/report/index.html.

    It is one file that needs no server and no network, and is rewritten by every call; run `audit` first for findings.
    """
    from blocksight.jobs.evaluate.compare import Output
    from blocksight.jobs.report.page import write_report

    written = write_report(Output(output, *existing(output, endpoint_url)), endpoint_url, console, truth)
    console.print(f"report: {printable(written.uri)} ({written.num_bytes / MEBIBYTE:,.1f} MiB)")


@commands.command("sql")
def ask_output(
    output: Existing,
    query: Annotated[str | None, typer.Argument(help="SQL over the views; without it they are printed.")] = None,
    csv: Annotated[Path | None, typer.Option(help="CSV file for all rows, instead of a table of the first.")] = None,
    as_json: AsJson = False,
    endpoint_url: Endpoint = None,
) -> None:
    """Query an output in place: views maps, rejects, values, metrics, and audit_... if there is an audit.

    Without a query: the statements that make the views, for your own DuckDB (`blocksight sql maps/ | duckdb`).

    Example: blocksight sql maps/ "SELECT explainer, avg(drop) FROM metrics GROUP BY explainer"
    """
    from blocksight.jobs.export import sql

    if query is None:
        if csv is not None:
            raise ConfigError(f"--csv {csv} needs a query whose rows it is to hold")
        sys.stdout.write(sql.script(output, endpoint_url))
        return
    found = sql.ask(sql.connect(output, endpoint_url), query)
    if as_json:
        print_json(sql.as_rows(found))
    elif csv is None:
        console.print(sql.as_table(found, console.width))
    else:
        count = sql.write_csv(found, csv)
        console.print(f"csv: {printable(csv)} ({counted(count, 'row')})")


@commands.command("regions")
def outline_output(
    output: Existing,
    threshold: Annotated[
        str,
        typer.Option(
            help="What is inside: otsu (the map itself says), share:0.2 (the most salient fifth of the pixels) or "
            "energy:0.5 (the fewest pixels that hold half of the map)."
        ),
    ] = "otsu",
    parts: Annotated[
        Literal["largest", "all"], typer.Option(help="The largest connected part of each map, or all of them.")
    ] = "largest",
    smooth: Annotated[
        float,
        typer.Option(
            help="Standard deviation of a Gaussian over the map first, in its pixels: fewer specks.  [default: 0]",
            show_default=False,
        ),
    ] = 0.0,
    workers: Cores = None,
    address: ClusterOfTasks = None,
    as_json: AsJson = False,
    endpoint_url: Endpoint = None,
) -> None:
    """Turn maps into boxes and masks: Parquet beside the maps, joined by key and target, and COCO JSON.

    Boxes and masks are in pixels of the upright original, whether the picture was squashed or cropped. What is there
    is kept: the same command goes on after a job has gone on. Other settings are another folder, OUTPUT/regions/....

    Example: blocksight regions maps/ --threshold energy:0.5 --parts all --smooth 3
    """
    from blocksight.engine.regions import RegionRule
    from blocksight.jobs.cli.record_tables import regions_table
    from blocksight.jobs.export.regions import find_regions
    from blocksight.jobs.worker.rows import existing_output

    try:
        rule = RegionRule.parse(threshold, parts, smooth)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    execution = Execution(workers=workers, address=address)
    shown = existing_output(output, endpoint_url)
    found = find_regions(shown, rule, progress_console(as_json), execution, endpoint_url)
    place = output.rstrip("/")
    if as_json:
        print_json({**asdict(found), "rule": str(rule), "folder": f"{place}/{found.folder}"})
    else:
        console.print(regions_table(found, place))
    if found.counts.open_units:
        progress_console(as_json).print(
            f"{counted(found.counts.open_units, 'unit')} of the job still open: explain goes on from there, and then "
            "the same command"
        )
        raise typer.Exit(INCOMPLETE)


@commands.command("export")
def export_output(
    output: Existing,
    form: Annotated[
        Literal["pictures", "numpy", "zarr", "fiftyone", "virelay", "spotlight", "quantus"],
        typer.Argument(metavar="FORMAT", help="pictures, numpy, zarr, fiftyone, virelay, spotlight or quantus."),
    ],
    destination: Annotated[str, typer.Argument(help="Local folder, empty or not there yet.")],
    key: Annotated[list[str] | None, typer.Option(help="Only this record; repeatable.")] = None,
    where: Annotated[
        str | None,
        typer.Option(help="Only maps for which this holds: SQL over the columns of `sql`'s views maps and metrics."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many explained records.")] = None,
    gif: Annotated[
        Literal["blocks", "outputs"] | None,
        typer.Option(help="Pictures: a GIF per map, over sise's blocks or over the outputs of --beside."),
    ] = None,
    beside: Annotated[
        list[str] | None, typer.Option(help="Pictures: another output of the same data for --gif outputs; repeatable.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Quantus, --gif blocks: the model again, if it is code of yours.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Quantus, --gif blocks: the weights file again, if there was one.")
    ] = None,
    truth: ShownTruth = None,
    workers: Cores = None,
    address: ClusterOfTasks = None,
    endpoint_url: Endpoint = None,
) -> None:
    """Write an output as pictures, as arrays, or in the format of another tool, with labels, scores and metrics.

    pictures: an overlay per map, PNG or GIF. numpy, zarr: the maps as arrays, with an index. The others: what FiftyOne,
    ViRelAy, Spotlight and Quantus read. Units are exported on all cores, or on a cluster whose nodes share the folder
    (virelay, quantus and --gif blocks by one process); the same command goes on after it broke off.

    Example: blocksight export maps/ pictures overlays/ --where "target_name = 'tabby' AND score < 0.5" --limit 100
    """
    from blocksight.jobs.export.run import ExportRequest, run_export

    asked = ExportRequest(
        output,
        form,
        destination,
        limit,
        weights,
        endpoint_url,
        model,
        truth,
        keys=tuple(key or ()),
        where=where,
        gif=gif,
        beside=tuple(beside or ()),
    )
    for line in run_export(asked, console, Execution(workers=workers, address=address)):
        console.print(printable(line))
