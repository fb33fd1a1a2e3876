"""Rules for a file of Ray's launcher on AWS: Ray's own schema, EC2's own shapes, and what would cost or leak."""

import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from botocore.loaders import Loader
from botocore.model import ServiceModel, StructureShape
from jsonschema import Draft7Validator

from blocksight.cluster.checks.commands import Product, configuration_findings
from blocksight.cluster.checks.findings import Finding, Place, nearest
from blocksight.cluster.checks.images import image_findings
from blocksight.cluster.checks.job_file import Offer, joined_findings, mounted_file
from blocksight.cluster.checks.literals import secret_findings
from blocksight.cluster.checks.ray_options import START_OPTIONS
from blocksight.cluster.checks.schema import faults_of
from blocksight.cluster.checks.shell import INSTALLS
from blocksight.cluster.checks.variables import assigned_findings

LOOPBACK = ("127.0.0.1", "localhost")
TOKEN_FILE = ".ray/auth_token"
OWNED = re.compile(r"--privileged|--cap-add|--pid[= ]host|--user[= ](root|0)\b|-v[ =]?/:|--device[ =]/dev/(sd|nvme)")
"""Options of `docker run` that give the container the machine."""
MAX_IDLE_MINUTES = 60
BOOTSTRAP = "~/ray_bootstrap_config.yaml"
"""Where Ray's launcher puts its configuration on the head."""
RUN_OPTIONS = ("run_options", "head_run_options", "worker_run_options")
SUBNETS = "SubnetIds"
"""Ray's own key of a `node_config`."""
DEVICE = re.compile(r"/dev/(sd[a-z]\d?|xvd[a-z])")
LEAST_DISK_GIB, MOST_DISK_GIB = 50, 16_384
"""Of a machine: the image, weights, and what Ray spills; and what EBS has."""
METADATA_HOPS = 2
"""From a container to the metadata of its machine: itself and the machine."""


def launcher_findings(place: Place, product: Product) -> Iterator[Finding]:
    """What is wrong with a file for `ray up`."""
    yield from secret_findings(place)
    for error in Draft7Validator(_ray_schema()).iter_errors(place.value):
        yield from faults_of(place, error)
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*", place["cluster_name"].text) is None:
        yield place["cluster_name"].finding("name", "it becomes a tag of machines", "write letters, digits and -")
    yield from _provider(place)
    yield from _login(place)
    yield from _types(place)
    for key in ("image", "head_image", "worker_image"):
        if place["docker"][key].is_there:
            yield from image_findings(place["docker"][key])
    if not any(place["docker"][key].is_there for key in ("image", "head_image")):
        yield place["docker"].finding("image", "nothing says what the machines run", "write docker: {image: ...}")
    yield from _container_options(place["docker"])
    yield from _installs(place)
    yield from _file_mounts(place)
    yield from _start(place)
    if (mounted := mounted_file(place, ".toml")) is not None:
        yield from configuration_findings(mounted, product)
        yield from joined_findings(mounted, _offer(place))


def _offer(place: Place) -> Offer:
    """What the workers of a file give to a driver: one actor for each machine with a GPU."""
    workers = [one for name, one in place["available_node_types"].entries() if name != place["head_node_type"].text]
    kinds = [one["node_config"]["InstanceType"].text for one in workers]
    most = sum(_count(one["max_workers"], 0) for one in workers)
    options = " ".join(one.text for key in RUN_OPTIONS for one in place["docker"][key].items())
    folders = tuple(re.findall(r"(?:-v|--volume)[ =]?[^\s:]+:(/[^\s:]+)", options))
    most = min(most, _count(place["max_workers"], most))
    return Offer(any(kind.startswith(("g", "p")) for kind in kinds), most, folders)


def _ray_schema() -> dict[str, Any]:
    """The schema by which `ray up` checks its file, of the installed Ray. It is found without importing Ray."""
    spec = find_spec("ray")
    assert spec is not None, "ray is a dependency"
    assert spec.origin is not None, "ray is a package"
    return json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())


