"""blocksight: explains whole data sets. What a notebook wants stands here by its name, and is imported on first use."""

from importlib import import_module
from typing import Any

NAMES = {
    "Execution": "blocksight.jobs.plan.config",
    "JobConfig": "blocksight.jobs.plan.config",
    "ModelAdapter": "blocksight.engine.model.adapter",
    "audit": "blocksight.jobs.audit.run:run_audit",
    "AuditRequest": "blocksight.jobs.audit.run",
    "EvaluationRequest": "blocksight.jobs.run.evaluation",
    "compare": "blocksight.jobs.evaluate.compare",
    "decode": "blocksight.storage.images.decode",
    "decode_map": "blocksight.storage.outputs.map_codec",
    "evaluate": "blocksight.jobs.run.evaluation:run_evaluation",
    "explain": "blocksight.jobs.run.job:run_job",
    "load_model": "blocksight.engine.model.loading",
    "open_output": "blocksight.jobs.work.rows:existing_output",
    "open_store": "blocksight.storage.stores.opening",
    "read_audit": "blocksight.jobs.audit.result",
    "report": "blocksight.jobs.report.page:write_report",
    "sql": "blocksight.jobs.export.sql:connect",
    "versus": "blocksight.jobs.versus.run:write_difference",
}
"""Where each name comes from: a module, and the name there if it is another one."""

__all__ = list(NAMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Imports a public name. Raises AttributeError for others."""
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(sorted(NAMES))}")
    module, _, attribute = NAMES[name].partition(":")
    return getattr(import_module(module), attribute or name)


def __dir__() -> list[str]:
    return sorted([*globals(), *NAMES])
