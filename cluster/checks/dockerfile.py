"""Rules for a Dockerfile: pinned bases, an ordinary user, no secrets, packages by the list of what was tested."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from blocksight.cluster.checks.commands import Product, command_findings
from blocksight.cluster.checks.documents import DocumentError, json_document
from blocksight.cluster.checks.findings import Finding, Place, nearest
from blocksight.cluster.checks.images import image_findings
from blocksight.cluster.checks.literals import is_secret, secret_findings
from blocksight.cluster.checks.variables import assigned_findings

INSTRUCTIONS = (
    *("ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "ONBUILD", "RUN"),
    *("SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR"),
)
PAIR = re.compile(r"(?P<name>\w+)=(?P<value>\"[^\"]*\"|'[^']*'|\S*)")
FETCHED = re.compile(r"\b(curl|wget)\b[^;&]*\|\s*(sudo\s+)?(ba)?sh\b")
PIP = re.compile(r"\bpip3?\b[^;&|]*\binstall\b(?P<rest>[^;&|]*)")
APT = re.compile(r"\bapt(-get)?\b[^;&|]*\binstall\b(?P<rest>[^;&|]*)")
TOKEN = "RAY_AUTH_MODE=token"
SECRETS = re.compile(
    r"(^|/)(\.aws|\.ssh|\.env|\.netrc|\.kube|\.docker|\.git-credentials|id_(rsa|dsa|ecdsa|ed25519)|credentials)(/|$)"
    r"|\.(pem|key|pfx|p12)$"
)
"""Files and folders that hold keys."""
OF_PYTHON = re.compile(r"(^|/)python:(?P<major>\d+)\.(?P<minor>\d+)")
LEAST_PYTHON = (3, 11)


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile, with its continued lines joined."""

    name: str
    rest: str
    place: Place


def instructions(place: Place) -> Iterator[Instruction]:
    """The instructions of a Dockerfile in their order."""
    number, joined = 0, ""
    for at, line in enumerate(place.text.splitlines(), 1):
        if line.lstrip().startswith("#") or not (line.strip() or joined):
            continue
        number = number if joined else at
        joined += line.rstrip().removesuffix("\\").strip() + " "
        if not line.rstrip().endswith("\\"):
            name, _, rest = joined.strip().partition(" ")
            yield Instruction(name.upper(), rest.strip(), Place(place.file, joined.strip(), f"line {number}"))
            joined = ""


def dockerfile_findings(place: Place, product: Product) -> Iterator[Finding]:
    """What is wrong with a Dockerfile."""
    found = list(instructions(place))
    yield from _bases(place, found)
    yield from _user(place, found)
    yield from _arguments(found)
    yield from _copies(found)
    for one in found:
        yield from secret_findings(one.place)
        if one.name not in INSTRUCTIONS:
            yield one.place.finding("schema", f"{one.name} is no instruction", nearest(one.name, INSTRUCTIONS))
        if one.name in ("ARG", "ENV"):
            yield from _variables(one)
            yield from assigned_findings(one.place, one.rest)
        if one.name == "RUN":
            yield from _run(one)
        if one.name == "ADD":
            yield one.place.finding("image", "ADD fetches and unpacks", "write COPY")
        if one.name == "EXPOSE":
            yield one.place.finding("network", "the image serves nothing by itself", "leave it out")
        if one.name == "WORKDIR" and not one.rest.startswith("/"):
            yield one.place.finding("path", f"{one.rest!r} depends on the lines before", "write a path from the root")
        if one.name in ("CMD", "ENTRYPOINT"):
            yield from _command(one, product)
    last = _last_stage(found)
    if not any(one.name == "ENV" and TOKEN in one.rest for one in last):
        why = "a Ray that starts in the image takes commands without a token"
        yield place.finding("token", why, f"write ENV {TOKEN}")


def _last_stage(found: list[Instruction]) -> list[Instruction]:
    starts = [at for at, one in enumerate(found) if one.name == "FROM"]
    return found[starts[-1] :] if starts else []


