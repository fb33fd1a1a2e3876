"""The tokens of a vision transformer with global attention: which attentions and blocks they pass, proved on examples.

Methods that follow attention back to patches need three facts. Every attention spans all tokens of one picture. No
other layer mixes patches. Nothing bypasses a block. Each is tried on the network before any picture is explained.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from blocksight.engine.errors import ModelError
from blocksight.engine.model.attention import Attention, explicit_attention
from blocksight.engine.model.layouts import Layout

if TYPE_CHECKING:
    from blocksight.engine.model.adapter import ModelAdapter

INSTEAD = "take gradcam, layercam, rise or libra(hirescam)"
"""Methods that work on windows, pyramids and networks without attention."""


@dataclass(frozen=True)
class TokenStream:
    """The attentions of a network over the tokens of a picture, shallow to deep."""

    layout: Layout
    """Which tokens are patches: those behind the first `prefix`, row by row."""
    attentions: tuple[str, ...]
    """The modules that compute the self-attentions; a module that runs twice stands twice."""
    has_pooler: bool
    """An attention with queries of its own gathers the tokens at the end."""

    @property
    def num_tokens(self) -> int:
        """T, those before the patches included."""
        return self.layout.prefix + self.layout.grid[0] * self.layout.grid[1]

    def maps(self, values: Tensor) -> Tensor:
        """The patches' part [N, h, w] of one number for each token [N, T]."""
        return values[:, self.layout.prefix :].unflatten(1, self.layout.grid)


def layouts_by_number(adapter: "ModelAdapter") -> dict[int, Layout]:
    """The layouts of tensors that hold tokens, by their number of tokens; of several the first."""
    tokens = [layout for layout in reversed(adapter.network.layouts()) if layout.kind == "tokens"]
    return {layout.prefix + layout.grid[0] * layout.grid[1]: layout for layout in tokens}


def token_stream(adapter: "ModelAdapter", method: str, instead: str = INSTEAD) -> TokenStream:
    """The attentions of a network whose tokens meet in them alone.

    Raises ModelError, which says what to take `instead`.
    """
    found, missed = _seen_and_missed(adapter)
    if missed:
        raise _refused(adapter, method, f"it changes {len(missed)} softmaxes before they weigh tokens", instead)
    own = [one for one in found if one.kind == "self"]
    poolers = [one for one in found if one.kind == "pool"]
    layouts = layouts_by_number(adapter)
    if not own or any(one.weights.shape[2] not in layouts or len(one.weights) != 2 for one in own):
        raise _refused(adapter, method, f"in {_seen(found)}", instead)
    if len({one.weights.shape[2] for one in own}) > 1 or len(poolers) > 1 or not _fits(own[-1], poolers):
        raise _refused(adapter, method, f"in {_seen(found)}, of several sizes", instead)
    stream = TokenStream(layouts[own[0].weights.shape[2]], tuple(one.name for one in own), has_pooler=bool(poolers))
    _check_mixing(adapter, method, stream, instead)
    return stream


def _fits(last: Attention, poolers: Sequence[Attention]) -> bool:
    return all(len(one.weights) == 2 and one.weights.shape[3] == last.weights.shape[3] for one in poolers)


def attentions_of(adapter: "ModelAdapter") -> list[Attention]:
    """All attentions of two example pictures."""
    return _seen_and_missed(adapter)[0]


def _seen_and_missed(adapter: "ModelAdapter") -> tuple[list[Attention], list[tuple[int, ...]]]:
    """All attentions of two example pictures, and the shapes of those whose weights cannot be followed."""
    found: list[Attention] = []
    with adapter.borrowed(), torch.no_grad(), explicit_attention(adapter.module, found.append) as missed:
        adapter.logits(example_pictures(adapter, 2))
    return found, missed


def example_pictures(adapter: "ModelAdapter", count: int) -> Tensor:
    """Random pictures as model inputs, always the same."""
    own = torch.Generator().manual_seed(0)
    return adapter.normalise(torch.randint(0, 256, (count, 3, *adapter.input_size), dtype=torch.uint8, generator=own))


def _seen(found: Sequence[Attention]) -> str:
    shapes = sorted({f"{len(one.weights)} x {one.weights.shape[2]} x {one.weights.shape[3]}" for one in found})
    return (
        f"attention over {', '.join(shapes)} (batch of 2 x queries x tokens)" if found else "no attention that is seen"
    )


def _refused(adapter: "ModelAdapter", method: str, why: str, instead: str) -> ModelError:
    return ModelError(
        f"{method} needs attention of all patches of a picture in every block, and {adapter.name} has it not: {why} "
        f"(in windows, in a pyramid, over channels, or in a kernel of its own): {instead}"
    )


