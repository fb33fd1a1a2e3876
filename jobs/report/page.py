"""Renders a report as one HTML file that loads nothing from any network, and writes it into the output."""

import base64
import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined
from rich.console import Console

from blocksight.jobs.audit.words import comparison, p_text, scope
from blocksight.jobs.evaluate.compare import Output
from blocksight.jobs.evaluate.known_truth import known_truth
from blocksight.jobs.plan.text import counted, plain
from blocksight.jobs.report.content import Report, clipped, report_of, with_unit
from blocksight.jobs.report.findings import colour_scale, place_of
from blocksight.jobs.worker.progress import Tally, passing

REPORT_KEY = "report/index.html"


PARTS = {"read": "unit", "draw": "map"}
"""The steps of a report, and what each counts."""


@dataclass(frozen=True)
class Written:
    """The page that was written."""

    uri: str
    num_bytes: int


def write_report(output: Output, endpoint_url: str | None, console: Console, truth: str | None = None) -> Written:
    """Reads the output and writes the page into it, over an earlier one.

    `truth`: where the ground truth is whose boxes are drawn; by default where `evaluate` or `audit` found it.

    Raises StoreError, and UnreconciledError if part of the output is damaged.
    """
    known = known_truth(output.store, truth, endpoint_url)
    with ExitStack() as steps:

        def begin(verb: str, total: int) -> Callable[[], None]:
            steps.close()  # one step at a time
            update = steps.enter_context(passing(console, Tally(total, None, verb=verb, noun=PARTS[verb])))
            return lambda: update(1)

        body = render(report_of(output, endpoint_url, datetime.now(UTC), begin, known))
    output.store.put(REPORT_KEY, body)
    return Written(f"{output.store.uri}/{REPORT_KEY}", len(body))


def render(report: Report) -> bytes:
    """The page in UTF-8. Every string of the report is escaped; control characters are shown as codes."""
    style, script = _part("style.css"), _part("script.js")
    classes = sorted({(item.target, item.class_name) for item in report.items}, key=lambda own: own[1].lower())
    methods = list(dict.fromkeys(estimate.method for metric in report.metrics for estimate in metric.estimates))
    return (
        _environment()
        .from_string(_part("template.html"))
        .render(
            report=report,
            classes=classes,
            methods=methods,
            scale=colour_scale(),
            style=style,
            script=script,
            policy=_policy(style, script),
        )
        .encode()
    )


def _part(name: str) -> str:
    return (files("blocksight.jobs.report") / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """A content security policy that allows the page's own style and script (by hash) and data: pictures only."""
    return (
        f"default-src 'none'; img-src data:; style-src {_hashed(style)}; script-src {_hashed(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _hashed(block: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()}'"


def _environment() -> Environment:
    made = Environment(autoescape=True, undefined=StrictUndefined, finalize=_harmless, trim_blocks=True)
    made.filters |= {
        "number": lambda value: f"{value:,}",
        "counted": counted,
        "percent": lambda share: f"{100 * share:.1f} %",
        "decimal": lambda value: f"{value:.3f}",
        "signed": lambda value: _signed(value, 2),
        "points": lambda value: f"{_signed(value, 1)} points",
        "short": lambda value: f"{value:.3g}",
        "basename": lambda key: PurePosixPath(key).name,
        "axis": lambda share: round(100 * min(1.0, max(0.0, share)), 2),
        "around": lambda value, reach: round(50 + 48 * value / reach, 2),
        "with_unit": with_unit,
        "place": place_of,
        "clip": clipped,
        "is_changed": lambda text: plain(text) != text,
        "encoded": lambda text: quote(text, safe="", errors="replace"),
        "compared": comparison,
        "p_value": p_text,
        "scope": scope,
        "tail": lambda text, most: text if len(text) <= most else f"…{text[1 - most :]}",
    }
    return made


def _signed(value: float, digits: int) -> str:
    """The value with a sign; the minus is as wide as the plus."""
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _harmless(value: Any) -> Any:
    """Text without control characters, to be escaped next; markup from the template is returned unchanged."""
    return plain(value) if isinstance(value, str) and not hasattr(value, "__html__") else value
