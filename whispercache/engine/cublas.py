"""
Errors of cuBLAS, explained: a missing library, or one that is too old for the card.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from whispercache.devices import release
from whispercache.devices.cublas import cublas_problem
from whispercache.devices.faults import Fault, classify

if TYPE_CHECKING:
    from whispercache.keys import ModelKey


def cublas_error_reason(error: Exception, key: ModelKey) -> str:
    """
    Explains an error of cuBLAS, with its cure; empty if it is another error.

    Source: the texts of CTranslate2 4.8.5. Before 4.7 it asks for products in int8 that
    no cuBLAS has for Blackwell (OpenNMT/CTranslate2#1982).
    """
    if "libcublas" in str(error) or "cublas64" in str(error):
        return cublas_problem() or str(error)
    if classify(error) is not Fault.UNSUPPORTED:
        return ""
    why = release.cublas_reason(key.device) or (
        f"it cannot compute in {key.compute_type} on {key.device}"
    )
    other = "another device, such as 'cpu'"
    if key.compute_type.startswith("int8"):
        other = "compute_type='float16'"
    update = "pip install -U nvidia-cublas-cu12 ctranslate2"
    return f"{error}: {why}; {update}, or take {other}"
