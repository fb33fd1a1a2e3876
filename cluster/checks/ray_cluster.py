"""Rules for the Ray cluster of a RayJob or RayCluster: its token, scaling, head and workers."""

import json
from collections import Counter
from collections.abc import Iterator

from blocksight.cluster.checks.beside import OPEN_SERVICES, service_findings
from blocksight.cluster.checks.commands import Product
from blocksight.cluster.checks.findings import Finding, Place
from blocksight.cluster.checks.images import image_findings
from blocksight.cluster.checks.pods import (
    GPU,
    NAME,
    context_findings,
    end_findings,
    label_findings,
    pod_findings,
    variable,
)
from blocksight.cluster.checks.quantities import quantity
from blocksight.cluster.checks.ray_options import ray_version_fault, start_option_findings

MAX_NAME_LETTERS = {"RayJob": 47, "RayCluster": 63}
SET_BY_RAY_START = ("num-cpus", "num-gpus", "memory", "resources")
SPOT = ("karpenter.sh/capacity-type", "cloud.google.com/gke-spot", "eks.amazonaws.com/capacityType")
"""Keys of labels that put a pod on machines which may be taken away."""
MOST_IDLE_SECONDS = 3600
MEASURED = {"num-cpus": ("cpu", "CPU"), "num-gpus": (GPU, "GPU"), "memory": ("memory", "memory")}
"""What `ray start` is told of a node, with the name of the container's limit and of the group's resource."""
REDIS = ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME")


def name_findings(place: Place) -> Iterator[Finding]:
    """The operator puts the name into the names of services, so that it is shorter than others."""
    name, most = place["metadata"]["name"], MAX_NAME_LETTERS[place["kind"].text]
    if len(name.text) > most:
        yield name.finding("name", f"{len(name.text)} letters; KubeRay takes {most}", "shorten it")
    if NAME.fullmatch(name.text) is None or name.text[:1].isdigit():
        yield name.finding(
            "name", f"{name.text!r} is no name", "write lower case letters, digits and -, a letter first"
        )


def cluster_findings(spec: Place, product: Product) -> Iterator[Finding]:
    """What is wrong with a RayCluster's spec."""
    yield from _token(spec)
    yield from _scaling(spec)
    yield from _head(spec["headGroupSpec"], spec)
    groups = list(spec["workerGroupSpecs"].items())
    if not groups:
        yield spec["workerGroupSpecs"].finding("workers", "the cluster has no workers", "add a group")
    counts = Counter(group["groupName"].text for group in groups)
    for group in groups:
        if counts[group["groupName"].text] > 1:
            yield group["groupName"].finding("name", "two groups have this name", "give each a name of its own")
        yield from _workers(group, spec, product)


def _token(spec: Place) -> Iterator[Finding]:
    mode, version = spec["authOptions"]["mode"], spec["rayVersion"]
    is_on = spec["authOptions"].is_there and mode.value in (None, "token")
    if not is_on:
        why = "without a token, whoever reaches the head runs code there"
        yield mode.finding("token", why, "write authOptions: {mode: token}")
    if not version.text:
        yield version.finding("token", "KubeRay gives a token only where the version is said", "write rayVersion")
    elif (fault := ray_version_fault(version.text)) is not None:
        yield version.finding("version", *fault)


def token_variable_findings(pod: Place) -> Iterator[Finding]:
    """A finding if a pod turns the token off."""
    for container in list(pod["containers"].items())[:1]:
        told = variable(container, "RAY_AUTH_MODE")
        if told.is_there and told.value != "token":
            yield told.finding("token", f"{told.value!r} turns the token off in this pod", "write token")


