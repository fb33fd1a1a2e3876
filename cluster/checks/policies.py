"""Rules for policies of AWS: exactly the actions that a job uses, on named places, and nothing of it left out."""

import re
from collections.abc import Iterator

from blocksight.cluster.checks.findings import Finding, Place, nearest

OBJECT_ACTIONS = ("s3:GetObject", "s3:PutObject", "s3:DeleteObject")
BUCKET_ACTIONS = ("s3:ListBucket",)
KEY_ACTIONS = ("kms:Decrypt", "kms:GenerateDataKey")
MACHINE_ACTIONS = ("ec2:RunInstances", "ec2:TerminateInstances", "ec2:CreateTags", "iam:PassRole")
LOOKS = ("ec2:DescribeInstances", "ec2:DescribeInstanceTypes", "ec2:DescribeImages")
"""What has no place of its own: AWS takes `*` alone."""
ROLE_ACTIONS = ("sts:AssumeRole", "sts:TagSession", "sts:AssumeRoleWithWebIdentity")
ACTIONS = (*OBJECT_ACTIONS, *BUCKET_ACTIONS, *KEY_ACTIONS, *MACHINE_ACTIONS, *LOOKS, *ROLE_ACTIONS)
TOGETHER = (("s3:GetObject", "s3:PutObject", *BUCKET_ACTIONS), (*MACHINE_ACTIONS, *LOOKS))
"""Actions of which a job uses all, if it uses the first that changes something. None needs to delete."""
TIDIED = ("_job/attempts/", "_job/probe-")
"""What a job removes, where it may: markers and probes."""
MACHINE_PARTS = ("instance", "image", "key-pair", "network-interface", "security-group", "subnet", "volume")
"""Kinds of places that starting a machine touches."""

FIELDS = ("Sid", "Effect", "Action", "Resource", "Condition", "Principal")
SERVICES = ("ec2.amazonaws.com", "pods.eks.amazonaws.com")
ARN = re.compile(r"arn:aws[a-z-]*:[a-z0-9-]+:[a-z0-9-]*:(\d{12})?:.+")
BUCKET = re.compile(r"arn:aws[a-z-]*:s3:::(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])")
OBJECTS = re.compile(rf"{BUCKET.pattern}/(?P<keys>.+)")
ENDS_WITH_STAR = re.compile(r"[^*]+|([^*]*[/-])?\*")
"""A star stands at the end, after / or -; elsewhere it is hardly meant."""

NEEDS_CONDITION = ("ec2:TerminateInstances", "ec2:CreateTags", "iam:PassRole")
OPERATORS = re.compile(
    r"(ForAllValues:|ForAnyValue:)?(String(Not)?(Equals|Like)(IgnoreCase)?|Arn(Not)?(Equals|Like)|Bool|Null|IpAddress"
    r"|NotIpAddress|Numeric\w+|Date\w+)(IfExists)?"
)
CLUSTER_TAG = "ray-cluster-name"
"""The tag that Ray's launcher gives to its machines."""
CONDITIONS = {
    "s3:prefix": "[^*]+|[^*]*[/-][*]",
    "ec2:CreateAction": "RunInstances",
    "iam:PassedToService": "ec2[.]amazonaws[.]com",
    "aws:SourceAccount": "[0-9]{12}",
    "aws:SourceArn": "arn:aws.+",
    f"aws:RequestTag/{CLUSTER_TAG}": ".+",
    f"aws:ResourceTag/{CLUSTER_TAG}": ".+",
}
"""Keys of conditions, each with the pattern of its values."""


def policy_findings(place: Place) -> Iterator[Finding]:
    """What is wrong with a policy, or with a trust policy."""
    for key, one in place.entries():
        if key not in ("Version", "Id", "Statement"):
            yield one.finding("schema", f"a policy has no {key}", nearest(key, ("Version", "Id", "Statement")))
    if place["Version"].value != "2012-10-17":
        yield place["Version"].finding("version", "the older language knows no variables", 'write "2012-10-17"')
    statements = list(place["Statement"].items())
    if not statements:
        yield place["Statement"].finding("schema", "a list of statements is missing", "add one")
    names = [one["Sid"].text for one in statements]
    for one in statements:
        sid = one["Sid"]
        if re.fullmatch(r"[A-Za-z0-9]+", sid.text) is None or names.count(sid.text) > 1:
            yield sid.finding("name", f"{sid.value!r} is no name of its own", "write letters and digits, each once")
        yield from _statement(one)
    yield from _left_out(place["Statement"], statements)
    yield from _buckets(statements)


