"""Reads files of any kind that start a cluster, and says what is wrong with them. Nothing is sent anywhere."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blocksight.cluster.checks import kustomization
from blocksight.cluster.checks.commands import Product
from blocksight.cluster.checks.documents import DocumentError, yaml_documents
from blocksight.cluster.checks.findings import Finding, Place
from blocksight.cluster.checks.kubernetes import object_findings

STANDARD_INPUT = "-"


@dataclass
class _Files:
    """What was read of the files."""

    sets: list[list[Place]] = field(default_factory=lambda: [[]])
    """Kubernetes objects: those of all plain files, and those of each kustomization."""
    others: list[tuple[str, Place]] = field(default_factory=list)
    """Documents of other kinds, each with its kind."""
    findings: list[Finding] = field(default_factory=list)


def check_files(names: Sequence[str], product: Product) -> list[Finding]:
    """What is wrong with files, or with folders that hold a `kustomization.yaml`; `-` is standard input.

    The Kubernetes objects of all plain files are one set, and may name each other; those of a kustomization are
    another. Each finding comes once.
    """
    files = _Files()
    for name in names:
        _read(name, files)
    found = list(files.findings)
    for kind, place in files.others:
        found += RULES[kind](place, product)
    for places in files.sets:
        if places:
            found += object_findings(places, product)
    return list(dict.fromkeys(found))


def _read(name: str, files: _Files) -> None:
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


def _read_folder(name: str, path: Path, files: _Files) -> None:
    if not (path / kustomization.FILE).is_file():
        way_out = "name its files, or a folder with one"
        files.findings.append(
            Place(name, None).finding("file", f"it is a folder without {kustomization.FILE}", way_out)
        )
        return
    places, findings = kustomization.build(path)
    files.sets.append([Place(f"{name} ({Path(one.file).name})", one.value) for one in places])
    files.findings += findings


def _sort(name: str, text: str, files: _Files) -> None:
    """Puts the documents of a text to their kinds."""
    for document in yaml_documents(text):
        place = Place(name, document)
        kind = _kind_of(document)
        if kind is None:
            why = "it is no kind of file that is checked here"
            files.findings.append(place.finding("file", why, f"checked are {', '.join(KINDS_READ)}"))
        elif kind == KUBERNETES:
            files.sets[0].append(place)
        else:
            files.others.append((kind, place))


KUBERNETES = "Kubernetes objects"
KINDS_READ = (KUBERNETES,)
RULES: Mapping[str, Callable[[Place, Product], Iterator[Finding]]] = {}


def _kind_of(document: Any) -> str | None:
    if not isinstance(document, dict):
        return None
    if "kind" in document or "apiVersion" in document:
        return KUBERNETES
    return None
