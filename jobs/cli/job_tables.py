"""The tables that the commands of a job print: its plan, its state, its outcome."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from blocksight.engine.catalog import entries
from blocksight.jobs.cli.tables import facts_table, quality_rows, size_text
from blocksight.jobs.explain.learned import num_learning_images
from blocksight.jobs.ledger.receipts import metric_means
from blocksight.jobs.ledger.reconcile import JobState
from blocksight.jobs.ledger.shard_counts import other_counts, sentence_on
from blocksight.jobs.plan.config import JobConfig
from blocksight.jobs.plan.forward_setting import PlannedForward
from blocksight.jobs.plan.machine_rates import expected_cost
from blocksight.jobs.plan.model_input import input_text
from blocksight.jobs.plan.plan import Plan
from blocksight.jobs.plan.preflight import Preflight
from blocksight.jobs.plan.records import DeadLetter, UnitFailure
from blocksight.jobs.plan.text import clock, counted, printable
from blocksight.jobs.plan.units import Workforce
from blocksight.jobs.run.job import RunOutcome
from blocksight.storage.images.decode import NEARLY_BLACK
from blocksight.storage.stores.s3_endpoints import endpoint_for


def plan_table(
    job: JobConfig,
    plan: Plan,
    workforce: Workforce,
    labels: str,
    asked: JobConfig,
    preflight: Preflight | None = None,
) -> Table:
    """Units, records, how labels are read, and the first estimate. `asked`: the job without `model.toml`."""
    cost = expected_cost(job, plan.num_records, workforce)
    forwards, is_measured = cost.forwards_per_record, cost.seconds is not None
    workers = counted(workforce.num_workers, "GPU" if workforce.on_gpu else "CPU core")
    time = f"not measured for this model here, on {workers}: `plan --probe` takes about ten seconds"
    if cost.seconds is not None:
        time = f"about {clock(cost.seconds)} on {workers} ({cost.basis}), and the start of the workers"
    about = "" if plan.is_exact else "about "
    rows = [
        ("input", f"{counted(plan.num_objects, 'object')}, {size_text(plan.num_bytes)}, as {plan.layout}"),
        ("ignored", printable(plan.ignored_text) or "nothing"),
        *(("note", printable(note)) for note in plan.notes),
        *(("unreadable", f"{printable(key)}: {printable(why)}") for key, why in plan.troubles.items()),
        ("records", f"{about}{plan.num_records:,}"),
        ("labels", printable(labels)),
        ("units", _units_text(plan, workforce)),
        ("model is fed", input_text(asked, plan.identity)),
        ("resize", printable(plan.identity["resize"])),
        *_first_pass(job, plan.num_records),
        *(_preflight(preflight) or [("model check", "`explain` examines the model on a few images before any work")]),
        ("forwards", _forwards_text(forwards, plan.num_records, cost.basis)),
        ("time", time),
        ("output", f"about {size_text(cost.num_bytes)}" + ("" if is_measured else " if the maps are smooth")),
        ("fingerprint", plan.fingerprint[:16]),
    ]
    return facts_table(rows, "plan (nothing was computed or written)")


def _units_text(plan: Plan, workforce: Workforce) -> str:
    """How many, and the rate that they were cut by."""
    if plan.rate is not None:
        return f"{len(plan.units):,}, cut by {plan.rate}"
    later = "; a new job measures one GPU first, and cuts them by its rate" if workforce.on_gpu else ""
    return f"{len(plan.units):,}{later}"


def _forwards_text(per_record: float, num_records: int, basis: str) -> str:
    """The masked forward passes of a job: `about 12,000 (1,000 a record, measured ...)`, or none."""
    if not per_record:
        return "none that are masked: this method scores no masks"
    return f"about {per_record * num_records:,.0f} ({per_record:,.0f} a record, {basis})"


def _first_pass(job: JobConfig, num_records: int) -> list[tuple[str, str]]:
    wanted = min(num_learning_images(job), num_records)
    text = f"{job.explainer} learns from {counted(wanted, 'image')}, once, before the first unit"
    return [("first pass", text)] if wanted else []


def job_state_table(
    output: str,
    job_state: JobState,
    forward: PlannedForward | None = None,
    labels: str | None = None,
    preflight: Preflight | None = None,
) -> Table:
    """How far a job is; `labels` says how its labels were read."""
    units = len(job_state.plan.units)
    rejects = ", ".join(f"{count} {code}" for code, count in sorted(job_state.rejects.items()))
    timed = [receipt for receipt in job_state.receipts.values() if receipt.explain_seconds]  # a rebuilt one is not
    seconds = sum(receipt.explain_seconds or 0.0 for receipt in timed)
    forwards = sum(receipt.num_forwards for receipt in timed)
    ways = "; ".join(sorted({receipt.forward for receipt in timed if receipt.forward and receipt.num_forwards}))
    rate = f", {forwards / seconds:,.0f} a second of a worker" + (f" ({ways})" if ways else "") if seconds else ""
    done = sum(receipt.num_records for receipt in timed)
    about = "" if job_state.plan.is_exact else "about "
    of_all = f" of {about}{job_state.plan.num_records:,}" if job_state.open_units else ""
    rows = [
        ("output", printable(output)),
        *((name, printable(job_state.plan.identity[name])) for name in ("data", "model")),
        *_preflight(preflight),
        ("units", f"{len(job_state.receipts):,} of {units:,} committed" + _dead(job_state)),
        *([] if job_state.plan.rate is None else [("units cut by", str(job_state.plan.rate))]),
        ("records", f"{job_state.total('num_records'):,}{of_all}"),
        ("explained", f"{job_state.total('num_ok'):,}"),
        ("rejected", f"{job_state.total('num_rejected'):,}" + (f" ({rejects})" if rejects else "")),
        *_other_counts(job_state),
        *_odd_formats(job_state.counts("odd_formats")),
        *([("labels", printable(labels))] if labels is not None else []),
        *_quality(job_state),
        *([("forwards", f"{job_state.total('num_forwards'):,}{rate}")] if job_state.total("num_forwards") else []),
        *([("speed", f"{done / seconds:,.3g} images a second of a worker")] if done and seconds else []),
        *([("masks", f"scored by {forward}")] if forward is not None else []),
        ("size", size_text(job_state.total("num_bytes"))),
        *_metric_rows(metric_means(job_state.receipts.values())),
    ]
    return facts_table(rows)


def _other_counts(job_state: JobState) -> list[tuple[str, str]]:
    counts = other_counts(job_state)
    return [("expected", printable(sentence_on(counts)))] if counts else []


def _preflight(preflight: Preflight | None) -> list[tuple[str, str]]:
    """How the model was examined, and what is odd about it."""
    if preflight is None:
        return []
    loud = [("[bold red]warning[/]", f"[bold red]{printable(sentence)}[/]") for sentence in preflight.findings]
    blocks = [("blocks", printable("; ".join(preflight.blocks)))] if preflight.blocks else []
    return [("model check", printable(preflight)), *blocks, *loud]


def _odd_formats(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """Images whose pixels use a small part of the range, by `DecodedImage.kind`."""
    stretched = ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items()) if "bits" in kind)
    num_dark = sum(count for kind, count in counts.items() if "bits" not in kind)
    rows = [("stretched", f"{printable(stretched)}: their greatest sample needs no more; scaled to the full range")]
    dark = f"{counted(num_dark, 'image')}: no sample above {NEARLY_BLACK - 1} of 255, the model sees almost nothing"
    return (rows if stretched else []) + ([("nearly black", dark)] if num_dark else [])


def _quality(job_state: JobState) -> list[tuple[str, str]]:
    if not job_state.num_maps:
        return []
    accuracy = () if job_state.accuracy is None else job_state.accuracy.facts
    return quality_rows(accuracy, job_state.flat_fact, job_state.warnings)


def _dead(job_state: JobState) -> str:
    if not job_state.dead:
        return ""
    causes = Counter(letter.cause for letter in job_state.dead.values())
    return f", {len(job_state.dead)} dead ({', '.join(f'{count} {cause}' for cause, count in causes.most_common())})"


def letter_lines(letters: Iterable[DeadLetter]) -> Iterator[str]:
    """A line for the units of one shard that were given up at the same step for the same cause; the first error."""
    alike: dict[tuple[str, ...], list[DeadLetter]] = {}
    for letter in letters:
        alike.setdefault((letter.inputs, letter.cause, letter.stage), []).append(letter)
    for own in alike.values():
        units, verb = ("unit", "is") if len(own) == 1 else ("units", "are")
        where = f"{units} {_ordinals(own)} ({printable(own[0].inputs)})"
        yield f"{where} {verb} dead, {own[0].cause} at {own[0].stage}: {printable(own[0].error)}"


def _ordinals(letters: Sequence[DeadLetter]) -> str:
    """`1, 2, 3`, or `1, 2, 3 and 40 more`."""
    shown = ", ".join(str(letter.ordinal) for letter in letters[:3])
    return shown if len(letters) <= 3 else f"{shown} and {len(letters) - 3} more"


def outcome_table(job: JobConfig, outcome: RunOutcome) -> Table:
    """The job's state after a run."""
    table = job_state_table(job.output, outcome.job_state, outcome.forward)
    if outcome.ran.seconds:
        busy = "" if outcome.ran.busy is None else f", workers busy {outcome.ran.busy:.0%} of it"
        table.add_row("this run", f"{clock(outcome.ran.seconds)}{busy}")
    elif outcome.manifest is not None:
        table.add_row("this run", "nothing to do: the job is complete")
    if outcome.job_state.receipts:
        table.add_row("read it", printable(_reading(job)))
    return table


def _reading(job: JobConfig) -> str:
    """The line of Python that reads the output."""
    data = f"{job.output.rstrip('/')}/data"
    endpoint = endpoint_for(data, job.endpoint_url) if data.startswith("s3://") else None
    if endpoint is None:
        return f"pyarrow.parquet.read_table({data!r})"
    return f"pandas.read_parquet({data!r}, storage_options={{'endpoint_url': {endpoint!r}}})"


def _metric_rows(means: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    rows = []
    for name, value in means.items():
        metric, _, protocol = name.partition("@")
        better = entries.METRICS[metric].better
        text = f"{value['mean']:.2f} % over {counted(value['count'], 'map')} ({better} is better, protocol {protocol})"
        rows.append((metric, text))
    return rows


def failure_line(failure: UnitFailure) -> str:
    """One line for a unit that was not committed."""
    where = f"unit {failure.ordinal} ({printable(failure.inputs)})"
    return f"{where} failed at {failure.stage}: {printable(failure.error)}"
