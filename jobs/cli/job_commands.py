"""The commands of a job: plan, explain, status, verify, retry, finalize and gc."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from blocksight.jobs.cli.app import (
    INCOMPLETE,
    OVER_BUDGET,
    UNRECONCILED,
    AsJson,
    Endpoint,
    Existing,
    console,
    existing,
    takes_job,
)
from blocksight.jobs.cli.figures import job_figures, plan_figures, print_json, progress_console
from blocksight.jobs.cli.job_tables import failure_line, job_state_table, letter_lines, outcome_table, plan_table
from blocksight.jobs.cli.watch import show, states
from blocksight.jobs.ledger.reconcile import JobState, check, final_manifest, num_accepted, read_job_state
from blocksight.jobs.ledger.reconcile import finalize as write_manifest
from blocksight.jobs.ledger.retry import reopen
from blocksight.jobs.plan.config import ConfigError, Execution, JobConfig
from blocksight.jobs.plan.forward_setting import planned_forward
from blocksight.jobs.plan.label_files import with_label_file
from blocksight.jobs.plan.model_input import with_model_file
from blocksight.jobs.plan.plan import Plan, planned_labels
from blocksight.jobs.plan.preflight import stored_preflight
from blocksight.jobs.plan.records import Cause
from blocksight.jobs.plan.text import counted, printable
from blocksight.jobs.run.budgets import Budget, exceeded_budgets
from blocksight.jobs.worker.progress import tracked
from blocksight.storage.stores.store import ObjectStore

commands = typer.Typer()
WATCH_SECONDS = 5.0
"""Between two looks of `status --watch`; each costs what one `status` costs."""


@commands.command()
@takes_job
def plan(
    job: JobConfig,
    execution: Execution,
    *,
    probe: Annotated[
        bool, typer.Option("--probe", help="Explain a few images for about ten seconds, to say the time and the size.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the input, cut it into units, estimate the cost. Reads no image without --probe, and writes nothing.

    Example: blocksight plan --data s3://bucket/images --output s3://bucket/maps --probe
    """
    from blocksight.jobs.run.explainer_choice import with_explainer
    from blocksight.jobs.run.job import begun_or_new, plan_for
    from blocksight.jobs.run.labels import preview_labels
    from blocksight.jobs.run.workers import workforce_of

    workforce = workforce_of(execution)
    asked, job = job, with_model_file(job)
    job, label_file = with_label_file(job)
    job, choice = with_explainer(job)
    if choice is not None and not as_json:
        console.print(f"explainer: {printable(choice)}")
    output, found = begun_or_new(job)
    made = plan_for(found, workforce)
    labels = preview_labels(job, made, label_file)
    if probe:
        from blocksight.jobs.bench.quick import probe_cost

        probe_cost(job, made, workforce.device, progress_console(as_json))
        made = plan_for(found, workforce)
    if as_json:
        print_json({**plan_figures(job, made, workforce), "labels": labels})
    else:
        console.print(plan_table(job, made, workforce, labels, asked, stored_preflight(output)))


@commands.command()
@takes_job
def explain(job: JobConfig, execution: Execution, *, as_json: AsJson = False) -> None:
    """Explain every record that is not explained yet. The same command again resumes, or has nothing to do.

    Example: blocksight explain --data photos/ --output maps/ --target top-3 -p mu=0.3

    Example: blocksight explain --data photos/ --output maps/ --explainer "ucag(sise)" -p crops=4 -p base.mu=0.3
    """
    from blocksight.jobs.run.job import run_job

    console = progress_console(as_json)
    outcome = run_job(job, execution, console)
    if as_json:
        print_json({**job_figures(job.output, outcome.job_state), "run": outcome.ran})
    else:
        console.print(outcome_table(job, outcome))
    for failure in outcome.ran.failures:
        console.print(failure_line(failure))
    for line in letter_lines(outcome.job_state.dead.values()):
        console.print(line)
    if outcome.ran.stopped is not None:
        console.print(f"Stopped: {printable(outcome.ran.stopped)}.")
    if outcome.ran.is_hopeless and outcome.job_state.open_units:
        raise typer.Exit(OVER_BUDGET)
    if outcome.num_open_elsewhere:
        others = counted(outcome.num_open_elsewhere, "unit")
        console.print(f"Part {execution.part} is complete; {others} of other parts still open.")
    _exit_unless_complete(outcome.job_state, outcome.exceeded_budgets, console, is_final=outcome.manifest is not None)


def _exit_unless_complete(
    job_state: JobState, exceeded_budgets: Sequence[str], console: Console, *, is_final: bool
) -> None:
    """Ends the command with an exit code if the job is not complete or over budget, and says what to do."""
    if job_state.open_units:
        still_open = counted(len(job_state.open_units), "unit")
        console.print(f"{still_open} still open: the same `explain` goes on from there.")
        raise typer.Exit(INCOMPLETE)
    for sentence in exceeded_budgets:
        console.print(f"Over budget: {sentence}.")
    if job_state.dead and exceeded_budgets and not is_final:
        console.print("`blocksight retry OUTPUT` opens dead units again; --max-dead-units accepts them.")
    if exceeded_budgets:
        raise typer.Exit(OVER_BUDGET)