def _bases(place: Place, found: list[Instruction]) -> Iterator[Finding]:
    """Each base is pinned, an earlier stage, or an argument whose default is pinned."""
    declared = [one.rest.partition("=") for one in found if one.name == "ARG"]
    arguments = {name: value for name, _, value in declared}
    stages: list[str] = []
    is_named = False
    for one in found:
        if one.name == "FROM":
            words = [word for word in one.rest.split() if not word.startswith("--")]
            base = re.sub(r"\$\{?(\w+)\}?", lambda name: arguments.get(name[1], ""), words[0] if words else "")
            if base not in stages:
                yield from image_findings(one.place, base)
                yield from _python(one.place, base)
            is_named = len(words) == 3 and words[1].upper() == "AS"
            if is_named:
                stages.append(words[2])
            elif len(words) != 1:
                yield one.place.finding("schema", "FROM takes IMAGE, or IMAGE AS NAME", "write one of the two")
        source = re.search(r"--from=(\S+)", one.rest)
        if one.name == "COPY" and source is not None and source[1] not in stages[: -1 if is_named else None]:
            if "@" in source[1] or "/" in source[1] or ":" in source[1]:
                yield from image_findings(one.place, source[1])
            else:
                yield one.place.finding("reference", f"no stage {source[1]!r} is before", nearest(source[1], stages))
    if not any(one.name == "FROM" for one in found):
        yield place.finding("schema", "it has no FROM", "name the base first")


def _python(place: Place, base: str) -> Iterator[Finding]:
    found = OF_PYTHON.search(base)
    if found is not None and (int(found["major"]), int(found["minor"])) < LEAST_PYTHON:
        least = ".".join(map(str, LEAST_PYTHON))
        why = f"the package needs Python {least}, and {base.partition('@')[0]} has an older one"
        yield place.finding("version", why, f"take python:{least} or newer")


def _arguments(found: list[Instruction]) -> Iterator[Finding]:
    """What a stage uses, and no ARG or ENV of the stage sets."""
    given: set[str] = set()
    for one in found:
        given = set() if one.name == "FROM" else given
        given |= {pair["name"] for pair in PAIR.finditer(one.rest)} if one.name in ("ARG", "ENV") else set()
        given |= {one.rest} if one.name == "ARG" else set()
        if one.name in ("RUN", "ENV", "LABEL", "COPY"):
            known = {*given, *(own["name"] for own in re.finditer(r"\b(?P<name>\w+)=", one.rest)), "PATH", "HOME"}
            for name in dict.fromkeys(re.findall(r"\$\{?([A-Za-z_]\w*)\}?", one.rest)):
                if name not in known:
                    yield one.place.finding("reference", f"nothing sets ${name} in this stage", nearest(name, given))


def _copies(found: list[Instruction]) -> Iterator[Finding]:
    """What is copied out of a stage was made there; the list of versions is copied before pip reads it."""
    stages: dict[str, list[Instruction]] = {}
    own: list[Instruction] = []
    for one in found:
        if one.name == "FROM":
            own = stages.setdefault(one.rest.rpartition(" ")[2], [])
        words = [word for word in one.rest.split() if not word.startswith("--")]
        source = re.search(r"--from=(\S+)", one.rest)
        for word in words[:-1] if one.name in ("COPY", "ADD") else []:
            if SECRETS.search(word):
                yield one.place.finding("secret", f"{word} holds keys, and stays in the image", "give them at run time")
        if one.name == "COPY" and source is not None and source[1] in stages:
            for word in words[:-1]:
                if not any(word in before.rest for before in stages[source[1]]):
                    yield one.place.finding("reference", f"the stage {source[1]} makes no {word}", "copy what it makes")
        for listed in re.findall(r"\s(?:-c|--constraint|-r)[ =](\S+)", one.rest) if one.name == "RUN" else []:
            if not any(before.name == "COPY" and before.rest.endswith(f" {listed}") for before in own):
                yield one.place.finding("reference", f"{listed} was not copied before", f"COPY {listed} {listed}")
        for word in re.findall(r"\bPATH=(/[^:\s]+)/bin", one.rest) if one.name == "ENV" else []:
            if not any(before.name in ("COPY", "RUN") and word in before.rest.split() for before in own):
                yield one.place.finding("reference", f"nothing puts programs into {word}", "name where they are copied")
        own.append(one)


