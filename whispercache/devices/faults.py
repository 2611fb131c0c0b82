"""
The meaning of an error of CTranslate2 or CUDA for the cache. Pure.

CTranslate2 raises RuntimeError for every error on a device, with the text of the CUDA
runtime in it. So errors can only be told apart by their text.
"""

from __future__ import annotations

from enum import Enum, auto


class Fault(Enum):
    """
    A kind of error.
    """

    # An allocation failed. With less in memory the same work may succeed.
    OUT_OF_MEMORY = auto()
    # A wording with two meanings, one of them that: free memory decides.
    PERHAPS_OUT_OF_MEMORY = auto()
    # The process's CUDA context is broken; every further call on the device fails.
    STICKY = auto()
    # A library cannot compute this on that device. In another type, or with a newer
    # library, the same model may work.
    UNSUPPORTED = auto()
    # Anything else: broken files, a missing library, a mistake in a call.
    OTHER = auto()


_OUT_OF_MEMORY = (
    "out of memory",
    "cublas_status_alloc_failed",
    "cudaerrormemoryallocation",
    "std::bad_alloc",
    "cannot allocate memory",
    "failed to allocate memory",
)

# Source: OpenNMT/CTranslate2#2064, a launch by thrust that found no memory; NVIDIA,
# cuBLAS, cublasCreate: also "an error in the hardware setup".
_PERHAPS_OUT_OF_MEMORY = (
    "cudaerrorinvaliddevice",
    "invalid device ordinal",
    "cublas_status_not_initialized",
)

# Texts of those CUDA errors that leave a context unusable.
# Source: the CUDA runtime's reference, cudaError: "leaves the process in an
# inconsistent state"; the texts are those of cudaGetErrorString.
_STICKY = (
    "illegal memory access",
    "illegal instruction was encountered",
    "misaligned address",
    "invalid program counter",
    "operation not supported on global/shared address space",
    "hardware stack error",
    "device-side assert",
    "unspecified launch failure",
    "launch timed out and was terminated",
    "uncorrectable ecc error",
    "uncorrectable nvlink error",
    "gpu has fallen off the bus",
    "gpu is lost",
)


# Source: OpenNMT/CTranslate2#1865, int8 on GeForce RTX 50xx; NVIDIA, cuBLAS, its
# status: "the device architecture" lacks what the function needs.
_UNSUPPORTED = ("cublas_status_not_supported", "cublas_status_arch_mismatch")


def is_from_ctranslate2(error: BaseException) -> bool:
    """
    Tests by its wording if an error that left a caller's block is CTranslate2's.

    Another library's error may be about another device.

    Source: src/cuda/utils.h @ 0d8bcd3, CUDA_CHECK and CUBLAS_CHECK; what Thrust throws
    passes as it is.
    """
    # Case matters: other libraries speak of CUDA failures in other words.
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        words in text
        for words in (
            "CUDA failed with error",
            "cuBLAS failed with status",
            "parallel_for failed",
        )
    )


def classify(error: BaseException) -> Fault:
    """
    Returns the kind of an error of a load, an unload or a call.
    """
    # Python's own, from an array or a file that did not fit.
    if isinstance(error, MemoryError):
        return Fault.OUT_OF_MEMORY
    if not isinstance(error, RuntimeError):
        return Fault.OTHER
    text = str(error).lower()
    # A broken context comes first: its texts may speak of memory as well.
    for wordings, fault in (
        (_STICKY, Fault.STICKY),
        (_OUT_OF_MEMORY, Fault.OUT_OF_MEMORY),
        (_PERHAPS_OUT_OF_MEMORY, Fault.PERHAPS_OUT_OF_MEMORY),
        (_UNSUPPORTED, Fault.UNSUPPORTED),
    ):
        if any(wording in text for wording in wordings):
            return fault
    return Fault.OTHER
