"""JSON schemas of the plain Kubernetes objects that stand beside a RayJob: accounts, policies, config maps, queues."""

from typing import Any

Schema = dict[str, Any]

NAME: Schema = {"type": "string", "minLength": 1}
TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
NUMBER_OR_TEXT: Schema = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
ANY_OBJECT: Schema = {"type": "object"}
METADATA: Schema = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {
        "name": NAME,
        "namespace": NAME,
        "labels": TEXTS,
        "annotations": TEXTS,
        "finalizers": {"type": "array", "items": TEXT},
    },
}
EFFECTS = ("NoSchedule", "NoExecute", "PreferNoSchedule")


def _one_of(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def _list(of: Schema) -> Schema:
    return {"type": "array", "items": of}


def _fields(known: dict[str, Schema], *required: str) -> Schema:
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": known}


def _object(known: dict[str, Schema], *required: str) -> Schema:
    own = {"apiVersion": NAME, "kind": NAME, "metadata": METADATA, **known}
    return _fields(own, "apiVersion", "kind", "metadata", *required)


def _spec(known: dict[str, Schema], *required: str) -> Schema:
    return _object({"spec": _fields(known, *required)}, "spec")


_EXPRESSION = {"key": NAME, "operator": _one_of("In", "NotIn", "Exists", "DoesNotExist"), "values": _list(TEXT)}
_SELECTOR = _fields({"matchLabels": TEXTS, "matchExpressions": _list(_fields(_EXPRESSION, "key", "operator"))})
_NAMED = _fields({"name": NAME}, "name")
_PEER = _fields(
    {
        "podSelector": _SELECTOR,
        "namespaceSelector": _SELECTOR,
        "ipBlock": _fields({"cidr": NAME, "except": _list(NAME)}, "cidr"),
    }
)
_PORT = _fields({"port": NUMBER_OR_TEXT, "endPort": {"type": "integer"}, "protocol": _one_of("TCP", "UDP", "SCTP")})
_TOLERATION = _fields(
    {
        "key": TEXT,
        "operator": _one_of("Exists", "Equal"),
        "value": TEXT,
        "effect": _one_of(*EFFECTS),
        "tolerationSeconds": {"type": "integer"},
    }
)
_TAINT = _fields({"key": NAME, "value": TEXT, "effect": _one_of(*EFFECTS)}, "key", "effect")
_QUOTA = _fields(
    {
        "name": NAME,
        "nominalQuota": NUMBER_OR_TEXT,
        "borrowingLimit": NUMBER_OR_TEXT,
        "lendingLimit": NUMBER_OR_TEXT,
    },
    "name",
    "nominalQuota",
)
_FLAVOR_QUOTAS = _fields({"name": NAME, "resources": _list(_QUOTA)}, "name", "resources")
_STOP_POLICY = _one_of("None", "Hold", "HoldAndDrain")

OBJECTS: dict[str, tuple[str, Schema]] = {
    "Namespace": ("v1", _object({"spec": ANY_OBJECT})),
    "ConfigMap": ("v1", _object({"data": TEXTS, "binaryData": TEXTS, "immutable": FLAG})),
    "PersistentVolumeClaim": (
        "v1",
        _spec(
            {
                "accessModes": _list(_one_of("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod")),
                "resources": _fields({"requests": _fields({"storage": NUMBER_OR_TEXT}, "storage")}, "requests"),
                "storageClassName": TEXT,
                "volumeName": NAME,
                "volumeMode": _one_of("Filesystem", "Block"),
                "selector": _SELECTOR,
            },
            "accessModes",
            "resources",
        ),
    ),
    "ServiceAccount": (
        "v1",
        _object(
            {"automountServiceAccountToken": FLAG, "imagePullSecrets": _list(_NAMED), "secrets": _list(_NAMED)},
        ),
    ),
    "NetworkPolicy": (
        "networking.k8s.io/v1",
        _spec(
            {
                "podSelector": _SELECTOR,
                "policyTypes": _list(_one_of("Ingress", "Egress")),
                "ingress": _list(_fields({"from": _list(_PEER), "ports": _list(_PORT)})),
                "egress": _list(_fields({"to": _list(_PEER), "ports": _list(_PORT)})),
            },
            "podSelector",
        ),
    ),
    "LocalQueue": (
        "kueue.x-k8s.io/v1beta2",
        _spec({"clusterQueue": NAME, "stopPolicy": _STOP_POLICY, "fairSharing": ANY_OBJECT}, "clusterQueue"),
    ),
    "ClusterQueue": (
        "kueue.x-k8s.io/v1beta2",
        _spec(
            {
                "resourceGroups": _list(
                    _fields(
                        {"coveredResources": _list(NAME), "flavors": _list(_FLAVOR_QUOTAS)},
                        "coveredResources",
                        "flavors",
                    )
                ),
                "namespaceSelector": _SELECTOR,
                "cohortName": NAME,
                "queueingStrategy": _one_of("StrictFIFO", "BestEffortFIFO"),
                "stopPolicy": _STOP_POLICY,
                "preemption": ANY_OBJECT,
                "flavorFungibility": ANY_OBJECT,
                "fairSharing": ANY_OBJECT,
                "admissionChecksStrategy": ANY_OBJECT,
            }
        ),
    ),
    "ResourceFlavor": (
        "kueue.x-k8s.io/v1beta2",
        _object(
            {
                "spec": _fields(
                    {
                        "nodeLabels": TEXTS,
                        "nodeTaints": _list(_TAINT),
                        "tolerations": _list(_TOLERATION),
                        "topologyName": NAME,
                    }
                )
            }
        ),
    ),
}
"""API version and schema of each kind."""
