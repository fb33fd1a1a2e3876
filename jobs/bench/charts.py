"""Draws the fidelity curve as a PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from blocksight.engine.judging.fidelity import FULL
from blocksight.jobs.bench.curve import AREA, AREA_MARGIN, DROP_MARGIN

Row = Mapping[str, Any]

PANELS = (
    ("block_correlation", "correlation of block maps with full SISE's", None),
    ("ssim", "SSIM to full SISE's map", None),
    (f"{AREA}_difference", "insertion minus deletion, less full SISE's", AREA_MARGIN),
    ("drop_difference", "Drop, less full SISE's, points (lower is better)", DROP_MARGIN),
)
"""Measure, title, and the margin within which nothing is lost."""

LINES = {"budget": ("C0", "budget"), "selection": ("C1", "SISE at mu"), "random subset": ("C2", "random subset")}
"""Kinds whose points are joined by lines: colour and name."""
POINTS = {"explainer": "C3", "control": "0.6"}
NOISE = {"float16 scores": (":", "float16 scores"), "bfloat16 scores": ("--", "bfloat16 scores")}


def curve_chart(rows: Sequence[Row], title: str, path: Path) -> None:
    """Forwards against fidelity and faithfulness, with 95 % intervals; margins are shaded, precisions are lines."""
    figure = Figure(figsize=(13, 9), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for panel, (measure, name, margin) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        _panel(panel, rows, measure, margin)
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("masked forwards per image")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=9)
    figure.savefig(path, dpi=110)


def _panel(panel: Axes, rows: Sequence[Row], measure: str, margin: float | None) -> None:
    panel.set_xscale("symlog", linthresh=20)
    panel.grid(visible=True, alpha=0.3)
    shown = [row for row in rows if row.get(measure, [None])[0] is not None]
    for kind, (colour, name) in LINES.items():
        own = [row for row in shown if row["kind"] == kind and row["method"] != "Ada-SISE"]
        if own:
            _dots(panel, sorted(own, key=_forwards), measure, color=colour, marker="o", ms=4, lw=1.2, label=name)
    for row in shown:
        if row["kind"] in POINTS or row["method"] in ("Ada-SISE", FULL):
            _dots(panel, [row], measure, color=POINTS.get(row["kind"], "k"), marker="s", ms=4, lw=0)
            panel.annotate(
                row["method"],
                (_forwards(row), row[measure][0]),
                (4, 4),
                textcoords="offset points",
                size=7,
                clip_on=True,
            )
        if row["method"] in NOISE and margin is None:
            style, name = NOISE[row["method"]]
            panel.axhline(row[measure][0], color="0.3", lw=0.9, ls=style, label=name)
    if margin is not None:
        joined = [row[measure] for row in shown if row["kind"] in LINES]
        reach = max([margin, *(abs(end) for own in joined for end in own if end is not None)])
        panel.set_ylim(-1.2 * reach, 1.2 * reach)  # points far outside are in the table only
        panel.axhspan(-margin, margin, color="C2", alpha=0.15)
        panel.axhline(0, color="0.3", lw=0.8)


def _dots(panel: Axes, rows: Sequence[Row], measure: str, **style: Any) -> None:
    arms = [[_arm(row[measure], end) for row in rows] for end in (1, 2)]
    means = [row[measure][0] for row in rows]
    panel.errorbar([_forwards(row) for row in rows], means, yerr=arms, elinewidth=0.8, capsize=2, **style)


def _arm(interval: Sequence[float | None], end: int) -> float:
    """The distance from the mean to an end of its interval; 0 if there is no interval, as for a single image."""
    mean, reach = interval[0], interval[end]
    return 0.0 if mean is None or reach is None else abs(reach - mean)


def _forwards(row: Row) -> float:
    return row["forwards"]
