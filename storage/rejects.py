"""The reject codes: the closed list of reasons why a record is not explained."""

from enum import StrEnum


class RejectCode(StrEnum):
    """Why a record has no map. The codes are stored in outputs: add new ones, never rename one."""

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
    NO_GRADIENT = "no_gradient"


class Reject(Exception):
    """Raised if one record cannot be explained. It becomes an output row with the reason."""

    def __init__(self, code: RejectCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        """The reason, from the closed list."""
        self.message = message
        """One sentence for the reader of the output: what was wanted and what was found."""

    def __reduce__(self) -> "tuple[type[Reject], tuple[RejectCode, str]]":
        """Pickles both arguments: by default an exception is rebuilt from the first alone."""
        return type(self), (self.code, self.message)