@commands.command()
def status(
    output: Existing,
    is_watched: Annotated[
        bool, typer.Option("--watch", help="Look again and again, and say what changed, until no unit is open.")
    ] = False,
    every: Annotated[
        float | None,
        typer.Option(min=1.0, help=f"With --watch: seconds between two looks.  [default: {WATCH_SECONDS:g}]"),
    ] = None,
    as_json: AsJson = False,
    endpoint_url: Endpoint = None,
) -> None:
    """Show how far a job is, from the output alone: while it runs, when it has ended, or after its driver died.

    Example: blocksight status s3://bucket/maps --watch --every 30
    """
    if every is not None and not is_watched:
        raise ConfigError(f"--every {every:g} is the pause between two looks of --watch, which is not given; give both")
    store, made = existing(output, endpoint_url)
    pause = WATCH_SECONDS if every is None else every
    job_state = _watched(store, made, pause, as_json) if is_watched else read_job_state(store, made)
    forward, labels = planned_forward(store), planned_labels(store)
    preflight = stored_preflight(store)
    if as_json:
        known = {"masks": forward and str(forward), "labels": labels, "preflight": preflight and asdict(preflight)}
        print_json({**job_figures(output, job_state), **known})
    else:
        console.print(job_state_table(output, job_state, forward, labels, preflight))
        for line in letter_lines(job_state.dead.values()):
            console.print(line)
    if job_state.open_units:
        raise typer.Exit(INCOMPLETE)
    _finished(store, job_state, progress_console(as_json))


def _watched(store: ObjectStore, plan: Plan, every: float, as_json: bool) -> JobState:
    """The job's state once it has ended; until then, each look is shown."""
    looks = states(
        lambda: read_job_state(store, plan),
        lambda: final_manifest(store, plan) is not None,
        lambda: time.sleep(every),
    )
    return show(progress_console(as_json), looks, time.monotonic)


def _finished(store: ObjectStore, job_state: JobState, console: Console) -> None:
    """Ends the command with an exit code if no unit is open but there is no final manifest."""
    if final_manifest(store, job_state.plan) is not None:
        return
    if job_state.dead:
        dead = counted(len(job_state.dead), "dead unit")
        console.print(f"{dead}: `retry` opens them again, `finalize --max-dead-units` does without.")
        raise typer.Exit(OVER_BUDGET)
    console.print("No unit is open, but the final manifest is missing: `blocksight finalize` writes it.")
    raise typer.Exit(INCOMPLETE)


@commands.command()
def verify(output: Existing, as_json: AsJson = False, endpoint_url: Endpoint = None) -> None:
    """Prove from the output alone that rows in = explained + rejected, every record once, no byte changed."""
    console = progress_console(as_json)
    store, made = existing(output, endpoint_url)
    faults, checked = [], 0
    for unit, found in tracked(console, check(store, made), len(made.units), "verify", "unit"):
        faults += found
        checked += unit is not None
    for fault in faults:
        console.print(printable(fault))
    if as_json:
        state = {} if faults else job_figures(output, read_job_state(store, made))
        print_json({"faults": faults, "fragments": checked, **state})
    if faults:
        console.print(f"NOT RECONCILED: {counted(len(faults), 'fault')} in {counted(checked, 'fragment')}.")
        raise typer.Exit(UNRECONCILED)
    job_state = read_job_state(store, made)
    if not as_json:
        console.print(job_state_table(output, job_state))
    if job_state.open_units:
        sound, still_open = counted(checked, "sound fragment"), counted(len(job_state.open_units), "open unit")
        console.print(f"{sound}, {still_open}.")
        raise typer.Exit(INCOMPLETE)
    _finished(store, job_state, console)
    without = f" but those of {counted(len(job_state.dead), 'dead unit')}" if job_state.dead else ""
    console.print(f"Reconciled: {counted(checked, 'fragment')}, every planned record{without} is stored once.")


@commands.command()
def retry(
    output: Existing,
    cause: Annotated[str | None, typer.Option(help=f"Only those of one cause: {', '.join(Cause)}.")] = None,
    endpoint_url: Endpoint = None,
) -> None:
    """Open dead units again, so that the next `explain` works on them."""
    store, made = existing(output, endpoint_url)
    reopened = reopen(store, made, cause)
    for line in letter_lines(reopened):
        console.print(line)
    console.print(f"{counted(len(reopened), 'unit')} open again." if reopened else "No dead unit to open.")


@commands.command()
def finalize(
    output: Existing,
    max_dead_units: Annotated[int, typer.Option(min=0, help="Do without so many dead units.")] = 0,
    as_json: AsJson = False,
    endpoint_url: Endpoint = None,
) -> None:
    """Write the final manifest of an output whose units are all committed or dead; computes nothing."""
    store, made = existing(output, endpoint_url)
    job_state = read_job_state(store, made)
    if as_json:
        print_json(job_figures(output, job_state))
    else:
        console.print(job_state_table(output, job_state))
    accepted = num_accepted(final_manifest(store, made))
    budget = Budget(max_reject_fraction=1.0, max_dead_units=max(max_dead_units, accepted))
    _exit_unless_complete(job_state, exceeded_budgets(job_state, budget), progress_console(as_json), is_final=False)
    write_manifest(store, job_state)
    progress_console(as_json).print("The final manifest is written.")


@commands.command()
def gc(
    output: Existing,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and leave it.")] = False,
    endpoint_url: Endpoint = None,
) -> None:
    """Remove what runs that died left behind: markers, unfinished files, lost plans. No result is touched."""
    from blocksight.jobs.ledger.garbage import collect_garbage

    store, made = existing(output, endpoint_url)
    names = collect_garbage(store, read_job_state(store, made), dry_run=dry_run)
    for name in names:
        console.print(printable(name))
    console.print(f"{counted(len(names), 'object')}{' found' if dry_run else ' removed'}.")