def _user(place: Place, found: list[Instruction]) -> Iterator[Finding]:
    users = [one for one in _last_stage(found) if one.name == "USER"]
    if not users:
        yield place.finding("privilege", "the image runs as root", "write USER 1000 at the end")
    elif not users[-1].rest.partition(":")[0].isdecimal() or int(users[-1].rest.partition(":")[0]) == 0:
        why = f"{users[-1].rest!r} is root, or a name that Kubernetes cannot tell from root"
        yield users[-1].place.finding("privilege", why, "write USER 1000")
    elif users[-1].rest.partition(":")[0] not in (made := _made_users(found)) and made:
        why = f"the image makes user {', '.join(made)} and runs as {users[-1].rest}, who has no home"
        yield users[-1].place.finding("privilege", why, f"write USER {made[-1]}")


def _made_users(found: list[Instruction]) -> list[str]:
    """The numbers of the users that the last stage makes."""
    commands = " ; ".join(one.rest for one in _last_stage(found) if one.name == "RUN")
    return re.findall(r"\buseradd\b[^;&|]*(?:--uid|-u)[ =](\d+)", commands)


def _variables(one: Instruction) -> Iterator[Finding]:
    name = one.rest.split("=")[0].split()[0] if one.rest.split() else ""
    if one.name == "ARG" and "=" not in one.rest and is_secret(name, "given"):
        why = f"{name} stays in the image's history, once it is given"
        yield one.place.finding("secret", why, "mount it for one RUN: --mount=type=secret")


def _run(one: Instruction) -> Iterator[Finding]:
    if FETCHED.search(one.rest):
        yield one.place.finding(
            "image", "a script of the network runs, whatever it holds today", "copy it, by its hash"
        )
    for found in PIP.finditer(one.rest):
        if not re.search(r"\s(-c|--constraint|-r|--requirement)\b", found["rest"]) and "==" not in found["rest"]:
            why = "pip takes the newest versions, and each build is another"
            yield one.place.finding("image", why, "write -c cluster/constraints.txt")
        if "--no-cache-dir" not in found["rest"] and "--mount=type=cache" not in one.rest:
            yield one.place.finding("image", "pip's cache stays in the layer", "write --no-cache-dir")
        if "--trusted-host" in found["rest"] or re.search(r"index-url[= ]\"?http://", found["rest"]):
            yield one.place.finding("image", "packages come without a checked address", "write https://")
    if APT.search(one.rest) and "--no-install-recommends" not in one.rest:
        yield one.place.finding("image", "apt installs what nobody asked for", "write --no-install-recommends")
    if re.search(r"\bsudo\b", one.rest):
        yield one.place.finding("privilege", "sudo in an image is a way to root", "put it before USER")
    if re.search(r"\bchmod\b[^;&]*\b0?777\b", one.rest):
        yield one.place.finding("privilege", "everybody may write there", "give it to the user with --chown")


def _command(one: Instruction, product: Product) -> Iterator[Finding]:
    try:
        words = json_document(one.rest)
    except DocumentError:
        why = "a shell starts it, which keeps signals to itself: no worker would commit at its end"
        yield one.place.finding("grace", why, 'write ["blocksight", "..."]')
        return
    if isinstance(words, list) and words[:1] == ["blocksight"] and len(words) > 1 and words[1] not in ("--help", "-h"):
        yield from command_findings(one.place, [str(word) for word in words], product)
