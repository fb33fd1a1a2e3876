"""Rules for the pods that a file describes: enumerations, references inside a pod, privileges, amounts, signals."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from difflib import get_close_matches

from blocksight.cluster.checks.findings import Finding, Place, nearest
from blocksight.cluster.checks.images import image_findings
from blocksight.cluster.checks.object_schemas import EFFECTS
from blocksight.cluster.checks.quantities import quantity
from blocksight.cluster.checks.variables import variable_findings

ENUMS: Mapping[str, tuple[str, ...]] = {
    "restartPolicy": ("Always", "OnFailure", "Never"),
    "dnsPolicy": ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"),
    "preemptionPolicy": ("PreemptLowerPriority", "Never"),
    "imagePullPolicy": ("Always", "IfNotPresent", "Never"),
    "terminationMessagePolicy": ("File", "FallbackToLogsOnError"),
    "protocol": ("TCP", "UDP", "SCTP"),
    "effect": EFFECTS,
    "whenUnsatisfiable": ("DoNotSchedule", "ScheduleAnyway"),
    "fsGroupChangePolicy": ("Always", "OnRootMismatch"),
    "procMount": ("Default", "Unmasked"),
    "medium": ("", "Memory", "HugePages", "HugePages-2Mi", "HugePages-1Gi"),
    "mountPropagation": ("None", "HostToContainer", "Bidirectional"),
    "scheme": ("HTTP", "HTTPS"),
}
"""Fields of a pod that take few values, which the schemas of custom resources do not list."""
TOLERATION_OPERATORS = ("Exists", "Equal")
NODE_OPERATORS = ("In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt")
SECCOMP = ("RuntimeDefault", "Localhost")
AMOUNTS = ("cpu", "memory")
"""What each container must ask for and be limited to."""

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
OBJECT_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
LABEL_KEY = re.compile(r"([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?")
VARIABLE = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")

GPU = "nvidia.com/gpu"
NODE_LABELS: Mapping[str, tuple[str, ...]] = {
    "karpenter.sh/capacity-type": ("spot", "on-demand", "reserved"),
    "karpenter.sh/nodepool": (),
    "eks.amazonaws.com/capacityType": ("SPOT", "ON_DEMAND", "CAPACITY_BLOCK"),
    "eks.amazonaws.com/nodegroup": (),
    "eks.amazonaws.com/compute-type": (),
    "cloud.google.com/gke-spot": ("true",),
    "cloud.google.com/gke-provisioning": ("spot", "standard", "preemptible"),
    "cloud.google.com/gke-accelerator": (),
    "cloud.google.com/gke-nodepool": (),
    "cloud.google.com/machine-family": (),
    "cloud.google.com/compute-class": (),
    "kubernetes.io/arch": ("amd64", "arm64"),
    "kubernetes.io/os": ("linux",),
    "kubernetes.io/hostname": (),
    "node.kubernetes.io/instance-type": (),
    "topology.kubernetes.io/region": (),
    "topology.kubernetes.io/zone": (),
    "nvidia.com/gpu.product": (),
    "nvidia.com/gpu.present": ("true",),
    "nvidia.com/gpu.memory": (),
    "nvidia.com/gpu.count": (),
}
"""Labels that clouds give to nodes, each with its values if they are few."""
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
DEFAULT_SECONDS = 30
"""Of Ray's drain and of Kubernetes' grace, where a file says nothing."""
MOST_GRACE_SECONDS = 3600


def pod_findings(template: Place) -> Iterator[Finding]:
    """What is wrong with a pod template, apart from its schema and what it names outside of itself."""
    pod = template["spec"]
    yield from _enums(pod)
    yield from label_findings(template["metadata"]["labels"])
    yield from label_findings(pod["nodeSelector"])
    for toleration in pod["tolerations"].items():
        yield from _toleration(toleration)
    yield from _twins((one["name"] for one in pod["volumes"].items()), "volumes")
    yield from _twins((one["name"] for one in containers(pod)), "containers")
    if not list(pod["containers"].items()):
        yield pod["containers"].finding("pod", "the pod has no container", "add one; Ray's comes first")
    yield from _users(pod["securityContext"])
    yield from _node_labels(pod)
    yield from _taints(pod)
    yield from _shared_host(pod)
    for volume in pod["volumes"].items():
        yield from _volume(volume)
    for container in containers(pod):
        yield from image_findings(container["image"])
        yield from _privileges(pod, container)
        yield from _users(container["securityContext"])
        yield from _amounts(container)
        yield from _mounts(pod, container)
        yield from _ports(container)
        yield from _variables(container)


def containers(pod: Place) -> Iterator[Place]:
    """All containers of a pod."""
    for kind in ("initContainers", "containers"):
        yield from pod[kind].items()


def _enums(pod: Place) -> Iterator[Finding]:
    for place in pod.walk():
        for key, value in place.entries():
            known = ENUMS.get(key, ())
            if known and isinstance(value.value, str) and value.value not in known:
                why = f"{value.value!r} is not among {', '.join(filter(None, known))}"
                yield value.finding("enum", why, nearest(value.value, filter(None, known)))
    for key, known in (("seccompProfile", SECCOMP), ("appArmorProfile", SECCOMP)):
        for place in pod.walk():
            kind = place[key]["type"]
            if kind.is_there and kind.value not in known:
                yield kind.finding("enum", f"{kind.value!r} is not among {', '.join(known)}", nearest(kind.text, known))
    for place in pod["affinity"].walk():
        operator = place["operator"]
        if operator.is_there and operator.value not in NODE_OPERATORS:
            why = f"{operator.value!r} is not among {', '.join(NODE_OPERATORS)}"
            yield operator.finding("enum", why, nearest(operator.text, NODE_OPERATORS))


def label_findings(labels: Place) -> Iterator[Finding]:
    """Labels whose key or value Kubernetes refuses."""
    for key, value in labels.entries():
        if LABEL_KEY.fullmatch(key) is None:
            yield value.finding(
                "label", f"{key!r} is no key of a label", "write prefix/name or name, at most 63 letters"
            )
        if LABEL_VALUE.fullmatch(value.text) is None:
            why = f"{value.value!r} is no value of a label"
            yield value.finding("label", why, "write at most 63 letters, digits, -, _ and .")


def _toleration(place: Place) -> Iterator[Finding]:
    operator = place["operator"].value or "Equal"
    if operator not in TOLERATION_OPERATORS:
        why = f"{operator!r} is not among {', '.join(TOLERATION_OPERATORS)}"
        yield place["operator"].finding("enum", why, nearest(str(operator), TOLERATION_OPERATORS))
    if operator == "Exists" and place["value"].text:
        yield place["value"].finding("toleration", "Exists takes no value", "leave it out, or write operator: Equal")
    if not place["key"].text:
        why = "without a key every taint is tolerated, also that of a broken node"
        yield place.finding("toleration", why, "name the key of the taint")
    elif operator == "Equal" and not place["value"].text:
        why = "Equal compares with a value, and there is none"
        yield place["operator"].finding("toleration", why, "write operator: Exists, or the taint's value")
    if place["tolerationSeconds"].is_there and place["effect"].value != "NoExecute":
        yield place["tolerationSeconds"].finding("toleration", "it counts for NoExecute alone", "leave it out")


def _taints(pod: Place) -> Iterator[Finding]:
    """Nodes with GPUs carry a taint, which keeps other pods away."""
    wants = any(container["resources"]["limits"][GPU].is_there for container in pod["containers"].items())
    if wants and GPU not in [one["key"].text for one in pod["tolerations"].items()]:
        why = f"nodes with GPUs carry the taint {GPU}, and no pod of these would run there"
        yield pod["tolerations"].finding("toleration", why, f"tolerate {{key: {GPU}, operator: Exists}}")


def _node_labels(pod: Place) -> Iterator[Finding]:
    """Labels of well-known kinds that no node carries, so that the pod would wait for ever."""
    for key, value in pod["nodeSelector"].entries():
        known = [one for one in NODE_LABELS if one.partition("/")[0] == key.partition("/")[0]]
        near = get_close_matches(key, NODE_LABELS, 1, 0.85)
        if key not in NODE_LABELS and (known or near):
            yield value.finding("label", f"no node carries the label {key}", nearest(key, [*known, *near]))
        values = NODE_LABELS.get(key, ())
        if values and value.text not in values:
            why = f"{value.value!r} is not among {', '.join(values)}"
            yield value.finding("enum", why, nearest(value.text, values))


def _users(context: Place) -> Iterator[Finding]:
    for key in ("runAsUser", "runAsGroup", "fsGroup"):
        number = context[key].value
        if isinstance(number, int) and not 0 <= number < 1 << 31:
            yield context[key].finding("user", f"{number} is no number of a user or group", "write 1000")


def _twins(names: Iterable[Place], what: str) -> Iterator[Finding]:
    places = list(names)
    counts = Counter(place.text for place in places)
    for place in places:
        if counts[place.text] > 1:
            yield place.finding("name", f"two {what} have the name {place.text!r}", "give each a name of its own")
        elif NAME.fullmatch(place.text) is None:
            yield place.finding("name", f"{place.text!r} is no name", "write lower case letters, digits and -")


def _shared_host(pod: Place) -> Iterator[Finding]:
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod[key].value:
            yield pod[key].finding("privilege", "the pod shares the machine's own", "leave it out")
    if pod["hostUsers"].value is True:
        yield pod["hostUsers"].finding("privilege", "the pod's users are the machine's", "leave it out")


def _volume(volume: Place) -> Iterator[Finding]:
    sources = [key for key, _ in volume.entries() if key != "name"]
    if len(sources) != 1:
        why = f"a volume comes from one source, this one from {', '.join(sources) or 'none'}"
        yield volume.finding("volume", why, "write one, such as configMap or emptyDir")
    if "hostPath" in sources:
        yield volume["hostPath"].finding(
            "privilege", "the pod sees files of the machine", "take an emptyDir or a claim"
        )
    size = volume["emptyDir"]["sizeLimit"]
    if size.is_there and quantity(size.value) is None:
        yield size.finding("quantity", f"{size.value!r} is no amount", "write a number with its unit, such as 24Gi")


def _privileges(pod: Place, container: Place) -> Iterator[Finding]:
    """What the Pod Security Standard "restricted" refuses."""
    own, shared = container["securityContext"], pod["securityContext"]
    yield from context_findings(own)
    user = own["runAsUser"].value if own["runAsUser"].is_there else shared["runAsUser"].value
    if user == 0:
        yield own["runAsUser"].finding("privilege", "the container runs as root", "write runAsUser: 1000")
    non_root = own["runAsNonRoot"].value if own["runAsNonRoot"].is_there else shared["runAsNonRoot"].value
    if non_root is not True:
        yield own["runAsNonRoot"].finding("privilege", "the container may run as root", "write runAsNonRoot: true")
    seccomp = own["seccompProfile"]["type"].value or shared["seccompProfile"]["type"].value
    if seccomp not in SECCOMP:
        why = "the container may make every system call"
        yield own["seccompProfile"].finding("privilege", why, "write seccompProfile: {type: RuntimeDefault}")


def context_findings(context: Place) -> Iterator[Finding]:
    """What a container's security context allows beyond the standard "restricted"."""
    if context["privileged"].value:
        yield context["privileged"].finding("privilege", "the container owns the machine", "leave it out")
    if context["allowPrivilegeEscalation"].value is not False:
        why = "a program in the container may gain rights"
        yield context["allowPrivilegeEscalation"].finding("privilege", why, "write allowPrivilegeEscalation: false")
    if "ALL" not in (context["capabilities"]["drop"].value or []):
        yield context["capabilities"].finding("privilege", "capabilities are kept", "write capabilities: {drop: [ALL]}")
    for added in context["capabilities"]["add"].items():
        yield added.finding("privilege", f"the capability {added.value} is added", "leave it out: Ray needs none")
    if context["procMount"].value == "Unmasked":
        yield context["procMount"].finding("privilege", "/proc of the machine is open", "leave it out")


