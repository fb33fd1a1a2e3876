"""Runs a few lines of Python in a process whose memory is limited to a number of bytes."""

import os
import subprocess
import sys
from pathlib import Path

_BEFORE = """
import resource
import sys
import numpy, PIL.Image
import blocksight.storage.images.decode, blocksight.storage.outputs.map_codec

PIL.Image.init()
allowed, body = int(sys.argv[1]), open(sys.argv[2], "rb").read()
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + allowed,) * 2)
"""

ROOM = 8 << 20
"""Bytes allowed beside the bound under test: the allocator's arenas and the interpreter's objects."""


def printed(code: str, body: Path, allowed: int) -> str:
    """Runs `code` with the bytes of `body` and returns its output. The process fails if it needs more memory."""
    command = [sys.executable, "-c", _BEFORE + code, str(allowed + ROOM), str(body)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout.strip()