def _statement(one: Place) -> Iterator[Finding]:
    for key, below in one.entries():
        if key in ("NotAction", "NotResource", "NotPrincipal"):
            yield below.finding("policy", "all but what it names is meant", f"write {key.removeprefix('Not')}")
        elif key not in FIELDS:
            yield below.finding("schema", f"a statement has no {key}", nearest(key, FIELDS))
    if one["Effect"].value not in ("Allow", "Deny"):
        yield one["Effect"].finding("enum", f"{one['Effect'].value!r} is neither Allow nor Deny", "write Allow")
    yield from _condition(one["Condition"], one)
    if one["Effect"].value == "Deny":
        return
    actions = list(_each(one["Action"]))
    if not actions:
        yield one["Action"].finding("schema", "it allows nothing", "name actions")
    for action in actions:
        yield from _action(action, one)
    if one["Principal"].is_there:
        yield from _principal(one, {action.text for action in actions})
    else:
        yield from _places(one, {action.text for action in actions})


def _action(action: Place, one: Place) -> Iterator[Finding]:
    if "*" in action.text:
        yield action.finding("policy", f"{action.text!r} is more than a job does", "name each action")
    elif action.text not in ACTIONS:
        yield action.finding("policy", f"a job does not use {action.value!r}", nearest(action.text, ACTIONS))
    starts = action.text == "ec2:RunInstances" and any(":instance/" in where.text for where in _each(one["Resource"]))
    if (action.text in NEEDS_CONDITION or starts) and not one["Condition"].value:
        why = f"{action.text} reaches machines and roles that are not the cluster's"
        yield action.finding("policy", why, "add a Condition on tags, or on the service")


def _condition(condition: Place, one: Place) -> Iterator[Finding]:
    if not condition.value:
        if "Condition" in (one.value or {}):
            yield condition.finding("policy", "it asks for nothing", "write what it compares, or leave it out")
        return
    for operator, below in condition.entries():
        if OPERATORS.fullmatch(operator) is None:
            yield below.finding("enum", f"{operator} is no kind of condition", "write StringEquals")
        if not below.value:
            yield below.finding("policy", "it compares nothing", "write a key and its values")
        for key, values in below.entries():
            if key not in CONDITIONS and not key.endswith((":sub", ":aud")):
                yield values.finding("policy", f"nothing here is asked by {key}", nearest(key, CONDITIONS))
            given = list(_each(values))
            if not given:
                yield values.finding("policy", "no value would do", "name one")
            for value in given:
                if re.fullmatch(CONDITIONS.get(key, ".+"), value.text) is None:
                    yield value.finding("policy", f"{value.value!r} is no value of {key}", f"write one of {key}")


def _each(place: Place) -> Iterator[Place]:
    """The entries of a list, or the one value that stands in its place."""
    if place.text or place.value == "":
        yield place
    yield from place.items()


def _principal(one: Place, actions: set[str]) -> Iterator[Finding]:
    principal = one["Principal"]
    if principal.text or not principal.value:
        yield principal.finding("policy", "everybody or nobody may take the role", "write {Service: ec2.amazonaws.com}")
    for key, below in principal.entries():
        for who in _each(below):
            if who.text == "*" or key not in ("Service", "Federated", "AWS"):
                yield who.finding("policy", f"{who.value!r} is everybody", "name a service")
            elif key == "Service" and who.text not in SERVICES:
                yield who.finding("enum", f"{who.value!r} runs no jobs of ours", nearest(who.text, SERVICES))
            elif key == "Federated" and not any(name.endswith(":sub") for name in _conditions(one)):
                yield who.finding("policy", "every account of the cluster may take the role", "add a Condition on sub")
    wanted = {"sts:AssumeRoleWithWebIdentity"} if principal["Federated"].is_there else {"sts:AssumeRole"}
    if "pods.eks.amazonaws.com" in [who.text for who in _each(principal["Service"])]:
        wanted.add("sts:TagSession")
        if not one["Condition"].value:
            yield one["Condition"].finding(
                "policy", "clusters of other accounts are meant too", "add aws:SourceAccount"
            )
    if actions != wanted:
        why = f"these take the role by {' and '.join(sorted(wanted))}"
        yield one["Action"].finding("policy", why, "write exactly these")


def _conditions(one: Place) -> list[str]:
    """The keys that a statement's conditions compare."""
    return [name for _, kind in one["Condition"].entries() for name, _ in kind.entries()]


