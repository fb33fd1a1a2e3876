"""Calls a function for each of many things, in processes on this machine's cores or on a cluster, in their order."""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import fields
from multiprocessing import get_context
from typing import Any, TypeVar

from rich.console import Console

from blocksight.cluster.cores import usable_cores
from blocksight.cluster.errors import ClusterError
from blocksight.jobs.plan.config import Execution
from blocksight.jobs.plan.records import Unit
from blocksight.jobs.run.workers import session_of, tell_of
from blocksight.jobs.worker.memory import keep_freed_memory
from blocksight.jobs.worker.progress import Tally, progress

LEAST_RECORDS = 2_000
"""A process imports for as long as it measures some hundreds of records: fewer than these are done in this one."""
AHEAD = 2
"""Calls under way for each worker, the one that runs and the next: it does not idle, and few results are held."""

ONE_PROCESS = Execution(runner="local")

Thing = TypeVar("Thing")
Made = TypeVar("Made")


class Reopening:
    """Work of which the fields alone are pickled: a dataclass that opens its stores anew in each process."""

    def __getstate__(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self)}  # pyright: ignore[reportArgumentType]


def over_units(
    work: Callable[[int], None], units: Sequence[Unit], execution: Execution, console: Console, verb: str
) -> None:
    """Calls `work` with the place in the plan of each unit, with progress. Raises as `in_order`."""
    if not units:
        return
    num_records = sum(unit.num_records for unit in units)
    done = closing(in_order(work, [unit.ordinal for unit in units], num_records, execution, console))
    with done as arriving, progress(console, Tally(num_records, None, verb=verb)) as update:
        for unit, _ in zip(units, arriving, strict=True):
            update(unit.num_records)


def in_order(
    work: Callable[[Thing], Made], things: Sequence[Thing], num_records: int, execution: Execution, console: Console
) -> Generator[Made, None, None]:
    """What `work` returns for each thing, in the things' order; both must be picklable, and the result small.

    On the cluster that is named; else on `workers` processes of this machine, or in this one for few records. Raises as
    `work`, and ClusterError if a process dies.
    """
    if execution.address is not None:
        yield from _on_cluster(work, things, execution, console)
        return
    workers = min(execution.workers or usable_cores(), len(things))
    if execution.runner == "local" or workers < 2 or num_records < LEAST_RECORDS:
        keep_freed_memory()
        yield from map(work, things)
        return
    context = get_context("spawn")  # a fork would inherit the locks of threads
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_hold, initargs=(work,)) as pool:
        try:
            yield from _ahead(lambda thing: pool.submit(_call, thing), things, AHEAD * workers, Future.result)
        except BrokenProcessPool as error:
            raise ClusterError(
                "a process of this command died, perhaps for want of memory; --workers 1 needs the least, and the same "
                "command goes on"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_HELD: list[Callable[[Any], Any]] = []
"""What this process of a pool calls: sent once, so that it opens its stores and reads its plan once."""


def _hold(work: Callable[[Any], Any]) -> None:
    keep_freed_memory()
    _HELD[:] = [work]


def _call(thing: Any) -> Any:
    return _HELD[0](thing)


def _on_cluster(
    work: Callable[[Thing], Made], things: Sequence[Thing], execution: Execution, console: Console
) -> Iterator[Made]:
    """The calls need cores alone: they are as many as CPUs, also where the nodes have GPUs."""
    with session_of(execution.model_copy(update={"device": "cpu"}), tell_of(console)) as sizing:
        from blocksight.jobs.run import pipeline

        assert sizing is not None  # of Ray
        submit, result = pipeline.calls_of(work)
        ahead = AHEAD if execution.workers is None else 1  # on a larger cluster, what waits would run
        yield from _ahead(submit, things, ahead * sizing.num_actors, result)


Handle = TypeVar("Handle")


def _ahead(
    submit: Callable[[Thing], Handle], things: Sequence[Thing], most: int, result: Callable[[Handle], Made]
) -> Iterator[Made]:
    """The results in order, with at most so many calls under way."""
    waiting: deque[Handle] = deque()
    for thing in things:
        if len(waiting) == most:
            yield result(waiting.popleft())
        waiting.append(submit(thing))
    while waiting:
        yield result(waiting.popleft())
