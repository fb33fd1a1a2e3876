"""A GPU that is not there: tensors that say they are on cuda:0, with true values, and a count of what CUDA would do.

It raises where CUDA would raise: for operands on two devices, and for numpy arrays of GPU tensors. It counts by line
of our code what makes the host wait, the bytes copied, and the operations that launch a kernel. It needs no GPU and
no CUDA build. It does not see CUDA's rounding, types that a CUDA kernel lacks, memory, speed, and captured graphs.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from blocksight.engine.model import resample

CUDA = torch.device("cuda", 0)
ROOMS = ("/engine/", "/jobs/")
"""The folders whose lines are named."""


class DeviceMismatchError(RuntimeError):
    """One operation got tensors of two devices."""


@dataclass
class Counts:
    """What CUDA would do, by line of our code."""

    waits: Counter[str] = field(default_factory=Counter)
    """The host waits for the GPU: copies that block, `item()`, `tolist()`, and shapes that depend on values."""
    launches: Counter[str] = field(default_factory=Counter)
    """Operations that launch a kernel, each counted once."""
    copies: Counter[str] = field(default_factory=Counter)
    """Copies to the GPU."""
    h2d_bytes: int = 0
    """Bytes copied to the GPU."""
    d2h_bytes: int = 0
    """Bytes copied from it."""
    is_on: bool = True

    def clear(self) -> None:
        """Begins again at zero."""
        self.waits.clear(), self.launches.clear(), self.copies.clear()
        self.h2d_bytes = self.d2h_bytes = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Counts nothing while the body runs."""
        before, self.is_on = self.is_on, False
        try:
            yield
        finally:
            self.is_on = before

    def wait(self, what: str) -> None:
        """Counts a wait of the host."""
        if self.is_on:
            self.waits[f"{_line()}: {what}"] += 1

    def launch(self, name: str) -> None:
        """Counts a kernel."""
        if self.is_on and name.rstrip("_") not in FREE:
            self.launches[f"{_line()}: {name}"] += 1

    def copy_in(self, tensor: Tensor, *, blocks: bool = True) -> None:
        """Counts a copy to the GPU; one that does not block is no wait."""
        if self.is_on:
            self.copies[_line()] += 1
            self.h2d_bytes += tensor.numel() * tensor.element_size()
            if blocks:
                self.wait("copy to the GPU")

    def copy_out(self, tensor: Tensor) -> None:
        """Counts a copy from the GPU, which always ends in a wait."""
        if self.is_on:
            self.d2h_bytes += tensor.numel() * tensor.element_size()
            self.wait("copy from the GPU")


COUNTS = Counts()


def _line() -> str:
    """The innermost line of our code."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        room = next((own for own in ROOMS if own in name), None)
        if room is not None and "site-packages" not in name and "/tests/" not in name:
            return f"{name[name.rindex(room) + 1 :]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


class PretendedTensor(Tensor):
    """A tensor on the pretended GPU."""

    values: Tensor
    """Its numbers, on the CPU."""

    @staticmethod
    def __new__(cls, values: Tensor) -> "PretendedTensor":
        made = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device="cpu",
        )
        made.values = values
        return made

    @property
    def device(self) -> torch.device:
        return CUDA

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_cpu(self) -> bool:
        return False

    def get_device(self) -> int:
        return 0

    def __repr__(self) -> str:
        return f"PretendedTensor({self.values!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "PretendedTensor":
        copied = PretendedTensor(self.values.detach().clone()).requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copied._is_param = True
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _computed(func, args, dict(kwargs or {}))


ATEN = torch.ops.aten
INDEXING = {
    ATEN.index.Tensor,
    ATEN.index_put_.default,
    ATEN.index_put.default,
    ATEN._index_put_impl_.default,
    ATEN._unsafe_index.Tensor,
    ATEN._unsafe_index_put.default,
}
WAITING = {
    ATEN.nonzero.default,
    ATEN.masked_select.default,
    ATEN._unique2.default,
    ATEN.unique_dim.default,
    ATEN.unique_consecutive.default,
    ATEN.equal.default,
    ATEN._local_scalar_dense.default,
    ATEN.bincount.default,
    ATEN.repeat_interleave.Tensor,
    ATEN._linalg_check_errors.default,
    ATEN.item.default,
    ATEN.is_nonzero.default,
}
"""Operations that bring a value, or a shape that depends on values, to the host."""
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "_local_scalar_dense", "is_same_size"}
"""Operations without a kernel. Those that return a view of an argument have none either."""


def _tensors(*arguments: Any) -> Iterator[Tensor]:
    """The tensors among arguments; quicker than torch's pytree, because every operation asks."""
    for one in arguments:
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, list | tuple):
            yield from _tensors(*one)
        elif isinstance(one, dict):
            yield from _tensors(*one.values())


