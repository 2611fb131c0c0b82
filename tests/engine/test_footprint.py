"""
Predicted footprints of real models, against measurements in a child process.
"""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from effort import tries
from faster_whisper import BatchedInferencePipeline, WhisperModel
from hypothesis import given, settings
from hypothesis import strategies as st
from micro import build_micro
from real import packaged

from whispercache.engine.sizes.architecture import ARCHITECTURES, ITEM_BYTES, layout
from whispercache.engine.sizes.footprint import (
    HEAP_SLACK,
    Footprint,
    Workload,
    estimate,
    footprint,
    workspace_bytes,
)
from whispercache.engine.sizes.header import read_header
from whispercache.engine.sizes.weights import weights_bytes
from whispercache.errors import CorruptModel, UnknownModel, UnsupportedComputeType
from whispercache.keys import COMPUTE_TYPES, MODELS

if TYPE_CHECKING:
    from whispercache.engine.sizes.header import ModelHeader

MIB = 1024**2
SIZES = ("tiny.en", "base")

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="measures with /proc")


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    A micro model.
    """
    return build_micro(tmp_path_factory.mktemp("micro"))


@pytest.fixture(scope="module")
def micro_bytes(micro: Path) -> bytes:
    """
    Its model.bin.
    """
    return (micro / "model.bin").read_bytes()


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    Where to write a damaged model.bin.
    """
    return tmp_path_factory.mktemp("broken") / "model.bin"


@pytest.fixture(params=SIZES)
def real(request: pytest.FixtureRequest) -> tuple[str, Path]:
    """
    Name and directory of packaged weights.
    """
    return request.param, packaged(request.param)


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """
    No packed weights, here or in a child: the same bytes on any x86 CPU.
    """
    monkeypatch.setenv("CT2_PACKED_GEMM", "0")
    return {**os.environ, "CT2_PACKED_GEMM": "0"}


# --- the header ---------------------------------------------------------------------


def test_a_real_header_gives_the_architecture_of_its_size(
    real: tuple[str, Path],
) -> None:
    """
    The header of a size's weights and the table of known sizes agree.
    """
    name, path = real
    header = read_header(path)
    assert header.architecture == ARCHITECTURES[name]
    assert header.saved_compute_type == "float16"
    assert header.file_bytes == (path / "model.bin").stat().st_size


def test_the_layout_of_a_known_size_is_that_of_its_file(real: tuple[str, Path]) -> None:
    """
    Every tensor's name and shape is known before the file is there.
    """
    name, path = real
    found = {each.name: each.shape for each in read_header(path).variables}
    expected = {each.name: each.shape for each in layout(ARCHITECTURES[name])}
    assert {key: shape for key, shape in found.items() if shape} == expected


def test_the_header_lists_what_the_converter_wrote(micro: Path) -> None:
    """
    Offsets and bytes of the variables cover the file without overlap.
    """
    header = read_header(micro / "model.bin")
    assert header.architecture.d_model == 32
    assert header.architecture.heads == 1
    ends = [each.offset + each.nbytes for each in header.variables]
    starts = [each.offset for each in header.variables[1:]]
    assert all(end < start for end, start in zip(ends, starts, strict=False))
    assert max(ends) < header.file_bytes
    raw = header.path.read_bytes()
    heads = next(each for each in header.variables if each.name == "encoder/num_heads")
    assert struct.unpack_from("<h", raw, heads.offset) == (1,)


@pytest.mark.parametrize(
    ("quantization", "saved"),
    [
        (None, "float16"),
        ("float32", "float32"),
        ("int16", "int16"),
        ("int8", "int8_float16"),
        ("int8_float32", "int8_float32"),
        ("int8_float16", "int8_float16"),
    ],
)
def test_the_saved_compute_type_is_read(
    tmp_path: Path, quantization: str | None, saved: str
) -> None:
    """
    What the converter quantized to is what the header tells.
    """
    header = read_header(build_micro(tmp_path, quantization=quantization))
    assert header.saved_compute_type == saved


