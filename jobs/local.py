"""The in-process runner: the reference that Ray must equal, byte for byte on CPU."""

from collections.abc import Iterable, Iterator

from jobs.context import JobContext
from jobs.explain import ExplainStep
from jobs.plan import open_output, open_source
from jobs.records import Receipt, Unit, UnitFailure
from jobs.unit import commit_unit, failed, read_unit


def run_units(units: Iterable[Unit], context: JobContext, state: bytes | None) -> Iterator[Receipt | UnitFailure]:
    """Runs the units one after the other and yields what became of each. Raises ModelError at once."""
    source, _ = open_source(context.config.data, context.config.endpoint_url)
    output = open_output(context.config)
    explain = ExplainStep(context, state)
    for unit in units:
        stage = "read"
        try:
            unit_input = read_unit(unit, source, context.config, context.facts.input_size)
            stage = "explain"
            result = explain(unit_input)
            stage = "commit"
            yield commit_unit(result, output, context.fingerprint)
        except Exception as error:  # noqa: BLE001 - a unit's trouble is its own: the others go on
            yield failed(unit, stage, error)
