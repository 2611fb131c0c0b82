"""
The conversion of model.bin: the numbers that CTranslate2 would compute at each load.
"""

from __future__ import annotations

import functools
import math
import shutil
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import ctranslate2
import numpy as np
import pytest
from ctranslate2.models import Whisper
from faster_whisper import WhisperModel
from faster_whisper.feature_extractor import FeatureExtractor
from micro import build_micro
from real import MIB, child, clip, decode_audio, micro, packaged, reference

from whispercache import CorruptModel
from whispercache.engine.sizes.header import ModelHeader, read_header
from whispercache.engine.sizes.weights import DTYPES, weights_bytes
from whispercache.engine.variants.convert import (
    KINDS,
    converted_bytes,
    kind_for,
    write_converted,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from whispercache.engine.sizes.architecture import Variable

    Values = NDArray[np.float32]

SMALL_FILES = ("config.json", "tokenizer.json", "vocabulary.json", "vocabulary.txt")
# As in the file format.
TYPE_NUMBERS = {"float32": 0, "int8": 1, "int16": 2, "float16": 4, "bfloat16": 5}
SOME_FLOATS = (0.0, -0.0, 1.0, -1.0, 2049.0, 2051.0, 1.00048828125, math.pi)
OF_FLOAT16 = (65504.0, 65519.99, 65520.0, 1e6, -1e6, math.inf, 6.1e-5, 5.96e-8)
SUBNORMAL = (2.98e-8, 2.9802322e-8, 2.9802326e-8, 8.94e-8, 1e-8, 1e-40, 1.4e-45)


class Answers(NamedTuple):
    """
    All that one model says of one clip.
    """

    compute_type: str
    encoded: NDArray[Any]
    languages: list[tuple[str, float]]
    tokens: list[int]
    score: float
    text: str


def convert(source: Path, kind: str, target: Path) -> Path:
    """
    The model of *source* in *target*, its weights in *kind*.
    """
    target.mkdir()
    with (target / "model.bin").open("wb") as file:
        write_converted(read_header(source), kind, file)
    for name in SMALL_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    return target


@pytest.fixture(scope="session")
def converted(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, str], Path]:
    """
    Converts packaged models, each once.
    """

    @functools.cache
    def once(name: str, kind: str) -> Path:
        target = tmp_path_factory.mktemp("converted") / f"{name}-{kind}"
        return convert(packaged(name), kind, target)

    return once


@functools.cache
def features() -> NDArray[np.float32]:
    """
    Mels of the clip: (80, 3000).
    """
    samples = decode_audio(clip("en-bread"))
    assert isinstance(samples, np.ndarray)
    mels = FeatureExtractor()(samples)[:, :3000]
    return np.pad(mels, ((0, 0), (0, 3000 - mels.shape[1])))


def answers(directory: Path, compute_type: str) -> Answers:
    """
    What the model of *directory* says in *compute_type*, on one thread.
    """
    whisper = WhisperModel(
        str(directory), device="cpu", cpu_threads=1, compute_type=compute_type
    )
    model = whisper.model
    encoded = whisper.encode(features())
    first = "<|startoftranscript|>"
    is_multilingual = model.is_multilingual
    prompt = [first, "<|en|>", "<|transcribe|>"] if is_multilingual else [first]
    found = model.generate(encoded, [prompt], return_scores=True, beam_size=1)[0]
    return Answers(
        str(model.compute_type),
        np.array(encoded),
        model.detect_language(encoded)[0] if is_multilingual else [],
        found.sequences_ids[0],
        found.scores[0],
        whisper.hf_tokenizer.decode(found.sequences_ids[0]),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "compute_type"),
    [
        ("tiny.en", "int8"),
        ("tiny.en", "float32"),
        ("base", "int8_float32"),
        ("base", "float32"),
    ],
)
def test_a_converted_model_gives_the_very_same_numbers(
    converted: Callable[[str, str], Path], name: str, compute_type: str
) -> None:
    """
    To the last bit, from the encoder's output to the words, on real speech.
    """
    kind = "int8" if compute_type.startswith("int8") else compute_type
    before = answers(packaged(name), compute_type)
    after = answers(converted(name, kind), compute_type)
    assert np.array_equal(before.encoded, after.encoded)
    assert before._replace(encoded=after.encoded) == after
    effective = "int8_float32" if kind == "int8" else kind
    assert after.compute_type == effective
    words = {word.strip(".,").lower() for word in after.text.split()}
    spoken = {word.strip(".,").lower() for word in reference("en-bread").split()}
    assert len(words & spoken) > len(spoken) / 2, after.text


@pytest.mark.parametrize("name", ["tiny.en", "base"])
@pytest.mark.parametrize("kind", ["int8", "float32"])
def test_its_size_is_known_before(
    converted: Callable[[str, str], Path], name: str, kind: str
) -> None:
    """
    But for the names of the scales.
    """
    size_bytes = (converted(name, kind) / "model.bin").stat().st_size
    said_bytes = converted_bytes(read_header(packaged(name)), kind)
    assert 0 <= size_bytes - said_bytes < 16 * 1024


