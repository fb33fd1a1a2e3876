"""Rules for a RayJob: what the operator of KubeRay refuses, and what would lose work or money."""

import re
from collections.abc import Iterator

from blocksight.cluster.checks.commands import Product, command_findings
from blocksight.cluster.checks.documents import DocumentError, yaml_documents
from blocksight.cluster.checks.findings import Finding, Place, nearest
from blocksight.cluster.checks.literals import secret_findings
from blocksight.cluster.checks.pods import pod_findings
from blocksight.cluster.checks.ray_cluster import access_findings, cluster_findings, number, token_variable_findings

SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
DEADLINES = {"activeDeadlineSeconds": "a job that hangs", "preRunningDeadlineSeconds": "a cluster that never starts"}
MANAGERS = ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
MOST_TTL_SECONDS = 86_400
MOST_RETRIES = 100
PLAIN_WORDS = re.compile(r"[A-Za-z0-9_@%+=:,./ -]*")
"""A command that every shell leaves as it is."""


def ray_job_findings(job: Place, product: Product) -> Iterator[Finding]:
    """What is wrong with a RayJob, apart from its schema and what it names outside of itself."""
    spec = job["spec"]
    yield from _mode(spec)
    yield from _shutdown(spec)
    yield from _deadlines(spec)
    yield from _retries(spec)
    yield from _deletion(spec)
    yield from _submission(spec)
    yield from _entrypoint(spec["entrypoint"], product)
    for key in ("entrypointNumCpus", "entrypointNumGpus", "entrypointResources"):
        if spec[key].value:
            why = "the driver waits for a worker, and no worker comes before the driver asks for it"
            yield spec[key].finding("entrypoint", why, "leave it out: the driver runs on the head")
    for place in (spec["managedBy"], spec["rayClusterSpec"]["managedBy"]):
        if place.is_there and place.value not in MANAGERS:
            why = f"{place.value!r} is not among {', '.join(MANAGERS)}"
            yield place.finding("enum", why, nearest(place.text, MANAGERS))
    yield from _runtime_env(spec["runtimeEnvYAML"])
    if spec["rayClusterSpec"].is_there:
        yield from cluster_findings(spec["rayClusterSpec"], product)


def _mode(spec: Place) -> Iterator[Finding]:
    mode = spec["submissionMode"]
    if mode.is_there and mode.value not in SUBMISSION_MODES:
        why = f"{mode.value!r} is not among {', '.join(SUBMISSION_MODES)}"
        yield mode.finding("enum", why, nearest(mode.text, SUBMISSION_MODES))
    if not spec["rayClusterSpec"].is_there and not spec["clusterSelector"].is_there:
        yield spec.finding("cluster", "the job has no cluster", "write rayClusterSpec")
    if spec["rayClusterSpec"].is_there and spec["clusterSelector"].is_there:
        why = "the job runs on the cluster that is selected, and nothing of rayClusterSpec is made"
        yield spec["clusterSelector"].finding("cluster", why, "leave one of the two out")


def _shutdown(spec: Place) -> Iterator[Finding]:
    """The cluster goes with the job."""
    ttl, is_shut = spec["ttlSecondsAfterFinished"], spec["shutdownAfterJobFinishes"].value
    way_out = "write shutdownAfterJobFinishes: true"
    if spec["suspend"].value and not is_shut:
        yield spec["suspend"].finding("shutdown", "a job that is suspended must shut its cluster down", way_out)
    if number(ttl) > 0 and not is_shut:
        yield ttl.finding("shutdown", "KubeRay refuses it without shutdownAfterJobFinishes", way_out)
    elif not is_shut and not spec["deletionStrategy"].is_there:
        place = spec["shutdownAfterJobFinishes"]
        yield place.finding("shutdown", "the cluster stays, and costs, after the job", way_out)


def _deadlines(spec: Place) -> Iterator[Finding]:
    for key, what in DEADLINES.items():
        if not spec[key].is_there:
            yield spec[key].finding("deadline", f"nothing ends {what}, and its pods cost", f"write {key}")
        elif number(spec[key]) <= 0:
            yield spec[key].finding("deadline", "a deadline is more than no second", "write a positive number")
    whole, start = spec["activeDeadlineSeconds"], spec["preRunningDeadlineSeconds"]
    if whole.is_there and start.is_there and 0 < number(whole) <= number(start):
        why = f"the job ends after {whole.value} s, and may wait {start.value} s for its start"
        yield start.finding("deadline", why, "give the whole job more than its start")
    ttl = spec["ttlSecondsAfterFinished"]
    if not 0 <= number(ttl) <= MOST_TTL_SECONDS:
        why = f"the cluster stays, and costs, for {ttl.value} s after the job"
        yield ttl.finding("deadline", why, "write 600")


