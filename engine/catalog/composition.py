"""Methods that wrap others, as in `ucag(smoothgrad(gradcam))`: names, entries and parameters of what is composed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal

from blocksight.engine.catalog.entries import EXPLAINERS, ExplainerEntry

Preset = Literal["paper", "fast"]

MAX_DEPTH = 3
"""Wrappers around one method."""


@dataclass(frozen=True)
class Method:
    """A registered explainer, and for a wrapper the method that it wraps."""

    name: str
    """A key of `blocksight.engine.catalog.entries.EXPLAINERS`."""
    base: "Method | None" = None

    def __str__(self) -> str:
        return self.name if self.base is None else f"{self.name}({self.base})"

    @property
    def own(self) -> ExplainerEntry:
        """The catalogue's entry of the outermost name."""
        return EXPLAINERS[self.name]

    @property
    def names(self) -> list[str]:
        """The wrappers from the outermost in, then what they wrap."""
        return [self.name, *(self.base.names if self.base is not None else [])]

    @property
    def innermost(self) -> "Method":
        """What is wrapped in the end."""
        return self if self.base is None else self.base.innermost


def method_of(text: str) -> Method:
    """The method that a name means; a wrapper that names none wraps its usual method.

    Hyphens, underscores, spaces and capitals do not count (`Grad-CAM` is `gradcam`). Raises ValueError with the nearest
    known names.
    """
    return _parsed(text.strip(), MAX_DEPTH)


def _parsed(text: str, depth: int) -> Method:
    outer, opened, inner = text.partition("(")
    name = _known(outer.strip(), text)
    wraps = EXPLAINERS[name].wraps
    if opened and not inner.endswith(")"):
        raise ValueError(f"explainer {text!r} opens a bracket that it does not close; wanted such as ucag(gradcam)")
    if opened and wraps is not None and not inner[:-1].strip():
        raise ValueError(f"explainer {text!r} names nothing between its brackets; wanted such as {name}({wraps})")
    if opened and wraps is None:
        wrappers = ", ".join(one for one, entry in EXPLAINERS.items() if entry.wraps is not None)
        raise ValueError(f"explainer {name} wraps no other; those that do: {wrappers}")
    if wraps is None:
        return Method(name)
    if depth == 0:
        raise ValueError(f"at most {MAX_DEPTH} wrappers can be put around a method")
    return Method(name, _parsed(inner[:-1].strip() if opened else wraps, depth - 1))


def _known(name: str, text: str) -> str:
    plain = {_plain(known): known for known in EXPLAINERS}
    if _plain(name) in plain:
        return plain[_plain(name)]
    near = get_close_matches(_plain(name), plain, n=1, cutoff=0.5)
    way_out = f"did you mean {plain[near[0]]!r}?" if near else f"known: {', '.join(EXPLAINERS)}"
    within = f" in {text!r}" if name != text else ""
    raise ValueError(f"explainer {name!r}{within} is not known; {way_out}")


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")


def _made(kind: type, values: Mapping[str, Any]) -> Any:
    return kind(**values)


def parameters_of(
    method: Method,
    values: Mapping[str, Any],
    preset: Preset = "paper",
    make: Callable[[type, Mapping[str, Any]], Any] = _made,
) -> Any:
    """The method's parameters: given values over the preset's, and the base's likewise under `base`.

    `make` builds a dataclass from values, and may check their types. Raises ValueError for an unknown name or a bad
    value.
    """
    kind = method.own.parameters
    known = [field.name for field in fields(kind)]
    if values and not known:
        raise ValueError(f"explainer {method.name} has no parameters, got {', '.join(values)}")
    for name in values:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.5)
            way_out = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"explainer {method.name} has no parameter {name!r}; {way_out}")
    given = {name: value for name, value in values.items() if name != "base"}
    presets = method.own.fast if preset == "fast" else {}
    own = make(kind, {**presets, **given})
    if method.base is None:
        return own
    inner = values.get("base") or {}
    if not isinstance(inner, Mapping):
        raise ValueError(f"base holds parameters of {method.base}, such as base.NAME=VALUE, got {inner!r}")  # noqa: TRY004 - as for other values
    return replace(own, base=parameters_of(method.base, inner, preset, make))


def blocks_of(method: Method) -> Literal["all", "last", "none"]:
    """Which of the network's blocks the method looks at."""
    return method.innermost.own.blocks


def num_forwards(method: Method, parameters: Any, num_targets: int) -> float | None:
    """What a record costs as forward passes; None: it depends on the model."""
    if method.base is None:
        known = method.own.num_forwards
        return None if known is None else float(known(parameters, num_targets))
    inner = num_forwards(method.base, parameters.base, num_targets)
    assert method.own.num_views is not None
    return None if inner is None else inner * method.own.num_views(parameters)


def images_to_learn_from(method: Method, parameters: Any) -> int:
    """How many images of the data the method sees in a first pass; 0: it learns nothing."""
    if method.base is not None:
        return images_to_learn_from(method.base, parameters.base)
    return method.own.images_to_learn_from(parameters)
