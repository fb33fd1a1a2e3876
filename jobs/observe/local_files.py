"""Checks the files of --metrics-file and --log-json before any work, so that a typing error costs no minute."""

import os
from errno import EACCES, EISDIR, ENOENT
from pathlib import Path

from blocksight.jobs.observe.unit_log import STANDARD_ERROR
from blocksight.jobs.plan.config import ConfigError


def check_local_files(metrics_file: str | None, log_json: str | None) -> None:
    """Raises ConfigError for a file that cannot be written on this machine, or that both options name."""
    log = None if log_json == STANDARD_ERROR else log_json
    for option, path in (("--metrics-file", metrics_file), ("--log-json", log)):
        if path is not None:
            _check(f"{option} {path}", path)
    if metrics_file is not None and log is not None and Path(metrics_file).resolve() == Path(log).resolve():
        raise ConfigError(f"--metrics-file and --log-json are both {metrics_file}, and each would overwrite the other")


def _check(named: str, path: str) -> None:
    if "://" in path:
        raise ConfigError(f"{named}: it is written on the driver's machine; name a local file")
    place = Path(path)
    fault = EISDIR if place.is_dir() else ENOENT if not place.parent.is_dir() else 0
    if not fault and not os.access(place if place.exists() else place.parent, os.W_OK):
        fault = EACCES
    if fault:
        raise ConfigError(f"{named}: {os.strerror(fault)}; name a file in a folder that exists")
