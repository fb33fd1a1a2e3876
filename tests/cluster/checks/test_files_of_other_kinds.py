"""Each mistake in a script of sbatch, a file of Ray's launcher, a task of SkyPilot, a Dockerfile or a policy is found
by its rule, and the files themselves have none."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from ray.scripts.scripts import start

from blocksight.cluster.checks.check import check_files
from blocksight.cluster.checks.findings import Finding
from blocksight.cluster.checks.quantities import quantity, slurm_bytes, slurm_seconds
from blocksight.cluster.checks.ray_options import START_OPTIONS
from blocksight.cluster.files import FILES
from tests.cluster.checks.changing import GONE, PRODUCT, change

CLUSTER = Path(__file__).parents[3] / "cluster"
CHECKED = [name for name in FILES if not name.startswith("kuberay/") and not name.endswith("ignore")]

SLURM = [
    ("--nodes=2", "--node=2", "slurm"),
    ("--nodes=2", "--nodes=two", "quantity"),
    ("--nodes=2", "--nodes=0", "quantity"),
    ("--nodes=2", "-N two", "quantity"),
    ("--mem=64G", "--mem=64GiB", "quantity"),
    ("--mem=64G", "--mem=64 GB", "slurm"),
    ("#SBATCH --mem=64G\n", "", "amount"),
    ("--gpus-per-node=1", "--gpus-per-node=0", "quantity"),
    ("--gpus-per-node=1", "--gpus-per-node=a100:x", "quantity"),
    ("--cpus-per-task=8", "--cpus-per-task=8.5", "quantity"),
    ("--time=24:00:00", "--time=24h", "quantity"),
    ("--time=24:00:00", "--time=1", "grace"),
    ("#SBATCH --time=24:00:00\n", "", "slurm"),
    ("--open-mode=append", "--open-mode=apend", "quantity"),
    ("#SBATCH --exclusive\n", "", "slurm"),
    ("--ntasks-per-node=1", "--ntasks-per-node=2", "slurm"),
    ("#SBATCH --requeue\n", "", "retry"),
    ("#SBATCH --requeue", "# SBATCH --requeue", "slurm"),
    ("#SBATCH --requeue", "#sbatch --requeue", "slurm"),
    ("#SBATCH --signal=B:TERM@90\n", "", "grace"),
    ("B:TERM@90", "TERM@90", "grace"),
    ("B:TERM@90", "B:TERM@20", "grace"),
    ("B:TERM@90", "B:TREM@90", "enum"),
    ("B:TERM@90", "B:USR1@90", "grace"),
    ("' TERM\n", "' USR1\n", "grace"),
    ("#!/bin/bash\n", "", "slurm"),
    ("--job-name=blocksight", "--job-name=$USER", "shell"),
    ("umask 077\n", "umask 077\n#SBATCH --partition=gpu\n", "slurm"),
    ("umask 077\n", "", "token"),
    ("RAY_AUTH_MODE=token ", "", "token"),
    ('RAY_AUTH_TOKEN_PATH="$home/token" ', "", "token"),
    ("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=d3b07384d113edec49eaa6238ad5ff00", "secret"),
    ("set -euo pipefail", "set -u", "shell"),
    ("export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600", "export TIMEOUT=600", "slurm"),
    ('"$first:$port" --min-nodes', '"$frst:$port" --min-nodes', "reference"),
    ("$SLURM_JOB_NODELIST", "$NODES", "reference"),
    (' --min-nodes "$SLURM_NNODES"', "", "ray-start"),
    ("  -- blocksight", "  blocksight", "ray-start"),
    ("blocksight explain", "blocksight explian", "command"),
    ('--config "$job"', '--confg "$job"', "command"),
    ("blocksight explain", "python explain.py", "command"),
    ('if [ "${SLURM_RESTART_COUNT:-0}" -lt 5 ]; then scontrol', "if true; then scontrol", "retry"),
    ("umask 077\n", "umask 077\npip install blocksight\n", "runtime-env"),
    ("#SBATCH --requeue", "#SBATHC --requeue", "slurm"),
    ("SLURM_NNODES", "SLURM_NODES", "reference"),
    ("SLURM_JOB_ID % 20000", "SLURM_JOBS_ID % 20000", "reference"),
    ("RAY_USAGE_STATS_ENABLED", "RAY_USAGE_STAT_ENABLED", "variable"),
    ("RAY_USAGE_STATS_ENABLED=0", "RAY_USAGE_STATS_ENABLED=no", "variable"),
    ("srun --kill-on-bad-exit=0 ray", "ray", "slurm"),
    ("ray symmetric-run", "ray symetric-run", "slurm"),
    ("--num-gpus", "--num-gpu", "ray-start"),
    ("export RAY_ADDRESS=", "RAY_ADDRESS=", "ray-start"),
    ('scancel --signal=TERM "$SLURM_JOB_ID.0"', 'kill -TERM "$step"', "grace"),
    ('> "$home/token"', '> "$home/tokens"', "reference"),
    ("export RAY_AUTH_MODE", "RAY_AUTH_MODE", "token"),
    ("esac\n", "", "shell"),
    ('--address "$first:$port" &', '--address "$first:$port" --part 0/2 &', "part"),
    ('--config "$job" --address "$first:$port"', '--config "$job"', "ray-start"),
    ('"${SLURM_GPUS_ON_NODE:-0}"', "8", "amount"),
    ('"${SLURM_GPUS_ON_NODE:-0}"', "1", None),
]

ARRAY = [
    ("--array=0-15", "--array=0-15:2", "part"),
    ("--array=0-15", "--array=0,3,5", "part"),
    ("--array=0-15", "--array=1-16", "quantity"),
    ("$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT", "$SLURM_ARRAY_TASK_ID/8", "part"),
    ("$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT", "$SLURM_ARRAY_TASK_ID/16", None),
    ("$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT", "${SLURM_ARRAY_TASK_ID}/${SLURM_ARRAY_TASK_COUNT}", None),
    ("$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT", "$SLURM_ARRAY_TASK_COUNT/$SLURM_ARRAY_TASK_ID", "part"),
    ("$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT", "3/16", "part"),
    (' --part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"', "", "part"),
    ("--array=0-15", "--array=0-99%20", None),
    ("--nodes=1", "--nodes=2", "slurm"),
    ("--ntasks=1", "--ntasks=4", "slurm"),
    ("--open-mode=append", "--open-mode=truncate", "retry"),
    ("#SBATCH --requeue", "#SBATCH --requeue\n#SBATCH --no-requeue", "retry"),
    (" &\nstep=$!", "\nstep=$!", "grace"),
    ('wait "$step" || code=$?', "true", "slurm"),
    ('scancel --signal=TERM "$SLURM_JOB_ID.0"', 'kill -TERM "$step"', "grace"),
    ("1 | 4 | 143)", "*)", "retry"),
    ("1 | 4 | 143)", "1 | 2 | 4)", "retry"),
    ("1 | 4 | 143)", "1 | 4 | 137 | 143)", None),
    ('exit "$code"', "exit 0", "slurm"),
]

SKYPILOT = [
    ("resources.acelerators", {"L4": 1}, "schema"),
    ("num_node", 1, "schema"),
    ("resources.job_recovery.recover_on_exit_code", 4, "schema"),
    ("num_nodes", 4, "replicas"),
    ("resources.accelerators", "L4S:1", "enum"),
    ("resources.accelerators", {"A10g": 1}, "enum"),
    ("resources.accelerators", "L4:one", "quantity"),
    ("resources.accelerators.L4", 0, "quantity"),
    ("resources.cpus", "8 or more", "quantity"),
    ("resources.memory", "32 GB+", "quantity"),
    ("resources.disk_tier", "fast", "enum"),
    ("resources.memory", GONE, "amount"),
    ("resources.accelerators.L4", 1000, "quantity"),
    ("resources.disk_size", 1_000_000, "quantity"),
    ("file_mounts.<~/job.toml>", "", "reference"),
    ("resources.network_tier", "fast", "enum"),
    ("resources.infra", "asw/us-east-1", "enum"),
    ("resources.use_spot", "yes!", "schema"),
    ("resources.any_of", [{"accelerators": "L4S:1"}], "enum"),
    ("resources.ports", 8265, "network"),
    ("resources.image_id", GONE, "image"),
    ("resources.image_id", "docker:registry.example/blocksight:1", "image"),
    ("resources.image_id", "ami-0868a20f5a3bf9702", "image"),
    ("resources.job_recovery", GONE, "retry"),
    ("resources.job_recovery.strategy", "EAGER", "enum"),
    ("resources.job_recovery.recover_on_exit_codes", [1, 2, 4], "retry"),
    ("resources.job_recovery.recover_on_exit_codes", [3], "retry"),
    ("resources.job_recovery.max_restarts_on_errors", -1, "quantity"),
    ("resources", {}, "amount"),
    ("resources", lambda old: {key: old[key] for key in ("memory", "image_id", "job_recovery")}, "amount"),
    ("secrets", {"ACCOUNT": "abc"}, "secret"),
    ("secrets", {"HF_TOKEN": "hf_abc"}, "secret"),
    ("envs", {"API_KEY": "abc"}, "secret"),
    ("run", "blocksight explain --config ~/jobs.toml", "reference"),
    ("run", "blocksight explain --config ~/job.toml --limit $LIMIT", "reference"),
    ("run", "blocksight explian --config ~/job.toml", "command"),
    ("run", "blocksight explain --config ~/job.toml --worker 2", "command"),
    ("run", "python job.py", "command"),
    ("run", GONE, "command"),
    ("setup", "pip install blocksight", "runtime-env"),
    ("file_mounts.<~/job.toml>", "jobs.toml", "reference"),
    ("file_mounts", {"job.toml": "job.toml"}, "path"),
    ("name", "block sight", "name"),
]

HEAD = "available_node_types.head"
SPOT = "available_node_types.spot"
LAUNCHER = [
    ("max_worker", 8, "schema"),
    ("cluster_name", "", "name"),
    ("provider.use_internal_ip", True, "schema"),
    ("provider.cache_stopped_nodes", True, "idle"),
    ("auth", GONE, "login"),
    ("auth.ssh_user", "ec2-user", "login"),
    ("docker.container_name", "", "schema"),
    (f"{SPOT}.min_workers", -1, "replicas"),
    (f"{SPOT}.max_workers", 9, "replicas"),
    (f"{SPOT}.node_config.InstanceMarketOptions", {}, "schema"),
    (f"{SPOT}.node_config.BlockDeviceMappings", GONE, "disk"),
    (f"{SPOT}.node_config.BlockDeviceMappings[0].Ebs.VolumeSize", 8, "disk"),
    (f"{SPOT}.node_config.BlockDeviceMappings[0].DeviceName", "/dev/sd1a", "disk"),
    ("file_mounts.</home/ray/.ray/auth_token>", "~/.ray/token", "reference"),
    ("file_mounts.</home/ray/job.toml>", "", "reference"),
    ("file_mounts.</home/ray/job.toml>", GONE, "reference"),
    ("head_start_ray_commands[0]", "ray stpo", "ray-start"),
    ("worker_start_ray_commands[0]", GONE, "ray-start"),
    ("head_start_ray_commands[1]", lambda old: old.replace("ray_bootstrap", "ray_botstrap"), "scaling"),
    ("idle_timeout_minutes", "5", "schema"),
    ("idle_timeout_minutes", 0, "idle"),
    ("idle_timeout_minutes", 600, "idle"),
    ("provider.type", "asw", "enum"),
    ("provider.region", "us-east", "enum"),
    ("provider.use_internal_ips", False, "network"),
    ("head_node_type", "heads", "reference"),
    ("max_workers", 0, "replicas"),
    (
        "available_node_types",
        lambda old: {**old, **{name: {**old["spot"], "min_workers": 5} for name in ("spot", "more")}},
        "replicas",
    ),
    (f"{SPOT}.min_workers", 9, "replicas"),
    (f"{SPOT}.max_workers", -1, "replicas"),
    (SPOT, GONE, "replicas"),
    (f"{SPOT}.node_config.SubnetIds", ["vpc-0a"], "schema"),
    (f"{SPOT}.node_config.InstanceTyp", "g5.2xlarge", "schema"),
    (f"{SPOT}.node_config.InstanceType", "g5.2xlarg", "enum"),
    (f"{SPOT}.node_config.InstanceType", GONE, "schema"),
    (f"{SPOT}.node_config.InstanceMarketOptions.MarketType", "spott", "enum"),
    (f"{SPOT}.node_config.MetadataOptions.HttpTokens", "optional", "metadata"),
    (f"{SPOT}.node_config.MetadataOptions", GONE, "metadata"),
    (f"{HEAD}.node_config.MetadataOptions.HttpPutResponseHopLimit", 1, "metadata"),
    (f"{HEAD}.node_config.MetadataOptions.HttpPutResponseHopLimit", "2", "schema"),
    (f"{HEAD}.node_config.IamInstanceProfile", GONE, "role"),
    (f"{HEAD}.node_config.IamInstanceProfile", {"Nam": "blocksight-head"}, "role"),
    (f"{HEAD}.node_config.BlockDeviceMappings[0].Ebs.Encrypted", GONE, "disk"),
    (f"{HEAD}.node_config.BlockDeviceMappings[0].Ebs.VolumeType", "gp4", "enum"),
    (f"{HEAD}.node_config.InstanceMarketOptions", {"MarketType": "spot"}, "head"),
    (f"{HEAD}.resources.CPU", 4, "head"),
    (f"{HEAD}.resources", {}, "head"),
    ("docker.image", "registry.example/blocksight:latest", "image"),
    ("docker", GONE, "image"),
    ("docker.worker_image", "registry.example/blocksight:gpu", "image"),
    ("docker.run_options[+]", "--privileged", "privilege"),
    ("docker.run_options[+]", "-e AWS_SECRET_ACCESS_KEY=abc", "secret"),
    ("setup_commands", ["pip install timm"], "runtime-env"),
    ("file_mounts.</home/ray/.ray/auth_token>", GONE, "token"),
    ("file_mounts.</home/ray/job.toml>", "jobs.toml", "reference"),
    ("file_mounts.<job.toml>", "job.toml", "path"),
    ("head_start_ray_commands[1]", lambda old: old.replace("RAY_AUTH_MODE=token ", ""), "token"),
    ("worker_start_ray_commands[1]", lambda old: old.replace("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=none"), "token"),
    ("head_start_ray_commands[1]", lambda old: old.replace("127.0.0.1", "0.0.0.0"), "network"),
    ("head_start_ray_commands[1]", lambda old: old.replace("--num-cpus=0", ""), "head"),
    ("head_start_ray_commands[1]", lambda old: old.replace("--port=6379", "--port=6380"), "reference"),
    ("head_start_ray_commands[1]", lambda old: old.replace("--head ", ""), "ray-start"),
    ("head_start_ray_commands[1]", lambda old: old.replace("--head", "--headd"), "ray-start"),
    ("head_start_ray_commands[1]", lambda old: old.partition("--autoscaling")[0], "scaling"),
    ("head_start_ray_commands[1]", lambda old: old.replace("--dashboard-host", "--dashbord-host"), "ray-start"),
    ("worker_start_ray_commands[1]", lambda old: old.replace("$RAY_HEAD_IP", "$HEAD_IP"), "reference"),
    ("worker_start_ray_commands", ["ray stop"], "ray-start"),
]

DOCKERFILE = [
    ("ARG BASE=python:3.11-slim-bookworm@sha256:", "ARG BASE=python:3.11-slim-bookworm #", "image"),
    ("FROM ${BASE} AS build", "FROM python:3.11 AS build", "image"),
    ("FROM ${BASE} AS build", "FROM ${BASES} AS build", "image"),
    ("FROM ${BASE} AS build", "FROM ${BASE} as build too", "schema"),
    ("--from=build", "--from=built", "reference"),
    ("USER 1000\n", "", "privilege"),
    ("USER 1000\n", "USER root\n", "privilege"),
    ("USER 1000\n", "USER ray\n", "privilege"),
    ("WORKDIR /home/ray", "WORKDIR home/ray", "path"),
    ("    RAY_AUTH_MODE=token \\\n", "", "token"),
    ("PYTHONUNBUFFERED=1", "HF_TOKEN=abc", "secret"),
    ("ARG VERSION=unknown", "ARG HF_TOKEN", "secret"),
    ("RUN useradd", "RUNN useradd", "schema"),
    ("RUN useradd --uid 1000 --create-home ray", "RUN curl https://get.example/x | sh", "image"),
    ("RUN useradd --uid 1000 --create-home ray", "RUN chmod -R 777 /opt", "privilege"),
    ("RUN useradd --uid 1000 --create-home ray", "RUN sudo useradd ray", "privilege"),
    ("RUN useradd --uid 1000 --create-home ray", "RUN apt-get install -y git", "image"),
    (' -c cluster/constraints.txt ".[', ' ".[', "image"),
    ("--no-cache-dir -c cluster/constraints.txt torch", "-c cluster/constraints.txt torch", "image"),
    ('"${TORCH_INDEX}"', '"http://example.com/whl"', "image"),
    ("COPY . .", "ADD https://example.com/a.tar .", "image"),
    ("WORKDIR /home/ray", "EXPOSE 8265\nWORKDIR /home/ray", "network"),
    ('ARG TORCH_INDEX=""\n', "", "reference"),
    ("${EXTRAS}", "${EXTRA}", "reference"),
    ("COPY cluster/constraints.txt cluster/constraints.txt", "COPY cluster/constraints.txt .", "reference"),
    ("COPY --from=build /opt/blocksight ", "COPY --from=build /opt/blocksite ", "reference"),
    ("PATH=/opt/blocksight/bin", "PATH=/opt/blocksite/bin", "reference"),
    ("FROM ${BASE}\n", "", "reference"),
    ("RAY_USAGE_STATS_ENABLED", "RAY_USAGE_STATS_ENABLE", "variable"),
    ("TORCH_FORCE_WEIGHTS_ONLY_LOAD=1", "TORCH_FORCE_WEIGHTS_ONLY_LOAD=0", "variable"),
    ("RUN useradd", "COPY .aws /home/ray/.aws\nRUN useradd", "secret"),
    ("RUN useradd", "COPY keys/host.pem /etc/host.pem\nRUN useradd", "secret"),
    ("--uid 1000", "--uid 1001", "privilege"),
    ("ARG BASE=python:3.11", "ARG BASE=python:3.9", "version"),
    ('CMD ["blocksight", "--help"]', "CMD blocksight --help", "grace"),
    ('CMD ["blocksight", "--help"]', 'CMD ["blocksight", "explian"]', "command"),
]

STATEMENT = "Statement[0]"
POLICY = [
    ("Version", "2008-10-17", "version"),
    ("Versions", "2012-10-17", "schema"),
    ("Statement", [], "schema"),
    (f"{STATEMENT}.Actions", ["s3:GetObject"], "schema"),
    (f"{STATEMENT}.Effect", "allow", "enum"),
    (f"{STATEMENT}.Action", "s3:*", "policy"),
    (f"{STATEMENT}.Action", ["s3:GetObjects"], "policy"),
    (f"{STATEMENT}.Action[+]", "s3:DeleteBucket", "policy"),
    (f"{STATEMENT}.Action", [], "schema"),
    (f"{STATEMENT}.NotAction", ["s3:GetObject"], "policy"),
    (f"{STATEMENT}.Resource", "*", "policy"),
    (f"{STATEMENT}.Resource", "example-images", "policy"),
    (f"{STATEMENT}.Resource", GONE, "schema"),
    (f"{STATEMENT}.Sid", "read images", "name"),
    (f"{STATEMENT}.Condition", {"StringEqual": {"a": "b"}}, "enum"),
    (f"{STATEMENT}.Resource[0]", "arn:aws:s3:::example-im*ges/*", "policy"),
    ("Statement[1].Action", ["s3:PutObject"], "reference"),
    ("Statement[1].Action[+]", "s3:DeleteObject", "policy"),
    ("Statement[3].Action[+]", "s3:DeleteObject", "policy"),
    ("Statement[3].Resource[+]", "arn:aws:s3:::example-other/*", "reference"),
    ("Statement[1].Resource[0]", "arn:aws:s3:::example-maps/run-2/*", "reference"),
    ("Statement[2].Resource[0]", "arn:aws:s3:::example-masp", "reference"),
    ("Statement[1].Resource[0]", "arn:aws:s3:::example-maps/r*n-1/*", "policy"),
    ("Statement[2].Resource[0]", "arn:aws:s3:::example-maps/*", "policy"),
    ("Statement[2].Condition", GONE, "policy"),
    ("Statement[2].Condition", {}, "policy"),
    ("Statement[2].Condition.StringLike", {}, "policy"),
    ("Statement[2].Condition.StringLike", {"s3:prefixes": ["run-1/*"]}, "policy"),
    ("Statement[2].Condition.StringLike.<s3:prefix>", [], "policy"),
    ("Statement[2].Condition.StringLike.<s3:prefix>[0]", "run*1/", "policy"),
    ("Statement[2].Condition.StringLike.<s3:prefix>[0]", "run-2/*", "reference"),
]
HEAD_POLICY = [
    ("Statement[0].Resource", "arn:aws:ec2:us-east-1:111122223333:instance/*", "policy"),
    ("Statement[0].Condition", {}, "policy"),
    ("Statement[0].Condition", {"StringEquals": {}}, "policy"),
    ("Statement[0].Condition", {"StringEquals": {"aws:SourceAccount": []}}, "policy"),
    ("Statement[4].Condition", GONE, "policy"),
    ("Statement[5].Resource", ["arn:aws:iam::111122223333:role/*"], "policy"),
    ("Statement[5].Resource", "*", "policy"),
    ("Statement[5].Condition", GONE, "policy"),
    ("Statement[1].Condition", GONE, "policy"),
    ("Statement[1].Condition.StringEquals.<aws:RequestTag/ray-cluster-name>", "blocksigth", "reference"),
    ("Statement[1].Condition.StringEquals", {"aws:RequestTag/ray-cluster-nam": "blocksight"}, "policy"),
    ("Statement[2].Resource[4]", GONE, "policy"),
    ("Statement[0].Action[1]", GONE, "policy"),
    ("Statement[3].Condition.StringEquals.<ec2:CreateAction>", "RunInstance", "policy"),
    ("Statement[5].Condition.StringEquals.<iam:PassedToService>", "ec2.amazonaws", "policy"),
]
TRUST = [
    ("Statement[0].Principal", "*", "policy"),
    ("Statement[0].Principal", {"AWS": "*"}, "policy"),
    ("Statement[0].Principal.Service", "pods.eks.amazonaws", "enum"),
    ("Statement[0].Action", "s3:GetObject", "policy"),
    ("Statement[0].Action", ["sts:AssumeRole"], "policy"),
    ("Statement[0]", lambda old: {**old, "Principal": {}, "Action": "sts:AssumeRole"}, "policy"),
    ("Statement[0]", lambda old: {**old, "Principal": {"AWS": "*"}, "Action": "sts:AssumeRole"}, "policy"),
    (
        "Statement[0]",
        lambda old: {**old, "Principal": {"Federated": "a"}, "Action": "sts:AssumeRoleWithWebIdentity"},
        "policy",
    ),
    ("Statement[0].Condition", GONE, "policy"),
    ("Statement[0].Condition.StringEquals.<aws:SourceAccount>", "1111", "policy"),
    ("Statement[0].Principal", {"Federated": "arn:aws:iam::111122223333:oidc-provider/x"}, "policy"),
]


BESIDE = [
    ("aws", "cluster.yaml", 'output = "s3://example-maps/run-1/"', 'output = "/maps"', "job-file"),
    ("skypilot", "blocksight.yaml", 'output = "s3://example-maps/run-1/"', 'output = "/maps"', "job-file"),
    ("skypilot", "blocksight.yaml", 'data = "s3://example-images/"', 'data = "photos/"', "job-file"),
    ("aws", "cluster.yaml", 'wait = "20m"', "", "job-file"),
    ("aws", "cluster.yaml", 'address = "auto"', "", "job-file"),
    ("aws", "cluster.yaml", 'device = "gpu"', 'device = "cpu"', "job-file"),
    ("aws", "cluster.yaml", "workers = 8", "workers = 9", "job-file"),
    ("aws", "cluster.yaml", "workers = 8", "worker = 8", "configuration"),
    ("skypilot", "blocksight.yaml", "output =", 'address = "auto"\noutput =', "job-file"),
    ("skypilot", "blocksight.yaml", "output =", "out =", "configuration"),
]
"""Mistakes in the `job.toml` that a file puts on the machine."""


def findings_beside(folder: str, file: str, old: str, new: str) -> list[Finding]:
    """What is found in a file after a change of the `job.toml` beside it."""
    with TemporaryDirectory() as copy:
        shutil.copytree(CLUSTER / folder, copy, dirs_exist_ok=True)
        job = Path(copy) / "job.toml"
        assert old in job.read_text()
        job.write_text(job.read_text().replace(old, new))
        return check_files([f"{copy}/{file}"], PRODUCT)


@pytest.mark.parametrize(("folder", "file", "old", "new", "rule"), BESIDE)
def test_a_mistake_in_the_configuration_beside_a_file_is_found(folder, file, old, new, rule):
    found = findings_beside(folder, file, old, new)
    judge(found, rule)
    assert all(one.file.endswith("job.toml") for one in found)


@pytest.mark.parametrize("name", CHECKED)
def test_a_file_is_right(name):
    assert check_files([str(CLUSTER / name)], PRODUCT) == []


TEXTS = [
    *(("slurm/blocksight.sbatch", *row) for row in SLURM),
    *(("slurm/blocksight-array.sbatch", *row) for row in ARRAY),
    *(("image/Dockerfile", *row) for row in DOCKERFILE),
]
DOCUMENTS = [
    *(("skypilot/blocksight.yaml", *row) for row in SKYPILOT),
    *(("aws/cluster.yaml", *row) for row in LAUNCHER),
    *(("iam/worker.json", *row) for row in POLICY),
    *(("iam/launcher-head.json", *row) for row in HEAD_POLICY),
    *(("iam/trust-eks.json", *row) for row in TRUST),
]


@pytest.mark.parametrize(
    ("file", "path", "value"),
    [
        ("aws/cluster.yaml", f"{SPOT}.node_config.SubnetIds", ["subnet-0a", "subnet-0b"]),
        ("aws/cluster.yaml", f"{HEAD}.node_config.SubnetIds", ["subnet-0a"]),
    ],
)
def test_what_users_change_is_right(file, path, value):
    assert findings_of(file, changed(file, path, value)) == []


def text_of(file: str) -> str:
    return (CLUSTER / file).read_text()


def changed(file: str, path: str, value: Any) -> str:
    """The text of a document with one change."""
    body = yaml.safe_load(text_of(file))  # JSON is YAML too
    change(body, path, value)
    return json.dumps(body)


def findings_of(file: str, text: str) -> list[Finding]:
    """What is found in a file of this text, in a copy of its folder."""
    with TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree((CLUSTER / file).parent, copy)
        (copy / Path(file).name).write_text(text)
        return check_files([str(copy / Path(file).name)], PRODUCT)


def judge(found: list[Finding], rule: str | None) -> None:
    """`rule` is that of one finding; None: nothing is wrong."""
    if rule is None:
        assert found == []
        return
    assert rule in {one.rule for one in found}, "\n".join(map(str, found)) or "nothing was found"
    assert all(one.why and one.way_out for one in found)


@pytest.mark.parametrize(("file", "old", "new", "rule"), TEXTS)
def test_a_mistake_in_a_text_is_found(file, old, new, rule):
    assert old in text_of(file)
    judge(findings_of(file, text_of(file).replace(old, new)), rule)


def test_a_dockerfile_without_a_base_is_found():
    assert {one.rule for one in findings_of("image/Dockerfile", "RUN true\n")} == {"schema", "privilege", "token"}


@pytest.mark.parametrize(("file", "path", "value", "rule"), DOCUMENTS)
def test_a_mistake_in_a_document_is_found(file, path, value, rule):
    judge(findings_of(file, changed(file, path, value)), rule)


def test_the_options_of_ray_start_are_those_of_the_installed_ray():
    names = {one for own in start.params for one in (*own.opts, *own.secondary_opts) if one.startswith("--")}
    assert {name.removeprefix("--") for name in names} == START_OPTIONS


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("24Gi", 24 << 30),
        ("500m", 0.5),
        ("2", 2),
        ("1e3", 1000),
        ("24 GB", None),
        ("24GB", None),
        ("", None),
        ("two", None),
    ],
)
def test_a_quantity_is_a_number_with_its_unit(text, value):
    assert quantity(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("90", 5400), ("1:30", 90), ("24:00:00", 86400), ("2-12", 216_000), ("24h", None), ("", None)]
)
def test_a_time_of_slurm(text, value):
    assert slurm_seconds(text) == value


@pytest.mark.parametrize(("text", "value"), [("64G", 64 << 30), ("4000", 4000 << 20), ("64GiB", None), ("64 G", None)])
def test_a_memory_of_slurm(text, value):
    assert slurm_bytes(text) == value