def _amounts(container: Place) -> Iterator[Finding]:
    asked, limits = container["resources"]["requests"], container["resources"]["limits"]
    for place in (asked, limits):
        for _, value in place.entries():
            if quantity(value.value) is None:
                why = f"{value.value!r} is no amount"
                yield value.finding("quantity", why, "write a number with its unit, such as 24Gi or 500m")
    for name in AMOUNTS:
        if not limits[name].is_there:
            why = f"nothing limits the container's {name}, and Ray counts the machine's"
            yield limits.finding("amount", why, f"write limits: {{{name}: ...}}")
    for name, limit in limits.entries():
        yield from _amount(name, asked[name], limit)
    for name, value in asked.entries():
        if not limits[name].is_there and name not in AMOUNTS:
            yield value.finding("amount", f"{name} is asked for and not limited", f"limit {name} to the same")


def _amount(name: str, asked: Place, limit: Place) -> Iterator[Finding]:
    least, most = quantity(asked.value), quantity(limit.value)
    if most is not None and most <= 0:
        yield limit.finding("amount", f"a limit of no {name}", "write how much the container needs")
    if least is not None and most is not None and least > most:
        why = f"{asked.value} is asked for, but {limit.value} is the limit"
        yield asked.finding("amount", why, "ask for the limit at most")
    if "/" in name and most is not None and (least not in (None, most) or most != int(most)):
        why = f"a limit of {limit.value}, and {asked.value or 'the same'} asked for: devices come whole"
        yield limit.finding("amount", why, "write the same whole number in both")


