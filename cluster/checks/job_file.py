"""Rules for the configuration that a driver on a cluster reads: it joins, waits, and asks for what the file offers."""

import tomllib
from collections.abc import Callable, Iterator
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
    folders: tuple[str, ...] = ()
    """Mounted ones, which may be of all machines."""


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
    yield from _place_findings(values, told, offer.folders)
    workers = values.get("workers")
    if workers is None:
        why = "the autoscaler is asked for one worker alone"
        yield told("workers").finding("job-file", why, f"write workers = {offer.most_actors}")
    elif isinstance(workers, int) and workers > offer.most_actors:
        why = f"{workers} explain actors are asked for, and {offer.most_actors} fit on all workers of this file"
        yield told("workers").finding("job-file", why, f"write workers = {offer.most_actors}, or allow more machines")


def alone_findings(place: Place, folders: tuple[str, ...]) -> Iterator[Finding]:
    """What of a configuration does not go with a driver that is alone on its machine; `folders` are mounted there."""
    values = _values(place.text)
    if values is not None:
        yield from _place_findings(values, _below(place), folders)
    for key in ("address", "wait"):
        if values is not None and values.get(key):
            why = "there is no cluster: the job starts Ray on its own machine"
            yield _below(place)(key).finding("job-file", why, "leave it out")


def _place_findings(
    values: dict[str, Any], told: Callable[[str], Place], folders: tuple[str, ...]
) -> Iterator[Finding]:
    """A place on a machine that ends with the job, or that others do not see."""
    for key in ("data", "output"):
        place = values.get(key)
        is_local = isinstance(place, str) and "://" not in place
        if is_local and not any(f"{place}/".startswith(f"{folder.rstrip('/')}/") for folder in folders):
            why = f"{place!r} lies on a machine that ends with the job, and no other machine sees it"
            yield told(key).finding("job-file", why, f'write {key} = "s3://..."')


def _values(text: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return None  # which the rule for configurations says


def _below(place: Place) -> Callable[[str], Place]:
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