def _scaling(spec: Place) -> Iterator[Finding]:
    options, scales = spec["autoscalerOptions"], spec["enableInTreeAutoscaling"].value
    for place in (options, *spec["workerGroupSpecs"].items()):
        yield from idle_findings(place["idleTimeoutSeconds"])
    if scales:
        yield from context_findings(options["securityContext"])
    elif options.is_there:
        yield options.finding("scaling", "they count with enableInTreeAutoscaling alone", "leave one of the two out")
    if scales and options["version"].value != "v2":
        pods = [spec["headGroupSpec"], *spec["workerGroupSpecs"].items()]
        for group in pods:
            if group["idleTimeoutSeconds"].is_there or group["priority"].value:
                yield group.finding("scaling", "idleTimeoutSeconds and priority need v2", "write version: v2")
    head = next(iter(spec["headGroupSpec"]["template"]["spec"]["containers"].items()), None)
    if head is not None and variable(head, "RAY_enable_autoscaler_v2").is_there:
        place = variable(head, "RAY_enable_autoscaler_v2")
        yield place.finding("scaling", "autoscalerOptions.version decides", "leave the variable out")
    if options["image"].is_there:
        yield from image_findings(options["image"])
    for resource, value in options["resources"]["limits"].entries():
        asked = options["resources"]["requests"][resource]
        if (quantity(asked.value) or 0) > (quantity(value.value) or 0):
            yield asked.finding("amount", f"{asked.value} is asked for, but {value.value} is the limit", "ask for less")


def idle_findings(place: Place) -> Iterator[Finding]:
    """A finding if the time that a worker without work is kept is none, or costs."""
    if place.is_there and not 0 < number(place) <= MOST_IDLE_SECONDS:
        why = f"a worker without work is kept for {place.value} s"
        yield place.finding("idle", why, f"write 1 to {MOST_IDLE_SECONDS}")


def _head(group: Place, spec: Place) -> Iterator[Finding]:
    yield from _group(group, spec)
    pod = group["template"]["spec"]
    cpus = group["rayStartParams"]["num-cpus"]
    own = group["resources"]["CPU"]
    if (own if own.is_there else cpus).value not in ("0", 0):
        why = "the head takes work, which dies with the driver, and stands in the driver's memory"
        yield cpus.finding("head", why, 'write num-cpus: "0"')
    yield from _open_doors(group)
    yield from _spot(pod)
    if spec["enableInTreeAutoscaling"].value and not pod["serviceAccountName"].text:
        why = "the operator scales by the head's account, and without one of its own it is made beside these files"
        yield pod["serviceAccountName"].finding("account", why, "name a ServiceAccount of these files")
    for container in list(pod["containers"].items())[:1]:
        for name in REDIS:
            if variable(container, name).is_there:
                why = f"{name} turns on a second truth beside the bucket"
                yield variable(container, name).finding("head", why, "leave it out, or write gcsFaultToleranceOptions")


def _open_doors(head: Place) -> Iterator[Finding]:
    """What shows the head outside of the cluster."""
    if head["serviceType"].value in OPEN_SERVICES:
        why = f"a {head['serviceType'].value} shows the dashboard and the jobs' port, which run code, to others"
        yield head["serviceType"].finding("open", why, "write ClusterIP, and reach it by kubectl port-forward")
    yield from service_findings(head["headService"]["spec"])
    if head["enableIngress"].value:
        why = "an Ingress shows the dashboard, which runs code, outside of the cluster"
        yield head["enableIngress"].finding("open", why, "leave it out, and reach it by kubectl port-forward")


def _spot(pod: Place) -> Iterator[Finding]:
    places = [*(pod["nodeSelector"][key] for key in SPOT)]
    for place in places:
        if place.text.lower() in ("spot", "true"):
            yield place.finding("head", "a spot machine may be taken away, and the driver with it", "leave it out here")


