"""Fits the tensors of a weights file to a module: wrappings come off, and the module's own load hooks do the rest."""

import re
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from blocksight.engine.errors import ModelError
from blocksight.engine.model.tensors import read_weights

MAX_DEPTH = 8
"""Dicts inside dicts that are looked into."""
MAX_ENTRIES = 1_000_000
MAX_SHOWN = 3

WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of a name that torch puts in: torch.compile, data parallel training, FSDP, activation checkpoints."""

RENAMES = ((re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)"), r"\1\2"),)
"""Names in published files that differ from the network's. torchvision renames its DenseNet files in this way."""

AUXILIARY = ("aux1.", "aux2.", "AuxLogits.", "aux_classifier.")
"""Heads of torchvision's networks that take part in training only."""

HEADS = ("fc", "classifier", "head", "heads", "linear", "last_linear", "logits", "output", "cls_head")
"""Names of the last layer in common networks."""

COUNTERS = "num_batches_tracked"
"""Batch norm's count of training steps, which no inference reads; files from before torch 0.4.1 have none."""

_OPTIMIZER = re.compile(r"(^|\.)(optim\w*|opt|exp_avg\w*|momentum\w*)\.")
"""A part of a path that holds an optimizer's state, which may have the weights' names."""
_AVERAGED = re.compile(r"(^|[._])(ema|swa|avg|averaged?)([._]|$)")


@dataclass(frozen=True)
class StateDict:
    """Tensors by name, as a file or a module names them."""

    tensors: Mapping[str, Tensor]
    versions: Mapping[str, Any] = field(default_factory=dict)
    """By path of a module: what torch's load hooks need to know of the version that wrote it."""
    places: Mapping[str, str] = field(default_factory=dict)
    """By name: the path of the dict in the file that holds the tensor. Names without one lie at the top."""
    notes: tuple[str, ...] = ()
    """What was assumed to make the names fit, one sentence each."""

    def renamed(self, names: Mapping[str, str]) -> "StateDict":
        """The same with other names; those that are not listed stay."""
        tensors, places = (
            {names.get(name, name): value for name, value in of.items()} for of in (self.tensors, self.places)
        )
        return replace(self, tensors=tensors, places=places)

    def noting(self, sentence: str) -> "StateDict":
        """The same with one more note."""
        return replace(self, notes=(*self.notes, sentence))


def read_state(body: bytes) -> StateDict:
    """The tensors of a weights file, as it names them. Never runs code: safetensors, or torch with `weights_only`."""
    return flattened(read_weights(body))


def flattened(loaded: Mapping[Any, Any]) -> StateDict:
    """All tensors of a file, also of dicts within dicts, whose keys are joined by dots.

    Raises ModelError if there is no tensor, or too much.
    """
    found, versions, places = {}, {}, {}
    for number, (path, key, value) in enumerate(_entries(loaded)):
        if number >= MAX_ENTRIES:
            raise ModelError(f"the weights file holds more than {MAX_ENTRIES:,} entries; wanted a state dict")
        if isinstance(value, Tensor):
            name = f"{path}{key}"
            if name in found:
                raise ModelError(f"the weights file holds two tensors of the name {name!r}; wanted a state dict")
            found[name], places[name] = value, path
        elif key is None and isinstance(value, Mapping):
            of_modules = {name: version for name, version in value.items() if isinstance(version, Mapping)}
            versions |= {f"{path}{name}".rstrip("."): version for name, version in of_modules.items()}
    if not found:
        held = ", ".join(str(key) for key in list(loaded)[:MAX_SHOWN]) or "nothing"
        raise ModelError(f"the weights file holds no tensor that has a name ({held}); wanted a state dict")
    return StateDict(found, versions, places)


def _entries(
    loaded: Mapping[Any, Any], path: str = "", above: tuple[int, ...] = ()
) -> Iterator[tuple[str, str | None, Any]]:
    """(path of the dict, key, value) of everything that is no dict; torch's versions of a dict have the key None."""
    above = (*above, id(loaded))  # a file may hold a dict that holds itself
    yield path, None, getattr(loaded, "_metadata", None)
    for key, value in loaded.items():
        if isinstance(value, Mapping) and len(above) < MAX_DEPTH and id(value) not in above:
            yield from _entries(value, f"{path}{key}.", above)
        elif isinstance(key, str):
            yield path, key, value


