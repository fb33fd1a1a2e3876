"""Captures libtiff's error messages for the reject's reason; libtiff would write them to stderr."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from PIL import Image

MAX_KEPT_MESSAGES = 3
"""Messages that are kept for one file; all are counted."""

_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)


class Messages(threading.local):
    """libtiff's messages about the file that this thread decodes."""

    count = 0
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"libtiff says, in {self.count} messages: {'; '.join(self.kept)}"


_messages = Messages()


@contextmanager
def libtiff_messages() -> Iterator[Messages]:
    """Captures libtiff's messages of this thread while the body runs; none goes to stderr."""
    _install_handler()
    _messages.count, _messages.kept = 0, ()
    yield _messages


@_HANDLER
def _on_error(module: bytes | None, form: bytes, arguments: int) -> None:
    _messages.count += 1
    if len(_messages.kept) < MAX_KEPT_MESSAGES:
        text = ctypes.create_string_buffer(200)
        ctypes.CDLL(None).vsnprintf(text, len(text), form, ctypes.c_void_p(arguments))
        message = f"{(module or b'').decode('latin-1')}: {text.value.decode('latin-1')}"
        _messages.kept = (*_messages.kept, message)


@cache
def _install_handler() -> None:
    """Runs once per process. If Pillow's libtiff is not found, its messages go to stderr as before."""
    Image.preinit()
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = Path(line.split(maxsplit=5)[-1])
        if path.name.startswith("libtiff") and path.exists():
            ctypes.CDLL(str(path)).TIFFSetErrorHandler(_on_error)
            return