def _workers(group: Place, spec: Place, product: Product) -> Iterator[Finding]:
    yield from _group(group, spec)
    pod = group["template"]["spec"]
    if NAME.fullmatch(group["groupName"].text) is None:
        yield group["groupName"].finding("name", f"{group['groupName'].value!r} is no name", "write lower case letters")
    yield from _replicas(group)
    yield from access_findings(pod)
    for container in list(pod["containers"].items())[:1]:
        yield from end_findings(pod, container, product.commit_seconds)
    if group["suspend"].value and spec["enableInTreeAutoscaling"].value:
        yield group["suspend"].finding("scaling", "a group that scales cannot be suspended", "leave it out")


def _replicas(group: Place) -> Iterator[Finding]:
    least, most = number(group["minReplicas"]), group["maxReplicas"]
    wanted = group["replicas"]
    for place in (group["minReplicas"], most, wanted):
        if number(place) < 0:
            yield place.finding("replicas", f"{place.value} is less than none", "write 0 or more")
    if not most.is_there:
        yield most.finding("replicas", "nothing limits the number of workers, nor what they cost", "write maxReplicas")
    elif number(most) < 1:
        yield most.finding("replicas", "no worker may ever start", "write maxReplicas: 1 or more")
    if most.is_there and least > number(most):
        why = f"at least {least} and at most {most.value} workers"
        yield group["minReplicas"].finding("replicas", why, "write minReplicas <= maxReplicas")
    if wanted.is_there and most.is_there and not least <= number(wanted) <= max(least, number(most)):
        why = f"{wanted.value} workers, but {least} to {most.value} are allowed"
        yield wanted.finding("replicas", why, "write a number between the two")


def access_findings(pod: Place) -> Iterator[Finding]:
    """A finding if a pod can speak to the API server, or is of no account of its own."""
    place = pod["automountServiceAccountToken"]
    if place.value is not False:
        why = "the pod reads strangers' files and can speak to the API server"
        yield place.finding("account", why, "write automountServiceAccountToken: false")
    if not pod["serviceAccountName"].text:
        why = "the pod runs as the namespace's default account, whose rights nobody here knows"
        yield pod["serviceAccountName"].finding("account", why, "name a ServiceAccount of these files")


def _group(group: Place, spec: Place) -> Iterator[Finding]:
    template, params = group["template"], group["rayStartParams"]
    yield from pod_findings(template)
    yield from label_findings(group["labels"])
    yield from start_option_findings(params)
    yield from token_variable_findings(template["spec"])
    if params["labels"].is_there:
        yield params["labels"].finding("scaling", "KubeRay refuses it here", "write the group's own labels")
    if group["resources"].value and any(params[name].is_there for name in SET_BY_RAY_START):
        yield group["resources"].finding("scaling", "rayStartParams says resources too", "leave one of the two out")
    yield from _promises(group)
    text = params["resources"].text.strip("'\"").replace("\\", "")
    if text and not _is_json(text):
        yield params["resources"].finding("scaling", f"{text!r} is no JSON", "write '{\"name\": 1}'")
    restart = template["spec"]["restartPolicy"]
    if spec["autoscalerOptions"]["version"].value == "v2" and restart.value not in (None, "Never"):
        why = "the autoscaler v2 replaces pods itself, and KubeRay refuses another policy"
        yield restart.finding("restart", why, "write restartPolicy: Never")


def _promises(group: Place) -> Iterator[Finding]:
    """Resources that Ray is told of, and that the container has not: two actors then share what is one's."""
    limits = next(iter(group["template"]["spec"]["containers"].items()), group)["resources"]["limits"]
    for option, (limit, resource) in MEASURED.items():
        for place in (group["rayStartParams"][option], group["resources"][resource]):
            told, has = quantity(place.value), quantity(limits[limit].value) or 0
            if told is not None and told > has:
                why = (
                    f"Ray is told of {place.value}, and the container's limit of {limit} is {limits[limit].value or 0}"
                )
                yield place.finding("amount", why, "leave it out: KubeRay tells Ray the limits")


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def number(place: Place) -> float:
    """The number at a place; 0 if there is none."""
    return place.value if isinstance(place.value, (int, float)) and not isinstance(place.value, bool) else 0