def _mapped(function: Callable[[Any], Any], argument: Any) -> Any:
    """The argument with the function applied to all that it holds."""
    if type(argument) in (list, tuple):
        return type(argument)(_mapped(function, one) for one in argument)
    if type(argument) is dict:
        return {name: _mapped(function, one) for name, one in argument.items()}
    return function(argument)


def _bare(one: Any) -> Any:
    return one.values if isinstance(one, PretendedTensor) else one


def _on_gpu(one: Any) -> Any:
    return PretendedTensor(one) if isinstance(one, Tensor) and not isinstance(one, PretendedTensor) else one


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an operation with a tensor on the GPU, on the true values."""
    name = func._schema.name.split("::")[1]
    plain = [one for one in _tensors(args, kwargs) if not isinstance(one, PretendedTensor)]
    if plain:
        _check_devices(func, name, args, plain)
    run = partial(func, *_mapped(_bare, args), **_mapped(_bare, kwargs))
    made = run()
    if _Inside.graph is not None:
        _Inside.graph.steps.append((run, made))
    written = _written(func, args, kwargs)
    _count_waits(func, name, args)
    if written is not None or not _is_view(made, args):
        COUNTS.launch(name)
    if written is not None:
        return written
    is_view = any(result.alias_info is not None for result in func._schema.returns)
    if is_view and torch.is_inference_mode_enabled() and not any(one.is_inference() for one in _tensors(args)):
        with torch.inference_mode(False):  # a view of an ordinary tensor is an ordinary one
            return _mapped(_on_gpu, made)
    return _mapped(_on_gpu, made)


def _count_waits(func: Any, name: str, args: tuple[Any, ...]) -> None:
    if func in WAITING:
        COUNTS.wait(name)
    if func in INDEXING and any(one.dtype in (torch.bool, torch.uint8) for one in _tensors(args[1])):
        COUNTS.wait("index of booleans")


def _is_view(made: Any, args: tuple[Any, ...]) -> bool:
    """The result is in an argument's memory."""
    memory = {_bare(one).untyped_storage().data_ptr() for one in _tensors(args)}
    results = list(_tensors(made))
    return bool(results) and all(one.untyped_storage().data_ptr() in memory for one in results)


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The arguments that an operation in place returns; None if it returns new tensors."""
    schema = func._schema
    names = [one.name for one in schema.arguments if one.alias_info is not None and one.alias_info.is_write]
    returned = [one.alias_info is not None and one.alias_info.is_write for one in schema.returns]
    if not names or not returned or not all(returned):
        return None
    given = {one.name: args[place] for place, one in enumerate(schema.arguments) if place < len(args)}
    found = [{**kwargs, **given}[name] for name in names]
    return found[0] if len(returned) == 1 else tuple(found)


def _check_devices(func: Any, name: str, args: tuple[Any, ...], plain: Sequence[Tensor]) -> None:
    """Counts what CUDA copies by itself, lets pass scalars, and raises DeviceMismatchError for all else."""
    if func is ATEN.copy_.default:
        is_in = isinstance(args[0], PretendedTensor)
        return (
            COUNTS.copy_in(args[1], blocks=not any(one is True for one in args[2:]))
            if is_in
            else COUNTS.copy_out(args[1])
        )
    if func in INDEXING and isinstance(args[0], PretendedTensor):
        indices = [one for one in _tensors(args[1]) if not isinstance(one, PretendedTensor)]
        if all(one.dim() == 0 or any(one is index for index in indices) for one in plain):
            for one in indices:
                COUNTS.copy_in(one)
            return None
    is_pointwise = torch.Tag.pointwise in func.tags or name == "fill_"
    if is_pointwise and all(one.dim() == 0 for one in plain):
        return None
    shapes = ", ".join(str(tuple(one.shape)) for one in plain)
    raise DeviceMismatchError(f"{name} got tensors on cuda:0, and on the CPU tensors of shape {shapes}, at {_line()}")


class _Inside:
    """Whether an operation on GPU tensors, a backward pass, or the recording of a graph is running."""

    operation = False
    backward = False
    graph: "_Graph | None" = None


@contextmanager
def _inside(name: str, value: Any) -> Iterator[None]:
    before = getattr(_Inside, name)
    setattr(_Inside, name, value)
    try:
        yield
    finally:
        setattr(_Inside, name, before)


class _Graph:
    """A CUDA graph: the recorded operations, which a replay runs again into the same memory."""

    def __init__(self) -> None:
        self.steps: list[tuple[Callable[[], Any], Any]] = []

    def replay(self) -> None:
        COUNTS.launch("graph")
        for run, made in self.steps:
            for old, new in zip(_tensors(made), _tensors(run()), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor in place
                    old.copy_(new)


class _Stream:
    """A CUDA stream, in which all is done at once."""

    def wait_stream(self, _: "_Stream") -> None:
        """Waits for nothing."""

    def synchronize(self) -> None:
        COUNTS.wait("synchronize")


class _InnerTensors(TorchDispatchMode):
    """Tensors that torch makes inside an operation on GPU tensors are on the GPU."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        is_inner = (_Inside.operation or _Inside.backward) and type(made) is Tensor
        if is_inner and next(_tensors(args, kwargs), None) is None:
            COUNTS.launch(func._schema.name.split("::")[1])
            return PretendedTensor(made)
        return made