def _places(one: Place, actions: set[str]) -> Iterator[Finding]:
    places = list(_each(one["Resource"]))
    if not places:
        yield one["Resource"].finding("schema", "it names no place", "write the bucket's name")
    for where in places:
        if where.text == "*":
            if not actions <= {*LOOKS}:
                yield where.finding("policy", "every place of the account is meant", "name the places")
        elif ARN.fullmatch(where.text) is None:
            yield where.finding("policy", f"{where.value!r} is no name of a place", "write arn:aws:...")
        elif {*LOOKS} & actions:
            yield where.finding("policy", "AWS takes no place for what only looks", 'write "*"')
        elif actions & {*OBJECT_ACTIONS} and OBJECTS.fullmatch(where.text) is None:
            yield where.finding("policy", f"{where.value!r} names no objects, so it allows none", "write .../PREFIX/*")
        elif actions & {*BUCKET_ACTIONS} and BUCKET.fullmatch(where.text) is None:
            yield where.finding("policy", f"{where.value!r} is no bucket, so it lists none", "write the bucket alone")
        elif "iam:PassRole" in actions and "*" in where.text:
            yield where.finding("policy", "any role may be passed on", "name the workers' role")
        elif ENDS_WITH_STAR.fullmatch(where.text) is None:
            yield where.finding("policy", f"a star within {where.value!r} is hardly meant", "write PREFIX/*")


def _left_out(place: Place, statements: list[Place]) -> Iterator[Finding]:
    """Actions, and places of machines, without which what is allowed is of no use."""
    allowed = {action.text for one in statements for action in _each(one["Action"])}
    for together in TOGETHER:
        if allowed & {"s3:PutObject", "ec2:RunInstances"} & {*together}:
            for action in sorted({*together} - allowed):
                yield place.finding("policy", f"a job also uses {action}", f"allow {action}")
    if "ec2:RunInstances" not in allowed:
        return
    starts = [one for one in statements if "ec2:RunInstances" in [action.text for action in _each(one["Action"])]]
    parts = {where.text.rpartition(":")[2].partition("/")[0] for one in starts for where in _each(one["Resource"])}
    for part in MACHINE_PARTS:
        if part not in parts:
            yield place.finding("policy", f"no machine starts without its {part}", f"allow RunInstances on {part}/*")
    tags = {
        value.text
        for one in statements
        for _, kind in one["Condition"].entries()
        for key, values in kind.entries()
        if key.endswith(f"/{CLUSTER_TAG}")
        for value in _each(values)
    }
    if len(tags) > 1:
        why = f"machines start with one tag and end with another: {', '.join(sorted(tags))}"
        yield place.finding("reference", why, "write the cluster's name in each")


def _buckets(statements: list[Place]) -> Iterator[Finding]:
    """What is listed or written must be read too; what is listed reaches no further than what is read."""
    read: dict[str, list[str]] = {}
    for one in statements:
        if "s3:GetObject" in [action.text for action in _each(one["Action"])]:
            for where in _each(one["Resource"]):
                if (found := OBJECTS.fullmatch(where.text)) is not None:
                    read.setdefault(found["bucket"], []).append(found["keys"].rstrip("*"))
    for one in statements:
        actions = {action.text for action in _each(one["Action"])}
        for where in _each(one["Resource"]):
            if actions & {"s3:PutObject", "s3:DeleteObject"}:
                yield from _writing(where, read)
            if "s3:DeleteObject" in actions and not any(folder in where.text for folder in TIDIED):
                why = f"{where.value!r} lets a job delete more than its markers and probes, and it need not delete"
                yield where.finding("policy", why, "leave DeleteObject out, or name _job/attempts/* and _job/probe-*")
            if actions & {*BUCKET_ACTIONS} and (found := BUCKET.fullmatch(where.text)) is not None:
                yield from _listing(one, where, read.get(found["bucket"], []))


def _writing(where: Place, read: dict[str, list[str]]) -> Iterator[Finding]:
    found = OBJECTS.fullmatch(where.text)
    if found is not None and not any(found["keys"].startswith(keys) for keys in read.get(found["bucket"], [])):
        yield where.finding("reference", "a job reads what it writes, and may not here", "allow GetObject")


def _listing(one: Place, where: Place, read: list[str]) -> Iterator[Finding]:
    if not read:
        yield where.finding("reference", "nothing of this bucket is read", "name a bucket whose objects are read")
        return
    prefixes = [
        value
        for _, kind in one["Condition"].entries()
        for key, own in kind.entries()
        if key == "s3:prefix"
        for value in _each(own)
    ]
    if not prefixes and "" not in read:
        why = "every key of the bucket is listed, and only some are read"
        yield where.finding("policy", why, "add a Condition on s3:prefix")
    for prefix in prefixes:
        if not any(prefix.text.rstrip("*").startswith(keys) for keys in read):
            yield prefix.finding("reference", f"nothing below {prefix.value!r} is read", "write the prefix of the run")
