"""blocksight explains whole data sets. This module offers the names for notebooks, each imported on first use."""

from importlib import import_module
from typing import Any

NAMES = {
    "AuditRequest": "blocksight.jobs.audit.run",
    "ClassProbability": "blocksight.engine.model.targets",
    "EXPLAINERS": "blocksight.engine.explainers",
    "EvaluationRequest": "blocksight.jobs.run.evaluation",
    "Execution": "blocksight.jobs.plan.config",
    "JobConfig": "blocksight.jobs.plan.config",
    "METRICS": "blocksight.engine.catalog.entries",
    "ModelAdapter": "blocksight.engine.model.adapter",
    "NoParameters": "blocksight.engine.catalog.parameters",
    "SiseParameters": "blocksight.engine.catalog.parameters",
    "Tile": "blocksight.storage.outputs.pictures",
    "audit": "blocksight.jobs.audit.run:run_audit",
    "colours": "blocksight.storage.outputs.pictures",
    "compare": "blocksight.jobs.evaluate.compare",
    "comparison_table": "blocksight.jobs.cli.metric_tables",
    "contact_sheet": "blocksight.storage.outputs.pictures",
    "decode": "blocksight.storage.images.decode",
    "decode_map": "blocksight.storage.outputs.map_codec",
    "difference_table": "blocksight.jobs.cli.metric_tables",
    "evaluate": "blocksight.jobs.run.evaluation:run_evaluation",
    "explain": "blocksight.jobs.run.one_picture",
    "fit": "blocksight.storage.images.decode",
    "image_with_map": "blocksight.jobs.worker.rows:shown",
    "images_of": "blocksight.jobs.worker.rows",
    "load_model": "blocksight.engine.model.loading",
    "minmax": "blocksight.engine.saliency",
    "one_line": "blocksight.storage.outputs.pictures",
    "open_output": "blocksight.jobs.worker.rows:existing_output",
    "open_store": "blocksight.storage.stores.opening",
    "overlay": "blocksight.storage.outputs.pictures",
    "photographs": "blocksight.jobs.bench.photographs",
    "read_audit": "blocksight.jobs.audit.result",
    "report": "blocksight.jobs.report.page:write_report",
    "resized": "blocksight.storage.outputs.pictures",
    "rows_with": "blocksight.jobs.worker.rows",
    "run_job": "blocksight.jobs.run.job",
    "sql": "blocksight.jobs.export.sql:connect",
    "versus": "blocksight.jobs.versus.run:write_difference",
}
"""The module of each public name; after a colon the name there, if it is a different one."""

__all__ = list(NAMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use. Raises AttributeError for any other name."""
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(sorted(NAMES))}")
    module, _, attribute = NAMES[name].partition(":")
    return getattr(import_module(module), attribute or name)


def __dir__() -> list[str]:
    return sorted([*globals(), *NAMES])
