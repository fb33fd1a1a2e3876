"""Rules for what the objects of one set of files name of each other: accounts, config maps, claims, files, queues."""

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from blocksight.cluster.checks.commands import Product, config_file, configuration_findings
from blocksight.cluster.checks.findings import Finding, Place, nearest
from blocksight.cluster.checks.fits import offer_of
from blocksight.cluster.checks.job_file import joined_findings


class Objects:
    """The Kubernetes objects of one set of files, by kind, namespace and name."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = tuple(places)
        self._by_name = {_identity(place): place for place in places}

    def of_kind(self, *kinds: str) -> Iterator[Place]:
        """The objects of some kinds."""
        return (place for place in self.places if place["kind"].text in kinds)

    def named(self, kind: str, name: str, beside: Place) -> Place | None:
        """The object of a kind and name in the namespace of another; None if there is none."""
        return self._by_name.get((kind, _namespace(beside), name))

    def names(self, kind: str, beside: Place) -> list[str]:
        """The names of a kind's objects in the namespace of another."""
        return [name for found, space, name in self._by_name if found == kind and space == _namespace(beside)]

    def missing(self, kind: str, name: Place, beside: Place) -> Iterator[Finding]:
        """A finding if what a place names is not among the objects."""
        if self.named(kind, name.text, beside) is None:
            known = self.names(kind, beside)
            space = f" in the namespace {_namespace(beside)}" if _namespace(beside) else ""
            why = f"no {kind} of the name {name.value!r} is in these files{space}"
            yield name.finding("reference", why, nearest(name.text, known) if known else f"add the {kind}")


CLUSTER_WIDE = ("ClusterQueue", "ResourceFlavor", "Namespace")


def _identity(place: Place) -> tuple[str, str, str]:
    kind = place["kind"].text
    return kind, "" if kind in CLUSTER_WIDE else _namespace(place), place["metadata"]["name"].text


def _namespace(place: Place) -> str:
    return place["metadata"]["namespace"].text


def twin_findings(objects: Objects) -> Iterator[Finding]:
    """Objects that stand twice: the later one would replace the other."""
    seen = set()
    for place in objects.places:
        if _identity(place) in seen:
            name = place["metadata"]["name"]
            yield name.finding("name", f"a second {place['kind'].text} of this name", "keep one of the two")
        seen.add(_identity(place))


def pod_templates(place: Place) -> Iterator[Place]:
    """The pod templates of a RayJob or RayCluster."""
    spec = place["spec"]
    if spec["submitterPodTemplate"].is_there:
        yield spec["submitterPodTemplate"]
    cluster = spec["rayClusterSpec"] if place["kind"].text == "RayJob" else spec
    yield cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"].items():
        yield group["template"]


def reference_findings(place: Place, objects: Objects) -> Iterator[Finding]:
    """What the pods of a RayJob or RayCluster name, and no file describes."""
    for template in pod_templates(place):
        pod = template["spec"]
        if pod["serviceAccountName"].text:
            yield from objects.missing("ServiceAccount", pod["serviceAccountName"], place)
        for below in pod.walk():
            yield from _config_map(below["configMap"], place, objects)
            yield from _config_key(below["configMapKeyRef"], place, objects)
            if below["configMapRef"]["name"].is_there:
                yield from objects.missing("ConfigMap", below["configMapRef"]["name"], place)
            if below["persistentVolumeClaim"]["claimName"].is_there:
                yield from objects.missing("PersistentVolumeClaim", below["persistentVolumeClaim"]["claimName"], place)


def scaling_account_findings(job: Place, objects: Objects) -> Iterator[Finding]:
    """The head's pod scales the cluster through the API server, so it needs its account's token."""
    spec = job["spec"]["rayClusterSpec"] if job["kind"].text == "RayJob" else job["spec"]
    pod = spec["headGroupSpec"]["template"]["spec"]
    account = objects.named("ServiceAccount", pod["serviceAccountName"].text, job)
    own = pod["automountServiceAccountToken"]
    told = own if own.is_there or account is None else account["automountServiceAccountToken"]
    if spec["enableInTreeAutoscaling"].value and told.value is False:
        why = "the autoscaler in the head's pod cannot speak to the API server, and no worker ever starts"
        yield told.finding("account", why, "write automountServiceAccountToken: true")


def _config_map(source: Place, beside: Place, objects: Objects) -> Iterator[Finding]:
    if not source.is_there or source["optional"].value:
        return
    yield from objects.missing("ConfigMap", source["name"], beside)
    found = objects.named("ConfigMap", source["name"].text, beside)
    for item in source["items"].items():
        if found is not None:
            yield from _key(item["key"], found)


def _config_key(source: Place, beside: Place, objects: Objects) -> Iterator[Finding]:
    if not source.is_there or source["optional"].value:
        return
    yield from objects.missing("ConfigMap", source["name"], beside)
    found = objects.named("ConfigMap", source["name"].text, beside)
    if found is not None:
        yield from _key(source["key"], found)


def _key(key: Place, config_map: Place) -> Iterator[Finding]:
    known = [name for kind in ("data", "binaryData") for name, _ in config_map[kind].entries()]
    if key.text not in known:
        why = f"the config map {config_map['metadata']['name'].value!r} has no {key.value!r}"
        yield key.finding("reference", why, nearest(key.text, known))


def job_file_findings(job: Place, objects: Objects, product: Product) -> Iterator[Finding]:
    """The file that the entrypoint's --config names must be mounted into the head, and be a job that we take."""
    entrypoint = job["spec"]["entrypoint"]
    file = config_file(entrypoint.text.split())
    if file is None or "://" in file:
        return
    text = _mounted(job, file, objects)
    if text is None:
        why = f"no config map of these files is mounted into the head so that {file} is there"
        yield entrypoint.finding("reference", why, "mount it there, or name the file that is mounted")
        return
    yield from configuration_findings(text, product)
    yield from joined_findings(text, offer_of(job))


def _mounted(job: Place, file: str, objects: Objects) -> Place | None:
    """The text of a file in the head's container; None if nothing of these files is there."""
    pod = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    sources = {volume["name"].text: volume["configMap"] for volume in pod["volumes"].items()}
    for container in list(pod["containers"].items())[:1]:
        for mount in container["volumeMounts"].items():
            source = sources.get(mount["name"].text)
            found = source and objects.named("ConfigMap", source["name"].text, job)
            if source is not None and found is not None:
                key = _key_of_file(source, mount, file)
                if key is not None and found["data"][key].is_there:
                    return found["data"][key]
    return None


def _key_of_file(source: Place, mount: Place, file: str) -> str | None:
    """The key of a config map that a mount puts at a path; None if the path is elsewhere."""
    place = PurePosixPath(mount["mountPath"].text)
    if mount["subPath"].text:
        name = mount["subPath"].text if PurePosixPath(file) == place else None
    else:
        name = PurePosixPath(file).name if PurePosixPath(file).parent == place else None
    items = {item["path"].text: item["key"].text for item in source["items"].items()}
    return (items.get(name) if items else name) if name is not None else None