@pytest.mark.parametrize("version", [2, 3, 5])
def test_old_versions_of_the_format_are_read(tmp_path: Path, version: int) -> None:
    """
    Types by width before version 4, no aliases before 3, and the same bytes found.
    """
    new = read_header(build_micro(tmp_path / "new", quantization="float32"))
    path = tmp_path / "model.bin"
    path.write_bytes(rewritten(new.path.read_bytes(), new, version))
    old = read_header(path)
    assert old.version == version
    assert old.architecture == new.architecture
    assert weights_bytes(old, "float32", "cpu") == weights_bytes(new, "float32", "cpu")


@on_linux
def test_little_of_the_file_is_read(real: tuple[str, Path]) -> None:
    """
    Reading the header of a real model takes under 1 % of its bytes.
    """
    path = real[1]
    before = bytes_read()
    header = read_header(path)
    assert bytes_read() - before < header.file_bytes / 100


def test_without_a_model_bin_the_model_is_unknown(tmp_path: Path) -> None:
    """
    An empty directory and a missing one are unknown models, not broken ones.
    """
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UnknownModel, match=r"model\.bin"):
            read_header(path)


@pytest.mark.soak
@settings(max_examples=tries(150), deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_corrupt(
    share: float, micro_bytes: bytes, broken: Path
) -> None:
    """
    Wherever the file is cut, it is found to be broken.
    """
    broken.write_bytes(micro_bytes[: int(share * len(micro_bytes))])
    with pytest.raises(CorruptModel, match="download or convert it again"):
        read_header(broken)


def test_the_message_names_the_tensor_that_is_cut(
    micro: Path, micro_bytes: bytes, tmp_path: Path
) -> None:
    """
    A download that broke off in a tensor says in which.
    """
    conv = next(each for each in read_header(micro).variables if "conv2/w" in each.name)
    (tmp_path / "model.bin").write_bytes(micro_bytes[: conv.offset + 10])
    with pytest.raises(CorruptModel, match=r"truncated.*encoder/conv2/weight"):
        read_header(tmp_path)


@pytest.mark.soak
@settings(max_examples=tries(300), deadline=None)
@given(data=st.data())
def test_flipped_bits_never_raise_anything_else(
    data: st.DataObject, micro: Path, micro_bytes: bytes, broken: Path
) -> None:
    """
    A damaged header is read as another model, or is corrupt.
    """
    spans = header_spans(micro)
    raw = bytearray(micro_bytes)
    for _ in range(data.draw(st.integers(1, 4))):
        start, stop = data.draw(st.sampled_from(spans))
        place = data.draw(st.integers(start, stop - 1))
        raw[place] ^= 1 << data.draw(st.integers(0, 7))
    broken.write_bytes(raw)
    try:
        header = read_header(broken)
    except CorruptModel:
        return
    assert header.file_bytes == len(raw)


@pytest.mark.soak
@settings(max_examples=tries(100), deadline=None)
@given(garbage=st.binary(max_size=2000))
def test_garbage_is_corrupt(garbage: bytes, broken: Path) -> None:
    """
    No random bytes pass for a model.
    """
    broken.write_bytes(garbage)
    with pytest.raises(CorruptModel):
        read_header(broken)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"WhisperSpec", b"WhispurSpec", "not a Whisper model"),
        (b"", b"\0", "1 bytes too many"),
        (b"encoder/conv1/weight", b"encoder/conv1/wxight", "missing"),
        (b"encoder/layer_0/ffn", b"encoder/layer_7/ffn", "missing"),
        (b"\x06\0\0\0", b"\x07\0\0\0", "version 7"),
        (b"encoder/conv1/weight", b"encoder/conv1/\xff\xff\xffght", "not text"),
        (b"encoder/conv1/weight", b"encoder/conv1/we\0ght", "garbage"),
        (b"encoder/conv2/bias", b"encoder/conv1/bias", "twice"),
        (b"encoder/conv1/bias\0\x01", b"encoder/conv1/bias\0\x09", "9 dimensions"),
        (b"conv1/bias\0\x01\x20", b"conv1/bias\0\x01\x21", "not what its shape"),
    ],
)
def test_the_message_says_what_is_wrong(
    micro_bytes: bytes, tmp_path: Path, old: bytes, new: bytes, reason: str
) -> None:
    """
    Each kind of damage is named, with the directory and what to do.
    """
    raw = micro_bytes.replace(old, new, 1) if old else micro_bytes + new
    (tmp_path / "model.bin").write_bytes(raw)
    with pytest.raises(CorruptModel, match=reason) as caught:
        read_header(tmp_path)
    assert caught.value.model == str(tmp_path)
    assert "\n" not in str(caught.value)