@pytest.mark.parametrize("compute_type", ["int8_float32", "float32"])
def test_it_takes_the_same_memory_once_loaded(
    converted: Callable[[str, str], Path], compute_type: str
) -> None:
    """
    The books need not know which file a model came from.
    """
    kind = DTYPES[compute_type][0]
    source, after = packaged("base"), converted("base", kind)
    for device in ("cpu", "cuda:0"):
        of_source = weights_bytes(read_header(source), compute_type, device)
        assert weights_bytes(read_header(after), compute_type, device) == of_source


@pytest.mark.process
def test_a_conversion_takes_little_memory() -> None:
    """
    The model is never in memory as a whole: base has 138 MiB.
    """
    code = """
import re, sys
from pathlib import Path
from whispercache.engine.variants.convert import write_converted
from whispercache.engine.sizes.header import read_header

def peak_kib():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

header = read_header(sys.argv[1])
before_kib = peak_kib()
with open("/dev/null", "wb") as target:
    write_converted(header, "int8", target)
print((peak_kib() - before_kib) * 1024)
"""
    done = child(code, packaged("base"))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60 * MIB


# Files that are put together here ----------------------------------------------------


def payload(header: ModelHeader, variable: Variable) -> bytes:
    """
    The bytes of one variable.
    """
    with header.path.open("rb") as file:
        file.seek(variable.offset)
        return file.read(variable.nbytes)


def rewrite(header: ModelHeader, changed: Mapping[str, tuple[str, bytes]]) -> None:
    """
    The model.bin of *header* again, some variables with another type and content.
    """

    def text(value: str) -> bytes:
        raw = value.encode() + b"\0"
        return struct.pack("<H", len(raw)) + raw

    parts = [struct.pack("<I", 6), text("WhisperSpec")]
    parts.append(struct.pack("<II", header.revision, len(header.variables)))
    for each in header.variables:
        rank = len(each.shape)
        parts += [text(each.name), struct.pack(f"<B{rank}I", rank, *each.shape)]
        if each.name in changed:
            dtype, raw = changed[each.name]
            parts += [struct.pack("<BI", TYPE_NUMBERS[dtype], len(raw)), raw]
        else:  # up to its payload it stays as it was
            raw = payload(header, each)
            with header.path.open("rb") as file:
                file.seek(each.offset - 5)
                parts += [file.read(5), raw]
    parts.append(struct.pack("<I", len(header.aliases)))
    parts += [text(alias) + text(name) for alias, name in header.aliases]
    header.path.write_bytes(b"".join(parts))


def floats_of(directory: Path) -> dict[str, Values]:
    """
    The weights of a model that was saved in float32.
    """
    header = read_header(directory)
    return {
        each.name: np.frombuffer(payload(header, each), "<f4").reshape(each.shape)
        for each in header.variables
        if each.dtype == "float32" and each.shape
    }


def micro_float32(directory: Path, values: tuple[float, ...] = ()) -> Path:
    """
    A micro model in float32, *values* among the encoder's positions.
    """
    build_micro(directory, quantization="float32")
    name = "encoder/position_encodings/encodings"
    changed = floats_of(directory)[name].copy()
    changed.flat[: len(values)] = values
    raw = changed.astype("<f4").tobytes()
    rewrite(read_header(directory), {name: ("float32", raw)})
    return directory


def micro_bfloat16(directory: Path) -> dict[str, Values]:
    """
    Make a micro model in bfloat16; its weights, which float32 has exactly.
    """
    floats = floats_of(build_micro(directory, quantization="float32"))
    halves = {name: each.view("<u4") >> 16 for name, each in floats.items()}
    changed = {
        name: ("bfloat16", each.astype("<u2").tobytes())
        for name, each in halves.items()
    }
    rewrite(read_header(directory), changed)
    return {name: (each << 16).view("<f4") for name, each in halves.items()}


def encoded(directory: Path, compute_type: str = "int8") -> NDArray[np.float32]:
    """
    What a micro model's encoder makes of noise.
    """
    model = Whisper(
        str(directory), device="cpu", intra_threads=1, compute_type=compute_type
    )
    noise = np.random.default_rng(0).standard_normal((1, 80, 3000))
    view = ctranslate2.StorageView.from_array(noise.astype(np.float32))
    return np.array(model.encode(view), np.float32)


def bits(values: Values) -> NDArray[np.uint32]:
    """
    What numbers look like in memory, signs of zeros and all.
    """
    return np.ascontiguousarray(values, "<f4").view("<u4")


def test_float16_rounds_as_ctranslate2_does(tmp_path: Path) -> None:
    """
    To the nearest, ties to even. What is too large is infinite; subnormals are kept.
    """
    random = np.random.default_rng(7)
    spread = random.standard_normal(20_000) * 10.0 ** random.integers(-9, 6, 20_000)
    values = (*SOME_FLOATS, *OF_FLOAT16, *SUBNORMAL, *map(float, spread))
    source = micro_float32(tmp_path / "source", values)
    header = read_header(convert(source, "float16", tmp_path / "after"))
    after = {each.name: each for each in header.variables}
    for name, before in floats_of(source).items():
        wanted = np.array(
            ctranslate2.StorageView.from_array(before.copy()).to(
                ctranslate2.DataType.float16
            )
        )
        assert after[name].dtype == "float16"
        assert payload(header, after[name]) == wanted.tobytes(), name


