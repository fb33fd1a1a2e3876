"""Rules for jobs that wait in a queue of Kueue: the queue exists, its quota covers the job, Kueue takes the job."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from decimal import Decimal

from blocksight.cluster.checks.findings import Finding, Place, nearest
from blocksight.cluster.checks.pods import containers
from blocksight.cluster.checks.quantities import quantity
from blocksight.cluster.checks.references import Objects

QUEUE = "kueue.x-k8s.io/queue-name"
LABELS = (QUEUE, "kueue.x-k8s.io/priority-class", "kueue.x-k8s.io/max-exec-time-seconds")
ELASTIC = "kueue.x-k8s.io/elastic-job"
MAX_GROUPS = 7


def queue_findings(objects: Objects) -> Iterator[Finding]:
    """What is wrong with the queues of a set of files, and with the jobs that wait in them."""
    for queue in objects.of_kind("LocalQueue"):
        yield from _cluster_queue(queue, objects)
    for queue in objects.of_kind("ClusterQueue"):
        yield from _quotas(queue, objects)
    for job in objects.of_kind("RayJob"):
        yield from _labels(job)
        name = job["metadata"]["labels"][QUEUE]
        if name.is_there:
            yield from objects.missing("LocalQueue", name, job)
            yield from _refused(job)
            yield from _covered(job, objects)
        elif job["spec"]["suspend"].value:
            why = "the job waits for ever: it is suspended, and no queue is named that would wake it"
            yield job["spec"]["suspend"].finding("queue", why, f"add the label {QUEUE}, or leave suspend out")


def _labels(job: Place) -> Iterator[Finding]:
    for key, value in job["metadata"]["labels"].entries():
        if key.startswith("kueue.") and key not in LABELS:
            yield value.finding("queue", f"Kueue knows no label {key}", nearest(key, LABELS))


def _cluster_queue(queue: Place, objects: Objects) -> Iterator[Finding]:
    name = queue["spec"]["clusterQueue"]
    known = [one["metadata"]["name"].text for one in objects.of_kind("ClusterQueue")]
    if name.text not in known:
        yield name.finding("reference", f"no ClusterQueue {name.value!r} is in these files", nearest(name.text, known))


def _quotas(queue: Place, objects: Objects) -> Iterator[Finding]:
    known = [one["metadata"]["name"].text for one in objects.of_kind("ResourceFlavor")]
    if queue["spec"]["namespaceSelector"].value is None:
        why = "no namespace may use the queue"
        yield queue["spec"]["namespaceSelector"].finding("queue", why, "write namespaceSelector: {} for all")
    for group in queue["spec"]["resourceGroups"].items():
        covered = group["coveredResources"].value or []
        for flavor in group["flavors"].items():
            name = flavor["name"]
            if name.text not in known:
                why = f"no ResourceFlavor {name.value!r} is in these files"
                yield name.finding("reference", why, nearest(name.text, known))
            told = [one["name"].text for one in flavor["resources"].items()]
            if told != covered:
                why = f"quotas of {', '.join(told)} for the covered resources {', '.join(map(str, covered))}"
                yield flavor["resources"].finding("queue", why, "give each covered resource one quota, in that order")
            for one in flavor["resources"].items():
                if quantity(one["nominalQuota"].value) is None:
                    why = f"{one['nominalQuota'].value!r} is no amount"
                    yield one["nominalQuota"].finding("quantity", why, "write a number with its unit, such as 24Gi")


def _refused(job: Place) -> Iterator[Finding]:
    """What Kueue's own check of a RayJob refuses."""
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    if spec["suspend"].value is not True:
        yield spec["suspend"].finding("queue", "the job does not wait for the queue", "write suspend: true")
    if spec["clusterSelector"].is_there:
        yield spec["clusterSelector"].finding("queue", "Kueue refuses jobs on a standing cluster", "leave it out")
    if not spec["shutdownAfterJobFinishes"].value:
        why = "the cluster would keep its share of the quota"
        yield spec["shutdownAfterJobFinishes"].finding("queue", why, "write true")
    if cluster["enableInTreeAutoscaling"].value and job["metadata"]["annotations"][ELASTIC].value != "true":
        why = "Kueue refuses a job that scales by itself"
        yield cluster["enableInTreeAutoscaling"].finding("queue", why, "write false, and fix the number of replicas")
    groups = list(cluster["workerGroupSpecs"].items())
    if len(groups) > MAX_GROUPS:
        yield cluster["workerGroupSpecs"].finding("queue", f"Kueue takes {MAX_GROUPS} groups", "join some")
    for group in groups:
        if group["groupName"].text == "head":
            yield group["groupName"].finding("queue", "Kueue keeps this name for the head", "give it another")
        if not group["replicas"].value and not cluster["enableInTreeAutoscaling"].value:
            why = "no worker is asked for, and none is added later"
            yield group["replicas"].finding("queue", why, "write how many workers the job has")


def _covered(job: Place, objects: Objects) -> Iterator[Finding]:
    """Every resource of the job's pods must have a quota, and a large enough one."""
    label = job["metadata"]["labels"][QUEUE]
    local = objects.named("LocalQueue", label.text, job)
    queues = {one["metadata"]["name"].text: one for one in objects.of_kind("ClusterQueue")}
    queue = queues.get(local["spec"]["clusterQueue"].text) if local is not None else None
    if queue is None:
        return
    quotas: defaultdict[str, Decimal] = defaultdict(Decimal)
    for group in queue["spec"]["resourceGroups"].items():
        for flavor in group["flavors"].items():
            for one in flavor["resources"].items():
                quotas[one["name"].text] += quantity(one["nominalQuota"].value) or Decimal(0)
    place = queue["spec"]["resourceGroups"]
    for name, wanted in sorted(needs_of(job).items()):
        if name not in quotas:
            yield place.finding("queue", f"no quota covers {name}, so the job never starts", f"add {name}")
        elif wanted > quotas[name]:
            why = f"the job wants {wanted:f} of {name}, the quota is {quotas[name]:f}: it never starts"
            yield place.finding("queue", why, "raise the quota, or take fewer workers")


def needs_of(job: Place) -> Mapping[str, Decimal]:
    """What a RayJob's pods ask for together, by resource: submitter, head, and all replicas."""
    cluster = job["spec"]["rayClusterSpec"]
    counted = [(1, job["spec"]["submitterPodTemplate"]), (1, cluster["headGroupSpec"]["template"])]
    for group in cluster["workerGroupSpecs"].items():
        replicas = group["replicas"].value
        counted.append((replicas if isinstance(replicas, int) else 0, group["template"]))
    total: defaultdict[str, Decimal] = defaultdict(Decimal)
    for count, template in counted:
        for container in containers(template["spec"]):
            resources = container["resources"]
            for name in {*_names(resources["requests"]), *_names(resources["limits"])}:
                place = resources["requests"][name]
                told = place.value if place.is_there else resources["limits"][name].value
                total[name] += count * (quantity(told) or Decimal(0))
    return total


def _names(place: Place) -> list[str]:
    return [name for name, _ in place.entries()]
