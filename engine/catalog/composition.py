"""Composed methods, such as `ucag(smoothgrad(gradcam))`: parses names, checks parameters and counts costs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal

from blocksight.engine.catalog.entries import EXPLAINERS, ExplainerEntry

Preset = Literal["paper", "fast"]

AUTO = "auto"
"""In the place of an explainer's name: the one that suits the model's architecture."""

MAX_DEPTH = 3
"""Most wrappers around one method."""


@dataclass(frozen=True)
class Method:
    """An explainer's name and, for a wrapper, the wrapped method."""

    name: str
    """A key of `blocksight.engine.catalog.entries.EXPLAINERS`."""
    base: "Method | None" = None

    def __str__(self) -> str:
        return self.name if self.base is None else f"{self.name}({self.base})"

    @property
    def entry(self) -> ExplainerEntry:
        """The catalogue's entry of `name`."""
        return EXPLAINERS[self.name]

    @property
    def names(self) -> list[str]:
        """All names, the outermost wrapper first."""
        return [self.name, *(self.base.names if self.base is not None else [])]

    @property
    def innermost(self) -> "Method":
        """The method that wraps no other."""
        return self if self.base is None else self.base.innermost


def parse_method(text: str) -> Method:
    """The method with this name; a wrapper without brackets wraps its default method.

    Hyphens, underscores, spaces and capitals are ignored (`Grad-CAM` is `gradcam`). Raises ValueError with the nearest
    known names.
    """
    return _parse(text.strip(), MAX_DEPTH)


def _parse(text: str, depth: int) -> Method:
    outer, opened, inner = text.partition("(")
    name = _known_name(outer.strip(), text)
    wraps = EXPLAINERS[name].wraps
    if opened and not inner.endswith(")"):
        raise ValueError(f"explainer {text!r} does not close its bracket; write it like ucag(gradcam)")
    if opened and wraps is not None and not inner[:-1].strip():
        raise ValueError(f"explainer {text!r} names no method in its brackets; write it like {name}({wraps})")
    if opened and wraps is None:
        wrappers = ", ".join(one for one, entry in EXPLAINERS.items() if entry.wraps is not None)
        raise ValueError(f"explainer {name} wraps no other method; wrappers are {wrappers}")
    if wraps is None:
        return Method(name)
    if depth == 0:
        raise ValueError(f"at most {MAX_DEPTH} wrappers may wrap a method")
    base = _parse(inner[:-1].strip() if opened else wraps, depth - 1)
    if name == "libra":
        _check_gradients(base)
    return Method(name, base)


def _check_gradients(base: Method) -> None:
    if "gradients" not in base.innermost.entry.needs or "fullgrad" in base.names:
        raise ValueError(
            f"libra changes the gradients that a method takes, and {base} takes none, or needs the plain ones: "
            "take libra(gradcam), libra(hirescam) or libra(chefer)"
        )


def _known_name(name: str, text: str) -> str:
    plain = {_plain(known): known for known in EXPLAINERS}
    if _plain(name) in plain:
        return plain[_plain(name)]
    near = get_close_matches(_plain(name), plain, n=1, cutoff=0.5)
    hint = f"did you mean {plain[near[0]]!r}?" if near else f"known: {', '.join(EXPLAINERS)}"
    within = f" in {text!r}" if name != text else ""
    raise ValueError(f"explainer {name!r}{within} is not known; {hint}")


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")


def _construct(kind: type, values: Mapping[str, Any]) -> Any:
    return kind(**values)


