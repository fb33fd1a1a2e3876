"""Rules for the configuration that a driver on a cluster reads: it joins, waits, and asks for what the file offers."""

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blocksight.cluster.checks.documents import DocumentError
from blocksight.cluster.checks.findings import Finding, Place
from blocksight.cluster.checks.kustomization import read


@dataclass(frozen=True)
class Offer:
    """What a file's machines give to a job."""

    has_gpus: bool
    most_actors: int
    """Explain actors, once all workers have come."""


def joined_findings(place: Place, offer: Offer) -> Iterator[Finding]:
    """What of a configuration does not go with a driver on the head of a cluster whose workers come later."""
    values = _values(place.text)
    told = _below(place)
    if values is None:
        return
    if values.get("address") != "auto":
        why = "the driver would start a Ray of its own on the head, and leave the workers idle"
        yield told("address").finding("job-file", why, 'write address = "auto"')
    if not values.get("wait"):
        why = "no worker is there when the driver starts, and it ends at once"
        yield told("wait").finding("job-file", why, 'write wait = "20m"')
    device = values.get("device", "auto")
    wanted = "gpu" if offer.has_gpus else "cpu"
    if device != wanted:
        why = f"device is {device!r}: while no worker is there, the autoscaler is not asked for what they have"
        yield told("device").finding("job-file", why, f'write device = "{wanted}"')
    workers = values.get("workers")
    if workers is None:
        why = "the autoscaler is asked for one worker alone"
        yield told("workers").finding("job-file", why, f"write workers = {offer.most_actors}")
    elif isinstance(workers, int) and workers > offer.most_actors:
        why = f"{workers} explain actors are asked for, and {offer.most_actors} fit on all workers of this file"
        yield told("workers").finding("job-file", why, f"write workers = {offer.most_actors}, or allow more machines")


def alone_findings(place: Place) -> Iterator[Finding]:
    """What of a configuration does not go with a driver that is alone on its machine."""
    values = _values(place.text)
    for key in ("address", "wait"):
        if values is not None and values.get(key):
            why = "there is no cluster: the job starts Ray on its own machine"
            yield _below(place)(key).finding("job-file", why, "leave it out")


def _values(text: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return None  # which the rule for configurations says


def _below(place: Place):
    return lambda key: Place(place.file, None, f"{place.path}: {key}" if place.path else key)


def mounted_file(place: Place, target_end: str) -> Place | None:
    """The local file that `file_mounts` puts at a path with this end; None if there is none, or it cannot be read."""
    for target, source in place["file_mounts"].entries():
        if target.endswith(target_end):
            file = Path(place.file).parent / source.text
            try:
                return Place(str(file), read(file))
            except (OSError, DocumentError):
                return None
    return None
