"""Reads files of any kind that start a cluster, and says what is wrong with them. Nothing is sent anywhere."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blocksight.cluster.checks import kustomization
from blocksight.cluster.checks.commands import Product, configuration_findings
from blocksight.cluster.checks.dockerfile import dockerfile_findings
from blocksight.cluster.checks.documents import DocumentError, json_document, yaml_documents
from blocksight.cluster.checks.findings import Finding, Place
from blocksight.cluster.checks.fits import (
    PlanFigures,
    fit_findings,
    machines_of_job,
    machines_of_script,
    machines_of_task,
    place_findings,
)
from blocksight.cluster.checks.kubernetes import object_findings
from blocksight.cluster.checks.launcher import launcher_findings
from blocksight.cluster.checks.literals import secret_findings
from blocksight.cluster.checks.monitoring import alert_findings, dashboard_findings
from blocksight.cluster.checks.policies import policy_findings
from blocksight.cluster.checks.skypilot import skypilot_findings
from blocksight.cluster.checks.slurm import slurm_findings

STANDARD_INPUT = "-"
PLACEHOLDERS = ("registry.example", f"sha256:{'0' * 64}", "example-images", "example-maps", "111122223333")
"""An image and its digest, two buckets, an account of AWS."""


@dataclass
class Files:
    """What was read of the files."""

    sets: list[list[Place]] = field(default_factory=lambda: [[]])
    """Kubernetes objects: those of all plain files, and those of each kustomization."""
    others: list[tuple[str, Place]] = field(default_factory=list)
    """Documents of other kinds, each with its kind."""
    findings: list[Finding] = field(default_factory=list)


def check_files(names: Sequence[str], product: Product, figures: PlanFigures | None = None) -> list[Finding]:
    """What is wrong with files, or with folders that hold a `kustomization.yaml`; `-` is standard input."""
    return findings_in(read_files(names), product, figures)


def read_files(names: Sequence[str]) -> Files:
    """Reads the files, and sorts what they hold by its kind."""
    files = Files()
    for name in names:
        _read(name, files)
    return files


def findings_in(files: Files, product: Product, figures: PlanFigures | None = None) -> list[Finding]:
    """What is wrong with files, each finding once.

    The Kubernetes objects of all plain files are one set, and may name each other; those of a kustomization are
    another. With `figures`, also what of that plan does not fit.
    """
    found = list(files.findings)
    for kind, place in files.others:
        found += RULES[kind](place, product)
    for places in files.sets:
        if places:
            found += object_findings(places, product)
    if figures is not None:
        found += _unfit(files, figures)
    return list(dict.fromkeys(found))


def placeholders_in(files: Files) -> list[str]:
    """What stands in the files of this package for what is the user's own, and is still there."""
    places = [place for _, place in files.others] + [one for places in files.sets for one in places]
    texts = [below.text for place in places for below in place.walk() if below.text]
    return [mark for mark in PLACEHOLDERS if any(mark in text for text in texts)]


def _unfit(files: Files, figures: PlanFigures) -> Iterator[Finding]:
    """What of a plan does not fit the machines, and the configurations, of the files."""
    of_kind = {SLURM: machines_of_script, SKYPILOT: machines_of_task}
    for kind, place in files.others:
        if kind in of_kind:
            yield from fit_findings(figures, of_kind[kind](place))
        if kind == CONFIGURATION:
            yield from place_findings(place, place.text, figures)
    for place in (one for places in files.sets for one in places):
        if place["kind"].text == "RayJob":
            yield from fit_findings(figures, machines_of_job(place))
        if place["kind"].text == "ConfigMap":
            for key, one in place["data"].entries():
                if key.endswith(".toml"):
                    yield from place_findings(one, one.text, figures)


def _read(name: str, files: Files) -> None:
    path = Path(name)
    if path.name == kustomization.FILE and path.is_file():
        path = path.parent
    if path.is_dir():
        _read_folder(name, path, files)
        return
    try:
        text = sys.stdin.read() if name == STANDARD_INPUT else kustomization.read(path)
        _sort("standard input" if name == STANDARD_INPUT else name, text, files)
    except (OSError, DocumentError) as error:
        why = f"it cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
        files.findings.append(Place(name, None).finding("file", why, "name a file that is there and can be read"))


def _read_folder(name: str, path: Path, files: Files) -> None:
    if not (path / kustomization.FILE).is_file():
        way_out = "name its files, or a folder with one"
        files.findings.append(
            Place(name, None).finding("file", f"it is a folder without {kustomization.FILE}", way_out)
        )
        return
    places, findings = kustomization.build(path)
    files.sets.append([Place(f"{name} ({Path(one.file).name})", one.value) for one in places])
    files.findings += findings


def _sort(name: str, text: str, files: Files) -> None:
    """Puts the documents of a text to their kinds."""
    for document in _documents(name, text):
        place = Place(name, document)
        kind = _kind_of(name, document)
        if kind is None:
            why = "it is no kind of file that is checked here"
            files.findings.append(place.finding("file", why, f"checked are {', '.join((KUBERNETES, *RULES))}"))
        elif kind == KUBERNETES:
            files.sets[0].append(place)
        else:
            files.others.append((kind, place))


def _documents(name: str, text: str) -> list[Any]:
    """What a text holds: values of YAML or JSON, or the text itself."""
    if _is_text(name, text):
        return [text]
    found = [json_document(text)] if name.endswith(".json") else yaml_documents(text)
    if not found:
        raise DocumentError("it is empty")
    return found


def _is_text(name: str, text: str) -> bool:
    return text.startswith("#!") or "#SBATCH" in text or name.endswith((".toml", ".sbatch")) or _is_dockerfile(name)


def _is_dockerfile(name: str) -> bool:
    return Path(name).name.startswith(("Dockerfile", "Containerfile")) and not name.endswith("ignore")


def _configuration(place: Place, product: Product) -> Iterator[Finding]:
    yield from secret_findings(place)
    yield from configuration_findings(place, product)


KUBERNETES = "Kubernetes objects"
RULES: Mapping[str, Callable[[Place, Product], Iterator[Finding]]] = {
    "files of Ray's launcher": launcher_findings,
    "tasks of SkyPilot": skypilot_findings,
    "scripts of sbatch": slurm_findings,
    "Dockerfiles": dockerfile_findings,
    "policies of AWS": lambda place, _: policy_findings(place),
    "configurations in TOML": _configuration,
    "alerts of Prometheus": alert_findings,
    "dashboards of Grafana": dashboard_findings,
}
"""The rules of each other kind of file."""
LAUNCHER, SKYPILOT, SLURM, DOCKERFILE, POLICY, CONFIGURATION, ALERTS, DASHBOARD = RULES


def _kind_of(name: str, document: Any) -> str | None:
    if isinstance(document, str):
        return DOCKERFILE if _is_dockerfile(name) else CONFIGURATION if name.endswith(".toml") else SLURM
    if not isinstance(document, dict):
        return None
    if "kind" in document or "apiVersion" in document:
        return KUBERNETES
    if "Statement" in document:
        return POLICY
    if "panels" in document or "groups" in document:
        return DASHBOARD if "panels" in document else ALERTS
    if {"cluster_name", "available_node_types", "head_start_ray_commands"} & {*document}:
        return LAUNCHER
    return SKYPILOT if {"run", "resources"} & {*document} else None
