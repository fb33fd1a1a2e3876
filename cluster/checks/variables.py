"""Variables of the environment that a job's programs read: their names, and what they take."""

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches

from blocksight.cluster.checks.findings import Finding, Place

REGION = r"[a-z]{2}(-[a-z]+)+-\d"
VARIABLES: Mapping[str, str] = {
    "RAY_AUTH_MODE": "",
    "RAY_AUTH_TOKEN": "",
    "RAY_AUTH_TOKEN_PATH": "[/$~].+",
    "RAY_USAGE_STATS_ENABLED": "0|1",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0|1",
    "RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT": r"\d+",
    "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",
    "PYTHONUNBUFFERED": "",
    "AWS_ROLE_ARN": "arn:.+",
    "AWS_WEB_IDENTITY_TOKEN_FILE": "/.+",
    "AWS_REGION": REGION,
    "AWS_DEFAULT_REGION": REGION,
    "CUDA_VISIBLE_DEVICES": "",
}
"""The pattern of each one's values; an empty one: any, or a rule of its own."""
SLURM_VARIABLES = frozenset(
    f"SLURM_{name}"
    for name in (
        *("ARRAY_JOB_ID", "ARRAY_TASK_COUNT", "ARRAY_TASK_ID", "ARRAY_TASK_MAX", "ARRAY_TASK_MIN", "ARRAY_TASK_STEP"),
        *("CLUSTER_NAME", "CPUS_ON_NODE", "CPUS_PER_TASK", "CPUS_PER_GPU", "GPUS", "GPUS_ON_NODE", "GPUS_PER_NODE"),
        *(
            "GPUS_PER_TASK",
            "JOBID",
            "JOB_ACCOUNT",
            "JOB_CPUS_PER_NODE",
            "JOB_END_TIME",
            "JOB_GPUS",
            "JOB_ID",
            "JOB_NAME",
        ),
        *("JOB_NODELIST", "JOB_NUM_NODES", "JOB_PARTITION", "JOB_START_TIME", "LOCALID", "MEM_PER_CPU", "MEM_PER_NODE"),
        *("NNODES", "NODEID", "NODELIST", "NPROCS", "NTASKS", "NTASKS_PER_NODE", "PROCID", "RESTART_COUNT", "STEP_ID"),
        *("SUBMIT_DIR", "SUBMIT_HOST", "TASKS_PER_NODE", "TMPDIR", "TOPOLOGY_ADDR"),
    )
)
"""What Slurm sets in a job."""


def variable_findings(name: str, at: Place, value: Place) -> Iterator[Finding]:
    """A variable that is misspelt, or has a value that it does not take. `at`: where its name stands."""
    near = get_close_matches(name, VARIABLES, 1, 0.85)
    if near and name not in VARIABLES:
        yield at.finding("variable", f"nobody reads {name}", f"write {near[0]}")
    pattern = VARIABLES.get(name, "")
    if pattern and value.text and re.fullmatch(pattern, value.text) is None:
        yield value.finding("variable", f"{value.value!r} is no value of {name}", f"write one of {pattern}")


ASSIGNED = re.compile(r"""(?<![\w$-])(?P<name>[A-Z][A-Z0-9_]+)=(?P<value>"[^"]*"|'[^']*'|[^\s;]*)""")


def assigned_findings(place: Place, text: str) -> Iterator[Finding]:
    """The same for each NAME=VALUE of a line of a shell or a Dockerfile."""
    for found in ASSIGNED.finditer(text):
        value = Place(place.file, found["value"].strip("\"'"), place.path)
        yield from variable_findings(found["name"], place, value)
