"""Reads paths and URIs: gives each place one spelling, and tells whether one place contains another."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from blocksight.storage.stores.store import StoreError

S3 = "s3://"
WILDCARD, ANY_FOLDERS = "*", "**"
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
NO_TWO_SLASHES = re.compile(r"(s3|file):(?!//)", re.IGNORECASE)
CREDENTIALS_WANTED = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, in the environment, or run under a role"
)


def normal_place(text: str) -> str:
    """The normal spelling of a place: an absolute path, or s3://BUCKET/PREFIX, without a slash at its end.

    Raises StoreError for text that is no path or known URI, and for a URI with user info or a query. The message
    never repeats a URI that may hold a secret.
    """
    if "\0" in text:
        raise StoreError("a path or URI holds a zero byte")
    if NO_TWO_SLASHES.match(text):
        raise StoreError(
            f"{text.partition(':')[0]}: has no two slashes after it; wanted s3://bucket/prefix or file:///PATH"
        )
    scheme, separator, rest = text.partition("://")
    if not separator:
        return _normal_path(text)
    if not SCHEME.fullmatch(scheme):
        raise StoreError("a URI begins with its scheme; wanted a local path, file:///PATH or s3://bucket/prefix")
    if scheme.lower() == "file":
        if not rest.startswith("/"):
            raise StoreError("a file:// URI has no path on this machine; wanted file:///PATH, or a plain path")
        return _normal_path(rest)
    if scheme.lower() == "s3":
        return _normal_bucket(rest)
    raise StoreError(f"{scheme}:// is not known; known: a local path, file://, s3://")


def split_place(place: str) -> tuple[str, str]:
    """The parent of a normal place and its name there; the name is "" for a whole bucket and for the root folder."""
    bucket_end = place.find("/", len(S3)) if place.startswith(S3) else 0
    if bucket_end < 0 or place == "/":
        return place, ""
    folder, _, name = place.rpartition("/")
    return folder or "/", name


def split_pattern(place: str) -> tuple[str, str]:
    """The folder of a normal place with a wildcard, and the pattern below it; the pattern is "" without a wildcard.

    The folder ends before the first part with `*`.
    """
    parts = place.split("/")
    first = next((number for number, part in enumerate(parts) if WILDCARD in part), len(parts))
    return "/".join(parts[:first]) or "/", "/".join(parts[first:])


def matches(key: str, pattern: str) -> bool:
    """True if the key has the pattern's form: `*`, `?` and `[…]` stand for parts of a name, `**` for any folders."""
    return _parts_match(key.split("/"), pattern.split("/"))


def _parts_match(names: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns:
        return not names
    if patterns[0] == ANY_FOLDERS and _parts_match(names, patterns[1:]):
        return True
    if not names:
        return False
    if patterns[0] == ANY_FOLDERS:
        return _parts_match(names[1:], patterns)
    return fnmatchcase(names[0], patterns[0]) and _parts_match(names[1:], patterns[1:])


def is_whole_bucket(place: str) -> bool:
    """True if a normal place is a bucket without a prefix."""
    return place.startswith(S3) and "/" not in place.removeprefix(S3)


def contain_each_other(first: str, second: str) -> bool:
    """True if one of two places is the other or lies in it, in any spelling and through links.

    A place with a wildcard counts as its folder.
    """
    one, other = (split_pattern(normal_place(place))[0] for place in (first, second))
    if one.startswith(S3) != other.startswith(S3):
        return False
    if not one.startswith(S3):
        return _is_inside(Path(one).resolve(), Path(other).resolve()) or _is_inside(
            Path(other).resolve(), Path(one).resolve()
        )
    one, other = (_with_plain_bucket(place) + "/" for place in (one, other))
    return one.startswith(other) or other.startswith(one)


def _normal_path(text: str) -> str:
    """The absolute path. `..` is resolved as the system does; other links are kept."""
    try:
        path = Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise StoreError(f"{text!r} is in the home folder of a user who has none") from error
    while ".." in path.parts:
        at = len(path.parts) - path.parts[::-1].index("..")
        path = Path(*path.parts[:at]).resolve().joinpath(*path.parts[at:])
    return "/" + str(path).lstrip("/")


def _normal_bucket(rest: str) -> str:
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.rstrip("/")
    if not bucket:
        raise StoreError("an s3:// URI names no bucket; wanted s3://bucket/prefix")
    if not BUCKET.fullmatch(bucket):
        raise StoreError(
            "the bucket of an s3:// URI may hold only letters, digits, dots, hyphens and underscores; user info does "
            f"not belong there: {CREDENTIALS_WANTED}"
        )
    if "?" in prefix:
        raise StoreError(
            f"an s3:// URI has no query (a signed link is not read): name the prefix, and {CREDENTIALS_WANTED}"
        )
    if {".", ".."} & set(prefix.split("/")):
        raise StoreError(
            f"{S3}{bucket}/{prefix} has a part `.` or `..`: a bucket has no folders to go up; write it out"
        )
    return f"{S3}{bucket}/{prefix}" if prefix else f"{S3}{bucket}"


def _with_plain_bucket(place: str) -> str:
    """The place with its bucket in lower case: no server has two buckets that differ in case alone."""
    bucket, slash, prefix = place.removeprefix(S3).partition("/")
    return f"{S3}{bucket.lower()}{slash}{prefix}"


def _is_inside(inner: Path, outer: Path) -> bool:
    """True by name, or if the system says so: a folder may be mounted twice, or ignore case."""
    return any(path == outer or _is_same(path, outer) for path in (inner, *inner.parents))


def _is_same(path: Path, other: Path) -> bool:
    try:
        return path.samefile(other)
    except OSError:
        return False