def _provider(place: Place) -> Iterator[Finding]:
    provider, idle = place["provider"], place["idle_timeout_minutes"]
    if provider["type"].value != "aws":
        why = f"only files for aws are checked here, not {provider['type'].value!r}"
        yield provider["type"].finding("enum", why, "write aws")
    if re.fullmatch(r"[a-z]{2}(-[a-z]+)+-\d", provider["region"].text) is None:
        yield provider["region"].finding("enum", f"{provider['region'].value!r} is no region", "write us-east-1")
    if provider["use_internal_ips"].value is not True:
        why = "machines get public addresses, on which Ray listens"
        yield provider["use_internal_ips"].finding("network", why, "write use_internal_ips: true")
    known = _ray_schema()["properties"]["provider"]["properties"]
    for key, one in provider.entries():
        if key not in known:
            yield one.finding("schema", f"provider has no {key}", nearest(key, known))
    if provider["cache_stopped_nodes"].value is not False:
        why = "machines are stopped, not ended, and their disks cost"
        yield provider["cache_stopped_nodes"].finding("idle", why, "write cache_stopped_nodes: false")
    minutes = idle.value if idle.is_there else 5
    if isinstance(minutes, int) and not 0 < minutes <= MAX_IDLE_MINUTES:
        why = f"a machine without work is kept for {minutes} minutes"
        yield idle.finding("idle", why, f"write 1 to {MAX_IDLE_MINUTES}")


def _login(place: Place) -> Iterator[Finding]:
    user, name = place["auth"]["ssh_user"], place["docker"]["container_name"]
    images = [one["node_config"]["ImageId"].text for _, one in place["available_node_types"].entries()]
    if not user.text or ("" in images and user.text != "ubuntu"):
        why = f"{user.value!r} cannot log in: the user of Ray's own machine image is ubuntu"
        yield user.finding("login", why, "write ssh_user: ubuntu, or name an ImageId with this user")
    if place["docker"].is_there and not name.text:
        yield name.finding("schema", "Ray does not know the container again", "write container_name: ray")


def _types(place: Place) -> Iterator[Finding]:
    types, head = place["available_node_types"], place["head_node_type"]
    names = [name for name, _ in types.entries()]
    if head.text not in names:
        why = f"no node type has the name {head.value!r}"
        yield head.finding("reference", why, nearest(head.text, names) if names else "add available_node_types")
    most = place["max_workers"].value if isinstance(place["max_workers"].value, int) else 2
    least = 0
    for name, one in types.entries():
        low, high = (_count(one["min_workers"], 0), _count(one["max_workers"], most))
        least += low
        if not 0 <= low <= high:
            yield one["min_workers"].finding("replicas", f"at least {low}, at most {high}", "write 0 <= min <= max")
        if high > most:
            yield one["max_workers"].finding("replicas", f"{high}, but {most} in all", "raise the max_workers of all")
        yield from _node(one, is_head=name == head.text)
    if least > most:
        why = f"at least {least} workers by type, but {most} in all"
        yield place["max_workers"].finding("replicas", why, f"write {least} or more")
    if most < 1 or len(names) < 2:
        yield place["max_workers"].finding(
            "replicas", "no worker may ever start", "add a type of workers, and a number"
        )


def _count(place: Place, default: int) -> int:
    return place.value if isinstance(place.value, int) else default


