"""The command line: each command reads its options, calls its part, and says what came of it."""

import inspect
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import track

from cluster.errors import ClusterError
from cluster.switches import refuse_unsafe_switches
from engine.errors import ModelError
from jobs import tables
from jobs.budgets import Budget, excess
from jobs.config import MAX_SEED, ConfigError, Execution, JobConfig, execution_of, load_config, parse_parameters
from jobs.plan import Plan
from jobs.progress import counted
from jobs.reconcile import Standing, check, final_manifest, num_accepted, stand
from jobs.reconcile import finalize as write_manifest
from jobs.records import Cause, UnfinishedError, UnreconciledError
from jobs.retry import reopen
from jobs.setting import planned_forward
from storage.patient import SHORT_PATIENCE_SECONDS, PatientStore
from storage.store import ObjectStore, StoreError
from storage.stores import WeakStoreError, open_store

COMPLETE, USAGE, OVER_BUDGET, INCOMPLETE, UNRECONCILED, WEAK_STORE = 0, 2, 3, 4, 5, 6

app = typer.Typer(
    name="blocksight",
    help="Explains whole data sets: a saliency map for every image of a folder or a bucket, kept as Parquet.\n\n"
    "Begin with `blocksight demo`.\n\n"
    "Exit codes: 0 complete; 2 usage, configuration, data or model; 3 complete, with more rejected records or "
    "dead units than the budget allows; 4 units are still open; "
    "5 the output is not what was planned; 6 the store cannot create an object once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
LOG_WIDTH = 140
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else LOG_WIDTH)
"""As wide as the terminal; a log or a pipe gets whole lines."""

JOB_OPTIONS: dict[str, Any] = {
    "data": Annotated[str | None, typer.Option(help="Folder, file or s3:// prefix of images, tar shards or Parquet.")],
    "output": Annotated[str | None, typer.Option(help="Folder or s3:// prefix for the result.")],
    "config": Annotated[Path | None, typer.Option(help="TOML file with these options as keys; options win.")],
    "endpoint_url": Annotated[str | None, typer.Option(help="S3 endpoint, for stores other than AWS.")],
    "model": Annotated[str | None, typer.Option(help="See `list models`.  [default: efficientnet_lite0]")],
    "weights": Annotated[str | None, typer.Option(help="State dict: file or s3:// URI; a weight name; or `random`.")],
    "blocks": Annotated[str | None, typer.Option(help="Blocks by hand, comma-separated, shallow to deep.")],
    "explainer": Annotated[
        str | None,
        typer.Option(help="See `list explainers`; some wrap another, as in ucag(gradcam).  [default: sise]"),
    ],
    "param": Annotated[
        list[str] | None,
        typer.Option("-p", "--param", help="Of the explainer, such as mu=0.3; of what it wraps: base.mu=0.3."),
    ],
    "preset": Annotated[
        str | None,
        typer.Option(
            help="fast: fewer steps for the dearest explainers, and half precision on a GPU where its scores are near "
            "enough; paper: the papers' constants in float32. What -p says wins.  [default: fast]"
        ),
    ],
    "precision": Annotated[
        str | None,
        typer.Option(
            help="Of masked forwards: float32, float16, bfloat16.  [default: float32 on a CPU; on a GPU by preset]"
        ),
    ],
    "budget": Annotated[
        str | None,
        typer.Option(
            help="Of sise: masks to score per image (a number, a share such as 0.1, or auto); the other "
            "scores are predicted.  [default: all are scored]"
        ),
    ],
    "fidelity": Annotated[
        str | None,
        typer.Option(
            help="Of sise: preview (no mask is scored), balanced (a tenth), full, or auto: full for records that "
            "are wrong, uncertain, rare among the class folders, or poorly mapped by a tenth.  [default: full]"
        ),
    ],
    "target": Annotated[
        str | None, typer.Option(help="predicted, label, top-3, 281 or 281,282.  [default: predicted]")
    ],
    "resize": Annotated[str | None, typer.Option(help="squash (whole image) or crop (its centre).  [default: squash]")],
    "limit": Annotated[int | None, typer.Option(help="Only the first so many records.")],
    "seed": Annotated[int | None, typer.Option(help="Of everything random.  [default: 0]")],
    "workers": Annotated[int | None, typer.Option(min=1, help="Explain actors.  [default: one per GPU, or CPU core]")],
    "runner": Annotated[
        str | None, typer.Option(help="ray, or local: this process alone, same bytes.  [default: ray]")
    ],
    "address": Annotated[str | None, typer.Option(help="Ray cluster to join.  [default: one is started]")],
    "batch_size": Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Masked inputs per forward.  [default: 8 with OpenVINO, else 4; on a GPU the fastest, or 256]",
        ),
    ],
    "tune": Annotated[
        bool | None,
        typer.Option(
            "--tune",
            help="Time a CPU's forwards first and take the fastest batch size: two outputs may then differ in bits.",
        ),
    ],
    "max_reject_fraction": Annotated[
        float | None, typer.Option(help="More rejected records are no success: exit 3.  [default: 0.5]")
    ],
    "max_dead_units": Annotated[
        int | None, typer.Option(help="More units that were given up are none either.  [default: 0]")
    ],
}
"""What `plan` and `explain` share: what is computed, and how it runs."""

