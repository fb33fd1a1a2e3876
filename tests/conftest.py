"""Shared fixtures and options: real data if they are beside the checkout, one S3 server, and `--sample`."""

import gc
import os
import random
import secrets
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from blocksight.cluster.bucket import EmbeddedBucket

# before anything loads Ray, which reads them once: the tests' clusters refuse connections of others
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

# before anything loads torch: the workers of pytest-xdist share the cores, and each takes one
os.environ.setdefault("OMP_NUM_THREADS", "1")

# no property is a matter of time: a busy machine makes a first example slow, and that is no failure of what is tested
settings.register_profile("no clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clock")

PLAIN_STARTUP = Path(__file__).parent / "plain_startup"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sample", type=int, help="run so many of the selected tests, drawn by --sample-seed")
    parser.addoption("--sample-seed", default="", help="what the draw depends on")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(PlainNotebooks())


class PlainNotebooks:
    """Notebooks score masks with eager PyTorch. OpenVINO would convert a real network eight times, for few images."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        with pytest.MonkeyPatch.context() as patch:
            if item.path.suffix == ".ipynb":
                patch.setenv("PYTHONPATH", str(PLAIN_STARTUP), prepend=os.pathsep)
            return (yield)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Draws a sample of the tests that `-m` and `-k` select; the tests keep their order."""
    sample = config.getoption("--sample")
    if sample is None or sample >= len(items):
        return
    lots = set(random.Random(config.getoption("--sample-seed")).sample(range(len(items)), sample))
    config.hook.pytest_deselected(items=[item for lot, item in enumerate(items) if lot not in lots])
    items[:] = [item for lot, item in enumerate(items) if lot in lots]


def pytest_collection_finish() -> None:
    """Spares the garbage collector what is loaded by now: a job collects once, and libraries and tests stay anyway."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_sync() -> Iterator[None]:
    """The folder store does not wait for the disk: no test cuts the power, and a small job waits 150 times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images and weights, if they are beside the checkout; users have none."""
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
