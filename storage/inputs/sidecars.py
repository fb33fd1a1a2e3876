"""Reads how many records a tar shard should hold, from the JSON files that common tools write beside the shards."""

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from blocksight.storage.limits import MAX_SIDECAR_BYTES, MAX_SIDECARS
from blocksight.storage.stores.store import MissingError, ObjectError, ObjectStore

STATS = "_stats.json"
NUM_READERS = 16


def expected_counts(store: ObjectStore, shards: Iterable[str], others: Iterable[str]) -> dict[str, int]:
    """The number of records by shard, for the shards that a sidecar names. `others`: the keys that are no shards.

    Read are img2dataset's `NAME_stats.json`, an index of WebDataset (`shardlist` with `nsamples`), and a file that
    maps shard names to numbers (`sizes.json`). At most `MAX_SIDECARS` files are read. Raises StoreError.
    """
    names = list(islice((key for key in others if key.lower().endswith(".json")), MAX_SIDECARS))
    with ThreadPoolExecutor(NUM_READERS) as pool:
        documents = list(pool.map(lambda key: _document(store, key), names))
    found: dict[str, int] = {}
    for key, document in zip(names, documents, strict=True):
        found |= _counts(key, document)
    return {shard: found[shard] for shard in shards if shard in found}


def _document(store: ObjectStore, key: str) -> Mapping[str, Any]:
    """The JSON object, or {} for a file that is gone, too large, or no JSON object: it then counts nothing."""
    try:
        found = json.loads(store.read(key, length=MAX_SIDECAR_BYTES))
    except (ValueError, RecursionError, MissingError, ObjectError):
        return {}
    return found if isinstance(found, dict) else {}


def _counts(key: str, document: Mapping[str, Any]) -> dict[str, int]:
    """Records by the shard's key."""
    folder = PurePosixPath(key).parent
    if key.endswith(STATS):
        pairs = [(PurePosixPath(key).name.removesuffix(STATS) + ".tar", document.get("successes"))]
    else:
        pairs = list(_listed(document))
    return {(folder / name).as_posix(): count for name, count in pairs if type(count) is int and count >= 0}


def _listed(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    shards = document.get("shardlist")
    if isinstance(shards, list):
        for shard in shards:
            if isinstance(shard, dict) and isinstance(shard.get("url"), str):
                yield PurePosixPath(shard["url"]).name, shard.get("nsamples")
    yield from document.items()