def _mounts(pod: Place, container: Place) -> Iterator[Finding]:
    known = [volume["name"].text for volume in pod["volumes"].items()]
    paths = Counter(mount["mountPath"].text for mount in container["volumeMounts"].items())
    for mount in container["volumeMounts"].items():
        if mount["name"].text not in known:
            why = f"the pod has no volume {mount['name'].value!r}"
            yield mount["name"].finding("reference", why, nearest(mount["name"].text, known) if known else "add it")
        path = mount["mountPath"]
        if not path.text.startswith("/") or ".." in path.text.split("/"):
            yield path.finding("path", f"{path.value!r} is no place in a container", "write a path from the root: /...")
        if paths[path.text] > 1:
            yield path.finding("path", f"two volumes are mounted at {path.text}", "mount them at two places")


def _ports(container: Place) -> Iterator[Finding]:
    for port in container["ports"].items():
        number = port["containerPort"]
        if not isinstance(number.value, int) or not 0 < number.value < 65536:
            yield number.finding("port", f"{number.value!r} is no port", "write a number from 1 to 65535")
        if port["hostPort"].value:
            yield port["hostPort"].finding("privilege", "the container takes a port of the machine", "leave it out")


def _variables(container: Place) -> Iterator[Finding]:
    counts = Counter(one["name"].text for one in container["env"].items())
    for one in container["env"].items():
        name = one["name"]
        if VARIABLE.fullmatch(name.text) is None:
            yield name.finding("name", f"{name.value!r} is no name of a variable", "write letters, digits and _")
        elif counts[name.text] > 1:
            yield name.finding("name", f"{name.text} is set twice, and the last one counts", "set it once")
        if one["value"].is_there and one["valueFrom"].is_there:
            yield one.finding("variable", f"{name.text} has a value and a reference to one", "leave one of the two")
        elif not one["value"].text and not one["valueFrom"].is_there:
            yield one.finding("variable", f"{name.text} has no value", "give it one, or leave it out")
        yield from variable_findings(name.text, name, one["value"])


