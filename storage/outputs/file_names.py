"""The name of a file for a record: sound in every file system, and another one for every key."""

import hashlib
import re

MAX_KEPT = 100
"""Characters of a key that its file's name keeps; with the hash and an ending it stays below 255 bytes."""
HASH_DIGITS = 16

PLAIN = re.compile(rf"(?!.*-[0-9a-f]{{{HASH_DIGITS}}}\Z)[a-z0-9_](?:[a-z0-9._-]{{0,{MAX_KEPT - 2}}}[a-z0-9_])?")
"""Keys that are their file's name: no letter case, nothing unusual, and no ending like the hash of another key."""
UNUSUAL = re.compile("[^A-Za-z0-9._-]+")
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}
"""Names that no file may have on Windows, whatever stands behind a dot."""


def file_name(key: str) -> str:
    """A file's name for a record's key, of ASCII letters, digits and `._-`, without an ending.

    It is the key where that is sound. Otherwise it is what can be kept of the key and a hash of all of it, so that
    `a+b`, `a b`, `A-B` and `a-b` have different names, also where letter case or Unicode forms do not count.
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
