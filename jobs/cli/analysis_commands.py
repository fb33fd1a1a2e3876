"""The commands that measure and compare outputs: evaluate, compare, versus and audit."""

import shlex
from typing import Annotated, Literal

import typer

from blocksight.jobs.cli.app import (
    FINDING,
    INCOMPLETE,
    AsJson,
    BatchSize,
    ClassMap,
    ClusterOfTasks,
    Cores,
    Endpoint,
    Existing,
    MinWorkers,
    OutputModel,
    OutputWeights,
    PyModules,
    ShownTruth,
    Wait,
    console,
    existing,
)
from blocksight.jobs.cli.audit_tables import audit_table
from blocksight.jobs.cli.figures import evaluation_figures, print_json, progress_console
from blocksight.jobs.cli.job_tables import failure_line
from blocksight.jobs.cli.metric_tables import comparison_table, difference_table, evaluation_table
from blocksight.jobs.evaluate.verdict import verdicts
from blocksight.jobs.plan.config import MAX_SEED, ConfigError, Execution, execution_of
from blocksight.jobs.plan.text import counted, printable
from blocksight.storage.stores.opening import open_store
from blocksight.storage.stores.retrying import SHORT_PATIENCE_SECONDS, PatientStore

commands = typer.Typer()


@commands.command()
def evaluate(
    output: Existing,
    metrics: Annotated[str, typer.Option(help="Names joined by commas, or all. See `list metrics`.")] = "all",
    metrics_sample: Annotated[float, typer.Option(help="Share of the records that is measured, such as 0.1.")] = 1.0,
    truth: Annotated[
        str | None, typer.Option(help="Where the objects are: VOC XML, COCO JSON or Parquet (file, folder, s3://).")
    ] = None,
    class_map: ClassMap = None,
    controls: Annotated[bool, typer.Option("--controls", help="Measure a random map, a bell and edges too.")] = False,
    baseline: Annotated[
        Literal["zero", "black", "drop"],
        typer.Option(
            help="Value of a pixel that a metric removes, for every method; drop: a vision transformer is not given "
            "the patches."
        ),
    ] = "zero",
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the sample and of all that is random.")] = 0,
    model: OutputModel = None,
    weights: OutputWeights = None,
    workers: Cores = None,
    runner: Annotated[str, typer.Option(help="ray, or local: this process alone.")] = "ray",
    address: ClusterOfTasks = None,
    device: Annotated[str, typer.Option(help="gpu (an error without one), cpu, or auto.")] = "auto",
    wait: Wait = None,
    min_workers: MinWorkers = None,
    py_modules: PyModules = None,
    batch_size: BatchSize = None,
    as_json: AsJson = False,
    endpoint_url: Endpoint = None,
) -> None:
    """Measure the maps of an output. Values are stored beside them; nothing is rewritten. Resumes like explain.

    Example: blocksight evaluate maps/ --metrics insertion,deletion,ebpg --truth boxes/ --metrics-sample 0.1
    """
    from blocksight.jobs.run.evaluation import EvaluationRequest, run_evaluation

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
    execution = execution_of(
        {
            "workers": workers,
            "runner": runner,
            "address": address,
            "device": device,
            "wait": wait,
            "min_workers": min_workers,
            "py_modules": py_modules or None,
            "batch_size": batch_size,
        }
    )
    console = progress_console(as_json)
    outcome = run_evaluation(asked, execution, console)
    for failure in outcome.failures:
        console.print(failure_line(failure))
    if outcome.stopped is not None:
        console.print(f"Stopped: {printable(outcome.stopped)}.")
    place = f"{output.rstrip('/')}/{outcome.folder}"
    if as_json:
        print_json(evaluation_figures(outcome.done, place, outcome.num_open))
    else:
        console.print(evaluation_table(outcome.done, place))
    if outcome.num_open:
        console.print(f"{counted(outcome.num_open, 'unit')} still open: the same command goes on from there.")
        raise typer.Exit(INCOMPLETE)


