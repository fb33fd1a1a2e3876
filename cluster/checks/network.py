"""Rules for NetworkPolicies: they reach the pods that are meant, and let the job through and nothing else."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from ipaddress import ip_address, ip_network

from blocksight.cluster.checks.findings import Finding, Place, nearest
from blocksight.cluster.checks.pods import label_findings
from blocksight.cluster.checks.references import Objects, pod_templates

MADE_BY = {"app.kubernetes.io/created-by": "kuberay-operator"}
"""The label that every pod of a RayJob carries, its submitter included."""
METADATA_ADDRESS = ip_address("169.254.169.254")
NAMESPACE_LABEL = "kubernetes.io/metadata.name"
NAMESPACES = ("kuberay-system", "kuberay-operator", "kube-system", "monitoring", "default")
"""Namespaces that are named where a cluster is set up as its documentation says."""
OPERATOR_PORTS = (8265, 6379)
"""The dashboard, through which the operator submits and watches, and the GCS."""


def network_findings(objects: Objects) -> Iterator[Finding]:
    """What is wrong with the policies of a set of files."""
    jobs = list(objects.of_kind("RayJob", "RayCluster"))
    policies = list(objects.of_kind("NetworkPolicy"))
    for policy in policies:
        yield from _selectors(policy)
        yield from _addresses(policy)
        yield from _ports(policy)
        yield from _directions(policy)
        for place in policy.walk():
            yield from label_findings(place["matchLabels"])
    for job in jobs:
        over = [policy for policy in policies if _covers(policy, job)]
        if policies and not over:
            selector = policies[0]["spec"]["podSelector"]
            why = "no policy of these files selects all pods of the job; the submitter's carries one label alone"
            yield selector.finding("network", why, f"write matchLabels: {_written(MADE_BY)}")
        elif over:
            yield from _ways_in(over)
            yield from _ways_out(over)


def _written(labels: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in labels.items()) + "}"


def _covers(policy: Place, job: Place) -> bool:
    """True if the policy selects every pod of a job, by labels that all of them carry."""
    if policy["metadata"]["namespace"].text != job["metadata"]["namespace"].text:
        return False
    return all(_selects(policy["spec"]["podSelector"], template) for template in pod_templates(job))


def _selects(selector: Place, template: Place | None = None) -> bool:
    """True if a selector of labels alone takes a pod of the operator."""
    if selector["matchExpressions"].value:
        return False
    own = (template["metadata"]["labels"].value if template is not None else None) or {}
    wanted = selector["matchLabels"].value or {}
    return all({**own, **MADE_BY}.get(key) == value for key, value in wanted.items())


def _ways_in(policies: list[Place]) -> Iterator[Finding]:
    rules = [rule for policy in policies for rule in policy["spec"]["ingress"].items()]
    place = policies[0]["spec"]["ingress"]
    if "Ingress" not in _types(policies[0]):
        return
    if not any(_from_own(rule) for rule in rules):
        yield place.finding("network", "the job's pods do not reach each other", "let in pods of the same label")
    for port in OPERATOR_PORTS:
        if not any(_opens(rule, port, "TCP") and not _from_own(rule) for rule in rules):
            why = f"the operator does not reach port {port}, so that no job is submitted or watched"
            yield place.finding("network", why, "let the operator's namespace in")
    for rule in rules:
        if not rule["from"].value:
            yield rule["from"].finding("network", "everybody is let in", "name where from")
        elif not _from_own(rule):
            yield from _all_ports(rule)


def _ways_out(policies: list[Place]) -> Iterator[Finding]:
    rules = [rule for policy in policies for rule in policy["spec"]["egress"].items()]
    place = policies[0]["spec"]["egress"]
    if "Egress" not in _types(policies[0]):
        yield policies[0]["spec"]["policyTypes"].finding("network", "pods may send anywhere", "add Egress")
        return
    if not any(_selects(peer["podSelector"]) for rule in rules for peer in rule["to"].items() if _is_of_pods(peer)):
        yield place.finding("network", "the job's pods do not reach each other", "let out to pods of the same label")
    outward = [
        rule for rule in rules if not all(_is_of_pods(peer) for peer in rule["to"].items()) or not rule["to"].value
    ]
    for protocol in ("UDP", "TCP"):
        if not any(_opens(rule, 53, protocol) for rule in outward):
            yield place.finding("network", f"no name is resolved: DNS by {protocol} is closed", "open port 53")
    if not any(_opens(rule, 443, "TCP") for rule in outward):
        yield place.finding("network", "neither the bucket nor the API server is reached", "open port 443")
    for rule in outward:
        yield from _all_ports(rule)


def _all_ports(rule: Place) -> Iterator[Finding]:
    """A finding for a rule, or an entry of one, that opens every port."""
    if not rule["ports"].value:
        yield rule["ports"].finding("network", "every port is open", "name the ports")
    for one in rule["ports"].items():
        if not one["port"].is_there:
            yield one.finding("network", "every port is open", "write port: 443, or whichever it is")


def _selectors(policy: Place) -> Iterator[Finding]:
    """Selectors that mean everybody, or nobody."""
    selector = policy["spec"]["podSelector"]
    if not selector["matchLabels"].value and not selector["matchExpressions"].value:
        why = "every pod of the namespace is meant, also those of others"
        yield selector.finding("network", why, f"write matchLabels: {_written(MADE_BY)}")
    peers = [
        peer
        for kind, side in (("ingress", "from"), ("egress", "to"))
        for rule in policy["spec"][kind].items()
        for peer in rule[side].items()
    ]
    for peer in peers:
        if not peer.value:
            yield peer.finding("network", "an empty peer", "write podSelector, namespaceSelector or ipBlock")
        for key in ("podSelector", "namespaceSelector"):
            below = peer[key]
            is_all = not below["matchLabels"].value and not below["matchExpressions"].value
            if below.is_there and is_all and not (key == "podSelector" and peer["namespaceSelector"].is_there):
                yield below.finding("network", f"an empty {key} means all of them", "write matchLabels")
        for key, value in peer["namespaceSelector"]["matchLabels"].entries():
            if key != NAMESPACE_LABEL and get_close_matches(key, [NAMESPACE_LABEL], 1, 0.8):
                yield value.finding("label", f"no namespace carries {key}", f"write {NAMESPACE_LABEL}")
            near = get_close_matches(value.text, NAMESPACES, 1, 0.85)
            if not value.text or (near and value.text not in NAMESPACES):
                yield value.finding(
                    "reference", f"{value.value!r} is hardly a namespace", nearest(value.text, NAMESPACES)
                )


def _from_own(rule: Place) -> bool:
    return any(_is_of_pods(peer) and _selects(peer["podSelector"]) for peer in rule["from"].items())


def _is_of_pods(peer: Place) -> bool:
    return peer["podSelector"].is_there and not peer["namespaceSelector"].is_there


def _opens(rule: Place, port: int, protocol: str) -> bool:
    """True if a rule lets a port through; one without ports lets all."""
    if not rule["ports"].value:
        return True
    return any((one["protocol"].value or "TCP") == protocol and _is_in(one, port) for one in rule["ports"].items())


def _is_in(place: Place, port: int) -> bool:
    first, last = place["port"].value, place["endPort"].value
    if first is None:
        return True
    return first == port if not isinstance(last, int) or not isinstance(first, int) else first <= port <= last


def _types(policy: Place) -> list[str]:
    told = policy["spec"]["policyTypes"].value
    return told if isinstance(told, list) else ["Ingress", *(["Egress"] if policy["spec"]["egress"].is_there else [])]


def _directions(policy: Place) -> Iterator[Finding]:
    types = _types(policy)
    for key, kind in (("ingress", "Ingress"), ("egress", "Egress")):
        if policy["spec"][key].is_there and kind not in types:
            why = f"these rules do not count: {kind} is not among the types"
            yield policy["spec"][key].finding("network", why, f"add {kind} to policyTypes")


def _ports(policy: Place) -> Iterator[Finding]:
    for place in policy.walk():
        for one in place["ports"].items():
            first, last = one["port"].value, one["endPort"].value
            if str(first).isdecimal() and not (isinstance(first, int) and 0 < first < 65536):
                yield one["port"].finding("port", f"{first!r} is no port", "write a number from 1 to 65535")
            if last is not None and not (isinstance(first, int) and isinstance(last, int) and first <= last < 65536):
                yield one["endPort"].finding("port", f"{first} to {last} are no ports", "write port <= endPort")


def _addresses(policy: Place) -> Iterator[Finding]:
    for place in policy.walk():
        block = place["ipBlock"]
        if not block.is_there:
            continue
        network = _network(block["cidr"].text)
        if network is None:
            why = f"{block['cidr'].value!r} is no block of addresses"
            yield block["cidr"].finding("address", why, "write one such as 10.0.0.0/8")
            continue
        spared = []
        for one in block["except"].items():
            inner = _network(one.text)
            if inner is None or inner.version != network.version or not inner.subnet_of(network):  # pyright: ignore[reportArgumentType]
                yield one.finding("address", f"{one.value!r} is no part of {network}", "write one that is")
            else:
                spared.append(inner)
        is_meant = network.num_addresses == 1  # it is opened by its name
        if METADATA_ADDRESS in network and not is_meant and not any(METADATA_ADDRESS in one for one in spared):
            why = f"pods reach {METADATA_ADDRESS}, and with it the machine's own role"
            yield block["except"].finding("network", why, f"write except: [{METADATA_ADDRESS}/32]")


def _network(text: str):
    try:
        return ip_network(text)
    except ValueError:
        return None