def _check_mixing(adapter: "ModelAdapter", method: str, stream: TokenStream, instead: str = INSTEAD) -> None:
    """With every token attending to itself alone, a change of one patch must reach its own token and no other.

    It is compared with the tokens that enter the first attention, for a convolution before it may overlap patches.
    """
    grid, prefix = stream.layout.grid, stream.layout.prefix
    cells = [(0, 0), (grid[0] // 2, grid[1] - 1)]
    pictures = example_pictures(adapter, 1).repeat(1 + len(cells), 1, 1, 1)
    for number, (row, column) in enumerate(cells, 1):
        _cell(pictures[number], grid, row, column).mul_(-1).add_(0.5)
    found: list[Attention] = []
    with adapter.borrowed(), torch.no_grad(), explicit_attention(adapter.module, found.append, _alone):
        adapter.logits(pictures)
    own = [one for one in found if one.kind == "self"]
    for number, (row, column) in enumerate(cells, 1):
        before, after = (_moved(one.values, number) for one in (own[0], own[-1]))
        is_there = prefix + row * grid[1] + column in before
        if not is_there or min(before) < prefix:
            raise _refused(
                adapter, method, f"a change of patch {row}, {column} reaches other tokens than expected", instead
            )
        if not after <= before:
            raise _refused(adapter, method, "something beside its attention mixes patches", instead)


def _cell(picture_chw: Tensor, grid: tuple[int, int], row: int, column: int) -> Tensor:
    """A view of a patch's pixels."""
    high, wide = picture_chw.shape[1] // grid[0], picture_chw.shape[2] // grid[1]
    return picture_chw[:, row * high : (row + 1) * high, column * wide : (column + 1) * wide]


def _alone(weights: Tensor) -> Tensor:
    """Every token attends to itself alone; poolers stay."""
    if weights.shape[2] != weights.shape[3]:
        return weights
    return torch.eye(weights.shape[3], dtype=weights.dtype, device=weights.device).expand_as(weights)


def _moved(values: Tensor, number: int) -> set[int]:
    """The tokens in which picture `number` of a batch differs from the first."""
    apart = (values[number] - values[0]).abs().amax((0, 2))
    return set((apart > 1e-6 * values[0].abs().amax()).nonzero().flatten().tolist())


# ---------------------------------------------------------------- blocks

SeeTokens = Callable[[int, Tensor], Tensor]
"""Receives a block's number and its tokens [N, T, D], and returns those that the network continues with."""


@contextmanager
def replacing_tokens(module: nn.Module, paths: Sequence[str], replace: SeeTokens) -> Iterator[None]:
    """Calls `replace` on the output of each block, in order of the paths."""

    def hook(number: int) -> Callable[[nn.Module, Any, Any], Any]:
        def called(_module: nn.Module, _given: Any, output: Any) -> Any:
            if isinstance(output, Tensor):
                return replace(number, output)
            return type(output)((replace(number, output[0]), *output[1:]))

        return called

    with ExitStack() as hooks:
        for number, path in enumerate(paths):
            hooks.enter_context(module.get_submodule(path).register_forward_hook(hook(number)))
        yield


def token_blocks(
    adapter: "ModelAdapter", method: str, stream: TokenStream, instead: str = "take chefer, daam or gradcam"
) -> tuple[str, ...]:
    """The modules, one around each attention, whose outputs [N, T, D] nothing bypasses. Raises ModelError."""
    names = stream.attentions
    depth = max(name.count(".") for name in names) + 1
    for level in range(depth):
        paths = tuple(_ancestor(name, level) for name in names)
        if len(set(paths)) == len(names) and all(paths) and _is_stream(adapter, paths, stream.num_tokens):
            return paths
    raise ModelError(
        f"{method} needs blocks of one attention each that nothing bypasses, and around {', '.join(names[:3])} of "
        f"{adapter.name} there are none: {instead}"
    )


def _ancestor(name: str, level: int) -> str:
    parts = name.split(".")
    return ".".join(parts[: len(parts) - level])


def _is_stream(adapter: "ModelAdapter", paths: Sequence[str], num_tokens: int) -> bool:
    """Whether each block's tokens depend on the tokens before them alone, and the logits on the last ones alone."""
    given = example_pictures(adapter, 2)
    made: list[Tensor] = []
    leaves: list[Tensor] = []

    def cut(_: int, tokens: Tensor) -> Tensor:
        made.append(tokens)
        leaves.append(tokens.detach().requires_grad_(True))
        return leaves[-1]

    with adapter.borrowed(), torch.enable_grad():
        try:
            with replacing_tokens(adapter.module, paths, cut):
                inputs = given.requires_grad_(True)
                logits = adapter.logits(inputs)
        except (AttributeError, TypeError, IndexError, KeyError):  # a module whose output is no tensor of tokens
            return False
        if len(made) != len(paths) or any(one.shape[:2] != (2, num_tokens) or one.dim() != 3 for one in made):
            return False
        before = [inputs, *leaves]
        return all(_hears_only(one, before, number) for number, one in enumerate([*made, logits]))


def _hears_only(output: Tensor, before: Sequence[Tensor], number: int) -> bool:
    """Whether of all these tensors the output depends on that of this number alone."""
    if not output.requires_grad:
        return False
    slopes = torch.autograd.grad(output.sum(), before, retain_graph=True, allow_unused=True)
    return [index for index, slope in enumerate(slopes) if slope is not None] == [number]
