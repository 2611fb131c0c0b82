"""
The bytes of a model's tensors on each device, in each compute type.

CTranslate2 converts each tensor by rules that depend only on its name, its shape and
the compute type, so the sums are exact.

Source: CTranslate2 src/models/model.cc:178-425 @ 0d8bcd3; on the CPU measured with
4.8.5 for tiny.en, base and the shape of large-v3.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import TYPE_CHECKING

from .architecture import ITEM_BYTES, Architecture, Variable, layout
from .header import ModelHeader

if TYPE_CHECKING:
    from collections.abc import Mapping

# The source of shapes: a file, or, before there is one, a known size.
Source = ModelHeader | Architecture

# Types of (linear layers, everything else) in each effective compute type.
DTYPES: Mapping[str, tuple[str, str]] = {
    "float32": ("float32", "float32"),
    "float16": ("float16", "float16"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "int16": ("int16", "float32"),
    "int8_float32": ("int8", "float32"),
    "int8_float16": ("int8", "float16"),
    "int8_bfloat16": ("int8", "bfloat16"),
}

# Packed copies as multiples of the unpacked bytes: (linear layers, projection). Source:
# measured with CT2_USE_MKL=1, tiny.en and base, CTranslate2 4.8.5, MKL on AVX2.
_PACKED_FLOAT = (0.0, 1.3)
_PACKED_INT8 = (1.0, 2.75)


def weights_bytes(source: Source, compute_type: str, device: str) -> int:
    """
    Returns the bytes of the tensors once loaded, exactly, but for single numbers and
    the copies that MKL packs on Intel CPUs (`packing_bytes()`).

    On CPUs without oneDNN (ARM) convolutions are quantized too, and take less.
    """
    on_cpu = device == "cpu"
    variables, aliases = _tensors(source)
    total = sum(
        _resident_bytes(each, compute_type, on_cpu=on_cpu) for each in variables
    )
    if on_cpu and DTYPES[compute_type][0] == "int8":
        # The tied output layer is a linear layer of its own to this sum of its rows.
        rows = {each.name: each.shape[0] for each in variables if each.shape}
        total += sum(4 * rows[name] for alias, name in aliases if _is_linear(alias))
    return total


def architecture_of(source: Source) -> Architecture:
    """
    Returns the architecture behind *source*.
    """
    return source if isinstance(source, Architecture) else source.architecture


def _tensors(
    source: Source,
) -> tuple[tuple[Variable, ...], tuple[tuple[str, str], ...]]:
    if isinstance(source, ModelHeader):
        return source.variables, source.aliases
    return layout(source), (("decoder/projection/weight", "decoder/embeddings/weight"),)


def _is_linear(name: str) -> bool:
    return name.endswith("weight") and "embeddings" not in name and "conv" not in name


def _loaded_dtype(variable: Variable, compute_type: str) -> str:
    weight, other = DTYPES[compute_type]
    if variable.name.endswith("weight") and "conv" not in variable.name:
        return weight
    # Neither CUDA nor oneDNN has a quantized convolution.
    is_float = "float" in variable.dtype or variable.name.endswith("weight")
    return other if is_float else variable.dtype


def _resident_bytes(variable: Variable, compute_type: str, *, on_cpu: bool) -> int:
    if not variable.shape or variable.name.endswith("weight_scale"):
        return 0
    dtype = _loaded_dtype(variable, compute_type)
    total = variable.elements * ITEM_BYTES[dtype]
    if dtype == "int8" and variable.name.endswith("weight"):
        total += 4 * variable.shape[0]
        # oneDNN keeps the sum of each row, which corrects unsigned products.
        if on_cpu and _is_linear(variable.name):
            total += 4 * variable.shape[0]
    return total


def converting_bytes(source: Source, compute_type: str) -> int:
    """
    Returns the host bytes at the worst peak of reading and converting the file.
    """
    total = worst = 0
    for each in _tensors(source)[0]:
        loaded = _resident_bytes(each, compute_type, on_cpu=True)
        total += max(each.nbytes, loaded)
        dtypes = {each.dtype, _loaded_dtype(each, compute_type)}
        if len(dtypes) == 2:
            # Both are there for a moment, with float32 between them if neither is that.
            between = 0 if "float32" in dtypes else 4 * each.elements
            worst = max(worst, min(each.nbytes, loaded) + between)
    return total + worst


def output_copy_bytes(architecture: Architecture, compute_type: str) -> int:
    """
    Returns the bytes of the padded second output layer that the first call makes.

    Source: CTranslate2 src/layers/decoder.cc:72-139, src/types.cc:345-363 @ 0d8bcd3.
    """
    weight, other = DTYPES[compute_type]
    multiple = {"int8": 16, "float16": 8, "bfloat16": 8}.get(weight, 1)
    if architecture.vocabulary % multiple == 0:
        return 0
    # Rounded up.
    rows = -(-architecture.vocabulary // multiple) * multiple
    scale_bytes = 4 if weight == "int8" else 0
    row_bytes = architecture.d_model * ITEM_BYTES[weight] + ITEM_BYTES[other]
    return rows * (row_bytes + scale_bytes)


def packing_bytes(source: Source, compute_type: str) -> tuple[int, int]:
    """
    Returns the bytes that MKL's packed weights add, and those that they replace.
    """
    architecture = architecture_of(source)
    item_bytes = ITEM_BYTES[DTYPES[compute_type][0]]
    per_linear, per_output = _PACKED_FLOAT if item_bytes == 4 else _PACKED_INT8
    linear = item_bytes * sum(
        each.elements for each in _tensors(source)[0] if _is_linear(each.name)
    )
    output = item_bytes * architecture.vocabulary * architecture.d_model
    return round(per_linear * linear + per_output * output), linear


def packs_weights() -> bool:
    """
    Tells whether CTranslate2 packs weights on this CPU: by default, on Intel's.

    Source: CTranslate2 src/cpu/backend.cc @ 0d8bcd3.
    """

    def is_set(name: str, *, default: bool) -> bool:
        value = os.environ.get(name)
        return default if value is None else value.lower() in ("1", "true")

    return is_set("CT2_PACKED_GEMM", default=True) and is_set(
        "CT2_USE_MKL", default=_is_intel()
    )


@lru_cache(maxsize=1)
def _is_intel() -> bool:
    import platform
    from pathlib import Path

    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        is_intel_mac = (platform.system(), platform.machine()) == ("Darwin", "x86_64")
        return is_intel_mac or "GenuineIntel" in platform.processor()