MAKERS = {
    *(
        torch.zeros,
        torch.ones,
        torch.full,
        torch.empty,
        torch.arange,
        torch.rand,
        torch.randn,
        torch.randint,
        torch.eye,
    ),
    *(torch.linspace, torch.randperm, torch.scalar_tensor, torch.empty_strided),
    *(torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like, torch.rand_like, torch.randn_like),
    *(Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty),
}
"""Functions that make a tensor without another's values."""
COPIERS = {torch.tensor, torch.as_tensor, Tensor.new_tensor}
"""Functions that make a tensor of given values."""


def _kind(device: Any) -> str | None:
    return None if device is None else torch.device(device).type


def _copied_in(tensor: Tensor, *, blocks: bool = True) -> Tensor:
    COUNTS.copy_in(tensor, blocks=blocks)
    return PretendedTensor(tensor.detach().clone(memory_format=torch.preserve_format))


def _copied_out(tensor: PretendedTensor) -> Tensor:
    COUNTS.copy_out(tensor)
    return tensor.detach().values.clone(memory_format=torch.preserve_format)


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to`."""
    kwargs.pop("copy", None)
    if args and isinstance(args[0], Tensor):
        device, dtype, is_async, layout = args[0].device, args[0].dtype, False, None
    else:
        device, dtype, is_async, layout = torch._C._nn._parse_to(*args, **kwargs)
    wanted = {"dtype": dtype, "memory_format": layout}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    if wanted:
        with _inside("operation", isinstance(tensor, PretendedTensor)):
            tensor = Tensor.to(tensor, **wanted)
    target = _kind(device)
    if target == "cuda" and not isinstance(tensor, PretendedTensor):
        return _copied_in(tensor, blocks=not is_async)
    if target == "cpu" and isinstance(tensor, PretendedTensor):
        return _copied_out(tensor)
    return tensor


def _cpu(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    return _copied_out(tensor) if isinstance(tensor, PretendedTensor) else tensor


def _cuda(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    return tensor if isinstance(tensor, PretendedTensor) else _copied_in(tensor)


def _numpy(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    if isinstance(tensor, PretendedTensor):
        raise TypeError(f"can't convert cuda:0 device type tensor to numpy, at {_line()}")
    return Tensor.numpy(tensor, *args, **kwargs)


def _tolist(tensor: Tensor) -> Any:
    if not isinstance(tensor, PretendedTensor):
        return Tensor.tolist(tensor)
    COUNTS.copy_out(tensor)
    return tensor.detach().values.tolist()


MOVES: Mapping[Any, Callable[..., Any]] = {
    Tensor.to: _to,
    Tensor.type_as: _to,
    Tensor.cpu: _cpu,
    Tensor.cuda: _cuda,
    Tensor.numpy: _numpy,
    Tensor.__array__: _numpy,
    Tensor.tolist: _tolist,
    Tensor.pin_memory: lambda tensor: tensor,
}
"""Methods that move a tensor."""


class _Functions(TorchFunctionMode):
    """Knows the devices that functions name."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        asked = dict(kwargs or {})
        if func in MOVES:
            return MOVES[func](*args, **asked)
        if func in MAKERS:
            return _made(func, args, asked)
        if func in COPIERS:
            return _copied(func, args, asked)
        if _kind(asked.get("device")) == "cuda":
            raise NotImplementedError(f"the pretended GPU does not know {func} with a device: add it to MAKERS")
        with _inside("operation", any(isinstance(one, PretendedTensor) for one in _tensors(args, asked))):
            return func(*args, **asked)


def _made(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    source = args[0] if args and isinstance(args[0], Tensor) else None
    kind = _kind(kwargs.pop("device", None)) or ("cuda" if isinstance(source, PretendedTensor) else "cpu")
    generator = kwargs.get("generator")
    if kind == "cuda" and generator is not None and generator.device.type == "cpu":
        raise DeviceMismatchError(f"a CPU generator for a tensor on cuda:0, at {_line()}")
    kwargs.pop("pin_memory", None)
    if source is None:
        made = func(*args, **kwargs)
    else:
        with torch._C.DisableTorchFunctionSubclass():
            made = func(_bare(source).detach(), *args[1:], **kwargs)
    if kind == "cpu":
        return made
    COUNTS.launch(func.__name__)
    return PretendedTensor(made.detach()).requires_grad_(made.requires_grad)


def _copied(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    given, kind = args[0], _kind(kwargs.pop("device", None))
    is_on_gpu = isinstance(given, PretendedTensor)
    if func is Tensor.new_tensor:
        kwargs.setdefault("dtype", given.dtype)
        made = torch.tensor(*args[1:], **kwargs)
    elif is_on_gpu:
        return given if kind in (None, "cuda") else _copied_out(given)
    else:
        made = func(_on_host(given), *args[1:], **kwargs)
    kind = kind or ("cuda" if is_on_gpu else "cpu")
    return _copied_in(made) if kind == "cuda" else made


def _on_host(given: Any) -> Any:
    """A sequence with its GPU scalars as numbers, each of which is a wait."""
    if not isinstance(given, list | tuple):
        return given
    return [one.item() if isinstance(one, PretendedTensor) else one for one in given]


def _watched(real: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose tensors are on the GPU, although autograd makes them."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _inside("backward", any(isinstance(one, PretendedTensor) for one in _tensors(args, kwargs))):
            return real(*args, **kwargs)

    return run


def _forget_matrices() -> None:
    """Empties the caches that know devices."""
    resample.upsampling.cache_clear()
    resample._pooled_axis.cache_clear()


@contextmanager
def pretended_gpu() -> Iterator[Counts]:
    """While the body runs, `cuda` is a device, and models and tensors can be moved to it. Yields the counts."""
    _forget_matrices()
    COUNTS.clear()
    patches: Mapping[str, Any] = {
        "torch.autograd.grad": _watched(torch.autograd.grad),
        "torch.autograd.backward": _watched(torch.autograd.backward),
        "torch.cuda.synchronize": lambda *_: COUNTS.wait("synchronize"),
        "torch.cuda.empty_cache": lambda: None,
        "torch.cuda.get_device_name": lambda *_: "a pretended GPU",
        "torch.cuda.get_device_capability": lambda *_: (9, 0),
        "torch.cuda.reset_peak_memory_stats": lambda *_: None,
        "torch.cuda.max_memory_allocated": lambda *_: 0,
        "torch.cuda.Stream": _Stream,
        "torch.cuda.current_stream": _Stream,
        "torch.cuda.stream": lambda _: nullcontext(),
        "torch.cuda.CUDAGraph": _Graph,
        "torch.cuda.graph": partial(_inside, "graph"),
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,  # without it autocast warns
    }
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    with ExitStack() as stack:
        for name, replacement in patches.items():
            stack.enter_context(mock.patch(name, replacement))
        stack.enter_context(_Functions())
        stack.enter_context(_InnerTensors())
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            yield COUNTS
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(before)
            _forget_matrices()