# --- weights ------------------------------------------------------------------------


def test_every_known_model_has_an_architecture() -> None:
    """
    The table of shapes lists exactly the models that have a name.
    """
    assert set(ARCHITECTURES) == set(MODELS)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        *(("tiny", 39), ("base", 74), ("small", 244), ("medium", 769)),
        *(("large-v3", 1550), ("large-v3-turbo", 809), ("distil-large-v3", 756)),
        *(("distil-small.en", 166), ("distil-medium.en", 394)),
        *(("distil-large-v2", 756), ("distil-large-v3.5", 756)),
    ],
)
def test_architectures_have_as_many_parameters_as_published(
    name: str, millions: int
) -> None:
    """
    The parameters add up to what each model's card says.
    """
    count = sum(math.prod(each.shape) for each in layout(ARCHITECTURES[name]))
    assert count / 1e6 == pytest.approx(millions, rel=0.035)


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
def test_the_closed_form_is_the_header(
    real: tuple[str, Path], compute_type: str, device: str
) -> None:
    """
    Without the file the prediction is the same, to the byte, in every compute type.
    """
    name, path = real
    header = read_header(path)
    known = ARCHITECTURES[name]
    expected = weights_bytes(header, compute_type, device)
    assert weights_bytes(known, compute_type, device) == expected


def test_weights_have_the_bytes_that_were_measured() -> None:
    """
    Known values, found by loading: CTranslate2's conversion rules did not drift.
    """
    tiny, large = ARCHITECTURES["tiny.en"], ARCHITECTURES["large-v3"]
    found = [
        weights_bytes(tiny, "float32", "cpu") / MIB,
        weights_bytes(tiny, "int8_float32", "cpu") / MIB,
        weights_bytes(large, "int8_float32", "cpu") / MIB,
        weights_bytes(large, "float16", "cuda:0") / 1e6,
        weights_bytes(large, "int8_float16", "cuda:0") / 1e6,
    ]
    assert found == pytest.approx([144.06, 40.49, 1505.7, 3087.2, 1556.6], abs=0.05)


@pytest.mark.parametrize("quantization", [None, "float32", "int8", "int16"])
@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
def test_the_saved_type_does_not_change_what_is_resident(
    tmp_path: Path, quantization: str | None, compute_type: str
) -> None:
    """
    A file in another type loads to the same bytes; scales are not counted twice.
    """
    header = read_header(build_micro(tmp_path / "a", quantization=quantization))
    plain = read_header(build_micro(tmp_path / "b"))
    for device in ("cpu", "cuda:0"):
        expected = weights_bytes(plain, compute_type, device)
        assert weights_bytes(header, compute_type, device) == expected


def test_a_gpu_keeps_a_padded_output_layer() -> None:
    """
    51865 tokens are padded and copied; 51864 are a multiple of 8 and are not.
    """
    for name, copied in (("base", True), ("base.en", False)):
        architecture = ARCHITECTURES[name]
        held = estimate(architecture, "float16", "cuda:0").weights_bytes
        extra = held - weights_bytes(architecture, "float16", "cuda:0")
        assert extra == (51872 * 513 * 2 if copied else 0)


# --- workspace ----------------------------------------------------------------------


def test_a_fallback_copies_the_audio_for_each_sample() -> None:
    """
    On large-v3 the temperature fallback takes over twice what five beams take.
    """
    large = ARCHITECTURES["large-v3"]
    beams = workspace_bytes(large, "float16", "cuda:0", Workload(fallback=False))
    samples = workspace_bytes(large, "float16", "cuda:0", Workload())
    assert samples / 1e6 == pytest.approx(1598, rel=0.02)
    assert samples > 2 * beams


