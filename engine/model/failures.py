"""Sentences for a model that fails on images, or returns something else than logits."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn


def first_line_of(error: BaseException) -> str:
    """The first line of an exception's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def failure_of(module: nn.Module, error: Exception, size: Sequence[int]) -> str:
    """Why a module fails on RGB images in float32, in a sentence that says what to do."""
    if not _has_modes(module):
        return "fails: it is a program of torch.export, which has no eval mode; return the module that it was made from"
    pixels = " x ".join(map(str, size))
    dtypes = {one.dtype for one in module.parameters() if one.is_floating_point()}
    if len(dtypes) == 1 and dtypes != {torch.float32}:
        name = name_of(dtypes.pop())
        return f"fails: its weights are {name} and images are float32; return model.float() from the factory"
    fed = (getattr(one, "gives_channels", None) for one in module.modules())
    given = next((number for number in fed if isinstance(number, int)), 3)
    path, taken = next(_channels_taken(module), ("", given))
    if taken != given:
        ways = {1: "say --channels 1", 3: "leave --channels out"}
        way = ways.get(taken, "wrap it in a module that gives it those that it needs")
        what = f"its first convolution {path} takes" if path else "the file takes"
        return f"fails on {'RGB' if given == 3 else 'grey'} images: {what} {taken} channels; {way}"
    return f"fails on RGB images of {pixels} pixels (--input-size gives another size): {first_line_of(error)}"


def _channels_taken(module: nn.Module) -> Iterator[tuple[str, int]]:
    """The path and the channels of each layer that says how many it takes; of a file's network the path is empty."""
    for path, one in module.named_modules():
        taken = getattr(one, "in_channels", None)
        if isinstance(taken, int) and not any(one.children()):
            yield (path if isinstance(one, nn.Conv2d) else ""), taken


def _has_modes(module: nn.Module) -> bool:
    try:
        module.train(module.training)
    except NotImplementedError:
        return False
    return True


def shape_of(output: object) -> str:
    """What a module returned for two images, for people, with a way to wrap it if the logits may be inside."""
    if isinstance(output, Tensor):
        return f"{tuple(output.shape)}{_way_from(output)}"
    kind = type(output).__name__
    if isinstance(output, dict):
        keys = ", ".join(map(str, list(output)[:6]))
        return f"a {kind} with {keys}{_wrapped(output.items(), 'output[{!r}]')}"
    if isinstance(output, tuple | list):
        inside = ", ".join(str(tuple(one.shape)) if isinstance(one, Tensor) else type(one).__name__ for one in output)
        return f"a {kind} of {inside}{_wrapped(enumerate(output), 'output[{!r}]')}"
    return f"a {kind}{_wrapped(getattr(output, '__dict__', {}).items(), 'output.{}')}"


def _way_from(output: Tensor) -> str:
    """How logits are made of a tensor that is not [N, K], as a clause; empty: unknown."""
    if output.dim() == 1:
        return ": wrap it in a module that returns output[:, None], and say --readout sigmoid or probabilities"
    if output.dim() > 2 and output[0].numel() == max(output.shape[1:]):
        return ": wrap it in a module that returns output.flatten(1)"
    if output.dim() == 4:
        return ": a map for each class; wrap it in a module that returns their means, output.mean((2, 3))"
    return ""


def _wrapped(parts: Iterable[tuple[object, object]], path: str) -> str:
    """How to take the logits out of several values, as a clause; empty: no value can be logits."""
    found = {name: one for name, one in parts if isinstance(one, Tensor)}
    named = [name for name in found if "logit" in str(name)]
    flat = [name for name, one in found.items() if one.dim() == 2]
    one = next(iter([*named, *flat, *found]), None)
    if one is None:
        return ""
    mean = ".mean((2, 3))" if found[one].dim() == 4 else ""  # a map for each class
    return f": wrap it in a module that returns the logits, such as {path.format(one)}{mean}"


def name_of(dtype: torch.dtype) -> str:
    """`float16` for `torch.float16`."""
    return str(dtype).removeprefix("torch.")
