"""The tools of others find nothing wrong with the files either; one that is missing is skipped, with this reason."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from blocksight.cluster.checks.kustomization import build
from blocksight.cluster.files import OVERLAYS

CLUSTER = Path(__file__).parents[2] / "cluster"
OFFLINE = ("--quiet", "--compact", "--skip-download")
PRIVILEGES = (
    "CKV_K8S_6,CKV_K8S_16,CKV_K8S_17,CKV_K8S_18,CKV_K8S_19,CKV_K8S_20,CKV_K8S_23,CKV_K8S_28,CKV_K8S_31,CKV_K8S_37"
)
AMOUNTS = "CKV_K8S_10,CKV_K8S_11,CKV_K8S_12,CKV_K8S_13,CKV_K8S_14,CKV_K8S_43"
IMAGE = "CKV_DOCKER_3,CKV_DOCKER_4,CKV_DOCKER_7,CKV_DOCKER_8,CKV_DOCKER_10"
"""Rules of checkov: no privileges, amounts, digests. It has others, such as probes, which are KubeRay's own."""


def needs(tool: str) -> Any:
    """Skips a test where a tool is missing."""
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is not installed")


def run(*command: object, text: str | None = None) -> None:
    """Runs a tool, which must find nothing."""
    done = subprocess.run([*map(str, command)], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def plain_objects(overlay: str) -> list[dict[str, Any]]:
    """The objects of an overlay that every Kubernetes knows, and its pods as pods."""
    objects, findings = build(CLUSTER / overlay)
    assert not findings
    (job,) = [one["spec"].value for one in objects if one["kind"].text == "RayJob"]
    cluster = job["rayClusterSpec"]
    templates = [cluster["headGroupSpec"]["template"], cluster["workerGroupSpecs"][0]["template"]]
    pods = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"pod-{at}", "namespace": "jobs"}, "spec": one["spec"]}
        for at, one in enumerate([*templates, job["submitterPodTemplate"]])
    ]
    others = [
        one.value for one in objects if ".io/" not in one["apiVersion"].text or "k8s.io/v1" in one["apiVersion"].text
    ]
    return [*pods, *(one for one in others if not one["apiVersion"].startswith("kueue."))]


@needs("kubernetes-validate")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_knows_every_field(overlay):
    for one in plain_objects(overlay):
        run("kubernetes-validate", "--strict", "-", text=yaml.safe_dump(one))


@needs("checkov")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_checkov_finds_no_privilege(overlay, tmp_path):
    (tmp_path / "pods.yaml").write_text(yaml.safe_dump_all(plain_objects(overlay)))
    run("checkov", *OFFLINE, "--check", f"{PRIVILEGES},{AMOUNTS}", "-f", tmp_path / "pods.yaml")


@needs("checkov")
def test_checkov_finds_nothing_in_the_image(tmp_path):
    """With the base in its place: checkov takes the variable of a FROM for an image without a tag."""
    text = (CLUSTER / "image/Dockerfile").read_text()
    [base] = re.findall(r"^ARG BASE=(\S+)$", text, re.MULTILINE)
    (tmp_path / "Dockerfile").write_text(text.replace("FROM ${BASE}", f"FROM {base}"))
    run("checkov", *OFFLINE, "--check", IMAGE, "-f", tmp_path / "Dockerfile")


@needs("hadolint")
def test_hadolint_finds_nothing_in_the_image():
    run("hadolint", CLUSTER / "image/Dockerfile")


@needs("shellcheck")
@pytest.mark.parametrize("script", sorted((CLUSTER / "slurm").glob("*.sbatch")), ids=lambda script: script.name)
def test_shellcheck_finds_nothing_in_a_script(script):
    run("shellcheck", script)


@needs("shellcheck")
def test_shellcheck_finds_nothing_in_a_command():
    launcher = yaml.safe_load((CLUSTER / "aws/cluster.yaml").read_text())
    commands = [*launcher["head_start_ray_commands"], *launcher["worker_start_ray_commands"]]
    commands.append(yaml.safe_load((CLUSTER / "skypilot/blocksight.yaml").read_text())["run"])
    run("shellcheck", "--shell=bash", "-", text="RAY_HEAD_IP=${1:?}\n" + "\n".join(commands))