@commands.command("compare")
def compare_outputs(
    outputs: Annotated[list[str], typer.Argument(help="Outputs of explain; the first one's method is the reference.")],
    store: Annotated[str | None, typer.Option(help="Parquet file for the table: a path or s3:// URI.")] = None,
    as_json: AsJson = False,
    endpoint_url: Endpoint = None,
) -> None:
    """Compare methods: means with 95 % intervals by bootstrap over images, and marks of significant differences.

    Every number comes from stored rows of the outputs. For more than Drop and Increase, run `evaluate` on each first.
    A star marks a paired difference to the first method with p below 0.05 after Holm's correction over the whole table.
    """
    from blocksight.jobs.evaluate.compare import Output, compare, rows_of_table, store_table

    table = compare([Output(name, *existing(name, endpoint_url)) for name in outputs])
    if as_json:
        facts = {"notes": table.notes, "verdicts": verdicts(table), "outputs": table.outputs}
        print_json({"cells": rows_of_table(table), **facts})
    else:
        console.print(comparison_table(table, console.width))
    if store is not None:
        store_table(table, store, endpoint_url)
        progress_console(as_json).print(f"table: {printable(store)}")


@commands.command()
def versus(
    a: Annotated[str, typer.Argument(help="The output that is the reference, such as the old model's.")],
    b: Annotated[str, typer.Argument(help="The output that is compared with it, of the same data.")],
    output: Annotated[str, typer.Option(help="Folder or s3:// prefix for the difference, rewritten if it is ours.")],
    as_json: AsJson = False,
    truth: ShownTruth = None,
    workers: Cores = None,
    address: ClusterOfTasks = None,
    endpoint_url: Endpoint = None,
) -> None:
    """Compare two outputs record by record: what regressed, how far the maps moved, and whether both are related.

    Two models are compared best with --target label in both: predicted targets differ where it matters most. Units are
    measured on all cores, or on a cluster; the same command goes on after it broke off.

    Example: blocksight versus maps-old/ maps-new/ --output old-against-new/
    """
    from blocksight.jobs.evaluate.known_truth import KnownTruth, known_truth
    from blocksight.jobs.versus.run import write_difference
    from blocksight.jobs.worker.rows import Output

    outputs = [Output(name, *existing(name, endpoint_url)) for name in (a, b)]
    store = PatientStore(open_store(output, endpoint_url), SHORT_PATIENCE_SECONDS)
    console = progress_console(as_json)
    known = known_truth(outputs[0].store, truth, endpoint_url)
    if known == KnownTruth():
        known = known_truth(outputs[1].store, None, endpoint_url)
    execution = Execution(workers=workers, address=address)
    found = write_difference(outputs[0], outputs[1], store, endpoint_url, console, known.truth, execution)
    if known.note is not None:
        console.print(printable(known.note))
    if as_json:
        print_json(found)
    else:
        console.print(difference_table(found.summary, output))
    if found.picture is not None:
        console.print(f"picture: {printable(output.rstrip('/'))}/{found.picture} ({found.summary['picture']})")


@commands.command()
def audit(
    output: Existing,
    truth: Annotated[
        str | None, typer.Option(help="Where the objects are, as in `evaluate`: tells shortcuts from objects.")
    ] = None,
    class_map: ClassMap = None,
    tries: Annotated[bool, typer.Option("--try/--no-try", help="Test suspected shortcuts on the model.")] = True,
    model: OutputModel = None,
    weights: OutputWeights = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of samples and random regions.")] = 0,
    fail_on: Annotated[
        Literal["finding"] | None,
        typer.Option(help="For CI: `finding` ends with exit code 7 if there is one.  [default: never]"),
    ] = None,
    workers: Cores = None,
    address: ClusterOfTasks = None,
    as_json: AsJson = False,
    endpoint_url: Endpoint = None,
) -> None:
    """Find what is wrong with a model: where its maps lie by class, which maps are odd, which shortcuts it takes.

    A region that one class's maps point at is blanked in members and pasted into other images, and random regions of
    its size too. A region that passes this test and is not the object is a finding. One that was not tested, or may be
    the object, is a suspicion. One whose test shows no effect is listed as tested, not confirmed. Maps are measured on
    all cores, or on a cluster; the same command goes on after it broke off.

    Example: blocksight audit s3://bucket/maps --truth boxes/
    """
    from blocksight.jobs.audit.run import AuditRequest, run_audit

    if fail_on is not None and not tries:
        raise ConfigError("--fail-on finding needs the test on the model, and --no-try leaves it out: give one of them")
    asked = AuditRequest(output, truth, class_map, weights, tries, seed, endpoint_url, model)
    console = progress_console(as_json)
    found = run_audit(asked, console, Execution(workers=workers, address=address))
    if as_json:
        print_json(found)
    else:
        console.print(audit_table(found, f"{output.rstrip('/')}/audit/"))
    console.print(f"to look at it: blocksight report {printable(shlex.quote(output))}")
    if fail_on is not None and found.findings:
        raise typer.Exit(FINDING)
