"""libtiff's own words about a damaged file: caught for the reason of a reject, where it would write them to stderr."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from PIL import Image

MAX_WORDS = 3
"""Messages of one file that are kept; all are counted."""

_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)


class Words(threading.local):
    """What libtiff said about the file that this thread decodes."""

    count = 0
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"libtiff says, in {self.count} messages: {'; '.join(self.kept)}"


_words = Words()


@contextmanager
def caught_words() -> Iterator[Words]:
    """What libtiff says in the body, in this thread; nothing of it goes to stderr."""
    _install_handler()
    _words.count, _words.kept = 0, ()
    yield _words


@_HANDLER
def _hear(module: bytes | None, form: bytes, arguments: int) -> None:
    _words.count += 1
    if len(_words.kept) < MAX_WORDS:
        text = ctypes.create_string_buffer(200)
        ctypes.CDLL(None).vsnprintf(text, len(text), form, ctypes.c_void_p(arguments))
        said = f"{(module or b'').decode('latin-1')}: {text.value.decode('latin-1')}"
        _words.kept = (*_words.kept, said)


@cache
def _install_handler() -> None:
    """Once a process; where Pillow's libtiff cannot be found, its words go to stderr as before."""
    Image.preinit()
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = Path(line.split(maxsplit=5)[-1])
        if path.name.startswith("libtiff") and path.exists():
            ctypes.CDLL(str(path)).TIFFSetErrorHandler(_hear)
            return
