"""Rules for a task of SkyPilot: its fields, machines, recovery, files, and the commands that it runs."""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from blocksight.cluster.checks.commands import Product, configuration_findings
from blocksight.cluster.checks.findings import Finding, Place, nearest
from blocksight.cluster.checks.images import image_findings
from blocksight.cluster.checks.job_file import alone_findings, mounted_file
from blocksight.cluster.checks.literals import secret_findings
from blocksight.cluster.checks.shell import INSTALLS, config_files, our_command_findings, unset_variables

TASK = (
    *("name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "volumes", "setup", "run"),
    *("config", "event_callback", "inputs", "outputs", "service", "pool"),
)
RESOURCES = (
    *("infra", "cloud", "region", "zone", "accelerators", "accelerator_args", "cpus", "memory", "instance_type"),
    *("use_spot", "job_recovery", "disk_size", "disk_tier", "network_tier", "local_disk", "ports", "labels"),
    *("image_id", "autostop", "priority", "volumes", "any_of", "ordered", "max_hourly_cost"),
)
RECOVERY = ("strategy", "max_restarts_on_errors", "recover_on_exit_codes")
STRATEGIES = ("EAGER_NEXT_REGION", "FAILOVER")
DISK_TIERS = ("low", "medium", "high", "ultra", "best", "none")
NETWORK_TIERS = ("standard", "best")
CLOUDS = (
    *("aws", "azure", "cudo", "do", "fluidstack", "gcp", "hyperbolic", "ibm", "k8s", "kubernetes", "lambda", "nebius"),
    *("oci", "paperspace", "primeintellect", "runpod", "scp", "seeweb", "shadeform", "ssh", "vast", "vsphere"),
)
GPUS = (
    *("A10", "A10G", "A100", "A100-80GB", "A40", "B200", "B300", "GB200", "GH200", "H100", "H100-MEGA", "H200", "K80"),
    *("L4", "L40", "L40S", "M60", "MI300X", "P100", "P4", "RTX3090", "RTX4090", "RTX5090", "RTX6000-Ada", "RTXA4000"),
    *("RTXA5000", "RTXA6000", "RTXPRO6000", "T4", "T4g", "V100", "V100-32GB"),
)
MOST_GPUS = 16
MOST_DISK_GB = 10_000
AMOUNT = re.compile(r"\d+(\.\d+)?\+?|\d+x")
SIZE = re.compile(r"\d+(\.\d+)?([kmgtp]b?)?\+?", re.IGNORECASE)
WORTH_A_RETRY = {1, 4}
"""Exit codes: a crash, and units that are open."""
NAME = re.compile(r"[a-zA-Z0-9]+(?:[._-]{1,2}[a-zA-Z0-9]+)*")


def skypilot_findings(task: Place, product: Product) -> Iterator[Finding]:
    """What is wrong with a task."""
    yield from secret_findings(task)
    yield from _known(task, TASK)
    if task["name"].is_there and NAME.fullmatch(task["name"].text) is None:
        yield task["name"].finding("name", f"{task['name'].value!r} is no name", "write letters, digits and -")
    nodes = task["num_nodes"]
    if nodes.is_there and nodes.value != 1:
        why = "each node would run the whole job: the command runs on all of them"
        yield nodes.finding("replicas", why, "write 1, and launch one job for each part")
    yield from _resources(task["resources"])
    yield from _environment(task)
    yield from _files(task)
    if INSTALLS.search(task["setup"].text):
        why = "it is installed on each machine at its start, and no digest says what it is"
        yield task["setup"].finding("runtime-env", why, "build it into the image")
    yield from our_command_findings(task["run"], task["run"].text, product)
    for file in config_files(task["run"].text):
        if (mounted := mounted_file(task, PurePosixPath(file).name)) is not None:
            yield from configuration_findings(mounted, product)
            mounts = (target for target, source in task["file_mounts"].entries() if source["source"].is_there)
            yield from alone_findings(mounted, tuple(mounts))


def _known(place: Place, known: tuple[str, ...]) -> Iterator[Finding]:
    for key, one in place.entries():
        if key not in known:
            yield one.finding("schema", f"SkyPilot has no field {key} here", nearest(key, known))


def _resources(place: Place) -> Iterator[Finding]:
    yield from _known(place, RESOURCES)
    choices = [place, *place["any_of"].items(), *place["ordered"].items()]
    for one in choices[1:]:
        yield from _known(one, RESOURCES)
    for one in choices:
        yield from _machine(one)
    if not any(
        one["accelerators"].is_there or one["cpus"].is_there or one["instance_type"].is_there for one in choices
    ):
        yield place.finding("amount", "nothing says what machine it is", "write accelerators, or cpus and memory")
    if not any(one["memory"].is_there or one["instance_type"].is_there for one in choices):
        yield place["memory"].finding("amount", "the cheapest machine may have too little memory", "write memory: 32+")
    image = place["image_id"]
    if not image.text.startswith("docker:"):
        why = "the machine runs what the cloud gives it"
        yield image.finding("image", why, "write docker:NAME@sha256:DIGEST")
    else:
        yield from image_findings(image, image.text.removeprefix("docker:"))
    if place["ports"].is_there:
        yield place["ports"].finding(
            "network", "ports are opened to the world, and the job serves none", "leave it out"
        )
    yield from _recovery(place)


def _machine(place: Place) -> Iterator[Finding]:
    gpus = place["accelerators"]
    given = gpus.entries() if isinstance(gpus.value, dict) else []
    named = [(key, one.value, one) for key, one in given]
    for one in [gpus] if gpus.text else gpus.items():
        name, _, count = one.text.partition(":")
        named.append((name, int(count) if count.isdecimal() else (count or 1), one))
    for name, count, one in named:
        if name not in GPUS and not name.startswith("tpu-"):
            yield one.finding("enum", f"{name!r} is no GPU that is known here", nearest(name, GPUS))
        if count is not None and (not isinstance(count, (int, float)) or not 0 < count <= MOST_GPUS):
            yield one.finding("quantity", f"{count!r} is no number of GPUs", f"write 1 to {MOST_GPUS}")
    for key, pattern in (("cpus", AMOUNT), ("memory", SIZE), ("disk_size", SIZE)):
        if place[key].is_there and pattern.fullmatch(str(place[key].value)) is None:
            yield place[key].finding("quantity", f"{place[key].value!r} is no amount", "write 8, or 8+ for at least 8")
    size = place["disk_size"].value
    if isinstance(size, int) and size > MOST_DISK_GB:
        yield place["disk_size"].finding("quantity", f"a disk of {size} GB costs more than the job", "write 100")
    for key, known in (("disk_tier", DISK_TIERS), ("network_tier", NETWORK_TIERS)):
        if place[key].is_there and place[key].value not in known:
            yield place[key].finding(
                "enum", f"{place[key].value!r} is not among {known}", nearest(place[key].text, known)
            )
    for key in ("infra", "cloud"):
        cloud = place[key].text.partition("/")[0].lower()
        if place[key].is_there and cloud not in (*CLOUDS, "*"):
            yield place[key].finding("enum", f"{cloud!r} is no cloud", nearest(cloud, CLOUDS))
    if place["use_spot"].is_there and not isinstance(place["use_spot"].value, bool):
        yield place["use_spot"].finding("schema", f"{place['use_spot'].value!r} is no yes or no", "write true")


def _recovery(place: Place) -> Iterator[Finding]:
    recovery = place["job_recovery"]
    strategy = recovery if recovery.text else recovery["strategy"]
    if isinstance(recovery.value, dict):
        yield from _known(recovery, RECOVERY)
    if strategy.is_there and strategy.text.upper() not in STRATEGIES:
        yield strategy.finding(
            "enum", f"{strategy.value!r} is not among {STRATEGIES}", nearest(strategy.text, STRATEGIES)
        )
    codes = recovery["recover_on_exit_codes"]
    given = codes.value if isinstance(codes.value, list) else [codes.value] if codes.is_there else []
    if not set(given) >= WORTH_A_RETRY:
        why = "a job that ends with open units is not started again"
        yield codes.finding("retry", why, "write recover_on_exit_codes: [1, 4]")
    for code in sorted(set(given) - WORTH_A_RETRY, key=str):
        yield codes.finding("retry", f"exit code {code!r} comes again at each retry, and costs", "leave it out")
    most = recovery["max_restarts_on_errors"]
    if most.is_there and (not isinstance(most.value, int) or most.value < 0):
        yield most.finding("quantity", f"{most.value!r} is no number of restarts", "write 0 or more")


def _environment(task: Place) -> Iterator[Finding]:
    names = [key for kind in ("envs", "secrets") for key, _ in task[kind].entries()]
    for kind in ("setup", "run"):
        for name in unset_variables(task[kind].text, iter(names)):
            if not name.startswith("SKYPILOT_"):
                way_out = nearest(name, names) if names else "add it to envs"
                yield task[kind].finding("reference", f"nothing sets ${name}", way_out)
    for key, value in task["secrets"].entries():
        if value.value is not None and value.value != "":
            why = f"{key} is written out"
            yield value.finding("secret", why, f"write {key}: null, and give it by --secret {key}")


def _files(task: Place) -> Iterator[Finding]:
    mounts = task["file_mounts"]
    for target, source in mounts.entries():
        if not target.startswith(("/", "~", "./")):
            yield source.finding("path", f"{target!r} is no place on the machine", "write a path such as ~/job.toml")
        if not source.value:
            yield source.finding("reference", "nothing is put there", "name a file")
        is_local = source.text and "://" not in source.text and not source.text.startswith(("/", "~"))
        if is_local and not (Path(task.file).parent / source.text).exists():
            yield source.finding("reference", f"{source.value!r} is not beside this file", "name a file that is there")
    targets = [PurePosixPath(target) for target, _ in mounts.entries()]
    for file in config_files(task["run"].text):
        place = PurePosixPath(file)
        is_there = any(place == one or one in place.parents for one in targets) or task["workdir"].is_there
        if "://" not in file and not is_there:
            yield task["run"].finding("reference", f"no file is put at {file}", "add it to file_mounts")