def fitted(stored: StateDict, wanted: Collection[str]) -> StateDict:
    """The tensors that a module with these names takes from a file, by the module's names.

    Takes off wrappers and the prefix under which most names fit, and applies published renames. Names that fit nothing
    stay as they are. Raises ModelError if several prefixes fit equally and hold other tensors.
    """
    names = set(wanted)
    stored = _without_wrappers(stored, names)
    prefixes = _prefixes(stored.tensors, names)
    added = "" if prefixes else _common_prefix(names)
    if added:
        prefixes = _prefixes(stored.tensors, {name[len(added) :] for name in names})
    chosen, notes = _chosen_prefix(prefixes, stored)
    stored = replace(stored, notes=(*stored.notes, *notes))
    found = _below(stored, chosen)
    if added and prefixes:
        found = _with_prefix(found, added)
    beside = _beside(found, stored, chosen, names)
    head = _head_beside(found, beside, names)
    found = _noting(_with_others(found, head, stored), [name for name in beside if name not in head])
    return _with_head(_published(_of_matched_dicts(found, names), names), names)


def _without_wrappers(stored: StateDict, wanted: Collection[str]) -> StateDict:
    """The names without torch's wrappers, if more of them fit then and no two become one."""
    own = {part for name in wanted for part in name.split(".")}
    removed = set(WRAPPERS) - own
    names = {name: _without_parts(name, removed) for name in stored.tensors}
    shorter = set(names.values())
    if len(shorter) < len(names) or _most(_prefixes(shorter, wanted)) <= _most(_prefixes(names, wanted)):
        return stored
    versions = {_without_parts(path, removed): version for path, version in stored.versions.items()}
    return replace(stored.renamed(names), versions=versions)


def _without_parts(name: str, parts: Collection[str]) -> str:
    return ".".join(part for part in name.split(".") if part not in parts)


def _most(counts: Counter[str]) -> int:
    return max(counts.values(), default=0)


def _prefixes(names: Iterable[str], wanted: Collection[str]) -> Counter[str]:
    """How many of the wanted names are there below each prefix."""
    return Counter(name[:start] for name in names for start in _starts_of_parts(name) if name[start:] in wanted)


def _starts_of_parts(name: str) -> list[int]:
    return [0, *(place + 1 for place, letter in enumerate(name) if letter == ".")]


def _common_prefix(names: Collection[str]) -> str:
    """The parts with which all names begin, such as `model.`."""
    first, last = (name.split(".")[:-1] for name in (min(names), max(names)))
    same = 0
    while same < min(len(first), len(last)) and first[same] == last[same]:
        same += 1
    return "".join(f"{part}." for part in first[:same])


def _chosen_prefix(prefixes: Counter[str], stored: StateDict) -> tuple[str, list[str]]:
    """The prefix under which most names fit, and what to say of it. Raises ModelError if the file must be asked."""
    if not prefixes:  # the module's hooks may know the names
        ((largest, _),) = Counter(stored.places.values()).most_common(1) or [("", 0)]
        return largest, []
    tied = [prefix for prefix, count in prefixes.items() if count == _most(prefixes)]
    tied = _distinct([prefix for prefix in tied if not _OPTIMIZER.search(prefix)] or tied, stored)
    plain = [prefix for prefix in tied if not _AVERAGED.search(prefix)] or tied
    if len(plain) > 1:
        shown = " and ".join(repr(prefix.rstrip(".") or "the top") for prefix in plain[:MAX_SHOWN])
        raise ModelError(
            f"the weights file holds {len(plain)} different sets of weights that fit the model, under {shown}: save "
            "the one you mean alone, such as torch.save(torch.load(FILE)[NAME], ANOTHER)"
        )
    notes = [f"the weights are those under {plain[0].rstrip('.')!r} of the file"] if plain[0] else []
    others = [prefix.rstrip(".") for prefix in tied if prefix != plain[0]]
    if others:
        notes.append(f"the file holds averaged weights as well, under {others[0]!r}: they are NOT used")
    return plain[0], notes


def _distinct(prefixes: Sequence[str], stored: StateDict) -> list[str]:
    """The prefixes that hold different tensors."""
    kept: list[str] = []
    for prefix in sorted(prefixes, key=lambda one: (bool(_AVERAGED.search(one)), len(one), one)):
        below = _below(stored, prefix).tensors
        if not any(_are_equal(below, _below(stored, other).tensors) for other in kept):
            kept.append(prefix)
    return kept


