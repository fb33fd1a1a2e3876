"""Turns an S3 client's errors into StoreErrors: the right class, and a message without credentials."""

from typing import Any

from botocore.exceptions import (
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
)
from botocore.parsers import ResponseParserError

from blocksight.storage.stores.locations import CREDENTIALS_WANTED, S3
from blocksight.storage.stores.store import MissingError, ObjectError, StoreError, UnavailableError

MISSING_CODES = {"NoSuchKey", "404", "NotFound"}
CONFLICT_CODES = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409", "OperationAborted"}
RANGE_CODES = {"InvalidRange", "416"}
BUSY_CODES = {"SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "Throttling"}
"""Codes of a busy store, besides status 429 and 500 and above: some stores send them with status 400."""
UNSUPPORTED_STATUS = {501, 505}
"""Status codes of a server that does not support the request; a retry does not help."""
ARCHIVED_CODE = "InvalidObjectState"
FORBIDDEN_CODES = {"AccessDenied", "403", "Forbidden", "AllAccessDisabled"}
"""Codes for an object that may not be read, or for all objects if the credentials lack the right."""
CREDENTIAL_CODES = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "AuthorizationHeaderMalformed",
}
REDIRECT_STATUS = {301, 302, 303, 307, 308}


def code_of(error: BaseException) -> str:
    """The server's error code in an exception of the client, or ""."""
    return str(_response(error).get("Error", {}).get("Code", ""))


def as_store_error(error: Exception, where: str, at: str, *, writes: bool) -> StoreError:
    """The error to raise for `where`, an object or a prefix. `at`: the endpoint's name with a leading space."""
    code, status = code_of(error), _status(error)
    if isinstance(error, NoCredentialsError | PartialCredentialsError | ProfileNotFound):
        return StoreError(f"no credentials for {where}{at}: {CREDENTIALS_WANTED}")
    if isinstance(error, RecursionError) or status in REDIRECT_STATUS:
        return StoreError(
            f"{where}{at} is redirected to another address, which is not followed: name the store's own address with "
            "--endpoint-url, or the bucket's region in AWS_REGION"
        )
    if code in MISSING_CODES:
        return MissingError(f"there is no object {where}{at}")
    if code == "NoSuchBucket":
        return StoreError(f"there is no bucket {where.removeprefix(S3).partition('/')[0]!r}{at}")
    if code == ARCHIVED_CODE:
        return StoreError(f"{where}{at} is archived and cannot be read ({code}): restore it, or leave it out")
    if code in CREDENTIAL_CODES:
        return StoreError(f"access to {where}{at} was refused ({code}): {CREDENTIALS_WANTED}")
    if code in FORBIDDEN_CODES:
        return StoreError(_forbidden(where, at, code, writes=writes))
    if isinstance(error, ParamValidationError):
        return StoreError(f"{where}{at} cannot be asked for: {error}")
    if isinstance(error, ResponseParserError | ValueError):
        return UnavailableError(f"{where}{at}: the answer is no S3 reply: {error}")
    if not code:
        return UnavailableError(f"{where}{at} cannot be reached: {type(error).__name__}: {error}")
    is_busy = code in BUSY_CODES or status == 429 or (status >= 500 and status not in UNSUPPORTED_STATUS)
    kind = UnavailableError if is_busy else StoreError
    return kind(f"{where}{at} failed with {code}: {error}")


def as_read_error(error: Exception, store_error: StoreError) -> StoreError:
    """The error of a failed read: ObjectError for a refusal, which may be of this object alone."""
    return ObjectError(str(store_error)) if code_of(error) in FORBIDDEN_CODES | {ARCHIVED_CODE} else store_error


def _forbidden(where: str, at: str, code: str, *, writes: bool) -> str:
    if writes:
        return (
            f"writing {where}{at} was refused ({code}): these credentials lack s3:PutObject or s3:DeleteObject there, "
            "or the bucket's policy has a condition for writes, such as encryption"
        )
    return f"reading {where}{at} was refused ({code}): these credentials lack s3:GetObject or s3:ListBucket there"


def _response(error: BaseException | None) -> dict[str, Any]:
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return response
        error = error.__cause__
    return {}


def _status(error: BaseException) -> int:
    return int(_response(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
