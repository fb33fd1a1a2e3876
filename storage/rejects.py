"""The closed list of reasons for which a record is not explained."""

from enum import StrEnum


class RejectCode(StrEnum):
    """Why a record has no map. Stored in the output: never rename one, only add."""

    INPUT_MISSING = "input_missing"
    INPUT_CHANGED = "input_changed"
    INPUT_UNREADABLE = "input_unreadable"
    READ_FAILED = "read_failed"
    EMPTY_FILE = "empty_file"
    TOO_MANY_BYTES = "too_many_bytes"
    NOT_AN_IMAGE = "not_an_image"
    FORMAT_REFUSED = "format_refused"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    TOO_MANY_PIXELS = "too_many_pixels"
    MODE_REFUSED = "mode_refused"
    DECODE_TIMEOUT = "decode_timeout"
    DECODE_FAILED = "decode_failed"
    DUPLICATE_KEY = "duplicate_key"
    MISSING_IMAGE = "missing_image"
    MEMBER_REFUSED = "member_refused"
    SHARD_TRUNCATED = "shard_truncated"
    LABEL_MISSING = "label_missing"
    NON_FINITE = "non_finite"
    MODEL_FAILED = "model_failed"
    ENCODE_FAILED = "encode_failed"
    PROCESS_DIED = "process_died"
    KEY_REFUSED = "key_refused"


class Reject(Exception):
    """One record cannot be explained; it becomes a row that says why."""

    def __init__(self, code: RejectCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        """One of the closed list."""
        self.message = message
        """One sentence for the reader of the output, with both sides (wanted and met)."""

    def __reduce__(self) -> "tuple[type[Reject], tuple[RejectCode, str]]":
        """An exception is rebuilt from its first argument alone; this one has two."""
        return type(self), (self.code, self.message)