def test_the_batched_pipeline_never_falls_back() -> None:
    """
    With a batch the fallback setting changes nothing.
    """
    base = ARCHITECTURES["base"]
    batched = [
        workspace_bytes(base, "float32", "cpu", Workload(batch_size=4, fallback=each))
        for each in (True, False)
    ]
    assert batched[0] == batched[1]


def test_the_cpu_computes_in_float32() -> None:
    """
    A compute type changes the workspace on a card, and not on the CPU.
    """
    base = ARCHITECTURES["base"]
    types = ("float32", "int8_float32", "int8_float16")
    assert len({workspace_bytes(base, each, "cpu", Workload()) for each in types}) == 1
    on_card = [workspace_bytes(base, each, "cuda:0", Workload()) for each in types]
    assert on_card[0] == on_card[1] == 2 * on_card[2]


@pytest.mark.parametrize("field", ["beam_size", "best_of", "batch_size"])
def test_a_workload_of_nothing_is_refused(field: str) -> None:
    """
    Zero beams, samples or windows are nonsense.
    """
    with pytest.raises(ValueError, match=field):
        Workload(**{field: 0})  # type: ignore[arg-type]


# --- the public function --------------------------------------------------------------


def test_aliases_and_repositories_have_the_footprint_of_the_model() -> None:
    """
    "large", "large-v3" and its repository are one model.
    """
    names = ("large", "large-v3", "Systran/faster-whisper-large-v3")
    assert len({footprint(name, "int8", "cuda") for name in names}) == 1


def test_a_directory_and_its_size_have_one_footprint(real: tuple[str, Path]) -> None:
    """
    Before the download and after it, the public function says the same.
    """
    name, path = real
    for compute_type in ("default", "int8"):
        by_name, by_path = footprint(name, compute_type), footprint(path, compute_type)
        assert by_name.weights_bytes == by_path.weights_bytes
        assert by_name.workspace_bytes == by_path.workspace_bytes
        assert by_name.loading_bytes == pytest.approx(by_path.loading_bytes, rel=1e-4)


def test_the_default_type_is_what_the_device_can_do() -> None:
    """
    Float16 files are float32 on the CPU and stay float16 on a card.
    """
    assert footprint("tiny") == footprint("tiny", "float32")
    assert footprint("tiny", device="cuda") == footprint("tiny", "float16", "cuda:1")
    with pytest.raises(UnsupportedComputeType):
        footprint("tiny", "float16", "cpu")


def test_an_automatic_device_is_refused() -> None:
    """
    The bytes depend on the device, so it has to be named.
    """
    with pytest.raises(ValueError, match="'cpu' or 'cuda'"):
        footprint("tiny", device="auto")


def test_a_downloaded_repository_is_read_from_the_local_cache(
    micro: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A repository that is not listed is looked up on this disk, never on the network.
    """
    hub = pytest.importorskip("huggingface_hub")
    found: dict[str, Any] = {"me/mine": str(micro / "model.bin")}
    monkeypatch.setattr(
        hub, "try_to_load_from_cache", lambda repository, _: found.get(repository)
    )
    assert footprint("me/mine") == footprint(micro)
    with pytest.raises(UnknownModel, match="not on this disk"):
        footprint("me/other")


def test_the_total_covers_loading_and_one_call() -> None:
    """
    Whichever is larger must be free.
    """
    assert Footprint(5, 3, 7, 0).total_bytes == 8
    assert Footprint(5, 3, 9, 0).total_bytes == 9


def test_loading_to_a_card_takes_host_memory() -> None:
    """
    Conversion happens on the host: the whole file, and the largest tensor in between.
    """
    plain = footprint("large-v3", "float16", "cuda")
    int8 = footprint("large-v3", "int8_float16", "cuda")
    assert plain.loading_bytes == plain.weights_bytes
    assert plain.host_loading_bytes == pytest.approx(3.087e9, rel=0.01)
    assert int8.host_loading_bytes == pytest.approx(
        3.087e9 + 5 * 51866 * 1280, rel=0.01
    )
    assert footprint("large-v3", "int8").host_loading_bytes == 0


# --- measured in a child process ----------------------------------------------------

LOADING = """
import ctypes, gc, json, sys
import ctranslate2, faster_whisper, tokenizers

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file
                    if line.startswith(field))

