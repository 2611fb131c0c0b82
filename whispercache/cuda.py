"""
The NVIDIA driver through ctypes: which GPUs CUDA sees, and what it knows of them.

Needs no toolkit. Never creates a context, which would cost a few hundred MiB of the
card: what only a context can tell is told only if somebody else made one already.

Opening the driver calls ``cuInit``, which reads ``CUDA_VISIBLE_DEVICES`` for the last
time and makes CUDA unusable in processes forked later: only the first question about a
GPU does it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CudaError", "Driver", "cublas_problem", "is_open", "open_driver"]

_IS_WINDOWS = sys.platform == "win32"
_DRIVER_LIBRARY = "nvcuda.dll" if _IS_WINDOWS else "libcuda.so.1"
_CUBLAS_LIBRARY = "cublas64_12.dll" if _IS_WINDOWS else "libcublas.so.12"

# From cuda.h.
_NO_DEVICE = 100
_ATTRIBUTE_INTEGRATED = 18


class CudaError(Exception):
    """
    The driver is missing or refused a call; the text says what, and how to mend it.
    """


class Driver:
    """
    The driver as this process sees it. GPUs go by CUDA's numbers, visible ones only.

    Every method raises `CudaError` where the driver refuses.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._call("cuInit", 0)
        count = ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        self.device_count: int = count.value

    def uuid(self, ordinal: int) -> str:
        """
        The GPU's UUID without prefix, or that of the MIG slice where it is one.
        """
        raw = (ctypes.c_ubyte * 16)()
        self._call("cuDeviceGetUuid_v2", raw, self._device(ordinal))
        text = bytes(raw).hex()
        cuts = ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32))
        return "-".join(text[start:end] for start, end in cuts)

    def pci_bus_id(self, ordinal: int) -> str:
        """
        Where the card sits, for example ``"0000:3b:00.0"``.
        """
        text = ctypes.create_string_buffer(32)
        self._call("cuDeviceGetPCIBusId", text, len(text), self._device(ordinal))
        return text.value.decode()

    def name(self, ordinal: int) -> str:
        """
        The card's name, with the profile of a MIG slice.
        """
        text = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", text, len(text), self._device(ordinal))
        return text.value.decode(errors="replace")

    def total_bytes(self, ordinal: int) -> int:
        """
        Memory of the GPU that CUDA programs can use, taken or not.
        """
        total = ctypes.c_size_t()
        device = self._device(ordinal)
        self._call("cuDeviceTotalMem_v2", ctypes.byref(total), device)
        return total.value

    def is_integrated(self, ordinal: int) -> bool:
        """
        Whether the GPU has no memory of its own but shares the host's.
        """
        value = ctypes.c_int()
        device = self._device(ordinal)
        self._call(
            "cuDeviceGetAttribute", ctypes.byref(value), _ATTRIBUTE_INTEGRATED, device
        )
        return bool(value.value)

    def free_bytes(self, ordinal: int) -> int | None:
        """
        Free bytes of the GPU, or None while no context is active in this process.
        """
        device = self._device(ordinal)
        if not self._is_active(device):
            return None
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        try:
            self._call("cuCtxPushCurrent_v2", context)
            try:
                free, total = ctypes.c_size_t(), ctypes.c_size_t()
                self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
                return free.value
            finally:
                self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
        finally:
            self._call("cuDevicePrimaryCtxRelease_v2", device)

    def _is_active(self, device: ctypes.c_int) -> bool:
        flags, active = ctypes.c_uint(), ctypes.c_int()
        self._call(
            "cuDevicePrimaryCtxGetState",
            device,
            ctypes.byref(flags),
            ctypes.byref(active),
        )
        return bool(active.value)

    def _device(self, ordinal: int) -> ctypes.c_int:
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        return device

    def _call(self, function: str, *arguments: object) -> None:
        """
        Call *function*. The arguments are ctypes values already, or small integers.
        """
        try:
            code = getattr(self._library, function)(*arguments)
        except AttributeError:
            msg = f"the NVIDIA driver is too old: it has no {function}; update it"
            raise CudaError(msg) from None
        if code == _NO_DEVICE:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            msg = (
                f"CUDA sees no GPU (CUDA_VISIBLE_DEVICES is {visible!r}); check with "
                "nvidia-smi, in a container start it with --gpus all"
            )
            raise CudaError(msg)
        if code != 0:
            msg = (
                f"the NVIDIA driver failed: {function}: {self._error_text(code)}; "
                "check with nvidia-smi"
            )
            raise CudaError(msg)

    def _error_text(self, code: int) -> str:
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(code, ctypes.byref(text))
        return f"{(text.value or b'error').decode(errors='replace')} ({code})"


def is_open() -> bool:
    """
    Whether this process, or one that forked it, has opened the driver.
    """
    return _open_driver.cache_info().currsize > 0 and isinstance(_open_driver(), Driver)


def open_driver() -> Driver:
    """
    This process's `Driver`, opened by the first call; a failure is remembered too.

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
    """
    The driver, or why there is none. Two threads may both get here; cuInit allows it.
    """
    try:
        return Driver(ctypes.CDLL(_DRIVER_LIBRARY))
    except OSError as error:
        return (
            f"no NVIDIA driver: {_DRIVER_LIBRARY} cannot be loaded ({error}); install "
            "the driver, in a container start it with --gpus all, or use device='cpu'"
        )
    except CudaError as error:
        return f"{error}, or use device='cpu'"


def cublas_problem() -> str | None:
    """
    What keeps CTranslate2 from finding cuBLAS 12, and how to mend it; None if nothing.

    Loads the library into this process, a few hundred MiB of address space.
    """
    try:
        ctypes.CDLL(_CUBLAS_LIBRARY)
    except OSError:
        pass
    else:
        return None
    folder = next(_cublas_folders(), None)
    if folder is None:
        variable = "PATH" if _IS_WINDOWS else "LD_LIBRARY_PATH"
        return (
            f"{_CUBLAS_LIBRARY} was not found: pip install nvidia-cublas-cu12, "
            f"then put its folder nvidia/cublas/lib on {variable} and start again"
        )
    return f"{_CUBLAS_LIBRARY} is installed but not found: {_path_command(folder)}"


def _path_command(folder: Path) -> str:
    """
    The shell line that puts *folder* where the dynamic loader looks.
    """
    if _IS_WINDOWS:
        return f"set PATH={folder};%PATH%"
    return f'export LD_LIBRARY_PATH="{folder}:$LD_LIBRARY_PATH" and start again'


def _cublas_folders() -> Iterator[Path]:
    """
    Folders of the pip package nvidia-cublas-cu12 that hold the library.
    """
    inside = "nvidia/cublas/bin" if _IS_WINDOWS else "nvidia/cublas/lib"
    for entry in sys.path:
        folder = Path(entry) / inside
        if (folder / _CUBLAS_LIBRARY).is_file():
            yield folder.resolve()
