"""Errors of devices, as libraries raise them, for tests that inject each of them."""

import torch

from blocksight.engine.model.device_errors import DeviceTrouble


class OutOfResources(Exception):
    """As Triton's class of this name, which is no RuntimeError."""


MEMORY, HOST_MEMORY = DeviceTrouble.MEMORY, DeviceTrouble.HOST_MEMORY
LOST, UNFIT = DeviceTrouble.LOST, DeviceTrouble.UNFIT

DEVICE_ERRORS = (
    (MEMORY, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.06 GiB. GPU 0 has 1 GiB")),
    (MEMORY, torch.OutOfMemoryError("no room")),
    (MEMORY, RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")),
    (MEMORY, torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later")),
    (MEMORY, RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
    (MEMORY, RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`")),
    (MEMORY, RuntimeError("GET was unable to find an engine to execute this computation")),
    (MEMORY, RuntimeError("FIND was unable to find an engine to execute this computation")),
    (MEMORY, RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")),
    (MEMORY, RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if the input is odd")),
    (MEMORY, RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED")),
    (MEMORY, RuntimeError("Triton Error [CUDA]: out of memory")),
    (MEMORY, RuntimeError("CUDA driver error: out of memory")),
    (MEMORY, RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "CUDACachingAllocator.cpp":1131')),
    (MEMORY, RuntimeError("HIP out of memory. Tried to allocate 2 GiB")),
    (MEMORY, RuntimeError("CUSPARSE_STATUS_INSUFFICIENT_RESOURCES when calling `cusparseCreate(handle)`")),
    (MEMORY, RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED")),
    (MEMORY, RuntimeError("[GPU] clEnqueueNDRangeKernel, error code: -5 CL_OUT_OF_RESOURCES")),
    (MEMORY, RuntimeError("Unable to find a valid cuDNN algorithm to run convolution")),
    (MEMORY, RuntimeError("Expected canUse32BitIndexMath(input) && canUse32BitIndexMath(output) to be true")),
    (MEMORY, RuntimeError("upsample_bilinear2d_nhwc only supports output tensors with less than INT_MAX elements")),
    (HOST_MEMORY, MemoryError()),
    (HOST_MEMORY, MemoryError("Unable to allocate 3.00 GiB for an array")),
    (HOST_MEMORY, RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 9")),
    (HOST_MEMORY, RuntimeError("Exception from src/inference/src/cpp/infer_request.cpp:223: std::bad_alloc")),
    (HOST_MEMORY, RuntimeError("could not create a memory object")),
    (LOST, torch.AcceleratorError("CUDA error: an illegal memory access was encountered")),
    (LOST, torch.AcceleratorError("CUDA error: device-side assert triggered")),
    (LOST, torch.AcceleratorError("CUDA error: unspecified launch failure")),
    (LOST, torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")),
    (LOST, torch.AcceleratorError("CUDA error: the launch timed out and was terminated")),
    (LOST, torch.AcceleratorError("CUDA error: misaligned address")),
    (LOST, torch.AcceleratorError("CUDA error: something that nobody has seen yet")),
    (LOST, torch.AcceleratorError("XPU error: device lost")),
    (LOST, RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")),
    (LOST, RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`")),
    (LOST, RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")),
    (LOST, RuntimeError("CUDA driver error: unknown error")),
    (LOST, RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`")),
    (UNFIT, torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device")),
    (UNFIT, torch.AcceleratorError("CUDA error: the provided PTX was compiled with an unsupported toolchain.")),
    (UNFIT, torch.AcceleratorError("CUDA error: device kernel image is invalid")),
    (UNFIT, torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy or unavailable")),
    (UNFIT, torch.AcceleratorError("CUDA error: invalid device ordinal")),
    (UNFIT, RuntimeError("Triton Error [CUDA]: device kernel image is invalid")),
    (UNFIT, RuntimeError("No available kernel. Aborting execution.")),
    (UNFIT, RuntimeError("FlashAttention only supports Ampere GPUs or newer.")),
    (UNFIT, RuntimeError("PTXAS fatal : Value 'sm_103a' is not defined for option 'gpu-name'")),
    (UNFIT, RuntimeError("Could not load library libcudnn_cnn_infer.so.8")),
    (UNFIT, RuntimeError("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU")),
    (UNFIT, RuntimeError("The NVIDIA driver on your system is too old (found version 11040)")),
    (UNFIT, RuntimeError("CUDA driver version is insufficient for CUDA runtime version")),
    (UNFIT, RuntimeError("no CUDA-capable device is detected")),
    (UNFIT, RuntimeError("No CUDA GPUs are available")),
    (UNFIT, RuntimeError("CUDA initialization: Unexpected error from cudaGetDeviceCount()")),
    (UNFIT, RuntimeError("CUDA unknown error - this may be due to an incorrectly set up environment")),
    (UNFIT, RuntimeError("Cannot re-initialize CUDA in forked subprocess")),
    (UNFIT, AssertionError("Torch not compiled with CUDA enabled")),
    (UNFIT, OSError("libcuda.so.1: cannot open shared object file: No such file or directory")),
    (UNFIT, OutOfResources("out of resource: shared memory, Required: 264192, Hardware limit: 232448")),
)
"""What each says about the device, and the error."""


def one_of_each() -> dict[DeviceTrouble, Exception]:
    """One error of each trouble, the first of the table."""
    return {trouble: error for trouble, error in reversed(DEVICE_ERRORS)}