def anonymous():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status("RssAnon")

path, compute_type = sys.argv[1:]
before, resident = anonymous(), status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
model = faster_whisper.WhisperModel(path, device="cpu", compute_type=compute_type)
peak = status("VmHWM") - resident
print(json.dumps([anonymous() - before, peak]))
"""

CALLING = """
import ctypes, gc, json, sys
import ctranslate2, numpy

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file
                    if line.startswith(field))

path, batch, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
model = ctranslate2.models.Whisper(path, compute_type="float32", intra_threads=2)
sot, without_stamps, before_it = json.loads(sys.argv[4])

def call(batch, length, **options):
    noise = numpy.random.default_rng(0).standard_normal((batch, 80, 3000))
    features = ctranslate2.StorageView.from_array(noise.astype(numpy.float32))
    audio = model.encode(features)
    if options:
        past = [before_it, *range(300, 300 + 220)] if length == 448 else []
        prompt = [*past, sot, without_stamps]
        stop = {"suppress_tokens": [sot - 1]}
        model.generate(audio, [prompt] * batch, max_length=length, **stop, **options)

call(1, 8, beam_size=1)
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
resident = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
call(batch, 448, **options)
print(json.dumps(status("VmHWM") - resident))
"""


def in_a_child(script: str, *arguments: str, env: dict[str, str] | None = None) -> Any:
    """
    What *script* prints in a process of its own.
    """
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, check=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.process
@on_linux
@pytest.mark.parametrize("compute_type", ["float32", "int8"])
def test_the_weights_are_within_5_percent_of_the_measured_growth(
    real: tuple[str, Path], compute_type: str, unpacked: dict[str, str]
) -> None:
    """
    A whole WhisperModel grows anonymous memory by what was predicted; so does loading.
    """
    path = str(real[1])
    grown, peak = in_a_child(LOADING, path, compute_type, env=unpacked)
    predicted = footprint(path, compute_type)
    assert predicted.weights_bytes == pytest.approx(grown, rel=0.05)
    # What is reserved is more than what is predicted.
    assert 0.85 <= peak * HEAP_SLACK / predicted.loading_bytes <= 1.05


@pytest.mark.process
@on_linux
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="MKL is for x86")
@pytest.mark.parametrize("compute_type", ["float32", "int8"])
def test_packed_weights_are_predicted_too(
    real: tuple[str, Path], compute_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    With MKL, the default on Intel, packed copies are in the prediction.
    """
    monkeypatch.setenv("CT2_USE_MKL", "1")
    monkeypatch.delenv("CT2_PACKED_GEMM", raising=False)
    path = str(real[1])
    plain = weights_bytes(read_header(path), "float32", "cpu")
    grown, peak = in_a_child(LOADING, path, compute_type)
    predicted = footprint(path, compute_type)
    assert predicted.weights_bytes == pytest.approx(grown, rel=0.1)
    assert peak < 1.1 * predicted.loading_bytes
    assert compute_type == "int8" or predicted.weights_bytes > 1.4 * plain


@pytest.mark.process
@on_linux
@pytest.mark.parametrize(
    ("batch", "options", "workload", "tolerance"),
    [
        (1, {}, Workload(beam_size=1, fallback=False), 0.3),
        (4, {}, Workload(beam_size=1, batch_size=4), 0.2),
        (
            1,
            {
                "beam_size": 1,
                "num_hypotheses": 5,
                "sampling_topk": 0,
                "sampling_temperature": 0.6,
            },
            Workload(),
            0.15,
        ),
    ],
)
def test_the_workspace_is_near_the_measured_peak(
    batch: int, options: dict[str, Any], workload: Workload, tolerance: float
) -> None:
    """
    Encoding and samples of tiny.en take about what the formulas say.
    """
    path = packaged("tiny.en")
    tokens = (path / "vocabulary.txt").read_text(encoding="utf-8").splitlines()
    special = ("<|startoftranscript|>", "<|notimestamps|>", "<|startofprev|>")
    ids = json.dumps([tokens.index(each) for each in special])
    env = {
        **os.environ,
        # Threads that spin while they wait would take the processor from other tests.
        "OMP_WAIT_POLICY": "PASSIVE",
        # A fixed threshold, since holes in the heap are not what is predicted: with
        # them the peak of samples is a tenth or a fifth higher, and differs.
        "MALLOC_MMAP_THRESHOLD_": "131072",
    }
    arguments = (str(path), str(batch), json.dumps(options), ids)
    peak = in_a_child(CALLING, *arguments, env=env)
    predicted = workspace_bytes(
        read_header(path).architecture, "float32", "cpu", workload
    )
    assert predicted == pytest.approx(peak, rel=tolerance)


