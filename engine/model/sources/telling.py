"""What sources tell in the same words, in place of what their libraries print."""

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

from blocksight.engine.errors import ModelError
from blocksight.engine.model.torchvision_models import RANDOM_WEIGHTS


def without_weights(model: str, weights: str | None) -> ModelError:
    """The error for a model of a library that needs a file; `weights` is what was named, and is none."""
    return ModelError(
        f"{model} needs --weights: a file or URI of a state dict (nothing is downloaded from a hub), or "
        f"{RANDOM_WEIGHTS}" + (f"; there is no file {weights!r}" if weights is not None else "")
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """The known names that are nearest to an unknown one, as a clause; empty if none is near."""
    near = get_close_matches(name, list(known), n=3, cutoff=0.4)
    return f"; nearest: {', '.join(near)}" if near else ""


@contextmanager
def quiet(logger: str | None = None) -> Iterator[None]:
    """Hides warnings and what a library logs; what matters is said by us. None: the root logger."""
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
