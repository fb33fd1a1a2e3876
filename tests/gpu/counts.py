"""Counts what each method costs the host of a GPU, per image of one target: waits, launches, copies and bytes.

`python -m tests.gpu.counts` prints where, and writes the table that `test_counts.py` compares with.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blocksight.engine.metrics import MASKED
from blocksight.engine.model.threads import one_thread
from blocksight.engine.scoring.forward import Forward
from tests.gpu.cases import QUICK, Case, Work, adapter_of, explaining, measuring
from tests.gpu.pretended import COUNTS, Counts, pretended_gpu

TABLE = Path(__file__).with_name("counts.json")
COMMAND = "python -m tests.gpu.counts"
BATCH_SIZE = 64
NUM_IMAGES = 8
"""Of one pass."""


@dataclass(frozen=True)
class Row:
    """An explainer, or a metric by its name alone."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    num_images: int = NUM_IMAGES
    net: str = "deep"


ROWS: Mapping[str, Row] = {
    "sise": Row("sise"),
    "sise, 32 images": Row("sise", num_images=32),  # a GPU's pass in a job
    "sise mu 0.3": Row("sise", {"mu": 0.3}),
    "sise budget 0.3": Row("sise", {"budget": 0.3}),
    "sise budget 0": Row("sise", {"budget": 0}, net="keen"),
    "ada-sise": Row("ada-sise"),
    "scorecam": Row("scorecam"),
    "gradcam": Row("gradcam"),
    "ablationcam": Row("ablationcam"),
    "reciprocam": Row("reciprocam"),
    "chefer": Row("chefer", net="fused vit"),
    "legrad": Row("legrad", net="fused vit"),
    "libra(chefer)": Row("libra(chefer)", net="fused vit"),
    "rise": Row("rise", QUICK["rise"]),
    "occlusion": Row("occlusion", QUICK["occlusion"]),
    "bee": Row("bee", QUICK["bee"], num_images=4),
    "keeptop": Row("faithfulness"),
    "road": Row("road_morf", num_images=4),
}


def uncounted(forward: Forward) -> Forward:
    """A forward pass of masked inputs that counts as nothing: it is the work itself."""

    def run(inputs_nchw: Tensor) -> Tensor:
        with COUNTS.paused():
            return forward(inputs_nchw)

    return run


def _work(row: Row) -> Work:
    """What a row runs on the GPU."""
    adapter = adapter_of(row.net).to("cuda")
    forward = uncounted(adapter.logits)
    if row.name in MASKED:
        return measuring(row.name, "zero", adapter, row.num_images, BATCH_SIZE, forward)
    case = Case(row.name, row.parameters, row.net)
    return explaining(case, adapter, row.num_images, BATCH_SIZE, row.num_images, 1, forward)


def counted(row: Row) -> tuple[dict[str, float], Counts]:
    """A row's figures per image, and its counts by line. The first run, which fills caches, is not counted."""
    with pretended_gpu() as counts:
        work = _work(row)
        work()
        counts.clear()
        work()
    figures = {
        "waits": counts.waits.total(),
        "launches": counts.launches.total(),
        "copies_to_gpu": counts.copies.total(),
        "bytes_to_gpu": counts.h2d_bytes,
        "bytes_from_gpu": counts.d2h_bytes,
    }
    return {kind: round(count / row.num_images, 2) for kind, count in figures.items()}, counts


def torch_version() -> str:
    """Without the build. Another version may split operations otherwise."""
    return torch.__version__.partition("+")[0]


def stored() -> dict[str, Any]:
    """The table: torch's version, and the figures of each row."""
    return json.loads(TABLE.read_text())


def main() -> None:
    """Counts every row, prints the lines that cost most, and writes the table."""
    rows = {}
    with one_thread():
        for name, row in ROWS.items():
            rows[name], counts = counted(row)
            print(f"\n{name}: {rows[name]}")
            for kind, lines in (("waits", counts.waits), ("launches", counts.launches)):
                _print_largest(kind, lines)
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    TABLE.write_text(f'{{\n "torch": "{torch_version()}",\n "rows": {{\n{lines}\n }}\n}}\n')
    print(f"\nwritten: {TABLE}")


def _print_largest(kind: str, lines: Counter[str]) -> None:
    for line, count in lines.most_common(12):
        print(f"  {count:6} {kind} {line}")


if __name__ == "__main__":
    main()