def variable(container: Place, name: str) -> Place:
    """The place of a variable's value; of a place without a value if it is not set."""
    for one in container["env"].items():
        if one["name"].text == name:
            return one["value"]
    return container["env"][name]


def end_findings(pod: Place, container: Place, commit_seconds: float) -> Iterator[Finding]:
    """A worker that is told to end must have the time: grace > drain > commit."""
    told = variable(container, DRAIN)
    drain = quantity(told.value) if told.is_there else Decimal(DEFAULT_SECONDS)
    if drain is None:
        yield told.finding("quantity", f"{told.value!r} is no number of seconds", 'write "60"')
        return
    grace = pod["terminationGracePeriodSeconds"]
    seconds = grace.value if isinstance(grace.value, int) else DEFAULT_SECONDS
    if drain <= Decimal(commit_seconds):
        why = f"{drain} s of drain end before a worker's commit, which may take {commit_seconds:g} s"
        yield told.finding("grace", why, f"set {DRAIN} to 60")
    if seconds > MOST_GRACE_SECONDS:
        why = f"a pod that hangs is kept for {seconds} s"
        yield grace.finding("grace", why, f"write {drain + 30}")
    if seconds <= drain:
        why = f"the pod is killed after {seconds} s, while Ray drains it for {drain} s"
        yield grace.finding("grace", why, f"write terminationGracePeriodSeconds: {drain + 30}")
