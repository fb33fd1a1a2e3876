"""Rules for policies of AWS: exactly the actions that a job uses, on named places."""

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
FIELDS = ("Sid", "Effect", "Action", "Resource", "Condition", "Principal")
SERVICES = ("ec2.amazonaws.com", "pods.eks.amazonaws.com")
BUCKET = re.compile(r"arn:aws[a-z-]*:s3:::[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
OBJECTS = re.compile(rf"{BUCKET.pattern}/.+")
ARN = re.compile(r"arn:aws[a-z-]*:[a-z0-9-]+:[a-z0-9-]*:(\d{12})?:.+")
NEEDS_CONDITION = ("ec2:TerminateInstances", "ec2:CreateTags", "iam:PassRole")
CONDITIONS = re.compile(
    r"(ForAllValues:|ForAnyValue:)?(String(Not)?(Equals|Like)(IgnoreCase)?|Arn(Not)?(Equals|Like)|Bool|Null|IpAddress"
    r"|NotIpAddress|Numeric\w+|Date\w+)(IfExists)?"
)


def policy_findings(place: Place) -> Iterator[Finding]:
    """What is wrong with a policy, or with a trust policy."""
    for key, one in place.entries():
        if key not in ("Version", "Id", "Statement"):
            yield one.finding("schema", f"a policy has no {key}", nearest(key, ("Version", "Id", "Statement")))
    if place["Version"].value != "2012-10-17":
        yield place["Version"].finding("version", "the older language knows no variables", 'write "2012-10-17"')
    names = [one["Sid"].text for one in place["Statement"].items()]
    if not names:
        yield place["Statement"].finding("schema", "a list of statements is missing", "add one")
    for one in place["Statement"].items():
        sid = one["Sid"]
        if re.fullmatch(r"[A-Za-z0-9]+", sid.text) is None or names.count(sid.text) > 1:
            yield sid.finding("name", f"{sid.value!r} is no name of its own", "write letters and digits, each once")
        yield from _statement(one)


def _statement(one: Place) -> Iterator[Finding]:
    for key, below in one.entries():
        if key in ("NotAction", "NotResource", "NotPrincipal"):
            yield below.finding("policy", "all but what it names is meant", f"write {key.removeprefix('Not')}")
        elif key not in FIELDS:
            yield below.finding("schema", f"a statement has no {key}", nearest(key, FIELDS))
    if one["Effect"].value not in ("Allow", "Deny"):
        yield one["Effect"].finding("enum", f"{one['Effect'].value!r} is neither Allow nor Deny", "write Allow")
    for key, below in one["Condition"].entries():
        if CONDITIONS.fullmatch(key) is None:
            yield below.finding("enum", f"{key} is no kind of condition", "write StringEquals")
    if one["Effect"].value == "Deny":
        return
    actions = list(_each(one["Action"]))
    if not actions:
        yield one["Action"].finding("schema", "it allows nothing", "name actions")
    for action in actions:
        if "*" in action.text:
            yield action.finding("policy", f"{action.text!r} is more than a job does", "name each action")
        elif action.text not in ACTIONS:
            yield action.finding("policy", f"a job does not use {action.value!r}", nearest(action.text, ACTIONS))
        if action.text in NEEDS_CONDITION and not one["Condition"].is_there:
            why = f"{action.text} reaches machines and roles that are not the cluster's"
            yield action.finding("policy", why, "add a Condition on tags, or on the service")
    if one["Principal"].is_there:
        yield from _principal(one, actions)
    else:
        yield from _places(one, {action.text for action in actions})


def _each(place: Place) -> Iterator[Place]:
    """The entries of a list, or the one value that stands in its place."""
    if place.text:
        yield place
    yield from place.items()


def _principal(one: Place, actions: list[Place]) -> Iterator[Finding]:
    principal = one["Principal"]
    if principal.text:
        yield principal.finding("policy", "everybody may take the role", "write {Service: ec2.amazonaws.com}")
    for key, below in principal.entries():
        for who in _each(below):
            if who.text == "*" or key not in ("Service", "Federated", "AWS"):
                yield who.finding("policy", f"{who.value!r} is everybody", "name a service")
            elif key == "Service" and who.text not in SERVICES:
                yield who.finding("enum", f"{who.value!r} runs no jobs of ours", nearest(who.text, SERVICES))
            elif key == "Federated" and not any(name.endswith(":sub") for name in _conditions(one)):
                yield who.finding("policy", "every account of the cluster may take the role", "add a Condition on sub")
    if {action.text for action in actions} - {*ROLE_ACTIONS}:
        yield one["Action"].finding("policy", "a trust policy says who takes the role", "write sts:AssumeRole")


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