def _node(node: Place, *, is_head: bool) -> Iterator[Finding]:
    config = node["node_config"]
    yield from shape_findings(_for_ec2(config), _run_instances())
    for subnet in config[SUBNETS].items():
        if not subnet.text.startswith("subnet-"):
            yield subnet.finding("schema", f"{subnet.value!r} is no subnet", "write subnet-...")
    if not config["InstanceType"].is_there:
        yield config["InstanceType"].finding("schema", "the kind of machine is missing", "write InstanceType")
    profile = config["IamInstanceProfile"]
    if not (profile["Name"].text or profile["Arn"].text):
        why = "Ray would make a role that may do everything with EC2 and S3"
        yield profile.finding("role", why, "name an instance profile with a policy of iam/")
    options = config["MetadataOptions"]
    if options["HttpTokens"].value != "required":
        why = "whoever makes the machine fetch an address reads its role's keys"
        yield options["HttpTokens"].finding("metadata", why, "write HttpTokens: required")
    if options["HttpPutResponseHopLimit"].value != METADATA_HOPS:
        why = "a container is two hops from the metadata: with one it has no role, with more others have it"
        yield options["HttpPutResponseHopLimit"].finding("metadata", why, f"write {METADATA_HOPS}")
    yield from _disks(config["BlockDeviceMappings"])
    market = config["InstanceMarketOptions"]
    if market.is_there and not market["MarketType"].text:
        yield market.finding("schema", "it says no market", "write MarketType: spot, or leave it out")
    if is_head and config["InstanceMarketOptions"]["MarketType"].value == "spot":
        why = "a spot machine may be taken away, and the driver with it"
        yield config["InstanceMarketOptions"].finding("head", why, "leave it out here")
    if is_head and node["resources"]["CPU"].value != 0:
        why = "the head takes work, which dies with the driver, and stands in the driver's memory"
        yield node["resources"]["CPU"].finding("head", why, "write resources: {CPU: 0}")


def _for_ec2(config: Place) -> Place:
    """What EC2 is given of a `node_config`: Ray reads the list of subnets, and names one."""
    if not isinstance(config.value, dict):
        return config
    return Place(config.file, {name: own for name, own in config.value.items() if name != SUBNETS}, config.path)


def _disks(disks: Place) -> Iterator[Finding]:
    if not disks.value:
        why = "the disk of the machine image is too small for images and weights"
        yield disks.finding("disk", why, "write BlockDeviceMappings with a VolumeSize of 100")
    for disk in disks.items():
        size, name = disk["Ebs"]["VolumeSize"], disk["DeviceName"]
        if not isinstance(size.value, int) or not LEAST_DISK_GIB <= size.value <= MOST_DISK_GIB:
            why = f"{size.value!r} GiB is no size for images and weights"
            yield size.finding("disk", why, f"write {LEAST_DISK_GIB} to {MOST_DISK_GIB}")
        if DEVICE.fullmatch(name.text) is None:
            yield name.finding("disk", f"{name.value!r} is no disk", "write /dev/sda1")
        if disk["Ebs"]["Encrypted"].value is not True:
            yield disk["Ebs"]["Encrypted"].finding("disk", "the disk is not encrypted", "write Encrypted: true")


@cache
def _run_instances() -> StructureShape:
    """The parameters of EC2's RunInstances, of the installed botocore."""
    model = ServiceModel(Loader().load_service_model("ec2", "service-2"), "ec2")
    shape = model.operation_model("RunInstances").input_shape
    assert isinstance(shape, StructureShape)
    return shape


def shape_findings(place: Place, shape: Any) -> Iterator[Finding]:
    """What of a value is no parameter of a service, of the wrong type, or no value that it takes."""
    kinds = {"structure": dict, "map": dict, "list": list, "string": str, "integer": int, "boolean": bool, "long": int}
    kind = kinds.get(shape.type_name)
    if kind is not None and (not isinstance(place.value, kind) or (kind is int and isinstance(place.value, bool))):
        yield place.finding("schema", f"{place.value!r} is no {shape.type_name}", f"write a {shape.type_name}")
    elif shape.type_name == "structure":
        for name, one in place.entries():
            if name in shape.members:
                yield from shape_findings(one, shape.members[name])
            else:
                yield one.finding("schema", f"EC2 has no parameter {name} here", nearest(name, shape.members))
    elif shape.type_name == "list":
        for one in place.items():
            yield from shape_findings(one, shape.member)
    elif (known := getattr(shape, "enum", None)) and place.value not in known:
        why = f"{place.value!r} is not among the {len(known)} values that botocore knows"
        yield place.finding("enum", why, nearest(place.text, known))


def _container_options(docker: Place) -> Iterator[Finding]:
    for key in RUN_OPTIONS:
        for one in docker[key].items():
            if OWNED.search(one.text):
                yield one.finding("privilege", f"{one.text!r} gives the container the machine", "leave it out")


def _installs(place: Place) -> Iterator[Finding]:
    for key in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        for one in place[key].items():
            if INSTALLS.search(one.text):
                why = "it is installed on each machine at its start, and no digest says what it is"
                yield one.finding("runtime-env", why, "build it into the image")


