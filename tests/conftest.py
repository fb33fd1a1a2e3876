"""What several tests need: real data where it lies beside the checkout, and one S3 server for the session."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.bucket import EmbeddedBucket

# before anything loads Ray, which reads them once: clusters of the tests answer nobody else
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images and weights; users have none."""
    if not SHARED.exists():
        pytest.skip("the shared test data (real images and weights) are not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def bucket() -> Iterator[EmbeddedBucket]:
    """A SeaweedFS bucket on loopback, with its credentials in the environment."""
    before = dict(os.environ)
    with EmbeddedBucket("blocksight-tests") as running:
        os.environ.update(running.environment)
        yield running
    os.environ.clear()
    os.environ.update(before)