def _are_equal(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(tensor, others[name]) for name, tensor in some.items())


def _below(stored: StateDict, prefix: str) -> StateDict:
    """What lies below a prefix, by shorter names."""
    size = len(prefix)
    tensors, places = (
        {name[size:]: value for name, value in of.items() if name.startswith(prefix)}
        for of in (stored.tensors, stored.places)
    )
    versions = (
        {
            f"{path}."[size:].rstrip("."): version
            for path, version in stored.versions.items()
            if f"{path}.".startswith(prefix)
        }
        if prefix
        else stored.versions
    )
    return replace(stored, tensors=tensors, places=places, versions=versions)


def _with_prefix(stored: StateDict, prefix: str) -> StateDict:
    """The same below a prefix that the module has and the file has not."""
    versions = {f"{prefix}{path}".rstrip("."): version for path, version in stored.versions.items()}
    longer = stored.renamed({name: f"{prefix}{name}" for name in stored.tensors})
    return replace(longer, versions=versions).noting(
        f"the file's names were read as those of the model's part {prefix.rstrip('.')!r}"
    )


def _beside(found: StateDict, stored: StateDict, chosen: str, wanted: Collection[str]) -> list[str]:
    """The file's names beside the chosen prefix, in the same dict of the file."""
    dicts = {found.places.get(name) for name in found.tensors if name in wanted}
    return [
        name
        for name in stored.tensors
        if not name.startswith(chosen) and stored.places.get(name) in dicts and not _AVERAGED.search(name)
    ]


def _head_beside(found: StateDict, beside: Iterable[str], wanted: Collection[str]) -> dict[str, str]:
    """The model's names of a head that lies beside the rest of the network, by the file's: `backbone.*` and `head.*`.

    Empty unless the head is the one layer that is missing, and one layer beside is named like a head.
    """
    missing, over = _layers(wanted - found.tensors.keys()), _layers(found.tensors.keys() - wanted)
    missing = {layer: leaves for layer, leaves in missing.items() if not f"{layer}.".startswith(AUXILIARY)}
    if len(missing) != 1 or over:
        return {}
    ((ours, leaves),) = missing.items()
    heads = [layer for layer, other in _layers(beside).items() if other == leaves and _is_head(layer)]
    return {f"{heads[0]}.{leaf}": f"{ours}.{leaf}" for leaf in leaves} if len(heads) == 1 and _is_head(ours) else {}


def _is_head(layer: str) -> bool:
    """True for `classifier` and `head.1`."""
    parts = [part for part in layer.split(".") if not part.isdecimal()]
    return bool(parts) and parts[-1].lower() in HEADS


def _with_others(found: StateDict, names: Mapping[str, str], stored: StateDict) -> StateDict:
    """With further tensors of the file under new names."""
    if not names:
        return found
    tensors, places = (
        {**own, **{ours: whole[name] for name, ours in names.items() if name in whole}}
        for own, whole in ((found.tensors, stored.tensors), (found.places, stored.places))
    )
    theirs, ours = (next(iter(side)).rpartition(".")[0] for side in (names, names.values()))
    return replace(found, tensors=tensors, places=places).noting(
        f"the file's layer {theirs!r}, which lies beside the others, was read as the model's {ours!r}"
    )


def _noting(found: StateDict, left: Sequence[str]) -> StateDict:
    """Says which tensors were left out."""
    if not left:
        return found
    shown = ", ".join(map(repr, left[:MAX_SHOWN]))
    return found.noting(f"left out of the file, because the model has no such names: {len(left)} tensors ({shown})")


def _of_matched_dicts(stored: StateDict, wanted: Collection[str]) -> StateDict:
    """Without the dicts of which the module has no name: an optimizer's state, other networks."""
    matched = {stored.places.get(name) for name in stored.tensors if name in wanted}
    if not matched:
        return stored
    return replace(
        stored, tensors={name: tensor for name, tensor in stored.tensors.items() if stored.places.get(name) in matched}
    )


def _published(stored: StateDict, wanted: Collection[str]) -> StateDict:
    """With the names of published files that are the module's under a known rule."""
    names = {}
    for name in stored.tensors.keys() - wanted:
        for pattern, replacement in RENAMES:
            other = pattern.sub(replacement, name)
            if other in wanted and other not in stored.tensors:
                names[name] = other
    return stored.renamed(names)


