"""Turns an S3 client's errors into StoreErrors: the right class, and a message without credentials."""

import os
import re
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import (
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
)
from botocore.parsers import ResponseParserError

from blocksight.storage.stores.locations import CREDENTIALS_WANTED, S3
from blocksight.storage.stores.s3_access import ENCRYPTION, PAYER, PROFILES, UNSIGNED, is_unsigned
from blocksight.storage.stores.s3_client import Connection
from blocksight.storage.stores.store import MissingError, ObjectError, StoreError, UnavailableError

MISSING_CODES = {"NoSuchKey", "404", "NotFound"}
CONFLICT_CODES = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409", "OperationAborted"}
RANGE_CODES = {"InvalidRange", "416"}
BUSY = re.compile(
    "SlowDown.*|.*Throttl.*|TooManyRequests.*|RequestTimeout|RequestLimitExceeded|BandwidthLimitExceeded|"
    "ServiceUnavailable|InternalError"
)
"""Codes of a busy store, in the words of several makers; some are sent with status 400 or 403."""
BUSY_STATUS = {408, 425, 429}
"""Status codes of a busy store, besides 500 and above."""
UNSUPPORTED_STATUS = {501, 505}
"""Status codes of a server that does not support the request; a retry does not help."""
ARCHIVED_CODE = "InvalidObjectState"
FORBIDDEN_CODES = {"AccessDenied", "403", "Forbidden", "AllAccessDisabled"}
"""Codes for an object that may not be read, or for all objects if the credentials lack the right."""
CREDENTIAL_FAULTS = {
    "InvalidAccessKeyId": "the store does not know their access key: are they of this store and account?",
    "SignatureDoesNotMatch": "their secret key is another than the store's, or a proxy changes requests",
    "ExpiredToken": "they have expired: renew them, and run the same command again",
    "TokenRefreshRequired": "they have expired: renew them, and run the same command again",
    "InvalidToken": "their session token is not of this store",
    "RequestTimeTooSkewed": "this machine's clock is wrong, and a signature holds the time: set the clock",
}
"""What is wrong with credentials that a store refuses, by its error code."""
REGION_CODES = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}
"""Codes for a request that was signed for another region than the bucket's."""
NO_REASON = "400"
"""The code of a bad request without a body, as all replies to HEAD are."""
SOURCES = {
    "env": "from environment variables",
    "shared-credentials-file": "from the shared credentials file",
    "config-file": "from the AWS configuration file",
    "iam-role": "of this machine's role",
    "container-role": "of this container's role",
    "assume-role": "of an assumed role",
    "assume-role-with-web-identity": "of an assumed role",
    "sso": "of a single sign-on",
}
"""Where credentials were found, for people, by botocore's name."""
ERRNO = re.compile(r"^\[Errno \d+\] ")
"""What the file system's exceptions put before a store's own words."""
REDIRECT_STATUS = {301, 302, 303, 307, 308}


@dataclass(frozen=True)
class Action:
    """What a request does, in words, and the permission that it needs."""

    verb: str
    permission: str


LIST = Action("listing", "s3:ListBucket (one object, named in full, needs no listing)")
READ = Action("reading", "s3:GetObject")
HEAD = Action("looking up (HEAD)", "s3:GetObject; or the object is missing, and they lack s3:ListBucket to be told so")
WRITE = Action("writing", "s3:PutObject")
DELETE = Action("deleting", "s3:DeleteObject")


def code_of(error: BaseException) -> str:
    """The server's error code in an exception of the client, of a reply without one its status, or ""."""
    status = status_of(error)
    return str(_response(error).get("Error", {}).get("Code", "")) or (str(status) if status >= 400 else "")


