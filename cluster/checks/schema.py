"""Checks documents against JSON schemas: the CRDs of KubeRay, and our own for what stands beside them."""

import gzip
import json
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from blocksight.cluster.checks.findings import Finding, Place, nearest
from blocksight.cluster.checks.object_schemas import METADATA, OBJECTS

KUBERAY_VERSION = "1.7.0"
CRDS = {"RayJob": "ray.io_rayjobs.json.gz", "RayCluster": "ray.io_rayclusters.json.gz"}
"""File of each custom resource of KubeRay."""


def api_version(kind: str) -> str | None:
    """The API version of a kind that is known here; None for another kind."""
    if kind in CRDS:
        return "ray.io/v1"
    return OBJECTS[kind][0] if kind in OBJECTS else None


def schema_findings(place: Place) -> Iterator[Finding]:
    """What of a Kubernetes object is no field of its kind, of the wrong type, or no value that the field takes."""
    for error in _validator(place["kind"].text).iter_errors(place.value):
        yield from faults_of(place, error)


def faults_of(place: Place, error: ValidationError) -> Iterator[Finding]:
    """The findings of one error of a schema."""
    at = place.at(*error.absolute_path)
    wanted: Any = error.validator_value
    instance: Any = error.instance
    match error.validator:
        case "additionalProperties":
            known = (error.schema.get("properties") if isinstance(error.schema, dict) else None) or {}
            for name in sorted(set(instance) - set(known)):
                yield at[name].finding("schema", f"{name} is no field here and would be dropped", nearest(name, known))
        case "required":
            for name in sorted(set(wanted) - set(instance)):
                yield at.finding("schema", f"the field {name} is missing", f"add {name}")
        case "enum":
            words = ", ".join(map(str, wanted))
            yield at.finding("schema", f"{at.value!r} is not among {words}", nearest(str(at.value), map(str, wanted)))
        case "type":
            kinds = " or ".join(wanted if isinstance(wanted, list) else [wanted])
            yield at.finding("schema", f"{_short(at.value)} is not of the type {kinds}", _typed(at.value, kinds))
        case "pattern":
            yield at.finding("schema", f"{at.value!r} is not written as this field is", "write a number with its unit")
        case _:
            yield at.finding("schema", _short(error.message), "see the reference of this kind of object")


def _typed(value: Any, kinds: str) -> str:
    is_plain = isinstance(value, (bool, int, float))
    return f'put it in quotes: "{json.dumps(value)}"' if kinds == "string" and is_plain else f"write a value of {kinds}"


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@cache
def _validator(kind: str) -> Draft202012Validator:
    return Draft202012Validator(crd_schema(kind) if kind in CRDS else OBJECTS[kind][1])


def crd_schema(kind: str) -> dict[str, Any]:
    """The schema of version v1 of a custom resource of KubeRay, made strict. A new one at each call."""
    packed = files("blocksight.cluster.checks").joinpath(f"kuberay-{KUBERAY_VERSION}", CRDS[kind]).read_bytes()
    versions = json.loads(gzip.decompress(packed))["spec"]["versions"]
    (schema,) = [one["schema"]["openAPIV3Schema"] for one in versions if one["name"] == "v1"]
    _make_strict(schema)
    schema["properties"]["metadata"] = METADATA
    return schema


def _make_strict(schema: Any) -> None:
    """Changes a schema of Kubernetes to JSON schema that refuses unknown fields, which the API server drops."""
    if isinstance(schema, list):
        for one in schema:
            _make_strict(one)
    if not isinstance(schema, dict):
        return
    if schema.pop("x-kubernetes-int-or-string", False):
        schema.pop("type", None)
        schema["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if schema.get("nullable") and "type" in schema:
        schema["type"] = [schema["type"], "null"]
    if isinstance(known := schema.get("properties"), dict):
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        if isinstance(schema.get("required"), list):  # the server fills defaults in before it looks
            schema["required"] = [name for name in schema["required"] if "default" not in known.get(name, {})]
    for key, below in schema.items():
        if key not in ("enum", "default", "required"):
            _make_strict(below)
