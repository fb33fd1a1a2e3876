"""The tables that `blocksight bench` prints: rates, costs, the race and the fidelity curve."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table

from blocksight.jobs.cli.tables import facts_table, grid_table, interval_text, size_text
from blocksight.jobs.plan.config import JobConfig
from blocksight.jobs.plan.text import counted, printable

if TYPE_CHECKING:
    from blocksight.jobs.bench.benchmark import Benchmark  # which needs torch, too slow for a --help
    from blocksight.jobs.bench.host import HostShare

EFFICIENCY = "the time that the bare model would need for as many forwards, over all that is taken"


def benchmark_table(job: JobConfig, found: "Benchmark") -> RenderableType:
    """The rates of the bare model and the explainer, and the cost of a data set."""
    own, cost = found.efficiency, found.cost
    worker = "core" if found.device == "cpu" else "GPU"
    money = f", {cost.money:,.2f} at the given price" if cost.money is not None else ""
    size = counted(found.bytes_per_map, "byte")
    rows = [
        ("model", f"{printable(job.model)}, {job.explainer} on {printable(found.hardware)}"),
        ("masks are scored by", str(found.setting)),
        ("bare model", ", ".join(f"{rate:,.0f}/s at {size}" for size, rate in own.bare_rates.items())),
        ("bare, in turns", f"{own.best_bare_rate:,.1f} forwards/s of a {worker}"),
        ("explainer", f"{own.forward_rate:,.1f} masked forwards/s, {own.forwards_per_image:,.0f} an image"),
        ("efficiency", "no masked forwards" if own.efficiency is None else f"{own.efficiency:.3f}: {EFFICIENCY}"),
        (
            "images",
            f"{1 / own.seconds_per_image:,.3g} a second of a {worker}, {size} a map",
        ),
        (
            counted(cost.records, "image"),
            f"{_hours(cost.hours)} hours on {counted(cost.workers, worker)}, {_hours(cost.worker_hours)} "
            f"{worker}-hours, {size_text(cost.num_bytes)}{money} (computed from the rate)",
        ),
    ]
    probed = grid_table(
        ["tried", "forwards/s", "score error", ""],
        [
            [str(one.setting), _rate(one.forwards_per_second), f"{one.score_error:.2g}", one.refused or ""]
            for one in found.probed
        ],
    )
    return Group(facts_table(rows, "bench"), probed, *([_race_table(found.race)] if found.race else []))


def _rate(per_second: float | None) -> str:
    return "not timed" if per_second is None else f"{per_second:,.0f}"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def _race_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    return grid_table(
        ["one image, in turns", "job", "how", "forwards", "forwards/s", "seconds", "we are ahead"],
        [
            [
                row["name"],
                row["job"],
                row["how"],
                f"{row['forwards']:,}",
                f"{row['forwards_per_second']:,.1f}",
                f"{row['forwards'] / row['forwards_per_second']:,.1f}",
                f"{row['we_are_ahead']:.2f} x",
            ]
            for row in rows
        ],
    )


def curve_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The fidelity curve: likeness to full SISE's maps, then differences to its metrics."""
    shown = grid_table(
        ["method", "forwards", "images", "blocks", "Spearman", "SSIM", "IoU 15 %", "ins - del", "Drop", "EBPG", ""],
        [
            [
                row["method"],
                f"{row['forwards']:,.0f}",
                str(row["images"]),
                *(_mean(row, name) for name in ("block_correlation", "spearman", "ssim", "iou_15")),
                *(_loss(row, name) for name in ("insertion_minus_deletion", "drop", "ebpg")),
                "no loss" if row.get("loses_nothing") else "",
            ]
            for row in rows
        ],
    )
    return Group(
        shown,
        "blocks: correlation of the block maps with full SISE's. From `ins - del` on: full SISE's mean, and for the "
        "others the paired difference to it with its 95 % interval; no loss: these lie within 0.01 and 1 point.",
    )


def _mean(row: Mapping[str, Any], name: str) -> str:
    mean = row[name][0]
    return "-" if mean is None else f"{mean:.3f}"


def _loss(row: Mapping[str, Any], name: str) -> str:
    paired = row.get(f"{name}_difference")
    if paired is None:
        return _mean(row, name)
    mean, low, high = paired
    return "-" if mean is None else f"{mean:+.3f}{interval_text(low, high)}"


def host_table(found: "HostShare") -> RenderableType:
    """CPU time of a record beside the model, by step, and the rates of a core."""
    job = f"{counted(found.records, 'record')} in {counted(found.units, 'unit')}, Grad-CAM of a tiny model"
    rejected = f", {found.rejected:,} rejected" if found.rejected else ""
    rows = [
        ("job", f"{job}{rejected}"),
        *((f"{name}, in process", f"{own:.2f} ms") for name, own in found.steps.items()),
        ("in process", _host_rate(found.in_process)),
        ("through Ray", f"{_host_rate(found.through_ray)}; {counted(found.actors, 'actor')}, while all work"),
        ("ratio", f"{found.ratio:.2f}: a core's rate through Ray over its rate in process"),
    ]
    return facts_table(rows, "the host's share, CPU time of a record")


def _host_rate(milliseconds: float) -> str:
    return f"{milliseconds:.2f} ms, {1e3 / milliseconds:,.0f} records a second of a core"