# --- the micro models themselves ----------------------------------------------------


def noise(seconds: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """
    White noise: float32 (samples,), mono, 16 kHz.
    """
    samples = np.random.default_rng(seconds).standard_normal(16_000 * seconds)
    return (0.1 * samples).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1, 3, 11])
@pytest.mark.parametrize(
    ("text", "how"),
    [
        ("hello world", {}),
        ("micro says hello", {"d_model": 64}),
        ("only english", {"english": True}),
        ("grüße señor", {"quantization": "int8"}),
    ],
)
def test_a_micro_model_answers_its_text(
    tmp_path: Path, text: str, how: dict[str, Any], seconds: int
) -> None:
    """
    To any audio, by every way of transcribing.
    """
    path = build_micro(tmp_path, text, **how)
    model = WhisperModel(str(path), device="cpu", compute_type="int8")
    audio = noise(seconds)
    batched = BatchedInferencePipeline(model)
    whole = [{"start": 0, "end": seconds}]
    for answer, _ in (
        model.transcribe(audio, beam_size=1),
        model.transcribe(audio, beam_size=5),
        model.transcribe(audio, temperature=0.4),
        model.transcribe(audio, without_timestamps=True),
        batched.transcribe(audio, batch_size=4, clip_timestamps=whole),
    ):
        assert "".join(each.text for each in answer).strip() == text
    segments, info = model.transcribe(audio, word_timestamps=True)
    words = [each.word.strip() for segment in segments for each in segment.words or []]
    assert " ".join(words) == text
    assert info.language == "en"
    if not how.get("english"):
        assert model.detect_language(audio)[0] == "en"


def test_a_micro_model_needs_distinct_words(tmp_path: Path) -> None:
    """
    A chain cannot tell the same word twice, nor more words than it has room for.
    """
    for text in ("again and again", "", " ".join(map(str, range(40)))):
        with pytest.raises(ValueError, match="text"):
            build_micro(tmp_path, text)


# --- what the tests above need ------------------------------------------------------


def bytes_read() -> int:
    """
    Bytes that this process read from files so far.
    """
    return int(Path("/proc/self/io").read_text(encoding="ascii").split()[1])


def header_spans(model: Path) -> list[tuple[int, int]]:
    """
    The stretches of model.bin that are not payload.
    """
    header = read_header(model)
    starts = [0, *(each.offset + each.nbytes for each in header.variables)]
    stops = [*(each.offset for each in header.variables), header.file_bytes]
    return list(zip(starts, stops, strict=True))


def rewritten(raw: bytes, header: ModelHeader, version: int) -> bytes:
    """
    The same model in an older version of the format.
    """

    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    parts = [struct.pack("<I", version), string("WhisperSpec")]
    parts.append(struct.pack("<II", header.revision, len(header.variables)))
    for each in header.variables:
        width = ITEM_BYTES[each.dtype]
        kind = list(ITEM_BYTES).index(each.dtype) if version >= 4 else width
        length = each.nbytes if version >= 4 else each.nbytes // width
        shape = struct.pack(f"<B{len(each.shape)}I", len(each.shape), *each.shape)
        parts += [string(each.name), shape, struct.pack("<BI", kind, length)]
        parts.append(raw[each.offset : each.offset + each.nbytes])
    if version >= 3:
        parts.append(struct.pack("<I", len(header.aliases)))
        parts += [string(text) for pair in header.aliases for text in pair]
    return b"".join(parts)
