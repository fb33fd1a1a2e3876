"""Finds secrets that stand in a file as a literal."""

import re
from collections.abc import Iterator

from blocksight.cluster.checks.findings import Finding, Place

SECRET_NAME = re.compile(r"\w*(KEY|SECRETS?|TOKENS?|PASS(W(OR)?D|PHRASE)?|CREDENTIALS?)", re.IGNORECASE)
PLAIN_NAME = re.compile(r"keys?|httptokens|\w*(public|group|partition|sort|output)_?key", re.IGNORECASE)
"""Names that end as a secret's would, and are none: the key of a toleration, the output key of a model."""
NO_LITERAL = re.compile(r"|\$.*|true|false|\d{1,2}|~?/.*|\./.*|[a-z0-9+]+://[^:@/]*", re.IGNORECASE)
"""Values that are no secret: empty, a variable, a switch, a path."""
SECRET_VALUES = {
    "a key of AWS": re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a token of GitHub": re.compile(r"\b(gh[pousr]_\w{20,}|github_pat_\w{20,})"),
    "a token of Hugging Face": re.compile(r"\bhf_[A-Za-z0-9]{20,}\b"),
    "a web token": re.compile(r"\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}"),
    "a password in an address": re.compile(r"\b[a-z][a-z0-9+]*://[^\s/:@$]+:[^\s/:@$]+@"),
}
WAY_OUT = "take it out and revoke it; let the pod or machine have a role, or refer to a Secret"
_VALUE = r"""(?P<value>"[^"]*"|'[^']*'|[^\s;]+)"""
IN_A_LINE = (
    re.compile(rf"(?<![\w$-])(?P<name>[A-Za-z_]\w*)={_VALUE}"),
    re.compile(rf"(?<!\S)--(?P<name>[a-z][\w-]*)[= ]{_VALUE}"),
)
"""A name and its value within a line of a shell: NAME=VALUE, --name VALUE."""


def is_secret(name: str, value: object) -> bool:
    """True if a value of this name is a secret that is written out."""
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        return False
    plain = name.replace("-", "_")
    is_named = SECRET_NAME.fullmatch(plain) is not None and PLAIN_NAME.fullmatch(plain) is None
    return is_named and NO_LITERAL.fullmatch(str(value)) is None


def secret_findings(place: Place) -> Iterator[Finding]:
    """The secrets among all values at and below a place."""
    for one in place.walk():
        if one.text:
            yield from _in_text(one)
        name = one["name"].text
        if is_secret(name, one["value"].value):
            yield one["value"].finding("secret", f"the value of {name} is written out", WAY_OUT)
        for key, below in one.entries():
            if is_secret(key, below.value):
                yield below.finding("secret", f"the value of {key} is written out", WAY_OUT)


def _in_text(place: Place) -> Iterator[Finding]:
    for what, pattern in SECRET_VALUES.items():
        if pattern.search(place.text):
            yield place.finding("secret", f"{what} is written out", WAY_OUT)
    for found in (one for pattern in IN_A_LINE for one in pattern.finditer(place.text)):
        if is_secret(found["name"], found["value"].strip("\"'")):
            yield place.finding("secret", f"the value of {found['name']} is written out", WAY_OUT)