def parameters_of(
    method: Method,
    values: Mapping[str, Any],
    preset: Preset = "paper",
    make: Callable[[type, Mapping[str, Any]], Any] = _construct,
) -> Any:
    """The method's parameters: the preset's with the given values; those of the wrapped method are in `base`.

    `make` builds a dataclass from values and may check their types. Raises ValueError for an unknown name or a bad
    value.
    """
    kind = method.entry.parameters
    known = [field.name for field in fields(kind)]
    if values and not known:
        raise ValueError(f"explainer {method.name} has no parameters, got {', '.join(values)}")
    for name in values:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"explainer {method.name} has no parameter {name!r}; {hint}")
    given = {name: value for name, value in values.items() if name != "base"}
    presets = method.entry.fast if preset == "fast" else {}
    own = make(kind, {**presets, **given})
    if method.base is None:
        return own
    inner = values.get("base") or {}
    if not isinstance(inner, Mapping):
        raise ValueError(f"base holds parameters of {method.base}, such as base.NAME=VALUE, got {inner!r}")  # noqa: TRY004 - as for other values
    return replace(own, base=parameters_of(method.base, inner, preset, make))


SIGNED = (
    "gradcam",
    "gradcam++",
    "xgradcam",
    "layercam",
    "hirescam",
    "integrated_gradients",
    "legrad",
    "chefer",
    "daam",
    "reciprocam",
)
"""Methods whose attributions have a sign, so that the map of a target's negative shows what speaks against it."""
OF_LOSSES = ("occlusion", "ablationcam")
"""Methods whose maps are the positive part of what is lost: their negative is what is won. Nothing wraps them so."""
OF_COVARIANCE = ("sise", "ada-sise", "scorecam", "rise")
"""Methods that sum masks, which has no zero: with signs they map the covariance of masks and scores instead."""
LINEAR_WRAPPERS = ("smoothgrad", "libra")
"""Wrappers that keep the sign of what they wrap."""


def has_sign(method: Method) -> bool:
    """True if the method maps what speaks against a target too."""
    if method.base is None:
        return method.name in (*SIGNED, *OF_LOSSES, *OF_COVARIANCE)
    return method.name in (*LINEAR_WRAPPERS, "feature-cam") and _keeps_sign(method.base)


def _keeps_sign(method: Method) -> bool:
    """True if what the method hands to a wrapper has a sign."""
    if method.base is None:
        return method.name in SIGNED
    return method.name in LINEAR_WRAPPERS and _keeps_sign(method.base)


def maps_covariance(method: Method) -> bool:
    """True if the method's map with signs is another than without: the covariance of masks and scores, or a scale."""
    return method.innermost.name in OF_COVARIANCE or "feature-cam" in method.names


def leaves_tokens_out(values: Mapping[str, Any]) -> bool:
    """True if a method's parameters, or those of one that it wraps, give the baseline `drop`."""
    inner = values.get("base")
    return values.get("baseline") == "drop" or (isinstance(inner, Mapping) and leaves_tokens_out(inner))


ELSEWHERE = ("integrated_gradients", "extremal_perturbation", "smoothgrad", "ucag", "libra")
"""Methods whose gradients are of other pictures than the one that is explained, or are changed."""


def follows_gradients(method: Method) -> bool:
    """True if the method's map is made of plain gradients at the picture itself."""
    return "gradients" in method.innermost.entry.needs and not set(ELSEWHERE) & set(method.names)


def blocks_of(method: Method) -> Literal["all", "last", "none"]:
    """The blocks of the network that the method reads."""
    return method.innermost.entry.blocks


def num_forwards(method: Method, parameters: Any, num_targets: int) -> float | None:
    """The cost of a record in forward passes; None: it depends on the model."""
    if method.base is None:
        known = method.entry.num_forwards
        return None if known is None else float(known(parameters, num_targets))
    inner = num_forwards(method.base, parameters.base, num_targets)
    assert method.entry.num_views is not None
    return None if inner is None else inner * method.entry.num_views(parameters)


def num_learning_images(method: Method, parameters: Any) -> int:
    """Number of images that the method's first pass reads; 0: it learns nothing."""
    if method.base is not None:
        return num_learning_images(method.base, parameters.base)
    return method.entry.num_learning_images(parameters)
