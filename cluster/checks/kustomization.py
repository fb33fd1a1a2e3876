"""Builds the objects of a kustomization: the few features that our overlays use, and a finding for all others."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blocksight.cluster.checks.documents import MAX_FILE_BYTES, DocumentError, plain, yaml_documents
from blocksight.cluster.checks.findings import Finding, Place, nearest

FILE = "kustomization.yaml"
READ = (
    *("apiVersion", "kind", "resources", "patches", "images", "configurations", "namespace"),
    *("configMapGenerator", "generatorOptions"),
)
ELSEWHERE = "render it yourself: kubectl kustomize FOLDER | blocksight cluster check -"
MAX_DEPTH = 8
"""Of kustomizations that name each other."""


def build(folder: Path, depth: int = 0) -> tuple[list[Place], list[Finding]]:
    """The objects of a folder with a kustomization, and what is wrong with it."""
    file = folder / FILE
    try:
        documents = yaml_documents(read(file))
    except (DocumentError, OSError) as error:
        return [], [Place(str(file), None).finding("kustomize", str(error), "mend the file")]
    if len(documents) != 1 or not isinstance(documents[0], dict):
        return [], [Place(str(file), None).finding("kustomize", "it is no single mapping", "write one document")]
    top = Place(str(file), documents[0])
    if depth > MAX_DEPTH:
        return [], [top["resources"].finding("kustomize", "kustomizations name each other in a circle", "break it")]
    objects, findings = _gathered(folder, top, depth)
    findings += _unread(top)
    for patch in top["patches"].items():
        findings += _patch(patch, objects)
    if top["namespace"].text:
        for one in objects:
            one.value.setdefault("metadata", {}).setdefault("namespace", top["namespace"].text)
    findings += _set_images(folder, top, objects)
    return objects, findings


def _gathered(folder: Path, top: Place, depth: int) -> tuple[list[Place], list[Finding]]:
    """The objects that a kustomization names, and the config maps that it makes."""
    objects: list[Place] = []
    findings: list[Finding] = []
    for resource in top["resources"].items():
        found, wrong = _resource(folder, resource, depth)
        objects += found
        findings += wrong
    for maker in top["configMapGenerator"].items():
        found, wrong = _config_map(folder, maker, top["generatorOptions"])
        objects, put = _placed(objects, maker["behavior"], found)
        findings += [*wrong, *put]
    return objects, findings


def _unread(top: Place) -> Iterator[Finding]:
    """Features of kustomize that are not read here, and words that are none."""
    for key, one in top.entries():
        if key not in READ:
            way_out = ELSEWHERE if key in _KNOWN else nearest(key, READ)
            yield one.finding("kustomize", f"{key} is not read here", way_out)


_KNOWN = (
    *("bases", "components", "commonAnnotations", "commonLabels", "crds", "helmCharts", "labels", "namePrefix"),
    *(
        "nameSuffix",
        "openapi",
        "patchesJson6902",
        "patchesStrategicMerge",
        "replacements",
        "replicas",
        "secretGenerator",
    ),
    *("transformers", "generators", "validators", "vars", "buildMetadata", "sortOptions", "metadata"),
)
"""Features of kustomize that are not read here."""


def read(file: Path) -> str:
    """The text of a file. Raises DocumentError if it is too large or no text, OSError if it cannot be read."""
    with file.open("rb") as opened:
        content = opened.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise DocumentError(f"it has more than {MAX_FILE_BYTES >> 20} MiB")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DocumentError("it is no text in UTF-8") from error


def _resource(folder: Path, place: Place, depth: int) -> tuple[list[Place], list[Finding]]:
    if "://" in place.text or place.text.startswith("github.com"):
        return [], [place.finding("kustomize", "it is fetched from a network", "keep a copy beside this file")]
    path = folder / place.text
    if path.is_dir():
        return build(path, depth + 1)
    try:
        return [Place(str(path), document) for document in yaml_documents(read(path))], []
    except OSError as error:
        return [], [place.finding("reference", f"{place.value!r} cannot be read: {error.strerror}", "name a file")]
    except DocumentError as error:
        return [], [Place(str(path), None).finding("yaml", str(error), "mend the file")]


def _config_map(folder: Path, maker: Place, options: Place) -> tuple[list[Place], list[Finding]]:
    data, findings = {}, []
    for key, one in maker.entries():
        if key not in ("name", "files", "literals", "namespace", "behavior"):
            findings.append(one.finding("kustomize", f"{key} is not read here", ELSEWHERE))
    for one in maker["files"].items():
        key, equals, name = one.text.partition("=")
        path = folder / (name if equals else key)
        try:
            data[key if equals else path.name] = read(path)
        except (OSError, DocumentError) as error:
            findings.append(one.finding("reference", f"{one.value!r} cannot be read: {error}", "name a file"))
    for one in maker["literals"].items():
        key, _, value = one.text.partition("=")
        data[key] = value.strip("\"'")
    name = maker["name"].text
    if options["disableNameSuffixHash"].value is not True:
        name += "-HASH"
        why = "kustomize adds a hash to the name, and changes it in no RayJob"
        place = options["disableNameSuffixHash"]
        findings.append(place.finding("reference", why, "write disableNameSuffixHash: true"))
    metadata = {"name": name} | ({"namespace": maker["namespace"].text} if maker["namespace"].text else {})
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}
    return [Place(maker.file, body)], findings


def _placed(objects: list[Place], behavior: Place, made: list[Place]) -> tuple[list[Place], list[Finding]]:
    """The objects with a config map that was made: a new one, or, by its behavior, in the place of one."""
    names = {(one["kind"].text, one["metadata"]["name"].text) for one in made}
    rest = [one for one in objects if (one["kind"].text, one["metadata"]["name"].text) not in names]
    if behavior.value == "replace" and len(rest) < len(objects):
        return [*rest, *made], []
    if behavior.value in (None, "create"):
        return [*objects, *made], []
    why = f"{behavior.value!r} is not read here" if behavior.value == "merge" else "there is no config map to replace"
    return [*objects, *made], [
        behavior.finding("kustomize", why, "write replace, and the name of one of the resources")
    ]


def _patch(patch: Place, objects: list[Place]) -> Iterator[Finding]:
    for key, one in patch.entries():
        if key not in ("target", "patch"):
            yield one.finding("kustomize", f"{key} is not read here", ELSEWHERE)
    target = patch["target"]
    kinds = {"kind": ("kind",), "name": ("metadata", "name"), "group": (), "version": ()}
    for key, one in target.entries():
        if key not in kinds:
            yield one.finding("kustomize", f"{key} is not read here", ELSEWHERE)
    chosen = [
        one
        for one in objects
        if all(one.at(*way).value == target[key].value for key, way in kinds.items() if way and target[key].is_there)
    ]
    try:
        operations = yaml_documents(patch["patch"].text)
    except DocumentError as error:
        yield patch["patch"].finding("kustomize", str(error), "mend the patch")
        return
    if not target.is_there or len(operations) != 1 or not isinstance(operations[0], list):
        yield patch["patch"].finding("kustomize", "only lists of operations with a target are read here", ELSEWHERE)
        return
    if not chosen:
        yield target.finding("reference", "no object of these files is meant", "name a kind and name that is there")
    for one in chosen:
        for operation in operations[0]:
            fault = _apply(one.value, operation)
            if fault is not None:
                yield patch["patch"].finding("kustomize", f"{json.dumps(operation)[:120]}: {fault}", "mend the patch")


def _apply(body: Any, operation: Any) -> str | None:
    """Applies one operation of a JSON patch to a body, in place; says why it cannot."""
    if not isinstance(operation, dict) or not isinstance(operation.get("path"), str):
        return "an operation has op, path and, but for remove, value"
    kind, value = operation.get("op"), plain(operation.get("value"))
    if kind not in ("add", "replace", "remove"):
        return "only add, replace and remove are read here"
    *way, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    for part in way:
        body = _child(body, part)
        if body is None:
            return f"there is no {part}"
    if isinstance(body, dict):
        return _change_mapping(body, last, kind, value)
    if isinstance(body, list):
        return _change_list(body, last, kind, value)
    return f"{last} stands in no mapping or list"


def _child(body: Any, part: str) -> Any:
    if isinstance(body, dict):
        return body.get(part)
    is_entry = isinstance(body, list) and part.isdecimal() and int(part) < len(body)
    return body[int(part)] if is_entry else None


def _change_mapping(body: dict[str, Any], key: str, kind: str, value: Any) -> str | None:
    if kind != "add" and key not in body:
        return f"there is no {key} to {kind}"
    if kind == "remove":
        del body[key]
    else:
        body[key] = value
    return None


def _change_list(body: list[Any], key: str, kind: str, value: Any) -> str | None:
    if kind == "add" and key == "-":
        body.append(value)
        return None
    if not key.isdecimal() or int(key) > len(body) - (kind != "add"):
        return f"the list has no place {key}"
    if kind == "add":
        body.insert(int(key), value)
    elif kind == "remove":
        del body[int(key)]
    else:
        body[int(key)] = value
    return None


def _set_images(folder: Path, top: Place, objects: list[Place]) -> Iterator[Finding]:
    """Puts the images of a kustomization in place, where its configurations say that images stand."""
    ways: dict[str, list[list[str]]] = {}
    for one in top["configurations"].items():
        try:
            (configuration,) = yaml_documents(read(folder / one.text))
        except (OSError, DocumentError, ValueError) as error:
            yield one.finding("reference", f"{one.value!r} cannot be read: {error}", "name a file")
            continue
        for image in Place(str(folder / one.text), configuration)["images"].items():
            ways.setdefault(image["kind"].text, []).append(image["path"].text.split("/"))
    for image in top["images"].items():
        for one in objects:
            for way in ways.get(one["kind"].text, []):
                _set_image(one.value, way, image)


def _set_image(body: Any, way: list[str], image: Place) -> None:
    if isinstance(body, list):
        for one in body:
            _set_image(one, way, image)
    elif isinstance(body, dict) and len(way) > 1:
        _set_image(body.get(way[0]), way[1:], image)
    elif isinstance(body, dict) and isinstance(body.get(way[0]), str):
        name = body[way[0]].partition("@")[0].rpartition(":")[0] or body[way[0]].partition("@")[0]
        if name == image["name"].text or body[way[0]] == image["name"].text:
            tag, digest = image["newTag"].value, image["digest"].text
            body[way[0]] = (
                (image["newName"].text or name) + (f":{tag}" if tag else "") + (f"@{digest}" if digest else "")
            )
