"""
The header of model.bin: names, shapes and types of the weights, without the weights.

The file interleaves names and payloads, so its header is read in small pieces, one per
variable, and the payloads are skipped: milliseconds, and under 1 % of the file.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from whispercache.errors import CorruptModel, LoadFailed, UnknownModel

from .architecture import ITEM_BYTES, Architecture, Variable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

# The files that a load reads beside model.bin, where they are there.
SMALL_FILES = (
    *("config.json", "preprocessor_config.json", "tokenizer.json"),
    *("vocabulary.json", "vocabulary.txt"),
)

# How files before version 4 named their types: by the width of an element.
_TYPE_BY_WIDTH = {4: "float32", 2: "int16", 1: "int8"}

_VERSIONS = range(2, 7)
_SPEC = "WhisperSpec"
_WINDOW_BYTES = 256
# Far above the 1046 variables of large-v3; keeps garbage from being read for long.
_MAX_ENTRIES = 20_000
_MAX_RANK = 4


@dataclass(frozen=True, slots=True)
class ModelHeader:
    """
    The header of a model.bin.

    Attributes:
        path: The model.bin.
        version: Version of the file format, 2 to 6.
        revision: Revision of the Whisper specification.
        file_bytes: Size of the file.
        variables: Every tensor, in file order.
        aliases: Second names of variables, as pairs (alias, name). They take no bytes.
        architecture: The numbers behind the shapes.
        decoder_heads: Attention heads of each layer of the decoder.
    """

    path: Path
    version: int
    revision: int
    file_bytes: int
    variables: tuple[Variable, ...]
    aliases: tuple[tuple[str, str], ...]
    architecture: Architecture
    decoder_heads: int

    def __hash__(self) -> int:
        # All variables would take longer than most that is done with one.
        return hash((self.path, self.version, self.revision, self.file_bytes))

    @property
    def saved_compute_type(self) -> str:
        """
        The effective type that the weights were saved in, for example ``"float16"``.

        Where layers differ in type, the order of a hash map decides in CTranslate2; the
        embeddings decide here.
        """
        dtypes = {variable.name: variable.dtype for variable in self.variables}
        weight = dtypes["decoder/embeddings/weight"]
        if weight != "int8":
            return weight
        other = dtypes.get("decoder/layer_norm/gamma", "float32")
        return f"int8_{other}" if "float" in other else "int8_float32"


def read_header(path: str | os.PathLike[str]) -> ModelHeader:
    """
    Reads the header of a model.bin, given the file or the directory that holds it.

    Blocks: a few milliseconds of small reads.

    Raises:
        UnknownModel: there is no model.bin.
        CorruptModel: it is truncated, has trailing bytes, or is not a Whisper model.
        LoadFailed: it cannot be opened or read.

    Source: CTranslate2 python/ctranslate2/specs/model_spec.py:382-414 and
    src/models/model.cc:588-767 @ 0d8bcd3.
    """
    from pathlib import Path

    file_path = Path(path)
    try:
        if file_path.is_dir():
            file_path /= "model.bin"
        with file_path.open("rb", buffering=_WINDOW_BYTES) as file:
            # Read-ahead would pull in most of the file behind the small reads.
            # Absent on macOS and Windows.
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            size_bytes = os.fstat(file.fileno()).st_size
            return _Reader(file, file_path, size_bytes).header()
    except FileNotFoundError:
        reason = "there is no model.bin; give the directory of a converted model"
        raise UnknownModel(str(path), reason) from None
    except OSError as error:
        reason = f"model.bin cannot be read ({error.strerror}); check its permissions"
        raise LoadFailed(str(path), reason) from error


class _Reader:
    def __init__(self, file: BinaryIO, path: Path, size_bytes: int) -> None:
        self._file = file
        self._path = path
        self._size_bytes = size_bytes
        self._position = 0

    def header(self) -> ModelHeader:
        (version,) = self._take("<I", "the version")
        if version not in _VERSIONS:
            raise self._broken(f"version {version} of the file format is unknown")
        spec = self._string("the specification")
        if spec != _SPEC:
            raise self._broken(f"it is a {spec[:40]!r}, not a Whisper model")
        revision, count = self._take("<II", "the number of variables")
        variables: dict[str, Variable] = {}
        for _ in range(self._bounded(count, "variables")):
            variable = self._variable(version)
            if variable.name in variables:
                raise self._broken(f"{variable.name!r} is in it twice")
            variables[variable.name] = variable
        # Files before version 3 have none.
        aliases = self._aliases(variables) if version >= 3 else ()
        # The end of the aliases is the end of the file.
        if self._position != self._size_bytes:
            excess = self._size_bytes - self._position
            raise self._broken(f"{excess} bytes too many at its end")
        # Equal tensors may be in it once: the others are aliases of it then.
        named = {**variables, **{alias: variables[name] for alias, name in aliases}}
        architecture = self._architecture(named)
        return ModelHeader(
            path=self._path,
            version=version,
            revision=revision,
            file_bytes=self._size_bytes,
            variables=tuple(variables.values()),
            aliases=aliases,
            architecture=architecture,
            decoder_heads=self._heads(named, "decoder", architecture.d_model),
        )

    def _variable(self, version: int) -> Variable:
        name = self._string("the name of a variable")
        (rank,) = self._take("<B", name)
        if rank > _MAX_RANK:
            raise self._broken(f"{name!r} has {rank} dimensions")
        shape = self._take(f"<{rank}I", name)
        kind, length = self._take("<BI", name)
        if version >= 4:
            dtypes = tuple(ITEM_BYTES)
            dtype, nbytes = dtypes[kind] if kind < len(dtypes) else "", length
        else:
            # Here "kind" is the width of an element, and "length" their number.
            dtype, nbytes = _TYPE_BY_WIDTH.get(kind, ""), length * kind
        if not dtype:
            raise self._broken(f"{name!r} has an unknown type ({kind})")
        variable = Variable(name, shape, dtype, nbytes, self._position)
        if variable.elements * ITEM_BYTES[dtype] != nbytes:
            raise self._broken(f"{name!r} has {nbytes} bytes, not what its shape needs")
        if self._position + nbytes > self._size_bytes:
            raise self._truncated(name)
        # The payload is skipped, not read.
        self._position += nbytes
        return variable

    def _aliases(
        self, variables: Mapping[str, Variable]
    ) -> tuple[tuple[str, str], ...]:
        (count,) = self._take("<I", "the number of aliases")
        aliases: list[tuple[str, str]] = []
        for _ in range(self._bounded(count, "aliases")):
            alias, target = self._string("an alias"), self._string("an alias")
            if alias in variables or target not in variables:
                raise self._broken(f"the alias {alias!r} of {target!r} is wrong")
            aliases.append((alias, target))
        return tuple(aliases)

    def _architecture(self, variables: Mapping[str, Variable]) -> Architecture:
        mels_shape = self._shape(variables, "encoder/conv1/weight", rank=3)
        vocabulary, d_model = self._shape(
            variables, "decoder/embeddings/weight", rank=2
        )
        ffn, _ = self._shape(variables, "encoder/layer_0/ffn/linear_0/weight", rank=2)
        layers = [
            self._layers(variables, f"{stack}/layer_")
            for stack in ("encoder", "decoder")
        ]
        if mels_shape[0] != d_model or 0 in (*mels_shape, vocabulary, ffn, *layers):
            raise self._broken("its shapes are not those of a Whisper model")
        heads = self._heads(variables, "encoder", d_model)
        return Architecture(
            d_model, layers[0], layers[1], heads, ffn, mels_shape[1], vocabulary
        )

    def _shape(
        self, variables: Mapping[str, Variable], name: str, rank: int
    ) -> tuple[int, ...]:
        variable = variables.get(name)
        if variable is None or len(variable.shape) != rank:
            raise self._broken(f"{name!r} is missing or has the wrong shape")
        return variable.shape

    def _layers(self, variables: Mapping[str, Variable], prefix: str) -> int:
        found = {
            name[len(prefix) :].partition("/")[0]
            for name in variables
            if name.startswith(prefix)
        } - {"norm"}
        if found != {str(layer) for layer in range(len(found))}:
            raise self._broken(f"some layers of {prefix!r} are missing")
        return len(found)

    def _heads(
        self, variables: Mapping[str, Variable], stack: str, d_model: int
    ) -> int:
        scalar = variables.get(f"{stack}/num_heads")
        if scalar is None:
            # Old conversions do not say; every Whisper has heads of width 64.
            return max(1, d_model // 64)
        self._position = scalar.offset
        raw = self._bytes(scalar.nbytes, scalar.name)
        heads = int.from_bytes(raw, "little", signed=True)
        if scalar.shape or "int" not in scalar.dtype or not 1 <= heads <= d_model:
            raise self._broken(f"{heads} attention heads for a width of {d_model}")
        return heads

    def _bounded(self, count: int, what: str) -> int:
        if count > _MAX_ENTRIES:
            raise self._broken(f"it claims {count} {what}")
        return count

    def _string(self, what: str) -> str:
        (length,) = self._take("<H", what)
        raw = self._bytes(length, what)
        text = raw.partition(b"\0")[0]
        # The stored length counts the NUL that ends the text.
        if len(text) != length - 1:
            raise self._broken(f"garbage in place of {what} at byte {self._position}")
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise self._broken(f"{what} is not text") from None

    def _take(self, layout: str, what: str) -> tuple[int, ...]:
        return struct.unpack(layout, self._bytes(struct.calcsize(layout), what))

    def _bytes(self, length: int, what: str) -> bytes:
        self._file.seek(self._position)
        # Not read where it cannot be: a wrong length may be gigabytes.
        is_there = self._position + length <= self._size_bytes
        raw = self._file.read(length) if is_there else b""
        if len(raw) < length:
            raise self._truncated(what)
        self._position += length
        return raw

    def _truncated(self, what: str) -> CorruptModel:
        return self._broken(
            f"model.bin is truncated: {self._size_bytes} bytes, and {what} goes on"
        )

    def _broken(self, reason: str) -> CorruptModel:
        return CorruptModel(str(self._path.parent), reason)
