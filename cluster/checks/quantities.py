"""Reads the amounts of Kubernetes and Slurm: quantities, memory, durations."""

import re
from decimal import Decimal

SUFFIXES = {
    "": 1,
    **{"n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3")},
    **{unit: 1000**power for power, unit in enumerate("kMGTPE", 1)},
    **{f"{unit}i": 1024**power for power, unit in enumerate("KMGTPE", 1)},
}
QUANTITY = re.compile(r"[+-]?(?P<number>\d+(\.\d*)?|\.\d+)((?P<suffix>[numkMGTPE]|[KMGTPE]i)|[eE](?P<power>[+-]?\d+))?")
SLURM_TIME = re.compile(r"((?P<days>\d+)-)?(?P<rest>\d+(:\d+){0,2})")
SLURM_MEMORY = re.compile(r"(?P<number>\d+)(?P<unit>[KMGT]?)B?", re.IGNORECASE)


def quantity(value: object) -> Decimal | None:
    """The number that a quantity of Kubernetes means (24Gi, 500m, 2); None if it is none."""
    found = QUANTITY.fullmatch(str(value)) if isinstance(value, (str, int, float)) else None
    if found is None or isinstance(value, bool):
        return None
    if found["power"] is not None:
        return Decimal(f"{found['number']}e{found['power']}") if abs(int(found["power"])) < 100 else None
    return Decimal(found["number"]) * SUFFIXES[found["suffix"] or ""]


def slurm_seconds(text: str) -> int | None:
    """The seconds of a time of Slurm: minutes, min:s, h:min:s, days-h, days-h:min, days-h:min:s. None if it is none."""
    found = SLURM_TIME.fullmatch(text)
    if found is None:
        return None
    parts = [int(part) for part in found["rest"].split(":")]
    if found["days"] is not None:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return ((int(found["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(parts) == 1:
        return parts[0] * 60
    return parts[0] * 60 + parts[1] if len(parts) == 2 else (parts[0] * 60 + parts[1]) * 60 + parts[2]


def slurm_bytes(text: str) -> int | None:
    """The bytes of a memory size of Slurm, which counts in megabytes (64G, 4000). None if it is none."""
    found = SLURM_MEMORY.fullmatch(text)
    if found is None:
        return None
    return int(found["number"]) * 1024 ** (" KMGT".index(found["unit"].upper() or "M"))
