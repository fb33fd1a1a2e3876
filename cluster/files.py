"""The files of the package that start clusters: their names, what each is for, and their text."""

from importlib.resources import as_file, files

import yaml

from blocksight.cluster.checks.kustomization import build
from blocksight.cluster.errors import ClusterError

FILES = {
    "image/Dockerfile": "the container image, for CPUs and GPUs",
    "image/Dockerfile.dockerignore": "what of the checkout the image does not hold",
    "kuberay/base/kustomization.yaml": "KubeRay: the objects, and the image by its digest",
    "kuberay/base/job.toml": "KubeRay: the job's configuration for CPUs, which becomes a ConfigMap",
    "kuberay/base/rayjob.yaml": "KubeRay: the RayJob with its head, workers and submitter",
    "kuberay/base/serviceaccount.yaml": "KubeRay: the accounts of head, workers and submitter",
    "kuberay/base/networkpolicy.yaml": "KubeRay: what the pods may reach, and who reaches them",
    "kuberay/base/images.yaml": "KubeRay: where images stand in a RayJob, for kustomize",
    "kuberay/overlays/cpu/kustomization.yaml": "KubeRay: workers of CPUs",
    "kuberay/overlays/gpu/kustomization.yaml": "KubeRay: one GPU for each worker",
    "kuberay/overlays/gpu/job.toml": "KubeRay: the job's configuration for GPUs",
    "kuberay/overlays/spot-eks/kustomization.yaml": "KubeRay: GPU workers on spot machines of EKS",
    "kuberay/overlays/spot-gke/kustomization.yaml": "KubeRay: GPU workers on spot machines of GKE",
    "kuberay/overlays/kueue/kustomization.yaml": "KubeRay: GPU workers behind a quota of Kueue",
    "kuberay/overlays/kueue/queue.yaml": "KubeRay: the queue and its quota",
    "slurm/blocksight.sbatch": "Slurm: one job over several nodes",
    "slurm/blocksight-array.sbatch": "Slurm: a job in parts, each alone on its node",
    "slurm/job.toml": "Slurm: the job's configuration",
    "aws/cluster.yaml": "AWS: Ray's launcher, with workers on spot machines",
    "aws/job.toml": "AWS: the job's configuration",
    "skypilot/blocksight.yaml": "SkyPilot: a managed job on one spot machine of any cloud",
    "skypilot/job.toml": "SkyPilot: the job's configuration",
    "grafana/blocksight.json": "Grafana: a dashboard of a job, with its progress, speed, trouble and money",
    "prometheus/alerts.yaml": "Prometheus: alerts on a job that stands still, rejects, gives up or waits for a store",
    "iam/driver.json": "AWS policy: what the driver does to the buckets",
    "iam/worker.json": "AWS policy: what the workers do to the buckets",
    "iam/launcher-head.json": "AWS policy: what the head of Ray's launcher does to machines",
    "iam/trust-ec2.json": "AWS trust policy: machines take the role",
    "iam/trust-eks.json": "AWS trust policy: pods of EKS take the role",
}
"""What each file is for."""
OVERLAYS = {
    name.removesuffix("/kustomization.yaml"): f"{what}: all objects as one YAML"
    for name, what in FILES.items()
    if name.startswith("kuberay/overlays/") and name.endswith("/kustomization.yaml")
}
"""Folders of KubeRay whose objects are built here, as `kubectl kustomize` does."""


def text_of(name: str) -> str:
    """The text of a file, or the objects of an overlay. Raises ClusterError for a name that is neither."""
    if name in OVERLAYS:
        return _built(name)
    if name not in FILES:
        raise ClusterError(f"the package has no file {name!r}; `blocksight cluster print` lists them")
    return files("blocksight.cluster").joinpath(*name.split("/")).read_text(encoding="utf-8")


def _built(name: str) -> str:
    with as_file(files("blocksight.cluster") / "kuberay") as folder:
        objects, findings = build(folder.parent / name)
    if findings:
        raise ClusterError(str(findings[0]))
    return yaml.safe_dump_all([one.value for one in objects], sort_keys=False)
