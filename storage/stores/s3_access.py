"""How a bucket is accessed, from the environment: unsigned, at the requester's cost, with encryption, by a profile."""

import os
from typing import Any

from blocksight.storage.stores.locations import S3, normal_place
from blocksight.storage.stores.store import StoreError

UNSIGNED = "AWS_NO_SIGN_REQUEST"
"""YES: requests are not signed, for public buckets. GDAL has the same name."""
PAYER = "AWS_REQUEST_PAYER"
"""`requester`: the account that asks pays. GDAL has the same name."""
ENCRYPTION = "BLOCKSIGHT_S3_ENCRYPTION"
"""AES256, aws:kms or aws:kms:KEY: the headers of encryption that each write carries."""
PROFILES = "BLOCKSIGHT_S3_PROFILES"
"""BUCKET=PROFILE,…: profiles of buckets that belong to other accounts than the rest."""
KMS = "aws:kms"


def is_unsigned() -> bool:
    """True if the user asks for unsigned requests."""
    return os.environ.get(UNSIGNED, "").lower() in ("yes", "true", "on", "1")


def is_requester_paying() -> bool:
    """True if the user agrees to pay. Raises StoreError for another value than `requester`."""
    value = os.environ.get(PAYER, "")
    if value.lower() not in ("", "requester"):
        raise StoreError(f"{PAYER} is {value!r}; the only value is requester")
    return bool(value)


def encryption_headers() -> dict[str, str]:
    """Arguments of a write for the encryption that the user asks for. Raises StoreError for an unknown kind."""
    value = os.environ.get(ENCRYPTION, "")
    if not value:
        return {}
    if value in ("AES256", KMS):
        return {"ServerSideEncryption": value}
    key = value.removeprefix(f"{KMS}:")
    if key in ("", value):
        raise StoreError(f"{ENCRYPTION} is {value!r}; wanted AES256, {KMS} or {KMS}:KEY")
    return {"ServerSideEncryption": KMS, "SSEKMSKeyId": key}


def client_options(place: str) -> dict[str, Any]:
    """Arguments of s3fs for a normal place s3://BUCKET/PREFIX. Raises StoreError for a variable without sense."""
    profile = value_for(place, os.environ.get(PROFILES, ""))
    return {
        "anon": is_unsigned(),
        "requester_pays": is_requester_paying(),
        "s3_additional_kwargs": encryption_headers(),
        **({"profile": profile} if profile else {}),
    }


def values_by_place(text: str) -> dict[str, str]:
    """The values of `VALUE,PLACE=VALUE,…` by normal place; "" is the place of the value for all others.

    A PLACE is a bucket's name or s3://BUCKET/PREFIX. Raises StoreError if two values are for one place.
    """
    values: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        named, separator, value = part.partition("=")
        is_for_all = not separator or "://" in named.removeprefix(S3)  # an address may hold the sign too
        place = "" if is_for_all else normal_place(named if named.startswith(S3) else f"{S3}{named}")
        if place in values:
            raise StoreError(f"{place or 'all other buckets'} has two values, wanted one: VALUE,BUCKET=VALUE")
        values[place] = part if is_for_all else value
    return values


def value_for(place: str, text: str) -> str | None:
    """The value that `text` gives a normal place: that of the longest PLACE around it, or the one for all others."""
    values = values_by_place(text)
    around = [named for named in values if f"{place}/".startswith(f"{named}/" if named else "")]
    return values[max(around, key=len)] if around else None
