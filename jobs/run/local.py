"""The local runner: explains units in this process; on CPUs Ray must give the same bytes."""

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from blocksight.jobs.explain.step import ExplainStep
from blocksight.jobs.ledger.stop_request import Stop
from blocksight.jobs.plan.context import JobContext
from blocksight.jobs.plan.records import Outcome, Unit, UnitInput, UnitResult
from blocksight.jobs.worker.attempts import WorkerStores, attempted, begin, done_here, open_worker_stores
from blocksight.jobs.worker.unit import commit_unit, take_unit


def run_units(
    units: Iterable[Unit], context: JobContext, state: bytes | None, stop: Stop
) -> Generator[Outcome, None, None]:
    """Explains the units one by one and yields each outcome, until `stop` is requested.

    Raises ModelError at once, and UnfitWorkerError as soon as this process can explain no unit.
    """
    stores, explain = open_worker_stores(context), ExplainStep(context, state)
    for unit in units:
        if stop.reason is not None:
            return
        yield done_here(run_unit(unit, context, stores, lambda: explain))


def run_unit(
    unit: Unit,
    context: JobContext,
    stores: WorkerStores,
    explain: Callable[[], ExplainStep],
    around: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> Outcome:
    """Reads, explains and commits one unit in one attempt; each step runs within `around(its name)`.

    `explain` gives the step that holds the model, or raises UnfitWorkerError.
    """

    def step(stage: str, work: Callable[[bool], Any]) -> Any:
        with around(stage):
            return attempted(unit, stage, stores, attempt, work)

    attempt = begin(unit, stores)
    taken = step("read", lambda careful: take_unit(unit, stores, context, careful=careful))
    if not isinstance(taken, UnitInput):
        return taken
    result = step("explain", lambda careful: explain()(taken, careful=careful))
    if not isinstance(result, UnitResult):
        return result
    return step("commit", lambda careful: commit_unit(result, stores.output, context.fingerprint, careful=careful))