def _file_mounts(place: Place) -> Iterator[Finding]:
    mounts = place["file_mounts"]
    for target, source in mounts.entries():
        if not target.startswith(("/", "~")):
            yield source.finding("path", f"{target!r} is no place on the machine", "write a path from the root: /...")
        if not source.text:
            yield source.finding("reference", "nothing is put there", "name a file")
        elif not source.text.startswith(("/", "~")) and not (Path(place.file).parent / source.text).exists():
            yield source.finding("reference", f"{source.value!r} is not beside this file", "name a file that is there")
    if not any(target.endswith(".toml") for target, _ in mounts.entries()):
        yield mounts.finding("reference", "the driver has no configuration", "mount job.toml")
    tokens = [source for target, source in mounts.entries() if target.endswith(TOKEN_FILE)]
    if any(source.text and not source.text.endswith(TOKEN_FILE) for source in tokens):
        yield tokens[0].finding("reference", "Ray writes no token there", f"write ~/{TOKEN_FILE}")
    if not tokens:
        why = "the machines have no token, and whoever reaches the head runs code there"
        yield mounts.finding("token", why, f"mount ~/{TOKEN_FILE}")


def _start(place: Place) -> Iterator[Finding]:
    head, worker = place["head_start_ray_commands"], place["worker_start_ray_commands"]
    yield from _starts(head)
    yield from _starts(worker)
    told, joined = _ray_start(head), _ray_start(worker)
    if told is None or joined is None:
        return
    if "head" not in told:
        yield head.finding("ray-start", "nothing starts the head", "write ray start --head")
    if told.get("autoscaling-config") != BOOTSTRAP:
        why = "without the launcher's own file no worker is ever started"
        yield head.finding("scaling", why, f"write --autoscaling-config={BOOTSTRAP}")
    if told.get("num-cpus") != "0":
        yield head.finding("head", "the head takes work, which dies with the driver", "write --num-cpus=0")
    if told.get("dashboard-host", LOOPBACK[0]) not in LOOPBACK:
        why = f"the dashboard listens on {told['dashboard-host']}, and starts jobs for whoever reaches it"
        yield head.finding("network", why, "write --dashboard-host=127.0.0.1")
    port = told.get("port", "6379")
    if joined.get("address") != f"$RAY_HEAD_IP:{port}":
        why = f"workers join {joined.get('address')!r}, while the head listens on port {port}"
        yield worker.finding("reference", why, f"write --address=$RAY_HEAD_IP:{port}")


def _starts(commands: Place) -> Iterator[Finding]:
    """What is wrong with the list of commands that start Ray on a machine."""
    if _ray_start(commands) is None:
        yield commands.finding("ray-start", "nothing starts Ray", "write ray start ...")
        return
    if "ray stop" not in [one.text for one in commands.items()]:
        yield commands.finding("ray-start", "a second `ray up` finds a Ray that runs already", "write ray stop first")
    for one in commands.items():
        if "ray start" in one.text:
            if "RAY_AUTH_MODE=token" not in one.text:
                yield one.finding("token", "without a token, whoever reaches the machine runs code there", _TOKEN)
            yield from assigned_findings(one, one.text)
            for option in _options(one.text):
                if option not in START_OPTIONS:
                    yield one.finding(
                        "ray-start", f"ray start has no option --{option}", nearest(option, START_OPTIONS)
                    )


_TOKEN = "write RAY_AUTH_MODE=token ray start ..."


def _ray_start(commands: Place) -> dict[str, str] | None:
    for one in commands.items():
        if "ray start" in one.text:
            return _options(one.text)
    return None


def _options(text: str) -> dict[str, str]:
    """The options of the `ray start` within a line, without their hyphens."""
    words = shlex.split(text.partition("ray start")[2].partition(";")[0])
    found = {}
    for at, word in enumerate(words):
        name, equals, value = word.removeprefix("--").partition("=")
        following = words[at + 1] if at + 1 < len(words) and not words[at + 1].startswith("--") else ""
        if word.startswith("--"):
            found[name] = value if equals else following
    return found
