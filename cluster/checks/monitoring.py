"""Rules for dashboards of Grafana and for alerts of Prometheus: every query names metrics that a job shows."""

import re
from collections.abc import Iterator, Mapping, Sequence

from blocksight.cluster.checks.commands import Product
from blocksight.cluster.checks.findings import Finding, Place, nearest

OURS = re.compile(r"(?:ray_|\(ray_\)\?)?(?P<name>blocksight_\w+)")
"""The name of a metric of ours: Ray's exporter puts ray_ before it, and the metrics file nothing."""
SELECTOR = re.compile(r'\{__name__=~"\(ray_\)\?(?P<name>\w+)"(?P<labels>[^{}]*)\}')
LABEL = re.compile(r'(?P<name>\w+)\s*(?P<how>=~|!~|!=|=)\s*"(?P<values>[^"]*)"')
SECONDS = re.compile(r"\d+(ms|[smhdwy])(\d+(ms|[smhd]))*")
SUFFIXES = ("_bucket", "_count", "_sum")
"""Of the samples of a histogram."""
PAIRS = {")": "(", "]": "[", "}": "{"}
GROUP = ("name", "rules", "interval", "limit", "labels")
RULE = ("alert", "expr", "for", "keep_firing_for", "labels", "annotations")


def alert_findings(place: Place, product: Product) -> Iterator[Finding]:
    """What is wrong with a file of rules for Prometheus."""
    names: set[str] = set()
    for group in place["groups"].items():
        yield from _unknown_keys(group, GROUP)
        if not group["name"].text:
            yield group["name"].finding("schema", "a group has no name", "name it")
        for rule in group["rules"].items():
            yield from _rule_findings(rule, product)
            if rule["alert"].text in names:
                yield rule["alert"].finding("schema", f"two alerts are called {rule['alert'].text}", "rename one")
            names.add(rule["alert"].text)
    if not names:
        yield place["groups"].finding("schema", "no group has a rule", "add one with alert and expr")


def _rule_findings(rule: Place, product: Product) -> Iterator[Finding]:
    yield from _unknown_keys(rule, RULE)
    if not rule["alert"].text:
        yield rule["alert"].finding("schema", "a rule has no name", "write alert: NAME")
    for key in ("for", "keep_firing_for"):
        if rule[key].is_there and not SECONDS.fullmatch(rule[key].text):
            yield rule[key].finding("quantity", f"{rule[key].value!r} is no duration", "write 5m")
    if not rule.at("annotations", "summary").text:
        yield rule["annotations"].finding("schema", "an alert without a summary says nothing", "add summary")
    yield from _query_findings(rule["expr"], product)


def _unknown_keys(place: Place, known: tuple[str, ...]) -> Iterator[Finding]:
    for key, one in place.entries():
        if key not in known:
            yield one.finding("schema", f"there is no key {key!r} here", nearest(key, known))


def dashboard_findings(place: Place, product: Product) -> Iterator[Finding]:
    """What is wrong with a dashboard of Grafana."""
    variables = {one["name"].text for one in place.at("templating", "list").items()}
    ids = [one["id"].value for one in place["panels"].items()]
    if not place["title"].text:
        yield place["title"].finding("schema", "a dashboard has no title", "name it")
    for panel in place["panels"].items():
        if ids.count(panel["id"].value) > 1:
            yield panel["id"].finding("schema", f"two panels have the id {panel['id'].value}", "number them")
        if panel["type"].text == "row":
            continue
        if not panel["targets"].value:
            yield panel["targets"].finding("schema", "a panel asks for nothing", "add a target with expr")
        for target in panel["targets"].items():
            yield from _query_findings(target["expr"], product)
            for name in re.findall(r"\$\{?(\w+)", target["expr"].text):
                if not name.startswith("__") and name not in variables:
                    yield target["expr"].finding("reference", f"${name} is no variable", nearest(name, variables))


def _query_findings(place: Place, product: Product) -> Iterator[Finding]:
    """What is wrong with a query: its brackets, the metrics that it names, and their labels."""
    if not place.text:
        yield place.finding("schema", "a query is missing", "write expr")
        return
    if not _is_balanced(place.text):
        yield place.finding("query", "its brackets or quotes are not closed", "count them")
    names = [found["name"] for found in OURS.finditer(place.text)]
    if not names:
        yield place.finding("metric", "it names no metric of a job", f"known are {', '.join(product.metrics)}")
    for name in names:
        if metric_of(name, product) is None:
            yield place.finding("metric", f"no job shows {name}", nearest(name, product.metrics))
    for found in SELECTOR.finditer(place.text):
        known = product.metrics.get(metric_of(found["name"], product) or "")
        if known is not None:
            yield from _label_findings(place, found["labels"], known)


def _label_findings(place: Place, text: str, known: Mapping[str, Sequence[str]]) -> Iterator[Finding]:
    for label in LABEL.finditer(text):
        if label["name"] not in known:
            yield place.finding("metric", f"it has no label {label['name']}", nearest(label["name"], known))
            continue
        values = known[label["name"]]
        for value in label["values"].split("|") if "~" in label["how"] else [label["values"]]:
            if value not in values:
                yield place.finding("metric", f"{label['name']} is never {value!r}", nearest(value, values))


def metric_of(name: str, product: Product) -> str | None:
    """The metric that a sample's name belongs to; None if it is of none."""
    if name in product.metrics and name not in product.histograms:
        return name
    parts = {f"{own}{suffix}": own for own in product.histograms for suffix in SUFFIXES}
    return parts.get(name)


def _is_balanced(query: str) -> bool:
    stack: list[str] = []
    bare = re.sub(r'"[^"\n]*"', "", query)
    for sign in bare:
        if sign in PAIRS.values():
            stack.append(sign)
        elif sign in PAIRS and (not stack or stack.pop() != PAIRS[sign]):
            return False
    return not stack and '"' not in bare
