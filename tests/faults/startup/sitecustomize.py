"""Injects faults into processes: with this folder on PYTHONPATH, every interpreter obeys `BLOCKSIGHT_FAULT`.

`hang=SECONDS` shortens the watchdog's time, `unit=SECONDS` the units; `decode` and `encode=SHA256` abort at a marked
image or map; `die=PATTERN` kills the process before a matching call to a local store, `die-after=PATTERN` after it;
`hold=FILE` delays the creation of fragments until that file exists; `tasks` has Ray's tasks read and commit, as beside
a GPU.
"""

import os
import re
import signal
import sys
import time
from hashlib import sha256
from pathlib import Path

POISON = b"this picture kills"


def hang(seconds):
    import blocksight.jobs.worker.watchdog

    blocksight.jobs.worker.watchdog.HANG_SECONDS = float(seconds)


def unit(seconds):
    """Makes units smaller: this many seconds of work are enough for one."""
    import blocksight.cluster.sizing

    blocksight.cluster.sizing.LEAST_UNIT_SECONDS = float(seconds)


def tasks(_):
    """Of the driver alone: the import of Ray would slow all other processes."""
    if "explain" not in sys.orig_argv:
        return
    from dataclasses import replace

    from blocksight.jobs.run import pipeline

    dataset, actors = pipeline._explain_dataset, pipeline._actors

    def beside_a_gpu(units, context, weights, sizing, unfit):
        return dataset(units, context, weights, replace(sizing, gpus_per_actor=1.0), unfit)

    pipeline._explain_dataset = beside_a_gpu
    pipeline._actors = lambda *given: {**actors(*given), "num_gpus": 0}


def decode(_):
    import blocksight.storage.images.decode

    original = blocksight.storage.images.decode.decode

    def deadly(data, *arguments):
        if POISON in data:
            os.abort()
        return original(data, *arguments)

    blocksight.storage.images.decode.decode = deadly


def encode(digest):
    import blocksight.storage.outputs.map_codec

    original = blocksight.storage.outputs.map_codec.encode_levels

    def deadly(levels):
        encoded = original(levels)
        if sha256(encoded).hexdigest() == digest:
            os.abort()
        return encoded

    blocksight.storage.outputs.map_codec.encode_levels = deadly


def intercept(before, after):
    """Calls `before` and `after` around each call on a local store, with the call's name and key."""
    from blocksight.storage.stores.local import LocalStore

    def wrapped(name, original):
        def call(self, key, *arguments, **options):
            before(f"{name} {key}")
            result = original(self, key, *arguments, **options)
            after(f"{name} {key}")
            return result

        return call

    for name in ("read", "head", "create", "put", "delete"):
        setattr(LocalStore, name, wrapped(name, getattr(LocalStore, name)))


def killer(pattern):
    def kill(call):
        if re.match(pattern, call):
            os.kill(os.getpid(), signal.SIGKILL)

    return kill


def hold(file):
    def wait(call):
        if call.startswith("create data/"):
            Path(f"{file}.held").touch()
            while not Path(file).exists():
                time.sleep(0.01)

    intercept(wait, lambda _: None)


FAULTS = {
    "hang": hang,
    "unit": unit,
    "decode": decode,
    "encode": encode,
    "die": lambda pattern: intercept(killer(pattern), lambda _: None),
    "die-after": lambda pattern: intercept(lambda _: None, killer(pattern)),
    "hold": hold,
    "tasks": tasks,
}

for fault in filter(None, os.environ.get("BLOCKSIGHT_FAULT", "").split(";")):
    name, _, value = fault.partition("=")
    FAULTS[name](value)
