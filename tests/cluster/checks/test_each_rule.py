"""Each finding of a check is, in some row of the tables, the only one of its rule: without it that row is red."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksight.cluster.checks import findings
from blocksight.cluster.checks.findings import Finding, Place
from blocksight.cluster.checks.kubernetes import object_findings
from tests.cluster.checks import test_files_of_other_kinds as others
from tests.cluster.checks import test_kubernetes as kubernetes
from tests.cluster.checks import test_monitoring as monitoring
from tests.cluster.checks.changing import PRODUCT

CHECKS = Path(findings.__file__).parent
WITH_TESTS_OF_THEIR_OWN = ("check.py", "fits.py", "kustomization.py")
ALONE = {"it has no FROM", "a second {place['kind'].text} of this name"}
"""Findings that one test each is about."""

Line = tuple[str, int]


@pytest.mark.sweep
def test_each_finding_is_needed_by_a_row(monkeypatch):
    lines: dict[Finding, set[Line]] = {}
    found = Place.finding

    def noted(self, rule, why, way_out):
        caller = sys._getframe(1)
        made = found(self, rule, why, way_out)
        lines.setdefault(made, set()).add((Path(caller.f_code.co_filename).name, caller.f_lineno))
        return made

    monkeypatch.setattr(Place, "finding", noted)
    needed: set[Line] = set()
    for rule, made in rows():
        if rule is None:
            continue
        places = set().union(*(lines[one] for one in made if one.rule == rule))
        needed |= places if len(places) == 1 else set()
    unneeded = [text for text, where in written() if not where & needed and not any(one in text for one in ALONE)]
    assert unneeded == [], "\n".join(unneeded)


def rows() -> Iterator[tuple[str | None, list[Finding]]]:
    """The rule of each row, None where nothing is wrong, and all that is found there."""
    for path, value, rule in {**kubernetes.PLANTED, **kubernetes.OTHERS}.values():
        yield rule, kubernetes.findings_after("spot-gke", "RayJob", path, value)
    for path, value, rule in kubernetes.POLICY.values():
        yield rule, kubernetes.findings_after("gpu", "NetworkPolicy", path, value)
    for overlay, table in (("kueue", kubernetes.QUEUE), ("cpu", kubernetes.BESIDE)):
        for kind, path, value, rule in table.values():
            yield rule, kubernetes.findings_after(overlay, kind, path, value)
    for body, rule in kubernetes.DOORS_AND_RIGHTS:
        yield rule, list(object_findings([Place("beside.yaml", body)], PRODUCT))
    for file, old, new, rule in others.TEXTS:
        yield rule, others.findings_of(file, others.text_of(file).replace(old, new))
    for file, path, value, rule in others.DOCUMENTS:
        yield rule, others.findings_of(file, others.changed(file, path, value))
    for file, path, value, rule in monitoring.MISTAKES:
        yield rule, monitoring.findings_after(file, path, value)
    for *row, rule in others.BESIDE:
        yield rule, others.findings_beside(*row)


def written() -> Iterator[tuple[str, set[Line]]]:
    """The text and the lines of each `yield PLACE.finding(...)`."""
    for file in sorted(set(CHECKS.glob("*.py")) - {CHECKS / name for name in WITH_TESTS_OF_THEIR_OWN}):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Yield) and node.value is not None and ".finding(" in ast.unparse(node.value):
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                yield f"{file.name}:{node.lineno} {ast.unparse(node)}", {(file.name, line) for line in lines}
