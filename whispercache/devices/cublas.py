"""
cuBLAS 12, which CTranslate2 opens by name at its first computation on a GPU.

Its pip package puts it where the dynamic loader does not look. After it was loaded from
there once, CTranslate2 finds it by its bare name, without ``LD_LIBRARY_PATH``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from pathlib import Path

_IS_WINDOWS = sys.platform == "win32"
_LIBRARY = "cublas64_12.dll" if _IS_WINDOWS else "libcublas.so.12"
# What cuBLAS itself needs comes first.
_PACKAGED = ("cublasLt64_12.dll" if _IS_WINDOWS else "libcublasLt.so.12", _LIBRARY)
# From library_types.h.
_MAJOR_VERSION, _MINOR_VERSION = 0, 1
_INSIDE = "nvidia/cublas/bin" if _IS_WINDOWS else "nvidia/cublas/lib"


def load_cublas() -> None:
    """
    Makes cuBLAS known by its name, from its pip package if it is in no other place.

    Does nothing where it cannot be loaded: CTranslate2 reports that at its first
    computation, and `cublas_problem` says why. Once found, it is not looked for again.
    """
    with contextlib.suppress(OSError):
        _load()


def cublas_problem() -> str | None:
    """
    Returns why CTranslate2 cannot find cuBLAS 12, and how to mend that; None if it can.

    Loads the library into this process, some 800 MiB of address space, for good.
    """
    try:
        _load()
    except OSError as error:
        return str(error)
    return None


def cublas_version() -> tuple[int, int] | None:
    """
    Returns the library's major and minor version, which are those of its CUDA.

    None where it is missing or does not tell. Loads it for good, as `cublas_problem`
    does. No GPU is touched.
    """
    numbers = []
    try:
        _load()
        # By its name, as CTranslate2 opens it.
        library = ctypes.CDLL(_LIBRARY)
        for of_version in (_MAJOR_VERSION, _MINOR_VERSION):
            number = ctypes.c_int()
            if library.cublasGetProperty(of_version, ctypes.byref(number)) != 0:
                return None
            numbers.append(number.value)
    except (OSError, AttributeError):
        return None
    major, minor = numbers
    return major, minor


@functools.cache
def _load() -> None:
    """
    Loads the library for good. A failure is not remembered.

    Raises:
        OSError: It is missing or broken; the text says how to mend that.
    """
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError as error:
        folder = _packaged_folder()
        if folder is None:
            variable = "PATH" if _IS_WINDOWS else "LD_LIBRARY_PATH"
            raise OSError(
                f"{_LIBRARY} was not found: pip install nvidia-cublas-cu12, or put "
                f"those of a CUDA 12 toolkit on {variable} and start again ({error})"
            ) from error
        _load_from(folder)


def _load_from(folder: Path) -> None:
    if sys.platform == "win32":
        # The handle that this gives is not needed: the folder stays.
        os.add_dll_directory(str(folder))
    try:
        for library in _PACKAGED:
            # Its symbols stay local: another library here may use another cuBLAS. A
            # library that opens it by name gets this one all the same, by its soname.
            ctypes.CDLL(str(folder / library))
    except OSError as error:
        raise OSError(
            f"{_LIBRARY} is in {folder} but cannot be loaded: pip install "
            f"--force-reinstall nvidia-cublas-cu12 ({error})"
        ) from error


def _packaged_folder() -> Path | None:
    for entry in sys.path:
        folder = Path(entry) / _INSIDE
        if (folder / _LIBRARY).is_file():
            return folder.resolve()
    return None
