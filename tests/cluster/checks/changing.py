"""Changes one value of a document by its path, so that a table can list mistakes."""

import re
from typing import Any

from blocksight.jobs.cli import main  # it registers the commands
from blocksight.jobs.cli.cluster_commands import product

assert main.app
PRODUCT = product()

GONE = object()
"""A value that takes the key away."""


def change(body: Any, path: str, value: Any) -> None:
    """Puts a value at a path such as `spec.groups[0].name`, in place; `<a.b/c>` is one key. A function gets the old
    value and returns the new one; `[+]` adds to a list."""
    keys = [angled or name or (index if index == "+" else int(index)) for angled, name, index in _parts(path)]
    for key in keys[:-1]:
        body = body.setdefault(key, {}) if isinstance(body, dict) else body[key]
    last = keys[-1]
    if last == "+":
        body.append(value)
    elif value is GONE:
        del body[last]
    else:
        body[last] = value(body[last] if isinstance(last, int) else body.get(last)) if callable(value) else value


def _parts(path: str) -> list[tuple[str, str, str]]:
    return re.findall(r"<([^>]+)>|([^.\[\]<>]+)(?![^\[]*\])|\[(\d+|\+)\]", path)
