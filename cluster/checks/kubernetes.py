"""Checks one set of Kubernetes objects: each by its schema and rules, and all of them together."""

from collections.abc import Iterator, Sequence

from blocksight.cluster.checks.beside import beside_findings
from blocksight.cluster.checks.commands import Product
from blocksight.cluster.checks.findings import Finding, Place, nearest
from blocksight.cluster.checks.kueue import queue_findings
from blocksight.cluster.checks.literals import secret_findings
from blocksight.cluster.checks.network import network_findings
from blocksight.cluster.checks.object_schemas import OBJECTS
from blocksight.cluster.checks.pods import OBJECT_NAME, label_findings
from blocksight.cluster.checks.ray_cluster import cluster_findings, name_findings
from blocksight.cluster.checks.ray_job import ray_job_findings
from blocksight.cluster.checks.references import (
    Objects,
    job_file_findings,
    reference_findings,
    scaling_account_findings,
    twin_findings,
)
from blocksight.cluster.checks.schema import CRDS, api_version, schema_findings

KINDS = (*CRDS, *OBJECTS)
BESIDE = (
    *("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding", "PodDisruptionBudget", "ResourceQuota", "LimitRange"),
    *("PriorityClass", "PersistentVolume", "StorageClass", "Service", "ExternalSecret", "SecretStore"),
)
"""Kinds that may stand beside a job; only their names, labels, secrets, open doors and great rights are looked at."""


def object_findings(places: Sequence[Place], product: Product) -> Iterator[Finding]:
    """What is wrong with a set of objects."""
    objects = Objects(places)
    for place in places:
        yield from secret_findings(place)
        yield from _head_of(place)
        yield from beside_findings(place)
        if api_version(place["kind"].text) != place["apiVersion"].value:
            continue
        yield from schema_findings(place)
        if place["kind"].text == "RayJob":
            yield from ray_job_findings(place, product)
            yield from job_file_findings(place, objects, product)
        if place["kind"].text == "RayCluster":
            yield from cluster_findings(place["spec"], product)
        if place["kind"].text in CRDS:
            yield from name_findings(place)
            yield from reference_findings(place, objects)
            yield from scaling_account_findings(place, objects)
    yield from twin_findings(objects)
    yield from network_findings(objects)
    yield from queue_findings(objects)


def _head_of(place: Place) -> Iterator[Finding]:
    """The kind, its version, the name and the labels."""
    kind, version = place["kind"], place["apiVersion"]
    known = api_version(kind.text)
    if kind.text == "Secret":
        yield place.finding("secret", "a Secret in a file is a secret in a file", "make it in the cluster")
    elif known is None and kind.text not in BESIDE:
        yield kind.finding(
            "kind", f"{kind.value!r} is no kind that is checked here", nearest(kind.text, (*KINDS, *BESIDE))
        )
    elif known is not None and version.value != known:
        yield version.finding("version", f"{version.value!r} is not the version of {kind.text}", f"write {known}")
    name = place["metadata"]["name"]
    if OBJECT_NAME.fullmatch(name.text) is None:
        yield name.finding("name", f"{name.value!r} is no name", "write lower case letters, digits and -")
    yield from label_findings(place["metadata"]["labels"])