def as_store_error(error: Exception, where: str, action: Action, connection: Connection | None) -> StoreError:
    """The error to raise for `where`, an object or a prefix. `connection`: None if there is none yet."""
    code, status = code_of(error), status_of(error)
    at = f" at {connection.endpoint}" if connection else ""
    if isinstance(error, NoCredentialsError):
        return StoreError(f"no credentials for {where}{at}: {CREDENTIALS_WANTED}")
    if isinstance(error, PartialCredentialsError):
        return StoreError(f"the credentials for {where}{at} are incomplete: {error}")
    if isinstance(error, ProfileNotFound):
        return StoreError(f"no credentials for {where}{at}: {error}; AWS_PROFILE or {PROFILES} names it")
    if isinstance(error, RecursionError) or status in REDIRECT_STATUS or code in REGION_CODES:
        return StoreError(_elsewhere(where, at, connection))
    if code in MISSING_CODES and action is LIST:
        return MissingError(f"there is no bucket of {where}{at} ({code}), or no S3 store answers there")
    if code in MISSING_CODES:
        return MissingError(f"there is no object {where}{at}")
    if code == "NoSuchBucket":
        return StoreError(f"there is no bucket {where.removeprefix(S3).partition('/')[0]!r}{at}")
    if code == ARCHIVED_CODE:
        return StoreError(f"{where}{at} is archived and cannot be read ({code}): restore it, or leave it out")
    if code in FORBIDDEN_CODES or code in CREDENTIAL_FAULTS or code == NO_REASON:
        return StoreError(f"{action.verb} {where}{at} was refused ({code}): {_refusal(code, action, connection)}")
    if isinstance(error, ParamValidationError):
        return StoreError(f"{where}{at} cannot be asked for: {error}")
    if isinstance(error, ResponseParserError | ValueError):
        return UnavailableError(f"{where}{at}: the answer is no S3 reply: {error}")
    if not code:
        return UnavailableError(f"{where}{at} cannot be reached: {type(error).__name__}: {error}")
    is_busy = BUSY.fullmatch(code) or status in BUSY_STATUS or (status >= 500 and status not in UNSUPPORTED_STATUS)
    kind = UnavailableError if is_busy else StoreError
    return kind(f"{action.verb} {where}{at} failed with {code}: {ERRNO.sub('', str(error))}")


def as_read_error(error: Exception, store_error: StoreError) -> StoreError:
    """The error of a failed read: ObjectError for a refusal, which may be of this object alone."""
    return ObjectError(str(store_error)) if code_of(error) in FORBIDDEN_CODES | {ARCHIVED_CODE} else store_error


def _elsewhere(where: str, at: str, connection: Connection | None) -> str:
    asked = f" ({connection.region} was asked)" if connection else ""
    return (
        f"{where}{at} is redirected to another address, which is not followed: name the store's own address with "
        f"--endpoint-url, or the bucket's region in AWS_REGION{asked}"
    )


def _refusal(code: str, action: Action, connection: Connection | None) -> str:
    """Why a request was refused and what to do, without advice to set what is set."""
    if connection is not None and connection.credentials is None:
        if is_unsigned():
            return f"{UNSIGNED} is set, so no credentials were used; unset it"
        return f"no credentials were found, and the request was not signed; {CREDENTIALS_WANTED}"
    source = SOURCES.get(connection.credentials or "", connection.credentials) if connection else None
    who = f"the credentials in use ({source})" if source else "the credentials in use"
    if code in CREDENTIAL_FAULTS:
        return f"{who} were read, and {CREDENTIAL_FAULTS[code]}; {UNSIGNED}=YES does without them in a public bucket"
    if code == NO_REASON:
        region = connection.region if connection else "asked"
        return f"the store gives no reason; {who} may have expired, or the bucket's region is not {region} (AWS_REGION)"
    return f"{who} lack {action.permission}{_hint(action)}"


def _hint(action: Action) -> str:
    if action is WRITE and not os.environ.get(ENCRYPTION):
        return f"; or the bucket demands encrypted writes, and {ENCRYPTION}=AES256 or aws:kms is wanted"
    if action in (LIST, READ, HEAD) and not os.environ.get(PAYER):
        return f"; or the requester has to pay, and {PAYER}=requester is wanted"
    return ""


def _response(error: BaseException | None) -> dict[str, Any]:
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return response
        error = error.__cause__
    return {}


def status_of(error: BaseException) -> int:
    """The reply's HTTP status in an exception of the client; 0 if there was no reply."""
    return int(_response(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
