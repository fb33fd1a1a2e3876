"""The dashboard and the alerts are right, and each mistake in one is found by its rule."""

import copy
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml

from blocksight.cluster.checks.check import check_files
from blocksight.cluster.checks.monitoring import SELECTOR, metric_of
from tests.cluster.checks.changing import GONE, PRODUCT, change

CLUSTER = Path(__file__).parents[3] / "cluster"
BOARD, ALERTS = CLUSTER / "grafana/blocksight.json", CLUSTER / "prometheus/alerts.yaml"


def queries_of(text: str) -> list[str]:
    """Every `expr` in a document."""
    found: list[str] = []

    def walk(value):
        if isinstance(value, dict):
            found.extend(own for key, own in value.items() if key == "expr")
            for own in value.values():
                walk(own)
        if isinstance(value, list):
            for own in value:
                walk(own)

    walk(yaml.safe_load(text))
    return found


def put(old, new):
    def replaced(text):
        assert old in text
        return text.replace(old, new)

    return replaced


ALERT_MISTAKES = [
    ("groups[0].rules[0].expr", put("blocksight_units", "blocksight_unit"), "metric"),
    ("groups[0].rules[0].expr", put('state="open"', 'state="waiting"'), "metric"),
    ("groups[0].rules[0].expr", put('state="open"', 'key="a.jpg"'), "metric"),
    ("groups[0].rules[0].expr", put("[5m]))", "[5m])"), "query"),
    ("groups[0].rules[0].expr", put("sum(", "sum["), "query"),
    ("groups[0].rules[0].expr", put('"open"', '"open'), "query"),
    ("groups[0].rules[0].expr", "up == 0", "metric"),
    ("groups[0].rules[0].expr", GONE, "schema"),
    ("groups[0].rules[0].for", "soon", "quantity"),
    ("groups[0].rules[0].fro", "5m", "schema"),
    ("groups[0].rules[0].alert", "BlocksightRejects", "schema"),
    ("groups[0].rules[0].alert", GONE, "schema"),
    ("groups[0].rules[0].annotations", GONE, "schema"),
    ("groups[0].name", GONE, "schema"),
    ("groups[0].rules", [], "schema"),
]
BOARD_MISTAKES = [
    ("panels[1].targets[0].expr", put("records_total", "records"), "metric"),
    ("panels[1].targets[0].expr", "sum(ray_blocksight_unit_seconds)", "metric"),
    ("panels[1].targets[0].expr", put("$__rate_interval", "$interval"), "reference"),
    ("panels[1].targets[0].expr", GONE, "schema"),
    ("panels[1].targets", [], "schema"),
    ("panels[1].id", 1, "schema"),
    ("title", GONE, "schema"),
    ("templating.list[1].name", "dollars", "reference"),
]


MISTAKES = [*((ALERTS, *row) for row in ALERT_MISTAKES), *((BOARD, *row) for row in BOARD_MISTAKES)]


def findings_after(file, path, value):
    """What is found in the file after one change."""
    body = copy.deepcopy(yaml.safe_load(file.read_text()))
    change(body, path, value)
    with TemporaryDirectory() as folder:
        changed = Path(folder) / file.name
        changed.write_text(json.dumps(body))
        return check_files([str(changed)], PRODUCT)


@pytest.mark.parametrize(("file", "path", "value", "rule"), MISTAKES)
def test_each_mistake_is_found_by_its_rule(file, path, value, rule):
    found = findings_after(file, path, value)
    assert {one.rule for one in found} == {rule}
    assert len({one.way_out for one in found}) == 1


@pytest.mark.parametrize("file", [BOARD, ALERTS])
def test_the_files_are_right(file):
    assert check_files([str(file)], PRODUCT) == []


def test_every_metric_of_a_job_is_on_the_dashboard_and_ray_or_not_it_is_asked_for():
    queries = queries_of(BOARD.read_text()) + queries_of(ALERTS.read_text())
    assert len(queries) > 15
    names = {metric_of(found["name"], PRODUCT) for query in queries for found in SELECTOR.finditer(query)}
    assert names == PRODUCT.metrics.keys()


def test_the_rows_and_the_alerts_are_those_that_are_promised():
    panels = json.loads(BOARD.read_text())["panels"]
    assert [panel["title"] for panel in panels if panel["type"] == "row"] == ["progress", "speed", "trouble", "money"]
    [group] = yaml.safe_load(ALERTS.read_text())["groups"]
    assert [rule["alert"].removeprefix("Blocksight") for rule in group["rules"]] == [
        "StandsStill",
        "Rejects",
        "DeadUnits",
        "StoreUnavailable",
    ]
