"""
The conversion of a model.bin to another weight type, exactly as a load would do it.

CTranslate2 converts a file to the compute type at each load. Here that is done once,
block by block, in a few megabytes of memory. Only what every load converts alike is
converted: for int8 the linear layers and embeddings, each row with a scale of its own.
So one int8 file serves int8_float32, int8_float16 and int8_bfloat16, and the loaded
weights are the same to the last bit.

``ctranslate2.specs`` can write such files, too, but holds the whole model in memory,
and `optimize` quantizes convolutions, which a load does not: the encoder's output
differs (by 17.8 at most, CTranslate2 4.8.5).
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from whispercache.engine.sizes.architecture import ITEM_BYTES, Variable
from whispercache.engine.sizes.weights import DTYPES
from whispercache.errors import CorruptModel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from whispercache.engine.sizes.header import ModelHeader

# Weight types that can be written. numpy has no bfloat16, and int16 is scaled
# otherwise.
KINDS = ("int8", "float32", "float16")
# The version decides how a quantized model rounds; all Whisper files have this one.
# Source: CTranslate2 src/models/model.cc, round_before_cast_in_quantization.
_VERSION = 6

_FLOATS = ("float32", "float16", "bfloat16")
_BLOCK_ELEMENTS = 1 << 20
_INT8_MAX = 127.0


class Origin(NamedTuple):
    """
    A model that variants are made of: its name, and the header of its model.bin. The
    *stamp* changes when one of its files does; without one they are read each time.
    """

    model: str
    header: ModelHeader
    stamp: tuple[int, ...] = ()

    @property
    def directory(self) -> Path:
        """
        The directory of its files.
        """
        return self.header.path.parent


def kind_for(header: ModelHeader, compute_type: str) -> str | None:
    """
    Returns the weight type that a file should have to be loaded in *compute_type* as it
    is; None if it has that already, or cannot be converted with the same result: from
    int8 back to floats, or to a type that is none of `KINDS`.
    """
    saved = {each.name: each.dtype for each in header.variables}
    weight = saved["decoder/embeddings/weight"]
    wanted = DTYPES[compute_type][0]
    # From int8 nothing better can be made.
    if header.version != _VERSION or weight not in _FLOATS:
        return None
    return wanted if wanted in KINDS and wanted != weight else None


def converted_bytes(header: ModelHeader, kind: str) -> int:
    """
    Returns the size of what `write_converted` writes, but for a few bytes a variable.
    """
    total = header.file_bytes
    for variable in header.variables:
        dtype = _dtype(variable, kind)
        total += variable.elements * ITEM_BYTES[dtype] - variable.nbytes
        if _is_quantized(variable, kind):
            total += 4 * variable.shape[0]
    return total


def write_converted(header: ModelHeader, kind: str, target: BinaryIO) -> None:
    """
    Writes the model behind *header* with its weights in *kind*.

    Blocks: reads and writes the whole model; base takes about half a second.

    Raises:
        CorruptModel: the file is shorter than its header says.
        OSError: it cannot be read, or *target* not be written.
    """
    quantized = sum(_is_quantized(each, kind) for each in header.variables)
    target.write(struct.pack("<I", _VERSION) + _string("WhisperSpec"))
    count = len(header.variables) + quantized
    target.write(struct.pack("<II", header.revision, count))
    with header.path.open("rb") as source:
        for variable in header.variables:
            _write_variable(header, variable, kind, source, target)
    target.write(struct.pack("<I", len(header.aliases)))
    target.writelines(_string(alias) + _string(name) for alias, name in header.aliases)


def _is_quantized(variable: Variable, kind: str) -> bool:
    # No backend that matters here has a quantized convolution.
    is_linear = variable.name.endswith("weight") and "conv" not in variable.name
    return kind == "int8" and is_linear and variable.dtype in _FLOATS


def _dtype(variable: Variable, kind: str) -> str:
    if _is_quantized(variable, kind):
        return "int8"
    # Single numbers stay as they are.
    is_float = bool(variable.shape) and variable.dtype in _FLOATS
    return kind if is_float and kind != "int8" else variable.dtype


def _write_variable(
    header: ModelHeader,
    variable: Variable,
    kind: str,
    source: BinaryIO,
    target: BinaryIO,
) -> None:
    import numpy as np

    dtype = _dtype(variable, kind)
    target.write(_entry(variable.name, variable.shape, dtype))
    source.seek(variable.offset)
    if dtype == variable.dtype:
        target.writelines(_blocks(header, variable, source))
        return
    scales: list[NDArray[np.float32]] = []
    for raw in _blocks(header, variable, source):
        values = _as_float32(raw, variable.dtype)
        if dtype == "int8":
            rows, scale = _quantize(values.reshape(-1, _row_elements(variable)))
            scales.append(scale)
            target.write(rows.tobytes())
        else:
            # A number too large for float16 becomes infinite, as in a load.
            with np.errstate(over="ignore"):
                target.write(values.astype(dtype, copy=False).tobytes())
    if scales:
        name = f"{variable.name}_scale"
        # After the weights: the order within the file does not matter to a load.
        target.write(_entry(name, (variable.shape[0],), "float32"))
        target.write(np.concatenate(scales).tobytes())


def _quantize(
    rows: NDArray[np.float32],
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    # As on the CPU. Source: CTranslate2 src/cpu/kernels.cc, quantize_s8 @ 0d8bcd3.
    import numpy as np

    largest = np.maximum(rows.max(axis=1), -rows.min(axis=1))
    # A row of zeros: any scale will do but one by zero.
    largest[largest == 0] = _INT8_MAX
    scale = np.float32(_INT8_MAX) / largest
    return np.rint(rows * scale[:, np.newaxis]).astype(np.int8), scale


def _as_float32(raw: bytes, dtype: str) -> NDArray[np.float32]:
    import numpy as np

    # numpy has no bfloat16, which is the upper half of a float32.
    if dtype == "bfloat16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(raw, np.dtype(dtype).newbyteorder("<")).astype("<f4")


def _row_elements(variable: Variable) -> int:
    return variable.elements // variable.shape[0] if variable.shape else 1


def _blocks(
    header: ModelHeader, variable: Variable, source: BinaryIO
) -> Iterator[bytes]:
    row_bytes = _row_elements(variable) * ITEM_BYTES[variable.dtype]
    # Whole rows, since each has a scale of its own.
    rows = max(1, _BLOCK_ELEMENTS // max(1, _row_elements(variable)))
    left = variable.nbytes
    while left:
        raw = source.read(min(left, rows * row_bytes))
        if len(raw) % row_bytes or not raw:
            reason = f"model.bin ends within {variable.name!r}"
            raise CorruptModel(str(header.path.parent), reason)
        left -= len(raw)
        yield raw


def _entry(name: str, shape: tuple[int, ...], dtype: str) -> bytes:
    kind = tuple(ITEM_BYTES).index(dtype)
    layout = f"<B{len(shape)}IBI"
    n_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    return _string(name) + struct.pack(layout, len(shape), *shape, kind, n_bytes)


def _string(text: str) -> bytes:
    raw = text.encode() + b"\0"
    return struct.pack("<H", len(raw)) + raw
