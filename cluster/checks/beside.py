"""Rules for what stands beside a job in its file: services that open it to others, and rights of its accounts."""

from collections.abc import Iterator

from blocksight.cluster.checks.findings import Finding, Place

OPEN_SERVICES = ("LoadBalancer", "NodePort", "ExternalName")
"""Types of services that are seen outside of the cluster."""
WHAT = ("verbs", "resources", "apiGroups")
GREAT_ROLES = ("cluster-admin", "admin", "edit")
"""Kubernetes' own roles that let an account run pods of any kind, or read secrets."""


def beside_findings(place: Place) -> Iterator[Finding]:
    """What is wrong with a Service, a role or a binding."""
    kind = place["kind"].text
    if kind == "Service":
        yield from service_findings(place["spec"])
    elif kind in ("Role", "ClusterRole"):
        everything = [one for rule in place["rules"].items() for what in WHAT for one in rule[what].items()]
        for one in everything:
            if one.text == "*":
                yield one.finding("rights", "whoever has the role may do more than a job needs", "name them one by one")
    elif kind in ("RoleBinding", "ClusterRoleBinding") and place["roleRef"]["name"].text in GREAT_ROLES:
        why = f"pods that read strangers' files get all rights of {place['roleRef']['name'].text}"
        yield place["roleRef"]["name"].finding("rights", why, "name a role of their own; a job needs none")


def service_findings(spec: Place) -> Iterator[Finding]:
    """A finding if a service shows its pods outside of the cluster."""
    if spec["type"].value in OPEN_SERVICES:
        why = f"a {spec['type'].value} shows the dashboard and the jobs' port, which run code, outside of the cluster"
        yield spec["type"].finding("open", why, "write ClusterIP, and reach it by kubectl port-forward")
    if spec["externalIPs"].value:
        why = "the service has addresses outside of the cluster"
        yield spec["externalIPs"].finding("open", why, "leave it out, and reach it by kubectl port-forward")