Existing = Annotated[str, typer.Argument(help="The output: folder or s3:// prefix.")]
Endpoint = Annotated[str | None, typer.Option(help="S3 endpoint, for stores other than AWS.")]
Model = Annotated[
    str | None, typer.Option(help="The model again, if it is code of yours: an output alone never has code imported.")
]
Weights = Annotated[str | None, typer.Option(help="The weights file again, if the model came from one.")]


def takes_job(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of a job, and hands it the checked configuration and execution."""

    def run(**given: Any) -> None:
        command(*job_of(given))

    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in JOB_OPTIONS.items()
    ]
    signature = inspect.Signature(shared)
    run.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    run.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    run.__doc__ = command.__doc__
    run.__name__ = command.__name__
    return run


def job_of(given: dict[str, Any]) -> tuple[JobConfig, Execution]:
    """What the shared options and their TOML file say."""
    options = {name: given[name] for name in JOB_OPTIONS if name not in ("config", "param", "budget")}
    asked = [*(given["param"] or []), *([f"budget={given['budget']}"] if given["budget"] is not None else [])]
    return load_config(given["config"], {**options, "parameters": parse_parameters(asked)})


@app.command()
@takes_job
def plan(job: JobConfig, execution: Execution) -> None:
    """List the input, cut it into units, estimate the cost. Reads no image and writes nothing.

    Example: blocksight plan --data s3://bucket/images --output s3://bucket/maps
    """
    from jobs.run import plan_job, workforce_of

    _, made = plan_job(job, execution)
    console.print(tables.plan_table(job, made, workforce_of(execution)))


@app.command()
@takes_job
def explain(job: JobConfig, execution: Execution) -> None:
    """Explain every record that is not explained yet. The same command again resumes, or has nothing to do.

    Example: blocksight explain --data photos/ --output maps/ --target top-3 -p mu=0.3

    Example: blocksight explain --data photos/ --output maps/ --explainer "ucag(sise)" -p crops=4 -p base.mu=0.3
    """
    from jobs.run import run_job

    outcome = run_job(job, execution, console)
    console.print(tables.outcome_table(job, outcome))
    for failure in outcome.ran.failures:
        console.print(tables.failure_line(failure))
    for letter in outcome.standing.dead.values():
        console.print(tables.letter_line(letter))
    if outcome.ran.stopped is not None:
        console.print(f"Stopped: {tables.printable(outcome.ran.stopped)}.")
    if outcome.ran.is_hopeless and outcome.standing.open_units:
        raise typer.Exit(OVER_BUDGET)
    _settled(outcome.standing, outcome.excess, is_final=outcome.manifest is not None)


def _settled(standing: Standing, excess: Sequence[str], *, is_final: bool) -> None:
    """Ends the command where the job is not the success that was asked for, and says the way out."""
    if standing.open_units:
        still_open = counted(len(standing.open_units), "unit")
        console.print(f"{still_open} still open: the same `explain` goes on from there.")
        raise typer.Exit(INCOMPLETE)
    for sentence in excess:
        console.print(f"Over budget: {sentence}.")
    if standing.dead and excess and not is_final:
        console.print("`blocksight retry OUTPUT` opens dead units again, --max-dead-units does without them.")
    if excess:
        raise typer.Exit(OVER_BUDGET)


@app.command()
def status(output: Existing, endpoint_url: Endpoint = None) -> None:
    """Say how far a job is, from the output alone; works while it runs and when its driver is gone."""
    store, made = _existing(output, endpoint_url)
    standing = stand(store, made)
    console.print(tables.standing_table(output, standing, planned_forward(store)))
    for letter in standing.dead.values():
        console.print(tables.letter_line(letter))
    if standing.open_units:
        raise typer.Exit(INCOMPLETE)
    _finished(store, standing)


def _finished(store: ObjectStore, standing: Standing) -> None:
    """Ends the command where every unit is settled and the final manifest is not written."""
    if final_manifest(store, standing.plan) is not None:
        return
    if standing.dead:
        dead = counted(len(standing.dead), "dead unit")
        console.print(f"{dead}: `retry` opens them again, `finalize --max-dead-units` does without.")
        raise typer.Exit(OVER_BUDGET)
    console.print("Every unit is settled, and the final manifest is not written: `blocksight finalize` writes it.")
    raise typer.Exit(INCOMPLETE)


@app.command()
def verify(output: Existing, endpoint_url: Endpoint = None) -> None:
    """Prove from the output alone that rows in = explained + rejected, every record once, no byte changed."""
    store, made = _existing(output, endpoint_url)
    faults, checked = [], 0
    fragments = track(
        check(store, made),
        "verifying",
        total=len(made.units) + 1,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    for unit, found in fragments:
        faults += found
        checked += unit is not None
    for fault in faults:
        console.print(tables.printable(fault))
    if faults:
        console.print(f"NOT RECONCILED: {counted(len(faults), 'fault')} in {counted(checked, 'fragment')}.")
        raise typer.Exit(UNRECONCILED)
    standing = stand(store, made)
    console.print(tables.standing_table(output, standing))
    if standing.open_units:
        sound, still_open = counted(checked, "sound fragment"), counted(len(standing.open_units), "open unit")
        console.print(f"{sound}, {still_open}.")
        raise typer.Exit(INCOMPLETE)
    _finished(store, standing)
    without = f" but those of {counted(len(standing.dead), 'dead unit')}" if standing.dead else ""
    console.print(f"Reconciled: {counted(checked, 'fragment')}, every planned record{without} stands once.")


@app.command()
def retry(
    output: Existing,
    cause: Annotated[str | None, typer.Option(help=f"Only those of one cause: {', '.join(Cause)}.")] = None,
    endpoint_url: Endpoint = None,
) -> None:
    """Open dead units again, so that the next `explain` works on them."""
    store, made = _existing(output, endpoint_url)
    reopened = reopen(store, made, cause)
    for letter in reopened:
        console.print(tables.letter_line(letter))
    console.print(f"{counted(len(reopened), 'unit')} open again." if reopened else "No dead unit to open.")


@app.command()
def finalize(
    output: Existing,
    max_dead_units: Annotated[int, typer.Option(min=0, help="Do without so many dead units.")] = 0,
    endpoint_url: Endpoint = None,
) -> None:
    """Write the final manifest of an output whose units are all committed or dead; computes nothing."""
    store, made = _existing(output, endpoint_url)
    standing = stand(store, made)
    console.print(tables.standing_table(output, standing))
    accepted = num_accepted(final_manifest(store, made))
    budget = Budget(max_reject_fraction=1.0, max_dead_units=max(max_dead_units, accepted))
    _settled(standing, excess(standing, budget), is_final=False)
    write_manifest(store, standing)
    console.print("The final manifest stands.")


@app.command()
def gc(
    output: Existing,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and leave it.")] = False,
    endpoint_url: Endpoint = None,
) -> None:
    """Remove what runs that died left behind: markers, unfinished files, lost plans. No result is touched."""
    from jobs.leftovers import remove_leftovers

    store, made = _existing(output, endpoint_url)
    names = remove_leftovers(store, stand(store, made), dry_run=dry_run)
    for name in names:
        console.print(tables.printable(name))
    console.print(f"{counted(len(names), 'leftover')}{' found' if dry_run else ' removed'}.")


@app.command()
def evaluate(
    output: Existing,
    metrics: Annotated[str, typer.Option(help="Names joined by commas, or all. See `list metrics`.")] = "all",
    metrics_sample: Annotated[float, typer.Option(help="Share of the records that is measured, such as 0.1.")] = 1.0,
    truth: Annotated[
        str | None, typer.Option(help="Where the objects are: VOC XML, COCO JSON or Parquet (file, folder, s3://).")
    ] = None,
    class_map: Annotated[
        Path | None, typer.Option(help='JSON: which classes a label stands for, such as {"dog": [151, 152]}.')
    ] = None,
    controls: Annotated[bool, typer.Option("--controls", help="Measure a random map, a bell and edges too.")] = False,
    baseline: Annotated[
        Literal["zero", "black"], typer.Option(help="What stands where a metric removes a pixel, for every method.")
    ] = "zero",
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the sample and of all that is random.")] = 0,
    model: Model = None,
    weights: Weights = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Actors.  [default: one per GPU, or CPU core]")] = None,
    runner: Annotated[str, typer.Option(help="ray, or local: this process alone.")] = "ray",
    address: Annotated[str | None, typer.Option(help="Ray cluster to join.  [default: one is started]")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Masked inputs per forward.")] = None,
    endpoint_url: Endpoint = None,
) -> None:
    """Measure the maps of an output: values in fragments beside them, nothing is rewritten. Resumes like explain.

    Example: blocksight evaluate maps/ --metrics insertion,deletion,ebpg --truth boxes/ --metrics-sample 0.1
    """
    from jobs.run_evaluation import EvaluationRequest, run_evaluation

    asked = EvaluationRequest(
        output=output,
        metrics=metrics,
        share=metrics_sample,
        controls=controls,
        seed=seed,
        baseline=baseline,
        truth=truth,
        class_map=class_map,
        model=model,
        weights=weights,
        endpoint_url=endpoint_url,
    )
    execution = execution_of({"workers": workers, "runner": runner, "address": address, "batch_size": batch_size})
    outcome = run_evaluation(asked, execution, console)
    for failure in outcome.failures:
        console.print(tables.failure_line(failure))
    if outcome.stopped is not None:
        console.print(f"Stopped: {tables.printable(outcome.stopped)}.")
    place = f"{output.rstrip('/')}/{outcome.folder}"
    console.print(tables.evaluation_table(outcome.done, place))
    if outcome.num_open:
        console.print(f"{counted(outcome.num_open, 'unit')} still open: the same command goes on from there.")
        raise typer.Exit(INCOMPLETE)


@app.command("compare")
def compare_outputs(
    outputs: Annotated[list[str], typer.Argument(help="Outputs of explain; the first one's method is the reference.")],
    store: Annotated[str | None, typer.Option(help="Parquet file for the table: a path or s3:// URI.")] = None,
    endpoint_url: Endpoint = None,
) -> None:
    """Compare methods: means with 95 % intervals by bootstrap over images, and marks where they differ for sure.

    Every number comes from the rows that stand in the outputs; run `evaluate` on each first, for more than
    Drop and Increase. A star marks a paired difference to the first method with p below 0.05 after Holm's
    correction over the whole table.
    """
    from jobs.compare import Output, compare, store_table

    table = compare([Output(name, *_existing(name, endpoint_url)) for name in outputs])
    console.print(tables.comparison_table(table, console.width))
    if store is not None:
        store_table(table, store, endpoint_url)
        console.print(f"table: {tables.printable(store)}")


@app.command("sql")
def ask_output(
    output: Existing,
    query: Annotated[str | None, typer.Argument(help="SQL over the views; without it they are printed.")] = None,
    csv: Annotated[Path | None, typer.Option(help="CSV file for all rows, instead of a table of the first.")] = None,
    endpoint_url: Endpoint = None,
) -> None:
    """Query an output where it stands: views maps, rejects, values, metrics, and audit_... where an audit stands.

    Without a query: the statements that make the views, for a DuckDB of your own (`blocksight sql maps/ | duckdb`).

    Example: blocksight sql maps/ "SELECT explainer, avg(drop) FROM metrics GROUP BY explainer"
    """
    from jobs import sql

    if query is None:
        if csv is not None:
            raise ConfigError(f"--csv {csv} needs a query whose rows it is to hold")
        sys.stdout.write(sql.script(output, endpoint_url))
        return
    found = sql.ask(sql.connect(output, endpoint_url), query)
    if csv is None:
        console.print(sql.as_table(found, console.width))
    else:
        count = sql.write_csv(found, csv)
        console.print(f"csv: {tables.printable(csv)} ({counted(count, 'row')})")


@app.command("export")
def export_output(
    output: Existing,
    form: Annotated[
        Literal["fiftyone", "virelay", "spotlight", "quantus"],
        typer.Argument(metavar="FORMAT", help="fiftyone, virelay, spotlight or quantus."),
    ],
    destination: Annotated[str, typer.Argument(help="Local folder, empty or not there yet.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many explained records.")] = None,
    model: Annotated[str | None, typer.Option(help="Quantus: the model again, if it is code of yours.")] = None,
    weights: Annotated[str | None, typer.Option(help="Quantus: the weights file again, if there was one.")] = None,
    endpoint_url: Endpoint = None,
) -> None:
    """Write an output in the form that another tool reads: images, maps, labels, scores, metrics.

    Example: blocksight export maps/ fiftyone for-fiftyone/
    """
    from jobs.export.run import ExportRequest, run_export

    for line in run_export(ExportRequest(output, form, destination, limit, weights, endpoint_url, model), console):
        console.print(tables.printable(line))


@app.command()
def audit(
    output: Existing,
    truth: Annotated[
        str | None, typer.Option(help="Where the objects are, as in `evaluate`: tells shortcuts from objects.")
    ] = None,
    class_map: Annotated[Path | None, typer.Option(help="JSON, as in `evaluate`.")] = None,
    tries: Annotated[
        bool, typer.Option("--try/--no-try", help="Put suspected shortcuts to the test on the model.")
    ] = True,
    model: Model = None,
    weights: Weights = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of samples and random regions.")] = 0,
    endpoint_url: Endpoint = None,
) -> None:
    """Find what is wrong with a model: how its maps lie, class by class, which are odd, which shortcuts it takes.

    A region that one class's maps point at is blanked in members and pasted into other images, beside random
    regions of its size. Only what stands that test is called a finding; the rest are suspicions.

    Example: blocksight audit s3://bucket/maps --truth boxes/
    """
    from jobs.audit.run import AuditRequest, run_audit

    asked = AuditRequest(output, truth, class_map, weights, tries, seed, endpoint_url, model)
    found = run_audit(asked, console)
    console.print(tables.audit_table(found, f"{output.rstrip('/')}/audit/"))
    console.print(f"to look at it: blocksight report {tables.printable(shlex.quote(output))}")


@app.command()
def report(output: Existing, endpoint_url: Endpoint = None) -> None:
    """Write one page that says what was run, what the maps show and how far to trust them: OUTPUT/report/index.html.

    It is one file that needs no server and no network, and is rewritten by every call; run `audit` first for findings.
    """
    from jobs.compare import Output
    from jobs.report.page import write_report

    standing = Output(output, *_existing(output, endpoint_url))
    written = write_report(standing, endpoint_url, console)
    console.print(f"report: {tables.printable(written.uri)} ({written.num_bytes / tables.MEBIBYTE:,.1f} MiB)")


@app.command()
def versus(
    a: Annotated[str, typer.Argument(help="The output that is the reference, such as the old model's.")],
    b: Annotated[str, typer.Argument(help="The output that is compared with it, of the same data.")],
    output: Annotated[str, typer.Option(help="Folder or s3:// prefix for the difference, rewritten if it is ours.")],
    endpoint_url: Endpoint = None,
) -> None:
    """Compare two outputs record by record: what regressed, how far the maps moved, and whether both go together.

    Two models are compared best with --target label in both: predicted targets differ where it matters most.

    Example: blocksight versus maps-old/ maps-new/ --output old-against-new/
    """
    from jobs.results import Output
    from jobs.versus.run import write_difference

    outputs = [Output(name, *_existing(name, endpoint_url)) for name in (a, b)]
    store = PatientStore(open_store(output, endpoint_url), SHORT_PATIENCE_SECONDS)
    found = write_difference(outputs[0], outputs[1], store, endpoint_url, console)
    console.print(tables.difference_table(found.summary, output))
    if found.picture is not None:
        console.print(f"picture: {tables.printable(output.rstrip('/'))}/{found.picture} ({found.summary['picture']})")


@app.command()
def bench(
    data: Annotated[
        str | None, typer.Option(help="The data set whose cost is reckoned.  [default: photographs, a million images]")
    ] = None,
    fidelity: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Measure the fidelity curve on these images instead; goes on where it was."),
    ] = None,
    peers: Annotated[bool, typer.Option("--peers", help="Race other libraries on the same job, in turns.")] = False,
    model: Annotated[str, typer.Option(help="See `list models`.")] = "efficientnet_lite0",
    weights: Annotated[str | None, typer.Option(help="State dict: file or s3:// URI; a weight name; `random`.")] = None,
    blocks: Annotated[str | None, typer.Option(help="Blocks by hand, comma-separated, shallow to deep.")] = None,
    explainer: Annotated[str, typer.Option(help="See `list explainers`; some wrap another: ucag(gradcam).")] = "sise",
    param: Annotated[
        list[str] | None,
        typer.Option("-p", "--param", help="Of the explainer, such as mu=0.3; of what it wraps: base.mu=0.3."),
    ] = None,
    preset: Annotated[
        Literal["paper", "fast"], typer.Option(help="fast may take fewer steps and half precision; as in `explain`.")
    ] = "fast",
    precision: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"], typer.Option(help="Of masked forwards; as in `explain`.")
    ] = "auto",
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option(help="[default: the GPU, or one core where there is none]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Masked inputs per forward.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="That the data set is reckoned for.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of an hour of one worker: a core, or a GPU.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many records.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the fidelity curve.")] = Path("blocksight-curve"),
    truth: Annotated[str | None, typer.Option(help="Where the objects are, for EBPG; as in `evaluate`.")] = None,
    class_map: Annotated[Path | None, typer.Option(help="JSON, as in `evaluate`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON alone.")] = False,
    endpoint_url: Endpoint = None,
) -> None:
    """Measure on this machine: the bare model's best rate, the explainer's, and the cost of a data set.

    `plan` uses the result. --peers races other libraries; --fidelity measures how near cheaper maps come to full SISE.

    Example: blocksight bench --data s3://bucket/images --price 2.50
    """
    from jobs import bench as benchmark

    asked = {
        "data": fidelity or data or str(output),
        "output": str(output),
        "endpoint_url": endpoint_url,
        "model": model,
        "weights": weights,
        "blocks": blocks,
        "explainer": explainer,
        "parameters": parse_parameters(param or []),
        "preset": preset,
        "precision": precision,
        "limit": limit,
    }
    job, _ = load_config(None, asked)
    said = Console(stderr=True, highlight=False, soft_wrap=True) if as_json else console
    where = benchmark.device_of(device)
    if fidelity is not None:
        idle = {
            "--data": data,
            "--peers": peers,
            "--blocks": blocks,
            "-p": param,
            "--price": price,
            "--workers": workers,
        }
        _refuse_idle("--fidelity", {**idle, "--explainer": explainer if explainer != "sise" else None}, output)
        rows = benchmark.run_curve(job, output, where, batch_size, truth, class_map, said)
        found, shown = {"curve": rows}, tables.curve_table(rows)
    else:
        made = benchmark.run_benchmark(
            job,
            has_data=data is not None,
            device=where,
            batch_size=batch_size,
            workers=workers,
            price=price,
            with_peers=peers,
            console=said,
        )
        found, shown = benchmark.facts(job, made), tables.benchmark_table(job, made)
    if as_json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        console.print(shown)


@app.command()
def bank(
    data: Annotated[str, typer.Option(help="Labelled images: folder, file or s3:// prefix, as for `explain`.")],
    model: Annotated[str, typer.Option(help="Whose features are taken; of a classifier, what enters its last layer.")],
    output: Annotated[str, typer.Option(help="Weights file to write: a path or s3:// URI, such as bank.safetensors.")],
    weights: Annotated[str | None, typer.Option(help="State dict: file or s3:// URI; a weight name; `random`.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many records.")] = None,
    resize: Annotated[Literal["squash", "crop"], typer.Option(help="Whole image, or its centre.")] = "squash",
    endpoint_url: Endpoint = None,
) -> None:
    """Make a classifier without training: features of labelled images, whose nearest vote for a new image's class.

    The file is the weights of the model knn(MODEL), which every other command takes.

    Example: blocksight bank --data labelled/ --model mine.models:backbone --output bank.safetensors
    """
    from jobs.bank import make_bank

    asked = {"data": data, "model": model, "output": output, "weights": weights, "limit": limit, "resize": resize}
    job, _ = load_config(None, {**asked, "endpoint_url": endpoint_url})
    made = make_bank(job, console)
    left_out = f", {counted(made.num_left_out, 'image')} left out" if made.num_left_out else ""
    console.print(
        f"bank: {counted(made.num_images, 'image')} of {len(made.class_names)} classes, "
        f"{made.dimensions} dimensions{left_out}"
    )
    use = f"--model {shlex.quote(made.model)} --weights {shlex.quote(output)}"
    console.print(f"to use it: blocksight explain {tables.printable(use)} --explainer daam")


def _refuse_idle(asked: str, idle: dict[str, Any], output: Path) -> None:
    """Raises ConfigError for options that would be ignored, and for a folder that is none."""
    given = [name for name, value in idle.items() if value]
    if given:
        raise ConfigError(f"{asked} measures all methods alike: leave {', '.join(given)} out")
    if str(output).startswith("s3:"):
        raise ConfigError(f"the figures of a benchmark go to a local folder, got --output {output}")


@app.command("list")
def list_entries(
    what: Annotated[Literal["explainers", "metrics", "models"], typer.Argument(help="What to list.")],
) -> None:
    """List what there is, with what it needs and what it costs."""
    console.print(tables.catalog_table(what))


@app.command()
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
    model: Model = None,
    weights: Weights = None,
    endpoint_url: Endpoint = None,
) -> None:
    """Show one record: its facts, and a picture of image, overlay and map for every target.

    What the explainer found beside the map (a scan path, crops, accumulated maps and the like) is drawn on a second
    picture, named *.products.png.

    With --blocks, --explainers or --beside the picture is a sheet of captioned overlays instead.
    """
    from jobs.results import Output
    from jobs.show import Wanted, render_record

    store, made = _existing(output, endpoint_url)
    others = tuple(Output(name, *_existing(name, endpoint_url)) for name in beside or ())
    wanted = Wanted(blocks, explainers, others, weights, model)
    with console.status("drawing"):
        facts, written = render_record(Output(output, store, made), key, endpoint_url, picture, wanted)
    console.print(facts)
    for path in written:
        console.print(f"picture: {tables.printable(path)}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for photographs, maps and pictures.")] = Path("blocksight-demo"),
    bucket: Annotated[bool, typer.Option("--bucket", help="Through a real S3 server on loopback.")] = False,
) -> None:
    """Explain six photographs with EfficientNet-Lite0: no account, no network, no data of yours."""
    from jobs.demo import run_demo

    run_demo(output, through_bucket=bucket, console=console)


def _existing(output: str, endpoint_url: str | None) -> tuple[ObjectStore, Plan]:
    """The output's store and the plan that stands in it."""
    from jobs.results import existing_output

    standing = existing_output(output, endpoint_url)
    return standing.store, standing.plan


def main() -> None:
    """Runs the command line; whatever the user can mend is one sentence on standard error, never a traceback."""
    stderr = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        refuse_unsafe_switches()
        app()
    except WeakStoreError as error:
        stderr.print(f"error: {tables.printable(error)}")
        sys.exit(WEAK_STORE)
    except UnfinishedError as error:
        stderr.print(f"unfinished: {tables.printable(error)}")
        sys.exit(INCOMPLETE)
    except UnreconciledError as error:
        stderr.print("NOT RECONCILED: " + "\n".join(tables.printable(line) for line in str(error).splitlines()))
        sys.exit(UNRECONCILED)
    except (ConfigError, StoreError, ModelError, ClusterError) as error:
        stderr.print("error: " + "\n".join(tables.printable(line) for line in str(error).splitlines()))
        sys.exit(USAGE)