def _with_head(stored: StateDict, wanted: Collection[str]) -> StateDict:
    """With the names of a head that stands in a Sequential in the file (`fc.1.weight` for `fc.weight`), or the reverse,
    or that has another name of a head (`classifier.weight`).

    Only if it is the one layer that is missing, and the one that is left over.
    """
    missing, over = _layers(wanted - stored.tensors.keys()), _layers(stored.tensors.keys() - wanted)
    if len(missing) != 1 or len(over) != 1:
        return stored
    ((ours, our_leaves),), ((theirs, their_leaves),) = missing.items(), over.items()
    is_renamed = _is_head(ours) and _is_head(theirs)
    if our_leaves != their_leaves or not (is_renamed or _is_numbered(ours, theirs) or _is_numbered(theirs, ours)):
        return stored
    names = {f"{theirs}.{leaf}": f"{ours}.{leaf}" for leaf in their_leaves}
    return stored.renamed(names).noting(
        f"the file names the layer {ours!r} {theirs!r}: it was read as the same layer, and whatever without weights "
        "stood beside it (a dropout, an activation) is not in the model"
    )


def _layers(names: Iterable[str]) -> dict[str, set[str]]:
    """The names of tensors by their layer."""
    found: dict[str, set[str]] = {}
    for name in names:
        layer, _, leaf = name.rpartition(".")
        if leaf != COUNTERS:
            found.setdefault(layer, set()).add(leaf)
    return found


def _is_numbered(longer: str, shorter: str) -> bool:
    """True for `fc.1` and `fc`, also for `fc.0.1`."""
    numbers = longer.removeprefix(f"{shorter}.").split(".")
    return longer.startswith(f"{shorter}.") and all(number.isdecimal() for number in numbers)


def load_state(module: nn.Module, stored: StateDict | Mapping[str, Tensor]) -> tuple[str, ...]:
    """Loads a file's tensors through the module's own `load_state_dict`; returns what was assumed, in sentences.

    Raises ModelError with both sides and the likely cause, if a name, a shape or a type is left that does not fit.
    """
    stored = stored if isinstance(stored, StateDict) else StateDict(stored)
    wanted = dict(module.state_dict())
    chosen = _without_auxiliary(fitted(stored, wanted.keys()), module)
    _refuse_integers(chosen.tensors, wanted)
    try:
        result: Any = module.load_state_dict(_as_torch(chosen), strict=False)
    except Exception as error:
        raise _misfit(chosen.tensors, wanted) or _refused(error) from error
    missing = [name for name in getattr(result, "missing_keys", ()) if not _can_be_missing(name, chosen, module)]
    over = [name for name in getattr(result, "unexpected_keys", ()) if not name.endswith(COUNTERS)]
    if missing or over:
        raise _unfit(chosen.tensors, wanted, missing, over, [])
    return (*chosen.notes, *_notes_on_types(chosen.tensors, wanted))


def _as_torch(stored: StateDict) -> OrderedDict[str, Tensor]:
    """A state dict as torch's hooks read it: versions of modules are an attribute."""
    state = OrderedDict(stored.tensors)
    state._metadata = OrderedDict(stored.versions)  # pyright: ignore[reportAttributeAccessIssue]
    return state


def _without_auxiliary(stored: StateDict, module: nn.Module) -> StateDict:
    """Without the auxiliary heads that the module was made without, as torchvision leaves them out."""
    children = {name for name, _ in module.named_children()}
    heads = [head for head in AUXILIARY if head.rstrip(".") not in children]
    kept = {name: tensor for name, tensor in stored.tensors.items() if not name.startswith(tuple(heads))}
    if len(kept) == len(stored.tensors):
        return stored
    return replace(stored, tensors=kept).noting(
        "the file's auxiliary heads were left out: they take part in training only"
    )


def _can_be_missing(name: str, stored: StateDict, module: nn.Module) -> bool:
    """True for what no inference reads, and for a tensor that shares its memory with one that was loaded."""
    is_of_torchvision = type(module).__module__.startswith("torchvision.models.")
    if name.endswith(COUNTERS) or (is_of_torchvision and name.startswith(AUXILIARY)):
        return True
    own = module.state_dict()
    return any(
        own[other] is not None and _share_memory(own[name], own[other]) for other in stored.tensors if other in own
    )


