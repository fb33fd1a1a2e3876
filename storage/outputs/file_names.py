"""File names for record keys: valid in every file system, and different for different keys."""

import hashlib
import re

MAX_KEPT = 100
"""Characters of a key that the file name keeps. With hash and suffix it stays below 255 bytes."""
HASH_DIGITS = 16

PLAIN = re.compile(rf"(?!.*-[0-9a-f]{{{HASH_DIGITS}}}\Z)[a-z0-9_](?:[a-z0-9._-]{{0,{MAX_KEPT - 2}}}[a-z0-9_])?")
"""Keys that are their own file name: no upper case, no unusual character, and no end like another key's hash."""
UNUSUAL = re.compile("[^A-Za-z0-9._-]+")
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}
"""Names that Windows reserves, with any suffix."""


def file_name(key: str) -> str:
    """The file name for a record's key: ASCII letters, digits and `._-`, without a suffix.

    A plain key is its own file name. Otherwise the name is the valid part of the key and a hash of the whole key, so
    `a+b`, `a b`, `A-B` and `a-b` have different names, also on file systems that ignore case or Unicode forms.
    """
    if PLAIN.fullmatch(key) and not _is_device(key):
        return key
    kept = UNUSUAL.sub("-", key).strip(".-")[-MAX_KEPT:].lstrip(".-")
    if not kept or _is_device(kept):
        kept = f"record-{kept}".rstrip("-")
    digest = hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()
    return f"{kept}-{digest[:HASH_DIGITS]}"


def _is_device(name: str) -> bool:
    return name.partition(".")[0].lower() in DEVICES
