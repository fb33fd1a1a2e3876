"""Evaluates finished outputs, and writes audits and hostile tables by hand."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from blocksight.jobs.audit.result import (
    AUDIT_KEY,
    GRID,
    ROWS,
    ROWS_FOLDER,
    Audit,
    Cluster,
    Group,
    Oddity,
    Spread,
    write_audit,
)
from blocksight.jobs.plan.config import Execution
from blocksight.jobs.plan.plan import load_plan
from blocksight.jobs.run.evaluation import EvaluationOutcome, EvaluationRequest, run_evaluation
from blocksight.storage.outputs.fragments import read_fragment
from blocksight.storage.stores.store import ObjectStore
from tests.jobs.jobs_of import model_of, rows_in, run_here
from tests.jobs.tiny import folder_of_images, picture

HOSTILE = ("../../x", "=cmd|' /C calc'!A0", "'; DROP VIEW maps; --", 'a"b\nc\x1b[31m', "/etc/passwd", "[red]<script>")
"""Keys and labels that an attacker may have chosen."""

LOCAL = Execution(runner="local")


def evaluated(
    output: object, execution: Execution = LOCAL, endpoint_url: str | None = None, **asked
) -> EvaluationOutcome:
    """Runs an evaluation of an output, with the name of its model."""
    asked = {"model": model_of(output, endpoint_url), **asked}
    return run_evaluation(
        EvaluationRequest(str(output), endpoint_url=endpoint_url, **asked), execution, Console(quiet=True)
    )


def measured(output: object, endpoint_url: str | None = None, **asked) -> None:
    """An evaluation that leaves no unit open."""
    assert evaluated(output, endpoint_url=endpoint_url, **asked).num_open == 0


def output_of_small_units(base: Path, patch: pytest.MonkeyPatch) -> Path:
    """An output in units of a few records: seven records with two targets each by Grad-CAM, three rejected."""
    patch.setattr("blocksight.cluster.sizing.LEAST_UNIT_SECONDS", 0.3)
    run_here(folder_of_images(base / "in"), base / "out", target="top-2", explainer="gradcam")
    return base / "out"


def hostile_table(folder: Path) -> Path:
    """A Parquet input whose keys and labels are hostile."""
    folder.mkdir(parents=True)
    images = [picture(number) for number in range(len(HOSTILE))]
    pq.write_table(pa.table({"image": images, "key": list(HOSTILE), "label": list(HOSTILE)}), folder / "t.parquet")
    return folder


def explained(store: ObjectStore) -> list[dict]:
    return [row for row in rows_in(store) if row["status"] == "ok"]


def audit(store: ObjectStore) -> Audit:
    """Writes an audit: the maps of a unit belong to the clusters 0 and 1 in turns, the last map to none."""
    for unit in load_plan(store).units:
        rows = read_fragment(store.read(unit.fragment_key)).to_pylist()
        own = [_audit_row(number, row) for number, row in enumerate(row for row in rows if row["status"] == "ok")]
        body = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([*own[:-1], *({**row, "cluster": None} for row in own[-1:])], ROWS), body)
        store.put(f"{ROWS_FOLDER}{unit.fragment_key.rpartition('/')[2]}", body.getvalue())
    grid = np.zeros((GRID, GRID), np.float32)
    group = Group("all", None, None, 3, {"gini": Spread(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3)}, grid, grid)
    cluster = Cluster(1, "bee", 0, 3, 0.5, 1.0, grid, ("a",))
    first = explained(store)[0]
    named = {name: first[name] for name in ("key", "target_index", "target_name", "score")}
    odd = [
        Oddity(**named, label=None, reason=reason, detail="far", strength=3.0)
        for reason in ("outlier", "right for a strange reason")
    ]
    made = Audit("x", {}, 10, 10, 0, None, {}, (group,), (cluster,), tuple(odd), (), ())
    write_audit(store, made)
    assert store.head(AUDIT_KEY) is not None
    return made


def pooled(number: int) -> np.ndarray:
    """The cells of map `number` of a unit."""
    return np.random.default_rng(number).integers(0, 256, GRID * GRID, dtype=np.uint8)


def _audit_row(number: int, row: dict) -> dict:
    known = {name: row[name] for name in ("key", "target_index", "target_name", "label_name", "score")}
    about = {"cluster": number % 2, "strangeness": 1.5, "pooled": pooled(number).tobytes()}
    return {**dict.fromkeys(ROWS.names), **known, **about}
