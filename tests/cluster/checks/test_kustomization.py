"""The objects of an overlay are those that kustomize builds; what is wrong with a kustomization is found."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from blocksight.cluster.checks.check import check_files
from blocksight.cluster.checks.kustomization import build
from tests.cluster.checks.changing import PRODUCT

KUBERAY = Path(__file__).parents[3] / "cluster" / "kuberay"
OVERLAYS = sorted(folder.name for folder in (KUBERAY / "overlays").iterdir())


def by_name(objects):
    return {(one["kind"], one["metadata"]["name"]): one for one in objects}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed: its kustomize is compared with")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_objects_are_those_of_kustomize(overlay):
    folder = KUBERAY / "overlays" / overlay
    theirs = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True).stdout
    ours, findings = build(folder)
    assert not findings
    assert by_name(one.value for one in ours) == by_name(yaml.safe_load_all(theirs))


@pytest.fixture
def copy(tmp_path):
    """A copy of the folder of KubeRay."""
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    return tmp_path / "kuberay"


@pytest.mark.parametrize(
    ("file", "old", "new", "rule"),
    [
        ("base/kustomization.yaml", "resources: [rayjob.yaml", "resources: [rayjobs.yaml", "reference"),
        ("base/kustomization.yaml", "files: [job.toml]", "files: [jobs.toml]", "reference"),
        ("overlays/gpu/kustomization.yaml", "files: [job.toml]", "files: [jobs.toml]", "reference"),
        ("base/kustomization.yaml", "disableNameSuffixHash: true", "disableNameSuffixHash: false", "reference"),
        ("base/kustomization.yaml", "configurations: [images.yaml]", "configurations: [image.yaml]", "reference"),
        ("base/kustomization.yaml", "digest: sha256:", "newTag: sha256-", "image"),
        ("base/kustomization.yaml", "name: blocksight\n    newName", "name: blocksite\n    newName", "image"),
        ("base/kustomization.yaml", "images:\n", "image:\n", "kustomize"),
        ("base/kustomization.yaml", "resources: [", "namePrefix: a-\nresources: [", "kustomize"),
        ("base/images.yaml", "workerGroupSpecs", "workerGroupSpec", "image"),
        ("base/rayjob.yaml", "  backoffLimit: 5\n", "  backoffLimit: 5\n  backoffLimit: 6\n", "yaml"),
        ("base/rayjob.yaml", "spec:\n", "spec: [\n", "yaml"),
        ("overlays/gpu/job.toml", 'address = "auto"', 'adress = "auto"', "configuration"),
        ("overlays/gpu/kustomization.yaml", "behavior: replace", "behavior: merge", "kustomize"),
        ("overlays/gpu/kustomization.yaml", "behavior: replace", "behavior: create", "name"),
        ("overlays/gpu/kustomization.yaml", "name: blocksight", "name: blocksite", "kustomize"),
        ("overlays/gpu/kustomization.yaml", "target: {kind: RayJob}", "target: {kind: RayJobs}", "reference"),
        ("overlays/gpu/kustomization.yaml", "workerGroupSpecs/0/", "workerGroupSpecs/1/", "kustomize"),
        ("overlays/gpu/kustomization.yaml", "op: add", "op: ad", "kustomize"),
        ("overlays/gpu/kustomization.yaml", "nvidia.com~1gpu", "nvidia.com/gpu", "kustomize"),
        ("overlays/gpu/kustomization.yaml", "patch: |-", "path: patch.yaml\n    patch: |-", "kustomize"),
        ("overlays/gpu/kustomization.yaml", "../../base", "https://example.com/base", "kustomize"),
        ("overlays/gpu/kustomization.yaml", "../../base", "../gpu", "kustomize"),
    ],
)
def test_a_mistake_is_found(copy, file, old, new, rule):
    text = (copy / file).read_text()
    assert old in text
    (copy / file).write_text(text.replace(old, new))
    found = check_files([str(copy / "overlays" / "gpu")], PRODUCT)
    assert rule in {one.rule for one in found}, found


@pytest.mark.parametrize(
    "patch",
    [
        {"target": {"kind": "RayJob"}, "patch": "kind: RayJob"},
        {"target": {"kind": "RayJob"}, "patch": "- op: ["},
        {"target": {"kind": "RayJob", "labelSelector": "a=b"}, "patch": "[]"},
        {"patch": "[]"},
    ],
    ids=["no list", "no YAML", "a target that is not read", "no target"],
)
def test_a_patch_that_is_not_read_is_said(copy, patch):
    (copy / "overlays" / "own").mkdir()
    body = {"resources": ["../gpu"], "patches": [patch]}
    (copy / "overlays" / "own" / "kustomization.yaml").write_text(yaml.safe_dump(body))
    (found,) = check_files([str(copy / "overlays" / "own")], PRODUCT)
    assert found.rule == "kustomize"


def test_a_file_of_a_kustomization_is_its_folder(copy):
    assert check_files([str(copy / "overlays" / "gpu" / "kustomization.yaml")], PRODUCT) == []


def test_plain_files_are_one_set(copy):
    base = copy / "base"
    found = check_files([str(base / name) for name in ("rayjob.yaml", "serviceaccount.yaml")], PRODUCT)
    assert {one.rule for one in found} == {"image", "reference"}  # kustomize sets the image and makes the config map


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_what_cannot_be_read_is_a_finding(tmp_path, name):
    assert [one.rule for one in check_files([str(tmp_path / name)], PRODUCT)] == ["file"]


def test_aliases_do_not_grow_without_bound(tmp_path):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)]
    (tmp_path / "laughs.yaml").write_text("\n".join(lines))
    (found,) = check_files([str(tmp_path / "laughs.yaml")], PRODUCT)
    assert "values" in found.why
