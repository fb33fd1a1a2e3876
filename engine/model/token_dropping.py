"""Token dropping: runs a vision transformer on some patches of a picture alone, proved before any picture.

A patch that is left out is not painted over: its token enters no block, and all others keep their positions.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from blocksight.engine.errors import ModelError
from blocksight.engine.model.attention import explicit_attention
from blocksight.engine.model.device_errors import device_trouble
from blocksight.engine.model.failures import first_line_of
from blocksight.engine.model.resample import Grid
from blocksight.engine.model.token_stream import example_pictures, replacing_tokens, token_blocks, token_stream

if TYPE_CHECKING:
    from blocksight.engine.model.adapter import ModelAdapter

METHOD = "the baseline drop"
INSTEAD = "take the baseline zero, which paints patches over"
TOLERANCE, ROUNDING = 1e-2, 1e-5
"""How far logits may lie from those of a full pass that hides the same patches: relative to how far hiding moves them,
or relative to the largest, whichever is more."""


class TokenDropping:
    """The logits of a network that is given some patches of each picture.

    The tokens are taken where they enter the first block: patch and position are in them, and nothing else mixes them.
    """

    def __init__(self, adapter: "ModelAdapter") -> None:
        """Raises ModelError, which says what to do, if the network cannot do without tokens.

        Three things are tried on random pictures. A patch reaches its own token alone. With all patches the logits are
        the network's own. With some, they are those of a full pass in which every attention hides the others.
        """
        self.adapter = adapter
        stream = token_stream(adapter, METHOD, INSTEAD)
        blocks = token_blocks(adapter, METHOD, stream, INSTEAD)
        self.grid: Grid = stream.layout.grid
        self.prefix, self.num_tokens, self.first = stream.layout.prefix, stream.num_tokens, blocks[0]
        if any(side % cells for side, cells in zip(adapter.input_size, self.grid, strict=True)):
            raise self._refused(f"its grid of {self.grid} does not divide the picture")
        with adapter.borrowed(), torch.no_grad():
            self._check_patches()
            self._check_dropping(blocks[-1])

    @property
    def num_patches(self) -> int:
        """P, row by row."""
        return self.grid[0] * self.grid[1]

    @property
    def patch_size(self) -> Grid:
        """Height and width in pixels."""
        high, wide = self.adapter.input_size
        return high // self.grid[0], wide // self.grid[1]

    def logits(self, inputs_nchw: Tensor, patches_nk: Tensor) -> Tensor:
        """Logits [N, classes] of pictures of which these K patches are kept, each row ascending."""
        first = self.adapter.module.get_submodule(self.first)
        with _given_tokens(first, self.num_tokens, lambda tokens: self._kept(tokens, patches_nk)):
            return self.adapter.logits(inputs_nchw)

    def _kept(self, tokens: Tensor, patches_nk: Tensor) -> Tensor:
        """The tokens [N, p + K, D] of these patches, and those before the patches."""
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        return torch.cat([tokens[:, : self.prefix], tokens[rows, self.prefix + patches_nk]], 1)

    def _check_patches(self) -> None:
        """A change of a patch moves its own token, and no other, where tokens enter the first block."""
        numbers = (0, self.num_patches - 1, self.num_patches // 2)
        pictures = example_pictures(self.adapter, 1).repeat(1 + len(numbers), 1, 1, 1)
        high, wide = self.patch_size
        for picture, number in zip(pictures[1:], numbers, strict=True):
            row, column = divmod(number, self.grid[1])
            picture[:, row * high : (row + 1) * high, column * wide : (column + 1) * wide].mul_(-1).add_(0.5)
        seen: list[Tensor] = []
        first = self.adapter.module.get_submodule(self.first)
        with _given_tokens(first, self.num_tokens, lambda tokens: seen.append(tokens) or tokens):
            self.adapter.logits(pictures)
        if not seen:
            raise self._refused(f"no tokens of {self.num_patches} patches enter {self.first}")
        for moved, number in zip(seen[0][1:], numbers, strict=True):
            apart = (moved - seen[0][0]).abs().amax(1)
            reached = (apart > 1e-6 * seen[0][0].abs().amax()).nonzero().flatten().tolist()
            if reached != [self.prefix + number]:
                raise self._refused(f"a patch enters {len(reached)} tokens of the first block, not its own alone")

    def _check_dropping(self, last: str) -> None:
        pictures = example_pictures(self.adapter, 2)
        whole = self.adapter.logits(pictures)
        for count in (self.num_patches, max(1, self.num_patches // 2), 1):
            patches = _drawn(2, self.num_patches, count).to(pictures.device)
            try:
                found = self.logits(pictures, patches)
                wanted = whole if count == self.num_patches else self._hidden(pictures, patches, last)
            except Exception as error:  # a module that counts its tokens may raise anything
                if device_trouble(error) is not None:
                    raise
                raise self._refused(
                    f"with {count} of {self.num_patches} patches it fails: {first_line_of(error)}"
                ) from error
            if not _is_near(found, wanted, whole):
                raise self._refused(
                    f"with {count} of {self.num_patches} patches its logits are not those of a full pass that hides "
                    "the others: positions enter elsewhere too"
                )

    def _hidden(self, pictures: Tensor, patches_nk: Tensor, last: str) -> Tensor:
        """The logits of full passes: no attention sees the other patches, and behind the last block they are cut."""
        is_kept = torch.zeros(len(pictures), self.num_tokens, dtype=torch.bool, device=pictures.device)
        is_kept[:, : self.prefix] = True
        is_kept.scatter_(1, self.prefix + patches_nk, value=True)

        def hide(weights: Tensor) -> Tensor:
            if weights.shape[3] != self.num_tokens:
                return weights
            seen = weights * is_kept[:, None, None].to(weights.dtype)
            return seen / seen.sum(3, keepdim=True)

        module = self.adapter.module
        with (
            explicit_attention(module, lambda _: None, hide),
            replacing_tokens(module, [last], lambda _, tokens: self._kept(tokens, patches_nk)),
        ):
            return self.adapter.logits(pictures)

    def _refused(self, why: str) -> ModelError:
        return ModelError(
            f"{METHOD} needs a vision transformer with one token for each patch, positions that are added once, and "
            f"global attention, and {self.adapter.name} is none: {why}; {INSTEAD}"
        )


def _drawn(num: int, num_patches: int, count: int) -> Tensor:
    """Random patches [num, count] of each picture, ascending."""
    own = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(num_patches, generator=own)[:count].sort().values for _ in range(num)])


def _is_near(found: Tensor, wanted: Tensor, whole: Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    most = max(TOLERANCE * float((wanted - whole).abs().max()), ROUNDING * float(whole.abs().max()))
    return float((found - wanted).abs().max()) <= most


@contextmanager
def _given_tokens(module: nn.Module, num_tokens: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Changes the tokens [N, T, D] that a block is given, in whichever argument they come."""

    def changed(value: Any) -> Any:
        is_tokens = isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == num_tokens
        return change(value) if is_tokens else value

    def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tuple(changed(one) for one in args), {name: changed(one) for name, one in kwargs.items()}

    with module.register_forward_pre_hook(hook, with_kwargs=True):
        yield
