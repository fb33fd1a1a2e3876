"""Photographs from scikit-image, for the demo, the benchmark and the notebooks."""

from pathlib import Path

from blocksight.jobs.plan.config import ConfigError

PHOTOGRAPHS = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
"""Files of scikit-image's data folder: a cat, a cup, a motorcycle and others."""


def photographs() -> dict[str, bytes]:
    """The photographs' bytes by file name. Raises ConfigError if the demo extra is not installed."""
    try:
        import skimage
    except ImportError as error:
        raise ConfigError("the demo's photographs come with its extra: pip install '.[demo]'") from error
    data = Path(str(skimage.__file__)).parent / "data"
    return {name: (data / name).read_bytes() for name in PHOTOGRAPHS}
