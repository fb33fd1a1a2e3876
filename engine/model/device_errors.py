"""Tells errors of the device (memory, a lost context, a missing driver) from errors of a record or a model.

Imports no torch: libraries are told by the names of their types and by their words.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from operator import itemgetter


class DeviceTrouble(IntEnum):
    """What is wrong with the device; of several the highest counts."""

    HOST_MEMORY = 1
    """The machine's memory is short: fewer inputs at once may fit."""
    MEMORY = 2
    """The device's memory is short: fewer inputs at once may fit."""
    UNFIT = 3
    """The device cannot run this at all: no driver, no kernel for it."""
    LOST = 4
    """The process cannot use its device any more: all later calls fail. A new process may."""


WORDS: tuple[tuple[DeviceTrouble, tuple[str, ...]], ...] = (
    (
        DeviceTrouble.LOST,
        (
            *("illegal memory access", "illegal address", "misaligned address", "illegal instruction"),
            *("invalid address space", "invalid program counter", "device-side assert", "hardware stack error"),
            *("unspecified launch failure", "launch failed", "launch timed out", "uncorrectable ecc", "nvlink error"),
            *("context is destroyed", "context was destroyed", "fallen off the bus", "gpu is lost", "device lost"),
            *("cublas_status_execution_failed", "cublas_status_mapping_error", "cublas_status_internal_error"),
            *("cudnn_status_execution_failed", "cudnn_status_mapping_error"),
        ),
    ),
    (
        DeviceTrouble.UNFIT,
        (
            *("no kernel image is available", "unsupported toolchain", "kernel image is invalid", "invalid ptx"),
            *("invalid device function", "ptx jit compil", "arch_mismatch", "gpu-architecture", "out of resource:"),
            *("found no nvidia driver", "driver version is insufficient", "driver on your system is too old"),
            *("no cuda-capable device", "no cuda gpus are available", "no hip gpus are available", "libcuda.so"),
            *("cuda initialization", "cuda driver initialization", "cuda unknown error", "initialization error"),
            *("not compiled with cuda", "cannot re-initialize cuda", "invalid device ordinal", "stub library"),
            *("busy or unavailable", "forward compatibility was attempted", "system not yet initialized"),
            *("no available kernel. aborting", "only supports ampere", "ptxas fatal", "could not load library libcu"),
            *("unsupported display driver", "cuda error: operation not supported", "too many resources requested"),
        ),
    ),
    (
        DeviceTrouble.HOST_MEMORY,
        (
            *("defaultcpuallocator", "alloc_cpu", "can't allocate memory", "cannot allocate memory", "bad_alloc"),
            *("not enough memory", "could not create a memory", "dnnl_out_of_memory", "bad_array_new_length"),
            *("unable to allocate", "failed to allocate", "could not allocate"),
        ),
    ),
    (
        DeviceTrouble.MEMORY,
        (
            *("out of memory", "out_of_memory", "outofmemory", "memoryallocation", "insufficient memory"),
            *("alloc_failed", "allocation_failure", "out_of_resources", "insufficient_resources", "nvml_success"),
            *("unable to find an engine", "no valid execution plan", "invalid configuration argument"),
            *("find a valid cudnn algorithm", "canuse32bitindexmath", "int_max elements"),  # a batch is too large
            *("cublas_status_not_initialized", "cusolver_status_not_initialized", "cudnn_status", "cudnn error"),
        ),
    ),
    (
        DeviceTrouble.LOST,
        (
            *("cuda error", "cuda driver error", "cuda runtime error", "cudaerror", "cuda_error", "triton error"),
            *("cublas_status", "cusolver_status", "cusolver error", "cusparse_status", "cusparse error"),
            *("cufft error", "cufft_", "nvrtc error", "hip error", "hiperror"),
        ),
    ),
)
"""Parts of messages in lower case, the most telling first: the first that is found decides."""

TYPES = {
    "OutOfMemoryError": DeviceTrouble.MEMORY,
    "AcceleratorError": DeviceTrouble.LOST,
    "OutOfResources": DeviceTrouble.UNFIT,
    "MemoryError": DeviceTrouble.HOST_MEMORY,
}
"""Types by name (of torch, Triton and Python), for messages with none of these words."""

TELLING = {"RuntimeError", "MemoryError", "TritonError", *TYPES}
"""Types whose message tells the trouble; that of another type may hold a record's own text."""
NO_CUDA = ("Torch not compiled with CUDA", "libcuda.so")
"""How messages of any type begin that say so."""

SENTENCES = {
    DeviceTrouble.HOST_MEMORY: "the machine's memory is short",
    DeviceTrouble.MEMORY: "the device's memory is short",
    DeviceTrouble.UNFIT: "the device cannot run this",
    DeviceTrouble.LOST: "the process lost its device",
}
ADVICE = {
    DeviceTrouble.HOST_MEMORY: "give it fewer --workers, a smaller --batch-size, or more memory",
    DeviceTrouble.MEMORY: "end what else uses it, or take a smaller --batch-size or a device with more memory",
    DeviceTrouble.UNFIT: "install a driver and a torch that fit it (cluster/README.md), or leave this device out",
    DeviceTrouble.LOST: "run the same command again; if it happens again and again, the device is faulty (dmesg tells)",
}


def device_trouble(error: BaseException) -> DeviceTrouble | None:
    """What is wrong with the device, if this error or one that caused it says so; None: nothing is known of it."""
    return max((found for _, found in _troubles(error)), default=None)


def is_short_of_memory(error: BaseException) -> bool:
    """True if fewer inputs at once may help."""
    return device_trouble(error) in (DeviceTrouble.HOST_MEMORY, DeviceTrouble.MEMORY)


@contextmanager
def while_it_fits() -> Iterator[None]:
    """Ends the body quietly when memory is short."""
    try:
        yield
    except Exception as error:
        if not is_short_of_memory(error):
            raise


def told_by_device(error: BaseException) -> str:
    """A sentence on the trouble, with the library's own words and what to do; of an error with `device_trouble`."""
    culprit, trouble = max(_troubles(error), key=itemgetter(1))
    words = str(culprit).strip().partition("\n")[0]
    told = f"{type(culprit).__name__}: {words}" if words else type(culprit).__name__
    return f"{SENTENCES[trouble]} ({told}): {ADVICE[trouble]}"


def _troubles(error: BaseException) -> Iterator[tuple[BaseException, DeviceTrouble]]:
    for one in _causes(error):
        trouble = _trouble_of(one)
        if trouble is not None:
            yield one, trouble


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that it was raised from or while handling, unless hidden by `from`."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ if one.__suppress_context__ else one.__context__


def _trouble_of(error: BaseException) -> DeviceTrouble | None:
    names = [kind.__name__ for kind in type(error).__mro__]
    message = str(error)
    if message.startswith(NO_CUDA):
        return DeviceTrouble.UNFIT
    if TELLING.intersection(names):
        for trouble, words in WORDS:
            if any(word in message.lower() for word in words):
                return trouble
    return next((TYPES[name] for name in names if name in TYPES), None)