def _share_memory(one: Any, other: Any) -> bool:
    is_known = isinstance(one, Tensor) and isinstance(other, Tensor) and one.numel() > 0
    return is_known and one.shape == other.shape and one.data_ptr() == other.data_ptr() != 0


def _refuse_integers(given: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> None:
    """Raises ModelError for whole numbers in place of floats: torch would copy quantised weights without scales."""
    for name, tensor in given.items():
        ours = wanted.get(name)
        if isinstance(ours, Tensor) and ours.is_floating_point() and not tensor.is_floating_point():
            raise ModelError(
                f"the weights do not fit the model: {name} holds {_type(tensor)}, and the model computes in "
                f"{_type(ours)}; a quantised file needs the network that it was made for, as a factory of yours"
            )


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _notes_on_types(given: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> list[str]:
    pairs = {(_type(tensor), _type(wanted[name])) for name, tensor in given.items() if name in wanted}
    return [
        f"the file's {theirs} was converted to {ours}"
        for theirs, ours in sorted(pairs)
        if "float" in theirs and theirs != ours
    ]


def _refused(error: Exception) -> ModelError:
    return ModelError(f"the model's own load_state_dict refused the weights: {error}")


def _misfit(given: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> ModelError | None:
    """What does not fit by name or shape; None: all of it does."""
    odd = [name for name in given.keys() & wanted.keys() if _shape(given[name]) != _shape(wanted[name])]
    if not odd:
        return None
    missing, over = (
        [name for name in names if not name.endswith(COUNTERS)]
        for names in (wanted.keys() - given.keys(), given.keys() - wanted.keys())
    )
    return _unfit(given, wanted, missing, over, odd)


def _shape(tensor: Any) -> tuple[int, ...] | None:
    is_known = isinstance(tensor, Tensor) and not nn.parameter.is_lazy(tensor)
    return tuple(tensor.shape) if is_known else None


def _unfit(
    given: Mapping[str, Tensor],
    wanted: Mapping[str, Any],
    missing: Sequence[str],
    over: Sequence[str],
    odd: Sequence[str],
) -> ModelError:
    """The error for tensors that are missing, left over, or of another shape."""
    names = sorted({*missing, *over, *odd})
    examples = "; ".join(
        f"{name}: {_shape(wanted.get(name))} wanted, {_shape(given.get(name))} given" for name in names[:MAX_SHOWN]
    )
    cause = _likely_cause(given, wanted, missing, over, odd)
    return ModelError(f"the weights do not fit the model in {len(names)} tensors: {examples}. Likely cause: {cause}")


def _likely_cause(
    given: Mapping[str, Tensor],
    wanted: Mapping[str, Any],
    missing: Sequence[str],
    over: Sequence[str],
    odd: Sequence[str],
) -> str:
    common = given.keys() & wanted.keys()
    if 2 * len(common) < len(wanted):
        ours, theirs = (", ".join(list(names)[:MAX_SHOWN]) for names in (wanted, given))
        return f"another architecture; the model's names are {ours} ..., the file's {theirs} ..."
    classes = {(len(given[name]), len(wanted[name])) for name in odd if _is_other_count(given[name], wanted[name])}
    last_layer = list(_layers(wanted))[-1]
    if len(classes) == 1 and list(_layers(odd)) == [last_layer] and not missing and not over:
        ((theirs, ours),) = classes
        return f"another number of classes; the file has {theirs}, the model {ours}: make the model with {theirs}"
    if odd:
        return "another width or variant of this architecture"
    heads = {name.split(".")[0] for name in (*missing, *over)}
    is_other_head = over and heads == {last_layer.split(".")[0]}
    if is_other_head or (missing and over and len(heads) == 1):
        layers = ", ".join(_layers(over))
        return f"a head of other layers ({layers}); make a network with that head, as a factory of yours"
    if over and not missing:
        return "the file is of a larger network of this family, or of one with parts that the model lacks"
    if missing and not over:
        return "the file holds only a part of the network, such as a backbone without its head"
    return "another version or variant of this architecture"


def _is_other_count(given: Tensor, wanted: Any) -> bool:
    """True if only the first axis differs, as that of a classifier's weight or bias."""
    theirs, ours = _shape(given), _shape(wanted)
    return bool(theirs) and bool(ours) and theirs[1:] == ours[1:] and theirs[0] != ours[0]
