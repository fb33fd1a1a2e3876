"""The metrics file: a registry's values as a text file that node-exporter's textfile collector reads."""

import os
from contextlib import suppress
from pathlib import Path

from blocksight.jobs.observe.registry import Registry
from blocksight.jobs.plan.config import ConfigError


class MetricsFile:
    """Writes a registry's values into one file, again and again."""

    def __init__(self, path: str, registry: Registry) -> None:
        """Writes them once. Raises ConfigError if that fails, so that a typing error shows at once."""
        self._place, self._registry = Path(path), registry
        try:
            write_whole(self._place, registry.text())
        except OSError as error:
            way_out = "name a file in a folder that exists"
            raise ConfigError(f"--metrics-file {path}: {error.strerror}; {way_out}") from error

    def write(self) -> None:
        """Writes what the values are now. A disk that is full meanwhile ends no job."""
        with suppress(OSError):
            write_whole(self._place, self._registry.text())


def write_whole(place: Path, text: str) -> None:
    """Writes the file so that a reader sees the old one or the new one, never a part. Raises OSError.

    The collector reads `*.prom` alone, and so not the file that is being written.
    """
    being_written = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        being_written.write_text(text, encoding="utf-8")
        being_written.replace(place)
    except OSError:
        being_written.unlink(missing_ok=True)
        raise
