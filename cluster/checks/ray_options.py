"""What `ray start` takes, and which versions of Ray go with this project."""

import re
from collections.abc import Iterator
from importlib.resources import files

from blocksight.cluster.checks.findings import Finding, Place, nearest

_NAMES = """
    address autoscaling-config block cgroup-path dashboard-agent-grpc-port dashboard-agent-listen-port
    dashboard-host dashboard-port disable-usage-stats enable-object-reconstruction enable-resource-isolation head
    include-dashboard include-log-monitor labels labels-file log-color log-style max-worker-port memory
    metrics-export-port min-worker-port no-monitor no-redirect-output node-ip-address node-manager-port node-name
    num-cpus num-gpus object-manager-port object-spilling-directory object-store-memory plasma-directory port
    proxy-server-url ray-client-server-port ray-debugger-external redis-password redis-shard-ports redis-username
    resources runtime-env-agent-port system-config system-reserved-cpu system-reserved-memory temp-dir
    tracing-startup-hook verbose worker-port-list
"""
START_OPTIONS = frozenset(_NAMES.split())
"""Options of `ray start` of Ray 2.60, without their two hyphens."""
NUMBERS = re.compile(r"num-cpus|num-gpus|memory|object-store-memory|.*port")
LEAST, BELOW = (2, 60), (2, 64)
"""The versions that the package allows."""


def ray_version_fault(version: str) -> tuple[str, str] | None:
    """Why a version of Ray does not go with this project, and the way out; None if it goes."""
    found = re.match(r"(\d+)\.(\d+)(\.\d+)?$", version)
    if found is None:
        return f"{version!r} is no version of Ray", f"write {pinned_ray()}"
    if not LEAST <= (int(found[1]), int(found[2])) < BELOW:
        why = f"this project runs with Ray {LEAST[0]}.{LEAST[1]} to below {BELOW[0]}.{BELOW[1]}, not {version}"
        return why, f"write {pinned_ray()}, or what the image has"
    return None


def pinned_ray() -> str:
    """The version of Ray that was tested with this project."""
    lines = files("blocksight.cluster").joinpath("constraints.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith("ray=="))


def start_option_findings(params: Place) -> Iterator[Finding]:
    """Options of `ray start` that it does not have, or whose value is none."""
    for name, value in params.entries():
        if name not in START_OPTIONS:
            yield value.finding("ray-start", f"ray start has no option --{name}", nearest(name, START_OPTIONS))
        elif NUMBERS.fullmatch(name) and not value.text.isdecimal():
            yield value.finding("ray-start", f"--{name} takes a whole number, not {value.value!r}", 'write "0" or more')
