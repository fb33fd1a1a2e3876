"""Lists a large prefix by several requests at once: split by folders, and a long folder by first characters."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from blocksight.storage.stores.object_columns import ObjectCollector, ObjectColumns, collected
from blocksight.storage.stores.s3_replies import Listing
from blocksight.storage.stores.store import StoreError, UnavailableError

LISTERS = 32
"""Listing requests at once."""
PAGES_ALONE = 4
"""Pages that are read one after the other before what is left is split: a shorter listing costs no request more."""
FIRST_CHARACTERS = tuple(map(chr, range(ord(" "), ord("}") + 1)))
"""Each is a prefix of its own; names that come after the last of them are one more part, which overlaps with it."""
PROGRESS_SECONDS = 5.0
"""Pause between two lines on how far a listing is."""

Entry = Mapping[str, Any]
Ask = Callable[..., Mapping[str, Any]]
"""One page of a listing; its arguments are those of ListObjectsV2. Raises StoreError."""


class ListingProgress:
    """Says every few seconds how many objects were listed. Its total is not known before the end."""

    def __init__(self, where: str) -> None:
        self._where, self._count, self._said = where, 0, time.monotonic()
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._count += count
            if time.monotonic() - self._said < PROGRESS_SECONDS:
                return
            self._said = time.monotonic()
            logging.getLogger(__name__).warning("%s: listed %s objects", self._where, f"{self._count:,}")


@dataclass(frozen=True)
class _Part:
    """The keys that begin with `prefix`, and come after `after` if that is given."""

    prefix: str
    after: str | None = None


_Answer = tuple[ObjectColumns, Sequence[_Part]]
"""Objects, and the parts that hold the others."""


def is_in_order(keys: Iterable[str]) -> bool:
    """True if the keys ascend by their bytes. A store that lists in another order cannot be split."""
    return all(one < other for one, other in pairwise(keys))


class SplitListing:
    """The listing of one prefix of a store that lists in order of the keys' bytes, as S3 does.

    A part is split again while requests could be made that are not: parts differ much in length.
    """

    def __init__(self, ask: Ask, where: str, progress: ListingProgress) -> None:
        self._ask, self._where, self._progress = ask, where, progress
        self._num_waiting = 0
        """Parts that were not listed to their end."""

    def entries(self, prefix: str, first: Sequence[Entry]) -> Iterator[Entry] | None:
        """The entry of each object, each once, in order of key. `first`: those of the first pages, in order.

        None if the prefix cannot be split, or a part is answered wrongly or refused: the listing page by page decides
        then, for servers and policies may know whole prefixes alone. Raises UnavailableError.
        """
        try:
            answer = self._split(prefix, _columns(first))
            return None if answer is None else _entries_once(self._gathered(answer, len(first)))
        except UnavailableError:
            raise
        except StoreError:
            return None

    def _gathered(self, answer: _Answer, num_first: int) -> ObjectColumns:
        """The objects of all parts, in order of key; one that two parts hold is there twice."""
        self._progress.add(-num_first)  # they are listed again
        found = ObjectCollector()
        with ThreadPoolExecutor(LISTERS) as listers:
            running: set[Future[_Answer]] = set()
            try:
                while True:
                    objects, parts = answer
                    self._progress.add(len(objects) if parts else 0)  # a part that was not split has counted its own
                    found.extend(objects)
                    running |= {listers.submit(self._listed, part) for part in parts}
                    self._num_waiting = len(running)
                    if not running:
                        return found.objects().in_order()
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    one = done.pop()
                    running.remove(one)
                    answer = one.result()
            finally:
                listers.shutdown(wait=False, cancel_futures=True)

    def _listed(self, part: _Part) -> _Answer:
        """The part's objects, or its split if it is long and listers are idle."""
        listing = Listing(f"{self._where}/{part.prefix}", part.prefix)
        options: dict[str, str] = {} if part.after is None else {"StartAfter": part.after}
        found = ObjectCollector()
        num_pages = 0
        while True:
            page = self._ask(Prefix=part.prefix, **options)
            new = _columns(listing.new_entries(page))
            self._progress.add(len(new))
            found.extend(new)
            num_pages += 1
            token = listing.next_token(page)
            if token is None:
                return found.objects(), ()
            options = {"ContinuationToken": token}
            may_split = part.after is None and num_pages % PAGES_ALONE == 0 and self._num_waiting < LISTERS
            if may_split and (answer := self._split(part.prefix, so_far := found.objects())) is not None:
                self._progress.add(-len(so_far))  # they are listed again in their parts
                return answer

    def _split(self, prefix: str, first: ObjectColumns) -> _Answer | None:
        """The parts of a prefix. `first`: its objects so far."""
        if not is_in_order(info.key for info in first):
            return None
        page = self._ask(Prefix=prefix, Delimiter="/")
        folders = [str(one.get("Prefix")) for one in page.get("CommonPrefixes", [])]
        if not all(one.startswith(prefix) and one.endswith("/") and one != prefix for one in folders):
            return None
        is_whole = not page.get("IsTruncated") and not page.get("NextContinuationToken")
        if is_whole and folders:
            own = Listing(f"{self._where}/{prefix}", prefix).new_entries(page)
            return _columns(own), [_Part(one) for one in folders]
        return self._split_by_characters(prefix, first)

    def _split_by_characters(self, prefix: str, first: ObjectColumns) -> _Answer | None:
        """The parts by the next character. What comes before the first of them was listed already.

        A store that does not know StartAfter lists all names in the last part once more, and each is taken once.
        """
        before, after = prefix + FIRST_CHARACTERS[0], prefix + FIRST_CHARACTERS[-1]
        if not first or first[-1].key < before:
            return None
        parts = [_Part(prefix + character) for character in FIRST_CHARACTERS]
        return collected(info for info in first if info.key < before), [*parts, _Part(prefix, after)]


def _columns(entries: Iterable[Entry]) -> ObjectColumns:
    """What is used of the entries. Size or version is null where the store lists none."""
    found = ObjectCollector()
    for entry in entries:
        found.add(entry["Key"], entry.get("Size"), entry.get("ETag"))
    return found.objects()


def _entries_once(objects: ObjectColumns) -> Iterator[Entry]:
    """The entries of objects in order of key, each once."""
    before = None
    for info in objects.drained():
        if info.key != before:
            known = {"Key": info.key, "Size": info.size, "ETag": info.etag}
            yield {name: value for name, value in known.items() if value is not None}
        before = info.key
