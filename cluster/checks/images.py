"""Container images must be named by the digest of their bytes: a tag may mean others tomorrow, and on each node."""

import re
from collections.abc import Iterator

from blocksight.cluster.checks.findings import Finding, Place

PINNED = re.compile(r"[\w./:-]*[\w]@sha256:[0-9a-f]{64}")


def image_findings(place: Place, name: str | None = None) -> Iterator[Finding]:
    """A finding if the image at a place, or `name` there, is not pinned."""
    image = place.text if name is None else name
    if PINNED.fullmatch(image) is None:
        why = f"the image {image!r} is not named by a digest, so nodes may run different bytes"
        yield place.finding("image", why, "write NAME@sha256:DIGEST, as the registry printed it after the push")
