"""What a job asks of its buckets, by a proxy that watches it, and what the policy of each role allows."""

import json
from asyncio import StreamReader, StreamWriter
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from tests.faults.proxy import FaultProxy, Head

IAM = Path(__file__).parents[2] / "cluster" / "iam"
ACTIONS = {"get": "s3:GetObject", "head": "s3:GetObject", "put": "s3:PutObject", "delete": "s3:DeleteObject"}
Request = tuple[str, str, str]
"""Action, the name of a bucket or of a key, and the listing's prefix."""


def process_of(port: int) -> int:
    """The process that has a connection of loopback open at a port."""
    wanted = f"0100007F:{port:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inode = next((row[9] for row in rows if row[1] == wanted), None)
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if entry.readlink() == Path(f"socket:[{inode}]"):
                return int(entry.parts[2])
        except OSError:  # the process or the file has gone
            continue
    return 0


class WatchingProxy(FaultProxy):
    """Notes what the processes of Ray's workers, and what all others, ask of a bucket."""

    def __init__(self, upstream_port: int) -> None:
        super().__init__(upstream_port)
        self.seen: dict[str, set[Request]] = {"driver": set(), "worker": set()}
        self._roles: dict[int, str] = {}

    async def _exchange(self, request: Head, reader: StreamReader, writer: StreamWriter) -> bool:
        port = writer.get_extra_info("peername")[1]
        if port not in self._roles:
            process = Path(f"/proc/{process_of(port)}/cmdline")
            is_worker = process.exists() and process.read_bytes().startswith(b"ray::")
            self._roles[port] = "worker" if is_worker else "driver"
        self.seen[self._roles[port]].add(as_action(request))
        return await super()._exchange(request, reader, writer)


def as_action(request: Head) -> Request:
    """What a request needs of a policy."""
    method, target = request.words[:2]
    parts = urlsplit(target)
    key = unquote(parts.path).lstrip("/").partition("/")[2]
    if method == "get" and not key:
        return "s3:ListBucket", "", parse_qs(parts.query).get("prefix", [""])[0]
    if method == "post" and "delete" in parts.query:  # of many keys, which the body names: markers alone
        return "s3:DeleteObject", "example-maps/run-1/_job/attempts/many", ""
    return ACTIONS[method], key, ""


NOT_USED_HERE = {
    ("s3:PutObject", "example-maps/run-1/_job/plan/forward.json"),  # the first worker that has a GPU
    ("s3:PutObject", "example-maps/run-1/_job/dead/*"),  # of a unit that is given up
    ("s3:ListBucket", "example-maps/run-1/*"),  # who lacks it is told 403 of a missing object, and not 404
}
"""Rights of a worker that a job on CPUs without dead units does not use."""


def rights_of(role: str) -> set[tuple[str, str]]:
    """The actions that a policy allows, each with a pattern of keys, or of the prefixes that may be listed."""
    rights = set()
    for statement in json.loads((IAM / f"{role}.json").read_text())["Statement"]:
        prefixes = statement.get("Condition", {}).get("StringLike", {}).get("s3:prefix", ["*"])
        for action in statement["Action"]:
            for place in statement["Resource"]:
                name = place.removeprefix("arn:aws:s3:::")
                lists = action == "s3:ListBucket"
                rights |= {(action, f"{name}/{prefix}") for prefix in prefixes} if lists else {(action, name)}
    return rights


def uses(request: Request, right: tuple[str, str]) -> bool:
    """True if a request needs a right."""
    action, key, prefix = request
    return action == right[0] and fnmatchcase(prefix if action == "s3:ListBucket" else key, right[1])


def refused(role: str, seen: set[Request]) -> set[Request]:
    """What a role asked for and its policy does not allow."""
    beside = ("s3:GetObject", "example-images", "")  # is it one object? A bucket as a whole is none
    return {one for one in seen - {beside} if not any(uses(one, right) for right in rights_of(role))}


def unused(role: str, seen: set[Request]) -> set[tuple[str, str]]:
    """What a role's policy allows and the role never asked for."""
    return {right for right in rights_of(role) if not any(uses(one, right) for one in seen)}
