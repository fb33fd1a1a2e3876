"""Each mistake in the objects of an overlay is found by its rule, and the overlays themselves have none."""

from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from blocksight.cluster.checks.check import check_files
from blocksight.cluster.checks.findings import Finding, Place
from blocksight.cluster.checks.kubernetes import object_findings
from blocksight.cluster.checks.kustomization import build
from tests.cluster.checks.changing import GONE, PRODUCT, change

OVERLAYS = Path(__file__).parents[3] / "cluster" / "kuberay" / "overlays"
NAMES = ("cpu", "gpu", "spot-eks", "spot-gke", "kueue")

CLUSTER = "spec.rayClusterSpec"
HEAD = f"{CLUSTER}.headGroupSpec"
GROUP = f"{CLUSTER}.workerGroupSpecs[0]"
SUBMITTER = "spec.submitterPodTemplate.spec"
POD = f"{GROUP}.template.spec"
HEAD_POD = f"{HEAD}.template.spec"
WORKER = f"{POD}.containers[0]"
HEAD_CONTAINER = f"{HEAD_POD}.containers[0]"
QUEUE_LABEL = "metadata.labels.<kueue.x-k8s.io/queue-name>"

PLANTED: Mapping[str, tuple[str, Any, str]] = {
    "misspelt job field": ("spec.shutdownAfterJobFinish", True, "schema"),
    "misspelt pod field": (f"{POD}.nodeSelectr", {}, "schema"),
    "misspelt toleration key": (f"{POD}.tolerations[0].efect", "x", "schema"),
    "quantity '24 GB'": (f"{WORKER}.resources.limits.memory", "24 GB", "quantity"),
    "int rayStartParam": (f"{GROUP}.rayStartParams.num-cpus", 1, "schema"),
    "min > max": (f"{GROUP}.minReplicas", 9, "replicas"),
    "submissionMode typo": ("spec.submissionMode", "K8SJobMode", "enum"),
    "ttl without shutdown": ("spec.shutdownAfterJobFinishes", False, "shutdown"),
    "token without rayVersion": (f"{CLUSTER}.rayVersion", GONE, "token"),
    "restartPolicy Always": (f"{POD}.restartPolicy", "Always", "restart"),
    "taint effect typo": (f"{POD}.tolerations[0].effect", "NoShedule", "enum"),
    "secret as value": (f"{WORKER}.env[+]", {"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}, "secret"),
    "mount of no volume": (f"{WORKER}.volumeMounts", [{"name": "gone", "mountPath": "/x"}], "reference"),
    "privileged": (f"{WORKER}.securityContext.privileged", True, "privilege"),
    "requests > limits": (f"{WORKER}.resources.requests.memory", "48Gi", "amount"),
    "head takes work": (f"{HEAD}.rayStartParams.num-cpus", "2", "head"),
    "shell variable in entrypoint": ("spec.entrypoint", "blocksight explain --data $DATA", "shell"),
    "grace 30": (f"{POD}.terminationGracePeriodSeconds", GONE, "grace"),
    "mutable tag": (f"{WORKER}.image", "x/blocksight:latest", "image"),
}
"""The nineteen mistakes that the specification plants in the overlay `spot-gke`."""


def _rule(policy: str, seconds: int) -> dict[str, Any]:
    return {"policy": policy, "condition": {"jobStatus": "FAILED", "ttlSeconds": seconds}}


RULE = _rule("DeleteCluster", 5)


def _kept_after(spec: dict[str, Any]) -> dict[str, Any]:
    """A job's spec without what ends its cluster."""
    return {
        key: value for key, value in spec.items() if key not in ("shutdownAfterJobFinishes", "ttlSecondsAfterFinished")
    }


def _with_rules(spec: dict[str, Any], *rules: dict[str, Any]) -> dict[str, Any]:
    return {**_kept_after(spec), "deletionStrategy": {"deletionRules": list(rules)}}


OTHERS: Mapping[str, tuple[str, Any, str]] = {
    # ------------------------------------------------ fields, types, enumerations, amounts
    "amount as the schema has it": (f"{WORKER}.resources.limits.memory", "24 GB", "schema"),
    "field of another place": (f"{GROUP}.terminationGracePeriodSeconds", 90, "schema"),
    "text for a number": ("spec.backoffLimit", "5", "schema"),
    "number for a variable": (f"{WORKER}.env[1].value", 0, "schema"),
    "no max": (f"{GROUP}.maxReplicas", GONE, "replicas"),
    "old version": ("apiVersion", "ray.io/v1alpha1", "version"),
    "misspelt kind": ("kind", "RayJobs", "kind"),
    "auth mode": (f"{CLUSTER}.authOptions.mode", "tokens", "schema"),
    "upscaling mode": (f"{CLUSTER}.autoscalerOptions.upscalingMode", "Fast", "schema"),
    "autoscaler version": (f"{CLUSTER}.autoscalerOptions.version", "v3", "schema"),
    "pull policy": (f"{WORKER}.imagePullPolicy", "IfNotPresnt", "enum"),
    "seccomp": (f"{HEAD_POD}.securityContext.seccompProfile.type", "Runtime", "enum"),
    "toleration operator": (f"{POD}.tolerations[0].operator", "Exist", "enum"),
    "toleration with a value": (f"{POD}.tolerations[0].value", "x", "toleration"),
    "toleration without a key": (f"{POD}.tolerations[0]", {"effect": "NoSchedule"}, "toleration"),
    "toleration seconds": (f"{POD}.tolerations[0].tolerationSeconds", 5, "toleration"),
    "node operator": (
        f"{POD}.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms",
        [{"matchExpressions": [{"key": "a", "operator": "Is", "values": ["b"]}]}],
        "enum",
    ),
    "cpu in words": (f"{HEAD_CONTAINER}.resources.requests.cpu", "two", "quantity"),
    "no memory limit": (f"{WORKER}.resources.limits.memory", GONE, "amount"),
    "no resources": (f"{HEAD_CONTAINER}.resources", GONE, "amount"),
    "half a GPU": (f"{WORKER}.resources.limits.<nvidia.com/gpu>", "0.5", "amount"),
    "fewer GPUs asked than limited": (f"{WORKER}.resources.requests.<nvidia.com/gpu>", "0", "amount"),
    "no GPU": (f"{WORKER}.resources.limits.<nvidia.com/gpu>", "0", "amount"),
    "GPU asked and not limited": (f"{HEAD_CONTAINER}.resources.requests.<nvidia.com/gpu>", "1", "amount"),
    "autoscaler's requests": (
        f"{CLUSTER}.autoscalerOptions.resources",
        {"requests": {"cpu": "2"}, "limits": {"cpu": "1"}},
        "amount",
    ),
    "size of a volume": (f"{HEAD_POD}.volumes[+]", {"name": "a", "emptyDir": {"sizeLimit": "5 GB"}}, "quantity"),
    "label value": (f"{POD}.nodeSelector.pool", "my pool", "label"),
    "label key": (f"{POD}.nodeSelector.<a pool>", "x", "label"),
    "label of a group": (f"{GROUP}.labels.zone", "a b", "label"),
    "label of the job": ("metadata.labels.team", "a b", "label"),
    # ------------------------------------------------ names and references
    "capitals in a name": ("metadata.name", "BlockSight", "name"),
    "a digit first": ("metadata.name", "1blocksight", "name"),
    "a long name": ("metadata.name", "a" * 48, "name"),
    "group name": (f"{GROUP}.groupName", "Explain_GPU", "name"),
    "an open service": (f"{CLUSTER}.headGroupSpec.serviceType", "LoadBalancer", "open"),
    "an open service of ours": (f"{CLUSTER}.headGroupSpec.headService", {"spec": {"type": "NodePort"}}, "open"),
    "addresses outside": (f"{CLUSTER}.headGroupSpec.headService", {"spec": {"externalIPs": ["1.2.3.4"]}}, "open"),
    "an open dashboard": (f"{CLUSTER}.headGroupSpec.enableIngress", True, "open"),
    "more GPUs told than there are": (f"{GROUP}.rayStartParams.num-gpus", "4", "amount"),
    "more cores told than there are": (f"{GROUP}.rayStartParams.num-cpus", "64", "amount"),
    "more memory told than there is": (f"{GROUP}.rayStartParams.memory", "999999999999", "amount"),
    "two clusters": ("spec.clusterSelector", {"ray.io/cluster": "other"}, "cluster"),
    "two groups of a name": (f"{CLUSTER}.workerGroupSpecs", lambda old: [*old, deepcopy(old[0])], "name"),
    "container name": (f"{WORKER}.name", "ray_worker", "name"),
    "two volumes of a name": (f"{HEAD_POD}.volumes[+]", {"name": "job", "emptyDir": {}}, "name"),
    "two variables of a name": (f"{WORKER}.env[+]", {"name": "RAY_AUTH_MODE", "value": "token"}, "name"),
    "name of a variable": (f"{WORKER}.env[+]", {"name": "A B", "value": "x"}, "name"),
    "value and reference": (
        f"{WORKER}.env[+]",
        {"name": "A", "value": "x", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        "variable",
    ),
    "account that is not there": (f"{POD}.serviceAccountName", "blocksight-wrker", "reference"),
    "submitter's account": (f"{SUBMITTER}.serviceAccountName", "submitter", "reference"),
    "head's account": (f"{HEAD_POD}.serviceAccountName", "default", "reference"),
    "no account of its own": (f"{HEAD_POD}.serviceAccountName", GONE, "account"),
    "worker without an account": (f"{POD}.serviceAccountName", GONE, "account"),
    "worker speaks to the API": (f"{POD}.automountServiceAccountToken", GONE, "account"),
    "other namespace": ("metadata.namespace", "jobs", "reference"),
    "config map that is not there": (f"{HEAD_POD}.volumes[0].configMap.name", "blocksite", "reference"),
    "key of a config map": (
        f"{HEAD_POD}.volumes[0].configMap.items",
        [{"key": "jobs.toml", "path": "job.toml"}],
        "reference",
    ),
    "variable of a config map": (
        f"{WORKER}.env[+]",
        {"name": "A", "valueFrom": {"configMapKeyRef": {"name": "blocksight", "key": "a"}}},
        "reference",
    ),
    "all variables of a config map": (f"{WORKER}.envFrom", [{"configMapRef": {"name": "settings"}}], "reference"),
    "claim that is not there": (
        f"{HEAD_POD}.volumes[+]",
        {"name": "c", "persistentVolumeClaim": {"claimName": "scratch"}},
        "reference",
    ),
    "volume renamed": (f"{HEAD_POD}.volumes[0].name", "config", "reference"),
    "volume of two sources": (f"{HEAD_POD}.volumes[0].emptyDir", {}, "volume"),
    "volume of no source": (f"{HEAD_POD}.volumes[+]", {"name": "empty"}, "volume"),
    "configuration elsewhere": ("spec.entrypoint", "blocksight explain --config /etc/job.toml", "reference"),
    "mount elsewhere": (f"{HEAD_CONTAINER}.volumeMounts[0].mountPath", "/etc/blocksite", "reference"),
    "relative mount": (f"{HEAD_CONTAINER}.volumeMounts[0].mountPath", "etc/blocksight", "path"),
    "two mounts at a place": (
        f"{HEAD_CONTAINER}.volumeMounts[+]",
        {"name": "job", "mountPath": "/etc/blocksight"},
        "path",
    ),
    # ------------------------------------------------ privileges, images, secrets
    "root": (f"{WORKER}.securityContext.runAsUser", 0, "privilege"),
    "root, whole pod": (f"{POD}.securityContext.runAsUser", 0, "privilege"),
    "may be root": (f"{POD}.securityContext.runAsNonRoot", GONE, "privilege"),
    "no seccomp": (f"{SUBMITTER}.securityContext.seccompProfile", GONE, "privilege"),
    "escalation": (f"{WORKER}.securityContext.allowPrivilegeEscalation", GONE, "privilege"),
    "capabilities": (f"{WORKER}.securityContext.capabilities", GONE, "privilege"),
    "a capability more": (f"{WORKER}.securityContext.capabilities.add", ["SYS_ADMIN"], "privilege"),
    "unmasked /proc": (f"{WORKER}.securityContext.procMount", "Unmasked", "privilege"),
    "autoscaler's context": (f"{CLUSTER}.autoscalerOptions.securityContext", GONE, "privilege"),
    "submitter's context": (f"{SUBMITTER}.containers[0].securityContext", GONE, "privilege"),
    "operator's submitter": ("spec.submitterPodTemplate", GONE, "submitter"),
    "submitter for ever": (f"{SUBMITTER}.restartPolicy", "Always", "submitter"),
    "host network": (f"{POD}.hostNetwork", True, "privilege"),
    "host processes": (f"{HEAD_POD}.hostPID", True, "privilege"),
    "users of the machine": (f"{POD}.hostUsers", True, "privilege"),
    "host path": (f"{HEAD_POD}.volumes[+]", {"name": "d", "hostPath": {"path": "/"}}, "privilege"),
    "host port": (f"{HEAD_CONTAINER}.ports", [{"containerPort": 6379, "hostPort": 6379}], "privilege"),
    "no port": (f"{HEAD_CONTAINER}.ports", [{"containerPort": 0}], "port"),
    "image by name alone": (f"{HEAD_CONTAINER}.image", "blocksight", "image"),
    "image of an init container": (
        f"{POD}.initContainers",
        [{"name": "first", "image": "busybox:1"}],
        "image",
    ),
    "short digest": (f"{SUBMITTER}.containers[0].image", "x/blocksight@sha256:0000", "image"),
    "token in a variable": (f"{HEAD_CONTAINER}.env[+]", {"name": "HF_TOKEN", "value": "abc"}, "secret"),
    "password in an address": ("metadata.annotations.proxy", "http://me:hunter2@proxy:3128", "secret"),
    "key of AWS": ("metadata.annotations.note", "AKIAABCDEFGHIJKLMNOP", "secret"),
    "secret in the runtime environment": ("spec.runtimeEnvYAML", "env_vars: {API_KEY: abc}", "secret"),
    "packages at run time": ("spec.runtimeEnvYAML", "pip: [timm]", "runtime-env"),
    "runtime environment is no YAML": ("spec.runtimeEnvYAML", "env_vars: {", "runtime-env"),
    # ------------------------------------------------ the entrypoint
    "no entrypoint": ("spec.entrypoint", "", "entrypoint"),
    "another program": ("spec.entrypoint", "python job.py", "command"),
    "misspelt command": ("spec.entrypoint", "blocksight explian --config /etc/blocksight/job.toml", "command"),
    "misspelt option": ("spec.entrypoint", "blocksight explain --confg /etc/blocksight/job.toml", "command"),
    "driver on a worker": ("spec.entrypointNumCpus", 1, "entrypoint"),
    "manager": ("spec.managedBy", "kueue", "enum"),
    "image of the autoscaler": (f"{CLUSTER}.autoscalerOptions.image", "rayproject/ray:2.60.0", "image"),
    "two commands": ("spec.entrypoint", "blocksight explain --config /etc/blocksight/job.toml; ls", "shell"),
    "glob": ("spec.entrypoint", "blocksight explain --data s3://a/*.tar --output s3://b/", "shell"),
    "backtick": ("spec.entrypoint", "blocksight explain --config `cat x`", "shell"),
    "pipe": ("spec.entrypoint", "blocksight explain --config /etc/blocksight/job.toml | tee log", "shell"),
    "home": ("spec.entrypoint", "blocksight explain --config ~/job.toml", "shell"),
    "quotes": ("spec.entrypoint", "blocksight explain --target 'tabby cat'", "shell"),
    "two lines": ("spec.entrypoint", "blocksight explain\n--config /etc/blocksight/job.toml", "shell"),
    # ------------------------------------------------ the operator's own rules
    "no cluster": (CLUSTER, GONE, "cluster"),
    "suspended without shutdown": (
        "spec",
        lambda s: {**s, "suspend": True, "shutdownAfterJobFinishes": False},
        "shutdown",
    ),
    "cluster stays": (
        "spec",
        _kept_after,
        "shutdown",
    ),
    "negative ttl": ("spec.ttlSecondsAfterFinished", -1, "deadline"),
    "no time": ("spec.activeDeadlineSeconds", 0, "deadline"),
    "less than the schema takes": ("spec.preRunningDeadlineSeconds", 0, "schema"),
    "less time than the start": ("spec.activeDeadlineSeconds", 600, "deadline"),
    "no retry": ("spec.backoffLimit", GONE, "retry"),
    "negative retries": ("spec.submitterConfig.backoffLimit", -1, "retry"),
    "retries by hand": ("spec.submissionMode", "InteractiveMode", "retry"),
    "sidecar": ("spec.submissionMode", "SidecarMode", "submitter"),
    "rules beside shutdown": (
        "spec.deletionStrategy",
        {"deletionRules": [{"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED", "ttlSeconds": 5}}]},
        "shutdown",
    ),
    "rules beside the old ones": (
        "spec.deletionStrategy",
        {"onSuccess": {"policy": "DeleteSelf"}, "onFailure": {"policy": "DeleteSelf"}, "deletionRules": [{}]},
        "shutdown",
    ),
    "suspended, and rules": (
        "spec",
        lambda s: {**_kept_after(s), "suspend": True, "deletionStrategy": {"deletionRules": [RULE]}},
        "shutdown",
    ),
    "both kinds of rules": (
        "spec",
        lambda s: {
            **_kept_after(s),
            "deletionStrategy": {
                **{key: {"policy": "DeleteSelf"} for key in ("onSuccess", "onFailure")},
                "deletionRules": [RULE],
            },
        },
        "shutdown",
    ),
    "rule without a condition": (
        "spec",
        lambda s: _with_rules(s, {"policy": "DeleteCluster", "condition": {}}),
        "shutdown",
    ),
    "rule twice": ("spec", lambda s: _with_rules(s, RULE, RULE), "shutdown"),
    "job before its cluster": ("spec", lambda s: _with_rules(s, RULE, _rule("DeleteSelf", 1)), "shutdown"),
    "cluster after its job": ("spec", lambda s: _with_rules(s, _rule("DeleteSelf", 1), RULE), "shutdown"),
    "half of a strategy": ("spec.deletionStrategy", {"onSuccess": {"policy": "DeleteSelf"}}, "shutdown"),
    "workers deleted that scale": (
        "spec.deletionStrategy",
        {"onSuccess": {"policy": "DeleteWorkers"}, "onFailure": {"policy": "DeleteSelf"}},
        "shutdown",
    ),
    "no token": (f"{CLUSTER}.authOptions", GONE, "token"),
    "token off": (f"{CLUSTER}.authOptions.mode", "disabled", "token"),
    "token off in a pod": (f"{WORKER}.env[0].value", "disabled", "token"),
    "token off at the submitter": (f"{SUBMITTER}.containers[0].env[0].value", "none", "token"),
    "old Ray": (f"{CLUSTER}.rayVersion", "2.40.0", "version"),
    "no version of Ray": (f"{CLUSTER}.rayVersion", "latest", "version"),
    "max below replicas": (f"{GROUP}.replicas", 9, "replicas"),
    "min and replicas above max": (GROUP, lambda old: {**old, "minReplicas": 9, "replicas": 9}, "replicas"),
    "negative replicas": (f"{GROUP}.minReplicas", -1, "replicas"),
    "no worker ever": (f"{GROUP}.maxReplicas", 0, "replicas"),
    "no groups": (f"{CLUSTER}.workerGroupSpecs", [], "workers"),
    "no containers": (f"{POD}.containers", [], "pod"),
    "option of ray start": (f"{HEAD}.rayStartParams.num-cpu", "0", "ray-start"),
    "value of an option": (f"{GROUP}.rayStartParams.num-gpus", "one", "ray-start"),
    "labels by ray start": (f"{GROUP}.rayStartParams.labels", "a=b", "scaling"),
    "resources are no JSON": (f"{GROUP}.rayStartParams.resources", "{a: 1}", "scaling"),
    "resources twice": (f"{HEAD}.resources", {"CPU": "0"}, "scaling"),
    "idle time of a group": (
        CLUSTER,
        lambda old: {
            **old,
            "autoscalerOptions": {**old["autoscalerOptions"], "version": "v1"},
            "workerGroupSpecs": [{**old["workerGroupSpecs"][0], "idleTimeoutSeconds": 5}],
        },
        "scaling",
    ),
    "options without scaling": (f"{CLUSTER}.enableInTreeAutoscaling", False, "scaling"),
    "autoscaler by a variable": (
        f"{HEAD_CONTAINER}.env[+]",
        {"name": "RAY_enable_autoscaler_v2", "value": "1"},
        "scaling",
    ),
    "suspended group": (f"{GROUP}.suspend", True, "scaling"),
    "head's restart": (f"{HEAD_POD}.restartPolicy", "Always", "restart"),
    "head on spot machines": (f"{HEAD_POD}.nodeSelector", {"cloud.google.com/gke-spot": "true"}, "head"),
    "Redis": (f"{HEAD_CONTAINER}.env[+]", {"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}, "head"),
    "head's CPUs": (f"{HEAD}.rayStartParams", {}, "head"),
    "waits for ever": ("spec.suspend", True, "queue"),
    # ------------------------------------------------ what the labels, taints and variables of others are called
    "label that no node has": (f"{POD}.nodeSelector.<cloud.google.com/gke-spt>", "true", "label"),
    "misspelt domain": (f"{POD}.nodeSelector.<karpenter.hs/capacity-type>", "spot", "label"),
    "value that no node has": (f"{POD}.nodeSelector.<karpenter.sh/capacity-type>", "Spot", "enum"),
    "taint of GPUs": (f"{POD}.tolerations[0].key", "nvidia.com/gup", "toleration"),
    "no toleration": (f"{POD}.tolerations", GONE, "toleration"),
    "every taint": (f"{POD}.tolerations[+]", {"operator": "Exists"}, "toleration"),
    "taint of which value": (f"{POD}.tolerations[0].operator", GONE, "toleration"),
    "misspelt variable": (f"{WORKER}.env[0].name", "RAY_AUTH_MOED", "variable"),
    "value of a variable": (f"{WORKER}.env[1].value", "no", "variable"),
    "variable without a value": (f"{WORKER}.env[1].value", GONE, "variable"),
    "user below zero": (f"{POD}.securityContext.runAsUser", -1, "user"),
    "submitter without a container": (f"{SUBMITTER}.containers", [], "pod"),
    # ------------------------------------------------ what would cost
    "no deadline": ("spec.activeDeadlineSeconds", GONE, "deadline"),
    "no deadline of the start": ("spec.preRunningDeadlineSeconds", GONE, "deadline"),
    "cluster stays for days": ("spec.ttlSecondsAfterFinished", 864_000, "deadline"),
    "retries without end": ("spec.backoffLimit", 10_000, "retry"),
    "idle workers": (f"{CLUSTER}.autoscalerOptions.idleTimeoutSeconds", 86_400, "idle"),
    "idle workers of a group": (f"{GROUP}.idleTimeoutSeconds", -1, "idle"),
    "pod that hangs": (f"{POD}.terminationGracePeriodSeconds", 100_000, "grace"),
    # ------------------------------------------------ the end of a worker
    "grace = drain": (f"{POD}.terminationGracePeriodSeconds", 60, "grace"),
    "drain below the commit": (f"{WORKER}.env[2].value", "20", "grace"),
    "Ray's own drain": (f"{WORKER}.env[2].name", "RAY_GRACEFUL_DRAIN", None),
    "drain in words": (f"{WORKER}.env[2].value", "60s", "quantity"),
}
"""More of their kinds, in the same overlay. A rule of None: it stays right."""

POLICY: Mapping[str, tuple[str, Any, str]] = {
    "other pods": ("spec.podSelector.matchLabels", {"app.kubernetes.io/name": "kuberay"}, "network"),
    "misspelt label": (
        "spec.podSelector.matchLabels",
        {"app.kubernetes.io/created-by": "kuberay-operater"},
        "network",
    ),
    "by expressions": (
        "spec.podSelector.matchExpressions",
        [{"key": "a", "operator": "Exists"}],
        "network",
    ),
    "other namespace": ("metadata.namespace", "jobs", "network"),
    "direction": ("spec.policyTypes", ["Ingres", "Egress"], "schema"),
    "no egress": ("spec.policyTypes", ["Ingress"], "network"),
    "protocol": ("spec.egress[1].ports[0].protocol", "tcp", "schema"),
    "no DNS by UDP": ("spec.egress[1].ports", [{"port": 53, "protocol": "TCP"}], "network"),
    "no DNS": ("spec.egress[1].ports[0].port", 54, "network"),
    "no bucket": ("spec.egress[2].ports[0].port", 80, "network"),
    "metadata address": ("spec.egress[2].to[0].ipBlock.except", GONE, "network"),
    "another address": ("spec.egress[2].to[0].ipBlock.except", ["169.254.169.253/32"], "network"),
    "no block": ("spec.egress[2].to[0].ipBlock.cidr", "0.0.0.0/33", "address"),
    "no part of it": ("spec.egress[2].to[0].ipBlock.except[0]", "169.254.169.254", None),
    "no address": ("spec.egress[2].to[0].ipBlock.except[0]", "169.254.169", "address"),
    "operator shut out": ("spec.ingress[1].ports[0].port", 8266, "network"),
    "operator's second port": ("spec.ingress[1].ports[1]", GONE, "network"),
    "each other, in": ("spec.ingress[0].from[0].podSelector.matchLabels", {"a": "b"}, "network"),
    "each other, out": ("spec.egress[0].to[0].podSelector.matchLabels", {"a": "b"}, "network"),
    "each other, gone": ("spec.ingress[0]", GONE, "network"),
    "egress of nobody": (
        "spec",
        lambda old: {"podSelector": old["podSelector"], "policyTypes": ["Ingress"], "ingress": old["ingress"]},
        "network",
    ),
    "ingress of nobody": ("spec.policyTypes", ["Egress"], "network"),
    "all in": ("spec.ingress[+]", {}, "network"),
    "all in to a port": ("spec.ingress[1].from", GONE, "network"),
    "all out": ("spec.egress[+]", {}, "network"),
    "every pod": ("spec.podSelector", {}, "network"),
    "every pod, in": ("spec.ingress[0].from[0].podSelector", {}, "network"),
    "every namespace": ("spec.ingress[1].from[0].namespaceSelector", {}, "network"),
    "nobody": ("spec.ingress[1].from[0]", {}, "network"),
    "every port, in": ("spec.ingress[1].ports", GONE, "network"),
    "every port, out": ("spec.egress[2].ports", GONE, "network"),
    "every port of a protocol": ("spec.egress[1].ports[0].port", GONE, "network"),
    "port in quotes": ("spec.ingress[2].ports[0].port", "8080", "port"),
    "label of a namespace": (
        "spec.ingress[1].from[0].namespaceSelector.matchLabels",
        {"kubernetes.io/metadata.nam": "kuberay-system"},
        "label",
    ),
    "misspelt namespace": (
        "spec.ingress[1].from[0].namespaceSelector.matchLabels.<kubernetes.io/metadata.name>",
        "kuberay-sytem",
        "reference",
    ),
    "port": ("spec.ingress[2].ports[0].port", 80800, "port"),
    "ports": ("spec.ingress[2].ports[0].endPort", 80, "port"),
    "field": ("spec.ingres", [], "schema"),
    "label": ("spec.ingress[0].from[0].podSelector.matchLabels", {"a b": "c"}, "label"),
}

QUEUE: Mapping[str, tuple[str, str, Any, str]] = {
    "queue that is not there": ("RayJob", QUEUE_LABEL, "blocksite", "reference"),
    "misspelt label": ("RayJob", "metadata.labels", {"kueue.x-k8s.io/queue": "blocksight"}, "queue"),
    "no label": ("RayJob", "metadata.labels", GONE, "queue"),
    "does not wait": ("RayJob", "spec.suspend", GONE, "queue"),
    "scales": ("RayJob", f"{CLUSTER}.enableInTreeAutoscaling", True, "queue"),
    "stays": ("RayJob", "spec.shutdownAfterJobFinishes", False, "queue"),
    "standing cluster": ("RayJob", "spec.clusterSelector", {"ray.io/cluster": "a"}, "queue"),
    "group named head": ("RayJob", f"{GROUP}.groupName", "head", "queue"),
    "eight groups": (
        "RayJob",
        f"{CLUSTER}.workerGroupSpecs",
        lambda old: [{**old[0], "groupName": f"g{at}", "replicas": 1, "minReplicas": 1} for at in range(8)],
        "queue",
    ),
    "label that nobody reads": ("RayJob", "metadata.labels.<kueue.x-k8s.io/priority-clas>", "high", "queue"),
    "no replicas": ("RayJob", GROUP, lambda old: {**old, "replicas": 0, "minReplicas": 0}, "queue"),
    "more than the quota": ("RayJob", GROUP, lambda old: {**old, "replicas": 9, "maxReplicas": 9}, "queue"),
    "cluster queue": ("LocalQueue", "spec.clusterQueue", "blocksite", "reference"),
    "no cluster queue": ("LocalQueue", "spec.clusterQueue", GONE, "schema"),
    "flavor": ("ClusterQueue", "spec.resourceGroups[0].flavors[0].name", "spot", "reference"),
    "flavor renamed": ("ResourceFlavor", "metadata.name", "spot", "reference"),
    "uncovered": (
        "ClusterQueue",
        "spec.resourceGroups[0]",
        lambda old: {
            "coveredResources": [name for name in old["coveredResources"] if name != "ephemeral-storage"],
            "flavors": [
                {
                    **old["flavors"][0],
                    "resources": [one for one in old["flavors"][0]["resources"] if one["name"] != "ephemeral-storage"],
                }
            ],
        },
        "queue",
    ),
    "covered otherwise": ("ClusterQueue", "spec.resourceGroups[0].coveredResources[0]", "cpus", "queue"),
    "too little": ("ClusterQueue", "spec.resourceGroups[0].flavors[0].resources[1].nominalQuota", "200Gi", "queue"),
    "no amount": ("ClusterQueue", "spec.resourceGroups[0].flavors[0].resources[1].nominalQuota", "256 GiB", "quantity"),
    "no namespace": ("ClusterQueue", "spec.namespaceSelector", GONE, "queue"),
    "strategy": ("ClusterQueue", "spec.queueingStrategy", "Fifo", "schema"),
    "old version": ("LocalQueue", "apiVersion", "kueue.x-k8s.io/v1alpha1", "version"),
}

TOML = "data.<job.toml>"


def _without(key: str, text: str) -> str:
    """A TOML text without a key."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith(f"{key} "))


BESIDE: Mapping[str, tuple[str, str, Any, str]] = {
    "renamed account": ("ServiceAccount", "metadata.name", "blocksigth", "reference"),
    "head without a token": ("ServiceAccount", "automountServiceAccountToken", False, "account"),
    "name of an account": ("ServiceAccount", "metadata.name", "Block_Sight", "name"),
    "renamed config map": ("ConfigMap", "metadata.name", "job", "reference"),
    "renamed file": ("ConfigMap", "data", lambda old: {"jobs.toml": old["job.toml"]}, "reference"),
    "unknown key": ("ConfigMap", TOML, lambda old: old + 'explaner = "rise"\n', "configuration"),
    "bad value": ("ConfigMap", TOML, lambda old: old + 'explainer = "rize"\n', "configuration"),
    "no TOML": ("ConfigMap", TOML, "data = s3://", "configuration"),
    "no output": ("ConfigMap", TOML, 'data = "s3://a/"', "configuration"),
    "maps on a machine that ends": (
        "ConfigMap",
        TOML,
        lambda old: old.replace("s3://example-maps/run-1/", "/maps"),
        "job-file",
    ),
    "no address": ("ConfigMap", TOML, lambda old: _without("address", old), "job-file"),
    "no wait": ("ConfigMap", TOML, lambda old: _without("wait", old), "job-file"),
    "no device": ("ConfigMap", TOML, lambda old: _without("device", old), "job-file"),
    "device that is not there": ("ConfigMap", TOML, lambda old: old.replace('"cpu"', '"gpu"'), "job-file"),
    "no workers": ("ConfigMap", TOML, lambda old: _without("workers", old), "job-file"),
    "more workers than fit": ("ConfigMap", TOML, lambda old: old.replace("= 32", "= 33"), "job-file"),
    "secret in a config map": ("ConfigMap", "data.API_KEY", "abc", "secret"),
    "private key in a config map": ("ConfigMap", "data.pem", "-----BEGIN RSA PRIVATE KEY-----", "secret"),
    "field of an account": ("ServiceAccount", "automountServiceAccountTokens", True, "schema"),
    "kind that is not known": ("ServiceAccount", "kind", "ServiceAcount", "kind"),
    "a secret": ("ConfigMap", "kind", "Secret", "secret"),
}


@cache
def objects_of(overlay: str) -> tuple[Place, ...]:
    places, findings = build(OVERLAYS / overlay)
    assert not findings
    return tuple(places)


def findings_after(overlay: str, kind: str, path: str, value: Any) -> list[Finding]:
    """What is found after one change of the first object of a kind."""
    places = deepcopy(objects_of(overlay))
    change(next(one for one in places if one["kind"].text == kind).value, path, value)
    return list(object_findings(places, PRODUCT))


def judge(found: list[Finding], rule: str | None) -> None:
    if rule is None:
        assert found == []
        return
    assert rule in {one.rule for one in found}, "\n".join(map(str, found)) or "nothing was found"
    assert all(one.why and one.way_out and one.file for one in found)


@pytest.mark.parametrize("overlay", NAMES)
def test_an_overlay_is_right(overlay):
    assert check_files([str(OVERLAYS / overlay)], PRODUCT) == []


def _rows(table: Mapping[str, tuple[Any, ...]]) -> list[Any]:
    return [pytest.param(*row, id=name) for name, row in table.items()]


@pytest.mark.parametrize(("path", "value", "rule"), _rows({**PLANTED, **OTHERS}))
def test_a_mistake_in_the_job_is_found(path, value, rule):
    judge(findings_after("spot-gke", "RayJob", path, value), rule)


@pytest.mark.parametrize(("path", "value", "rule"), _rows(POLICY))
def test_a_mistake_in_the_network_policy_is_found(path, value, rule):
    judge(findings_after("gpu", "NetworkPolicy", path, value), rule)


@pytest.mark.parametrize(("kind", "path", "value", "rule"), _rows(QUEUE))
def test_a_mistake_in_the_queue_is_found(kind, path, value, rule):
    judge(findings_after("kueue", kind, path, value), rule)


@pytest.mark.parametrize(("kind", "path", "value", "rule"), _rows(BESIDE))
def test_a_mistake_beside_the_job_is_found(kind, path, value, rule):
    judge(findings_after("cpu", kind, path, value), rule)


def test_a_finding_is_one_line_with_file_path_rule_why_and_way_out():
    (found,) = findings_after("gpu", "RayJob", "spec.submissionMode", "K8SJobMode")
    file, path, rule, rest = str(found).split(": ", 3)
    assert (Path(file).name, path, rule) == ("rayjob.yaml", "spec.submissionMode", "enum")
    assert rest.endswith("; write K8sJobMode")


VALID: Mapping[str, tuple[str, Any]] = {
    "a secret by reference": (
        f"{WORKER}.env[+]",
        {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}},
    ),
    "four GPUs a pod": (f"{WORKER}.resources.limits.<nvidia.com/gpu>", "4"),
    "a scratch volume": (f"{POD}.volumes", [{"name": "scratch", "emptyDir": {"sizeLimit": "50Gi"}}]),
    "two groups": (f"{CLUSTER}.workerGroupSpecs", lambda old: [*old, {**deepcopy(old[0]), "groupName": "more"}]),
    "another variable": (f"{WORKER}.env[+]", {"name": "TOKENIZERS_PARALLELISM", "value": "false"}),
    "rules of deletion": ("spec", lambda s: _with_rules(s, RULE, _rule("DeleteSelf", 600))),
    "a label": ("metadata.labels", {"team": "vision"}),
    "whole numbers for amounts": (f"{WORKER}.resources.limits.cpu", 5),
    "an option in the entrypoint": (
        "spec.entrypoint",
        "blocksight explain --config /etc/blocksight/job.toml --limit 5",
    ),
}


@pytest.mark.parametrize(("path", "value"), _rows(VALID))
def test_what_users_change_is_right(path, value):
    judge(findings_after("gpu", "RayJob", path, value), None)


def _beside(kind: str, **fields: Any) -> dict[str, Any]:
    version = "v1" if kind == "Service" else "rbac.authorization.k8s.io/v1"
    return {"apiVersion": version, "kind": kind, "metadata": {"name": "beside"}, **fields}


DOORS_AND_RIGHTS = [
    (_beside("Service", spec={"type": "LoadBalancer", "ports": [{"port": 8265}]}), "open"),
    (_beside("Service", spec={"type": "NodePort", "ports": [{"port": 8265}]}), "open"),
    (_beside("Service", spec={"externalIPs": ["1.2.3.4"], "ports": [{"port": 8265}]}), "open"),
    (_beside("Service", spec={"type": "ClusterIP", "ports": [{"port": 8265}]}), None),
    (_beside("ClusterRoleBinding", roleRef={"kind": "ClusterRole", "name": "cluster-admin"}), "rights"),
    (_beside("RoleBinding", roleRef={"kind": "ClusterRole", "name": "edit"}), "rights"),
    (_beside("RoleBinding", roleRef={"kind": "Role", "name": "reader"}), None),
    (_beside("Role", rules=[{"apiGroups": [""], "resources": ["*"], "verbs": ["get"]}]), "rights"),
    (_beside("Role", rules=[{"apiGroups": [""], "resources": ["pods"], "verbs": ["*"]}]), "rights"),
    (_beside("Role", rules=[{"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}]), None),
]


@pytest.mark.parametrize(("found", "rule"), DOORS_AND_RIGHTS)
def test_a_door_or_a_right_beside_a_job_is_found(found, rule):
    judge(list(object_findings([Place("beside.yaml", found)], PRODUCT)), rule)


def test_a_claim_and_a_role_may_stand_beside_a_job():
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "scratch"},
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Ti"}}},
    }
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "reader"}, "rules": []}
    places = [*deepcopy(objects_of("gpu")), Place("more.yaml", claim), Place("more.yaml", role)]
    volume = {"name": "scratch", "persistentVolumeClaim": {"claimName": "scratch"}}
    change(next(one for one in places if one["kind"].text == "RayJob").value, f"{POD}.volumes", [volume])
    assert list(object_findings(places, PRODUCT)) == []


def test_an_object_that_stands_twice_is_found():
    places = deepcopy(objects_of("cpu"))
    assert "name" in {one.rule for one in object_findings([*places, places[1]], PRODUCT)}