def _retries(spec: Place) -> Iterator[Finding]:
    own, mode = spec["backoffLimit"], spec["submissionMode"].value
    for place in (own, spec["submitterConfig"]["backoffLimit"]):
        if not 0 <= number(place) <= MOST_RETRIES:
            yield place.finding("retry", f"a job that fails each time is started {place.value} times", "write 5")
    if mode == "InteractiveMode" and number(own) > 0:
        yield own.finding("retry", "InteractiveMode takes no retries", "leave it out")
    elif mode != "InteractiveMode" and number(own) == 0:
        why = "without a retry, the loss of the head's pod ends the job"
        yield own.finding("retry", why, "write backoffLimit: 5; a retry goes on where the bucket stands")


def _deletion(spec: Place) -> Iterator[Finding]:
    strategy = spec["deletionStrategy"]
    if not strategy.is_there:
        return
    rules, old = (
        list(strategy["deletionRules"].items()),
        strategy["onSuccess"].is_there or strategy["onFailure"].is_there,
    )
    if rules and spec["shutdownAfterJobFinishes"].value:
        why = "deletionRules and shutdownAfterJobFinishes exclude each other"
        yield strategy["deletionRules"].finding("shutdown", why, "leave one of the two out")
    if rules and old:
        yield strategy.finding("shutdown", "onSuccess and onFailure exclude deletionRules", "keep the rules")
    if not rules and not (strategy["onSuccess"].is_there and strategy["onFailure"].is_there):
        yield strategy.finding("shutdown", "it needs rules, or both onSuccess and onFailure", "write deletionRules")
    yield from _deletion_rules(rules)
    scales = spec["rayClusterSpec"]["enableInTreeAutoscaling"].value
    for place in strategy.walk():
        if place["policy"].value == "DeleteWorkers" and scales:
            yield place["policy"].finding("shutdown", "it does not go with autoscaling", "write DeleteCluster")


def _deletion_rules(rules: list[Place]) -> Iterator[Finding]:
    """Each rule has one condition, and what is deleted later holds what is deleted before."""
    order = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
    times: dict[tuple[str, str], float] = {}
    for rule in rules:
        states = [key for key in ("jobStatus", "jobDeploymentStatus") if rule["condition"][key].is_there]
        if len(states) != 1:
            yield rule["condition"].finding("shutdown", "it needs one of jobStatus and jobDeploymentStatus", "name one")
            continue
        state, policy = rule["condition"][states[0]].text, rule["policy"].text
        seconds = number(rule["condition"]["ttlSeconds"])
        if (state, policy) in times:
            yield rule["policy"].finding("shutdown", f"a second rule of {policy} after {state}", "keep one")
        for other in order[order.index(policy) + 1 :] if policy in order else ():
            if times.get((state, other), seconds) < seconds:
                yield rule["condition"]["ttlSeconds"].finding("shutdown", f"{other} comes before {policy}", "wait less")
        for other in order[: order.index(policy)] if policy in order else ():
            if times.get((state, other), seconds) > seconds:
                yield rule["condition"]["ttlSeconds"].finding(
                    "shutdown", f"{policy} comes before {other}", "wait longer"
                )
        times[state, policy] = seconds


def _submission(spec: Place) -> Iterator[Finding]:
    template, mode = spec["submitterPodTemplate"], spec["submissionMode"].value or "K8sJobMode"
    if mode == "SidecarMode" and (template.is_there or spec["submitterConfig"].is_there):
        yield spec["submissionMode"].finding("submitter", "SidecarMode takes no submitter of ours", "write K8sJobMode")
    if template.is_there:
        yield from pod_findings(template)
        yield from token_variable_findings(template["spec"])
        yield from access_findings(template["spec"])
        if template["spec"]["restartPolicy"].value not in ("Never", "OnFailure"):
            why = "a submitter that ends must not be started again for ever"
            yield template["spec"]["restartPolicy"].finding("submitter", why, "write restartPolicy: Never")
    elif mode in ("K8sJobMode", "SidecarMode"):
        why = "the operator's own submitter has no securityContext: a restricted namespace refuses it"
        yield spec["submitterPodTemplate"].finding("submitter", why, "describe the submitter's pod, as the base does")


def _entrypoint(place: Place, product: Product) -> Iterator[Finding]:
    if not place.text.strip():
        yield place.finding("entrypoint", "the job runs nothing", "write blocksight explain --config FILE")
        return
    if PLAIN_WORDS.fullmatch(place.text) is None:
        signs = " ".join(sorted({sign for sign in place.text if PLAIN_WORDS.fullmatch(sign) is None}))
        why = f"a shell of the submitter's pod expands it ({signs!r}), where neither files nor variables are the job's"
        yield place.finding("shell", why, "put parameters into the TOML file that --config names")
        return
    yield from command_findings(place, place.text.split(), product)


def _runtime_env(place: Place) -> Iterator[Finding]:
    if not place.is_there:
        return
    try:
        documents = yaml_documents(place.text)
    except DocumentError as error:
        yield place.finding("runtime-env", str(error), "write YAML, or leave it out")
        return
    for document in documents:
        yield from secret_findings(Place(place.file, document, place.path))
        for key in document if isinstance(document, dict) else ():
            if key != "env_vars":
                why = f"{key} comes to each node at its start, and no digest says what it is"
                yield place.finding("runtime-env", why, "build it into the image")