def test_bfloat16_becomes_float32_exactly(tmp_path: Path) -> None:
    """
    It is the upper half of a float32.
    """
    wanted = micro_bfloat16(tmp_path / "source")
    assert kind_for(read_header(tmp_path / "source"), "float32") == "float32"
    found = floats_of(convert(tmp_path / "source", "float32", tmp_path / "after"))
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert np.array_equal(bits(found[name]), bits(values)), name


@pytest.mark.parametrize("compute_type", ["int8", "float32"])
@pytest.mark.parametrize("saved", ["bfloat16", "float32", "float16"])
def test_files_of_every_float_give_the_same_numbers(
    tmp_path: Path, saved: str, compute_type: str
) -> None:
    """
    From bfloat16 and float32, too, the encoder's output is the same to the last bit.
    """
    source = tmp_path / "source"
    if saved == "bfloat16":
        micro_bfloat16(source)
    else:
        build_micro(source, quantization=saved)
    if saved == compute_type:
        assert kind_for(read_header(source), compute_type) is None
        return
    after = convert(source, compute_type, tmp_path / "after")
    wanted = encoded(source, compute_type)
    assert np.array_equal(encoded(after, compute_type), wanted)
    assert not np.isnan(wanted).any()


def test_a_row_of_zeros_stays_one(tmp_path: Path) -> None:
    """
    Its scale is 1, and nothing is divided by zero.
    """
    source = build_micro(tmp_path / "source", quantization="float32")
    name = "encoder/layer_0/ffn/linear_0/weight"
    rows = floats_of(source)[name].copy()
    rows[[0, 5, -1]] = 0
    rewrite(read_header(source), {name: ("float32", rows.tobytes())})
    after = convert(source, "int8", tmp_path / "after")
    header = read_header(after)
    found = {each.name: payload(header, each) for each in header.variables}
    scale = np.frombuffer(found[f"{name}_scale"], "<f4")
    quantized = np.frombuffer(found[name], np.int8).reshape(rows.shape)
    assert list(scale[[0, 5, -1]]) == [1, 1, 1]
    assert not quantized[[0, 5, -1]].any()
    assert np.isfinite(scale).all()
    assert abs(quantized[1]).max() == 127
    assert np.array_equal(encoded(after), encoded(source))


def test_only_what_every_load_converts_alike_is_converted(tmp_path: Path) -> None:
    """
    Convolutions, norms and biases stay in the type of the source; scales are float32.
    """
    header = read_header(convert(micro(), "int8", tmp_path / "after"))
    for each in header.variables:
        if each.name.endswith("weight_scale"):
            assert each.dtype == "float32", each.name
        elif each.name.endswith("weight") and "conv" not in each.name:
            assert each.dtype == "int8", each.name
        elif each.shape:
            assert each.dtype == "float16", each.name
    assert header.aliases == read_header(micro()).aliases
    assert header.architecture == read_header(micro()).architecture


@pytest.mark.parametrize(
    ("saved", "wanted"),
    [
        ("float16", {"int8": "int8", "float32": "float32"}),
        ("float32", {"int8": "int8", "float16": "float16"}),
        ("bfloat16", {"int8": "int8", "float32": "float32", "float16": "float16"}),
        ("int8", {}),
        ("int16", {}),
    ],
)
def test_what_a_file_is_worth_converting_to(saved: str, wanted: dict[str, str]) -> None:
    """
    To another type that every float can become, not to its own, and not back from int8.
    """
    header = read_header(micro())
    name = "decoder/embeddings/weight"
    variables = tuple(
        replace(each, dtype=saved) if each.name == name else each
        for each in header.variables
    )
    header = replace(header, variables=variables)
    found = {each: kind_for(header, each) for each in DTYPES}
    expected = {each: wanted.get(each.partition("_")[0]) for each in DTYPES}
    assert found == expected
    assert set(found.values()) - {None} <= set(KINDS)


def test_files_of_other_versions_are_left_alone() -> None:
    """
    The version decides how CTranslate2 rounds.
    """
    header = read_header(micro())
    for version in (2, 3, 4, 5):
        old = replace(header, version=version)
        assert [kind_for(old, each) for each in DTYPES] == [None] * len(DTYPES)


@pytest.mark.parametrize("kind", ["int8", "float32"])
@pytest.mark.parametrize("left", [0.0, 0.5, 0.95])
def test_a_file_that_ends_too_soon_is_corrupt(
    tmp_path: Path, kind: str, left: float
) -> None:
    """
    Whatever was cut off since its header was read, no half of a model is written.
    """
    shutil.copytree(micro(), tmp_path / "source")
    header = read_header(tmp_path / "source")
    with header.path.open("r+b") as file:
        file.truncate(int(header.file_bytes * left))
    with (tmp_path / "after").open("wb") as target, pytest.raises(CorruptModel) as told:
        write_converted(header, kind, target)
    assert "model.bin ends within" in str(told.value)
