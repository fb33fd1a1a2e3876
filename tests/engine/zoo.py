"""Judges the blocks of libraries' models by an oracle that shares no code with the proofs.

The oracle reads a layer's tensor as its library means it, with a plain hook: the two equal axes of a square picture are
height and width; tokens stand in rows behind the library's own number of prefix tokens. A model is `right` if Grad-CAM
there correlates with ours at the same place, if nothing goes around that place, and if the library's own feature maps
of that size agree.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from blocksight.engine.errors import ModelError
from blocksight.engine.model.adapter import ModelAdapter

LEAST_CORRELATION = 0.99
INPUT = " <"
"""Ends the path of a layer whose input is meant."""


def verdict(module: nn.Module, side: int, prefix: int | None = None, *, is_last: bool = False) -> tuple[str, str]:
    """`right`, `refused`, `wrong` or `unjudged` of a classifier of square RGB pictures, and why.

    `prefix`: the number of tokens before the picture's, as the library says; `is_last`: its features have their
    channels last.
    """
    module.eval()
    _give_heads_weights(module)
    adapter = ModelAdapter(module, input_size=(side, side))
    try:
        block, taps = adapter.network.last_block()
    except ModelError as error:
        return "refused", str(error)
    inputs = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(5))
    with adapter.borrowed():
        logits, (maps,) = taps(inputs)
        (slopes,) = torch.autograd.grad(logits[:, 1].sum(), maps)
        own = grad_cam(maps, slopes)
        told = f"{block.name} {tuple(maps.shape[1:])}"
        seen = list(_layers(module, inputs, prefix, is_last=is_last))
        same = [(path, other, cam) for path, other, cam in seen if _are_same(maps, other)]
        if not same:
            return "unjudged", f"no layer of the library has the tensor of {told}"
        near = [_correlation(own, cam) for _, _, cam in same if cam is not None]
        path, is_whole = same[-1][0], any(not path.endswith(INPUT) for path, *_ in same)
        if near and max(near) < LEAST_CORRELATION:  # an input's gradient is a part, if the tensor goes elsewhere too
            told = f"Grad-CAM at {told} correlates {max(near):.2f} with the hook at {path}"
            return ("wrong" if is_whole else "unjudged"), told
        if all(_has_way_around(module, one, inputs) for one, *_ in same):
            return "wrong", f"the logits depend on the picture beside {path}"
        if not _agrees_with_the_library(module, inputs, maps):
            return "wrong", f"the library's own features of the size of {told} are others"
    return "right", told


def grad_cam(maps: Tensor, slopes: Tensor) -> Tensor:
    """Grad-CAM [N, h, w] before its ReLU."""
    return (slopes.mean((2, 3), keepdim=True) * maps).sum(1).detach()


def _correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.flatten().double(), other.flatten().double()]))[0, 1])


def _are_same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(
        one, other, rtol=1e-3, atol=1e-4 * float(other.detach().abs().max())
    )


def _give_heads_weights(module: nn.Module) -> None:
    """Heads that begin with zeros have no gradient, and nothing could be compared."""
    own = torch.Generator().manual_seed(3)
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and not layer.weight.any():
            layer.weight.data.normal_(0, 0.02, generator=own)


def _first(value: Any) -> Any:
    if isinstance(value, dict) and value:
        return next(iter(value.values()))
    return value[0] if isinstance(value, tuple | list) and value else value


def _layers(
    module: nn.Module, inputs: Tensor, prefix: int | None, *, is_last: bool
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """The path of each layer, its output and its input as the library means them, and Grad-CAM there."""
    seen: list[tuple[str, Tensor]] = []

    def keep(path: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.requires_grad and value.dim() in (3, 4):
            seen.append((path, value))

    with ExitStack() as hooks, torch.enable_grad():
        for path, layer in module.named_modules():
            if path:
                before = layer.register_forward_pre_hook(lambda _, given, path=path: keep(path + INPUT, _first(given)))
                after = layer.register_forward_hook(lambda _m, _g, out, path=path: keep(path, _first(out)))
                hooks.callback(before.remove)
                hooks.callback(after.remove)
        logits = module(inputs.detach().requires_grad_(True))
    slopes = torch.autograd.grad(logits[:, 1].sum(), [value for _, value in seen], allow_unused=True)
    for (path, value), slope in zip(seen, slopes, strict=True):
        maps = _as_meant(value, prefix, is_last=is_last)
        if maps is not None:
            own = None if slope is None else _as_meant(slope, prefix, is_last=is_last)
            yield path, maps, None if own is None else grad_cam(maps, own)


def _as_meant(value: Tensor, prefix: int | None, *, is_last: bool) -> Tensor | None:
    """The feature maps [N, C, h, w] of a layer's tensor; None: it holds none."""
    if value.dim() == 4:
        first, last = value.shape[2] == value.shape[3], value.shape[1] == value.shape[2]
        if first and not (last and is_last):
            return value
        return value.permute(0, 3, 1, 2) if last else None
    if prefix is None:
        prefix = 0 if math.isqrt(value.shape[1]) ** 2 == value.shape[1] else 1
    for extra in dict.fromkeys((prefix, 0)):
        cells = value.shape[1] - extra
        if cells > 0 and math.isqrt(cells) ** 2 == cells:
            return value[:, extra:].transpose(1, 2).unflatten(2, (math.isqrt(cells), -1))
    return None


def _has_way_around(module: nn.Module, path: str, inputs: Tensor) -> bool:
    """True if two pictures still have different logits while the layer's tensor is 0."""
    layer = module.get_submodule(path.removesuffix(INPUT))

    def empty(value: Any) -> None:
        """In place, so that a shortcut beside the layer takes the zeros too."""
        _first(value).zero_()

    with torch.no_grad():
        usual = module(inputs)
        hook = (
            layer.register_forward_pre_hook(lambda _, given: empty(given))
            if path.endswith(INPUT)
            else layer.register_forward_hook(lambda _m, _g, out: empty(out))
        )
        try:
            one, other = module(inputs)
        finally:
            hook.remove()
    return bool((one - other).abs().max() > 1e-3 * (usual[0] - usual[1]).abs().max())


def _agrees_with_the_library(module: nn.Module, inputs: Tensor, maps: Tensor) -> bool:
    """False if the library gives features of the same numbers in another order."""
    given = getattr(module, "forward_intermediates", None)
    if given is None:
        return True
    try:
        with torch.no_grad():
            features = given(inputs, intermediates_only=True, output_fmt="NCHW")
    except (TypeError, AssertionError, RuntimeError, NotImplementedError):
        return True
    for own in features:
        has_same_numbers = own.shape == maps.shape and _are_same(
            maps.flatten(1).sort(1).values, own.flatten(1).sort(1).values
        )
        if has_same_numbers and not _are_same(maps, own):
            return False
    return True
