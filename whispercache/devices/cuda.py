"""
The NVIDIA driver through ctypes: which GPUs CUDA sees, and what it knows of them.

It needs no toolkit. It never creates a context, which would cost a few hundred MiB of
the card. What only a context can tell is unknown until another library has made one.

Opening the driver calls ``cuInit``, which reads ``CUDA_VISIBLE_DEVICES`` for the last
time and makes CUDA unusable in processes forked later. Therefore the driver is opened
by the first question about a GPU, and not before.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

DRIVER_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

# From cuda.h.
_NO_DEVICE = 100
_ATTRIBUTE_INTEGRATED = 18
_ATTRIBUTE_CAPABILITY_MAJOR = 75
_ATTRIBUTE_CAPABILITY_MINOR = 76
_ATTRIBUTE_POOLS_SUPPORTED = 115
_POOL_RESERVED_CURRENT = 5
_POOL_USED_CURRENT = 7
_POOL_USED_HIGH = 8


class CudaError(RuntimeError):
    """
    A driver that is missing or refused a call; the text says how to mend that.
    """


@dataclass(frozen=True, slots=True)
class Pool:
    """
    The pool that this process's CUDA allocates a GPU's memory from, at one moment.

    CTranslate2 allocates from it (``cudaMallocAsync``), as other libraries here may.
    Other processes have their own. The numbers are read one after the other and may
    disagree while another thread allocates.
    """

    used_bytes: int  # allocated and not freed
    reserved_bytes: int  # held of the card, in use or not
    peak_bytes: int  # the most that was in use since `Driver.forget_peak`

    @property
    def idle_bytes(self) -> int:
        """
        Bytes held of the card without being in use, which a trim gives back.
        """
        return max(self.reserved_bytes - self.used_bytes, 0)


class Driver:
    """
    The driver as this process sees it. GPUs go by CUDA's numbers, visible ones only.

    Every method raises `CudaError` where the driver refuses.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        # Allowed more than once, and by other libraries of the process as well.
        self._call("cuInit", 0)
        count = ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        self.device_count: int = count.value

    def uuid(self, ordinal: int) -> str:
        """
        Returns the UUID of the GPU, or of the MIG slice where it is one, unprefixed.
        """
        raw = (ctypes.c_ubyte * 16)()
        self._call("cuDeviceGetUuid_v2", raw, self._device(ordinal))
        text = bytes(raw).hex()
        # In groups, as NVML and nvidia-smi write it.
        cuts = ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32))
        return "-".join(text[start:end] for start, end in cuts)

    def pci_bus_id(self, ordinal: int) -> str:
        """
        Returns the card's slot, for example ``"0000:3b:00.0"``.
        """
        text = ctypes.create_string_buffer(32)
        self._call("cuDeviceGetPCIBusId", text, len(text), self._device(ordinal))
        return text.value.decode()

    def name(self, ordinal: int) -> str:
        """
        Returns the card's name, with the profile of a MIG slice.
        """
        text = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", text, len(text), self._device(ordinal))
        return text.value.decode(errors="replace")

    def total_bytes(self, ordinal: int) -> int:
        """
        Returns the GPU's memory that CUDA programs can use, taken or not.
        """
        total = ctypes.c_size_t()
        device = self._device(ordinal)
        self._call("cuDeviceTotalMem_v2", ctypes.byref(total), device)
        return total.value

    def is_integrated(self, ordinal: int) -> bool:
        """
        Tests if the GPU has no memory of its own but shares the host's.
        """
        return bool(self._attribute(self._device(ordinal), _ATTRIBUTE_INTEGRATED))

    def compute_capability(self, ordinal: int) -> tuple[int, int]:
        """
        Returns the generation of code that the GPU runs, for example ``(8, 6)``.
        """
        device = self._device(ordinal)
        return (
            self._attribute(device, _ATTRIBUTE_CAPABILITY_MAJOR),
            self._attribute(device, _ATTRIBUTE_CAPABILITY_MINOR),
        )

    def is_active(self, ordinal: int) -> bool:
        """
        Tests if this process has a context on the GPU.
        """
        # Of all threads: cuCtxGetCurrent would only tell of this one.
        flags, active = ctypes.c_uint(), ctypes.c_int()
        self._call(
            "cuDevicePrimaryCtxGetState",
            self._device(ordinal),
            ctypes.byref(flags),
            ctypes.byref(active),
        )
        return bool(active.value)

    def free_bytes(self, ordinal: int) -> int | None:
        """
        Returns the GPU's free bytes; None while this process has no context there.
        """
        with self._context(ordinal) as device:
            # The driver answers only with a context, and to create one takes memory.
            if device is None:
                return None
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
            return free.value

    def synchronize(self, ordinal: int) -> bool:
        """
        Waits for all of this process's work on the GPU; False where it has no context.

        Errors of that work, such as an illegal memory access, are raised here.

        Blocks: until the work is done.
        """
        with self._context(ordinal) as device:
            if device is not None:
                self._call("cuCtxSynchronize")
            return device is not None

    def pool(self, ordinal: int) -> Pool | None:
        """
        Reads the GPU's memory pool; None without a context, or where it has no pools.
        """
        with self._pool(ordinal) as pool:
            if pool is None:
                return None
            return Pool(
                used_bytes=self._pool_bytes(pool, _POOL_USED_CURRENT),
                reserved_bytes=self._pool_bytes(pool, _POOL_RESERVED_CURRENT),
                peak_bytes=self._pool_bytes(pool, _POOL_USED_HIGH),
            )

    def trim(self, ordinal: int) -> bool:
        """
        Gives the pool's idle memory back to the card; False where there is no pool.

        A threshold that another library of this process set does not stop that.

        Blocks: until this process's work on the GPU is done.
        """
        with self._pool(ordinal) as pool:
            if pool is not None:
                # Memory that was freed in stream order is idle only after that.
                self._call("cuCtxSynchronize")
                self._call("cuMemPoolTrimTo", pool, ctypes.c_size_t(0))
            return pool is not None

    def forget_peak(self, ordinal: int) -> None:
        """
        Counts the pool's peak from now on; does nothing where there is no pool.
        """
        with self._pool(ordinal) as pool:
            if pool is not None:
                # Zero is the only value that a peak can be set to.
                none = ctypes.c_uint64(0)
                name = "cuMemPoolSetAttribute"
                self._call(name, pool, _POOL_USED_HIGH, ctypes.byref(none))

    @contextmanager
    def _context(self, ordinal: int) -> Iterator[ctypes.c_int | None]:
        """
        Yields the device, its context current on this thread; None where it has none.
        """
        # The primary context is the one that CTranslate2, by the CUDA runtime, uses.
        if not self.is_active(ordinal):
            yield None
            return
        device, context = self._device(ordinal), ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        try:
            # The thread may have another context current, and gets that back.
            self._call("cuCtxPushCurrent_v2", context)
            try:
                yield device
            finally:
                self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
        finally:
            self._call("cuDevicePrimaryCtxRelease_v2", device)

    @contextmanager
    def _pool(self, ordinal: int) -> Iterator[ctypes.c_void_p | None]:
        """
        Yields the pool in use on the GPU, its context current; None without one.
        """
        with self._context(ordinal) as device:
            # A driver without pools refuses the calls below.
            if device is None or not self._attribute(
                device, _ATTRIBUTE_POOLS_SUPPORTED
            ):
                yield None
                return
            pool = ctypes.c_void_p()
            self._call("cuDeviceGetMemPool", ctypes.byref(pool), device)
            yield pool

    def _pool_bytes(self, pool: ctypes.c_void_p, attribute: int) -> int:
        value = ctypes.c_uint64()
        self._call("cuMemPoolGetAttribute", pool, attribute, ctypes.byref(value))
        return value.value

    def _attribute(self, device: ctypes.c_int, attribute: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        return value.value

    def _device(self, ordinal: int) -> ctypes.c_int:
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        return device

    def _call(self, function: str, *arguments: object) -> None:
        try:
            code = getattr(self._library, function)(*arguments)
        except AttributeError:
            raise CudaError(
                f"the NVIDIA driver is too old: it has no {function}; update it"
            ) from None
        # The usual case in a container, so it gets an advice of its own.
        if code == _NO_DEVICE:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            raise CudaError(
                f"CUDA sees no GPU (CUDA_VISIBLE_DEVICES is {visible!r}); check with "
                "nvidia-smi, in a container start it with --gpus all"
            )
        if code != 0:
            raise CudaError(
                f"the NVIDIA driver failed: {function}: {self._error_text(code)}; "
                "check with nvidia-smi"
            )

    def _error_text(self, code: int) -> str:
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(code, ctypes.byref(text))
        return f"{(text.value or b'error').decode(errors='replace')} ({code})"


def is_open() -> bool:
    """
    Tests if this process, or one that forked it, has opened the driver.
    """
    # Asked by the count of the cache, since asking the function would open it.
    return _open_driver.cache_info().currsize > 0 and isinstance(_open_driver(), Driver)


def open_driver() -> Driver:
    """
    Returns this process's `Driver`, which the first call opens.

    A failure is remembered, too.

    Raises:
        CudaError: There is no driver, or it sees no GPU.
    """
    driver = _open_driver()
    if isinstance(driver, str):
        # A new one each time: a kept exception would collect tracebacks.
        raise CudaError(driver)
    return driver


@functools.cache
def _open_driver() -> Driver | str:
    # Two threads may both get here, which cuInit allows.
    try:
        return Driver(ctypes.CDLL(DRIVER_LIBRARY))
    except OSError as error:
        return (
            f"no NVIDIA driver: {DRIVER_LIBRARY} cannot be loaded ({error}); install "
            "the driver, in a container start it with --gpus all, or use device='cpu'"
        )
    except CudaError as error:
        return f"{error}, or use device='cpu'"
