"""
The decoder of audio, which hears whatever of a file can be heard.
"""

from __future__ import annotations

import asyncio
import importlib.util
import io
import itertools
import os
import tempfile
import threading
import tracemalloc
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import av
import faster_whisper.audio
import numpy as np
import pytest
from broken_audio import VALID, encoded, tone, wav
from real import TEXT, clip, decode_audio, micro, model_of, text_of
from starlette.datastructures import UploadFile

from whispercache import Audio, AudioDamage, AudioError, ModelCache, compare, read_audio
from whispercache.cli.main import main
from whispercache.engine.audio import decoder as audio_module
from whispercache.engine.audio.decoder import Recording
from whispercache.engine.audio.samples import in_place_of
from whispercache.server import decoding
from whispercache.server.decode import Decoder, samples

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RATE = 16_000
SPOKEN_S = 8.0
CLIPS = sorted(Path(clip("en-bread")).parent.glob("*.flac"))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """
    What FFmpeg says about broken files is of no interest here.
    """
    level = av.logging.get_level()
    av.logging.set_level(av.logging.PANIC)
    yield
    av.logging.set_level(level)


def of_kind(name: str, seconds: float = SPOKEN_S) -> bytes:
    """
    A tone in the container and codec that *name* has in `VALID`.
    """
    container, codec, rate_hz = VALID[name]
    return encoded(container, codec, seconds, rate_hz)


def heard(content: bytes) -> Audio:
    """
    What the library makes of *content*; the server makes the same of it.
    """
    audio = read_audio(io.BytesIO(content))
    with tempfile.TemporaryDirectory() as folder:
        upload, target = Path(folder, "upload"), Path(folder, "samples")
        upload.write_bytes(content)
        target.touch()
        outcome = decoding.decode(str(upload), str(target), 10**9)
        assert outcome.damage == audio.damage
        assert np.array_equal(samples(target), audio.samples)
    return audio


def seconds_of(content: bytes) -> float:
    """
    How long it is heard.
    """
    return len(heard(content).samples) / RATE


def with_a_hole(content: bytes) -> bytes:
    """
    The same with a tenth of it zeroed, a quarter from its start.
    """
    at, n_bytes = len(content) // 4, len(content) // 10
    return content[:at] + bytes(n_bytes) + content[at + n_bytes :]


def noise(container: str, codec: str, rate_hz: int, seconds: float) -> bytes:
    """
    Noise in mono, in frames of changing length where the codec allows that.
    """
    dice = np.random.default_rng(7)
    target = io.BytesIO()
    with av.open(target, "w", format=container) as file:
        stream = cast("av.AudioStream", file.add_stream(codec, rate_hz))
        stream.layout = "mono"
        at = 0
        while at < seconds * rate_hz:
            length = int(dice.integers(1, 5_000))
            values = dice.integers(-30_000, 30_000, (1, length)).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(values, "s16", "mono")
            frame.sample_rate, frame.pts = rate_hz, at
            file.mux(stream.encode(frame))
            at += length
        file.mux(stream.encode(None))
    return target.getvalue()


@contextmanager
def _temporary(path: Path) -> Iterator[Any]:
    with tempfile.TemporaryFile() as file:
        file.write(path.read_bytes())
        file.seek(0)
        yield file


@contextmanager
def _piped(path: Path) -> Iterator[Any]:
    reading, writing = os.pipe()

    def write() -> None:
        with os.fdopen(writing, "wb") as file:
            file.write(path.read_bytes())

    thread = threading.Thread(target=write)
    thread.start()
    with os.fdopen(reading, "rb") as file:
        yield file
    thread.join()


class _OnlyReads:
    """
    A stream that has nothing but ``read``.
    """

    def __init__(self, path: Path) -> None:
        self._file = io.BytesIO(path.read_bytes())

    def read(self, n_bytes: int) -> bytes:
        return self._file.read(n_bytes)


class TestWholeFiles:
    """
    What nothing is wrong with is heard as faster-whisper hears it, to the last bit.
    """

    @pytest.mark.slow
    @pytest.mark.parametrize("path", CLIPS, ids=lambda path: path.stem)
    def test_clips_give_the_samples_of_faster_whisper(self, path: Path) -> None:
        """
        float32, one dimension.
        """
        audio = read_audio(path)
        expected = decode_audio(str(path))
        assert audio.samples.dtype == expected.dtype == np.float32
        assert audio.samples.shape == expected.shape
        assert np.array_equal(audio.samples, expected)
        assert audio.damage is None

    @pytest.mark.slow
    @pytest.mark.parametrize("name", VALID)
    def test_every_container_gives_them(self, name: str) -> None:
        """
        Of every codec and rate, and nothing is said to be damaged.
        """
        content = of_kind(name)
        audio = heard(content)
        assert np.array_equal(audio.samples, decode_audio(io.BytesIO(content)))
        assert audio.damage is None

    @pytest.mark.parametrize(
        ("rate_hz", "seconds"),
        [(8_000, 130.0), (RATE, 70.0), (44_100, 25.0), (48_000, 12.0), (11_025, 1.0)],
    )
    def test_groups_of_frames_are_not_heard(self, rate_hz: int, seconds: float) -> None:
        """
        However frames are put together: faster-whisper's groups are ten times as long.
        """
        content = noise("wav", "pcm_s16le", rate_hz, seconds)
        samples = read_audio(io.BytesIO(content)).samples
        assert np.array_equal(samples, decode_audio(io.BytesIO(content)))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "given",
        [
            lambda path, _: str(path),
            lambda path, _: path,
            lambda path, _: io.BytesIO(path.read_bytes()),
            lambda path, kept: kept.enter_context(path.open("rb")),
            lambda path, kept: kept.enter_context(io.FileIO(path)),
            lambda path, kept: kept.enter_context(_temporary(path)),
            lambda path, kept: kept.enter_context(_piped(path)),
            lambda path, _: _OnlyReads(path),
            lambda path, _: f"file:{path}",
            lambda path, _: f"concat:{path}",
        ],
        ids=[
            *("str", "Path", "BytesIO", "open", "FileIO", "temporary", "pipe"),
            *("reader", "file-URL", "concat-URL"),
        ],
    )
    def test_whatever_faster_whisper_takes_is_taken(
        self, tmp_path: Path, given: Callable[[Path, ExitStack], Any]
    ) -> None:
        """
        Seekable or not, and whatever FFmpeg opens by name.
        """
        path = tmp_path / "tone.mp3"
        path.write_bytes(of_kind("tone.mp3", 1.0))
        with ExitStack() as kept:
            audio = read_audio(given(path, kept))
            other = given(path, kept)
            expected = decode_audio(str(other) if isinstance(other, Path) else other)
        assert np.array_equal(audio.samples, expected)

    @pytest.mark.skipif(os.name == "nt", reason="no file there has such a name")
    def test_a_file_may_have_a_colon_in_its_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        FFmpeg takes what is before it for a protocol, unless the path is absolute.
        """
        (tmp_path / "12:30 talk.mp3").write_bytes(of_kind("tone.mp3", 1.0))
        monkeypatch.chdir(tmp_path)
        assert len(read_audio("12:30 talk.mp3").samples) > RATE // 2
        with pytest.raises(AudioError, match=r"'12:31 talk\.mp3'"):
            read_audio("12:31 talk.mp3")

    def test_long_audio_is_in_memory_once(self) -> None:
        """
        As floats; faster-whisper has it two and a half times at its peak.
        """
        content = noise("wav", "pcm_s16le", RATE, 120.0)
        tracemalloc.start()
        try:
            samples = read_audio(io.BytesIO(content)).samples
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak_bytes < 1.2 * samples.nbytes

    def test_the_first_of_several_streams_is_heard(self) -> None:
        """
        As with faster-whisper; other languages and pictures come after it.
        """
        target = io.BytesIO()
        with av.open(target, "w", format="matroska") as file:
            picture = cast("av.VideoStream", file.add_stream("mjpeg", 1))
            picture.width, picture.height, picture.pix_fmt = 16, 16, "yuvj420p"
            streams = [
                cast("av.AudioStream", file.add_stream("pcm_s16le", rate_hz))
                for rate_hz in (44_100, 8_000)
            ]
            for stream in streams:
                stream.layout = "mono"
            file.mux(picture.encode(av.VideoFrame(16, 16, "yuvj420p")))
            for stream, seconds in zip(streams, (1, 2), strict=True):
                frame = av.AudioFrame("s16", "mono", stream.rate * seconds)
                frame.sample_rate, frame.pts = stream.rate, 0
                frame.planes[0].update(tone(seconds, stream.rate))
                file.mux(stream.encode(frame))
        content = target.getvalue()
        audio = read_audio(io.BytesIO(content))
        assert len(audio.samples) == RATE
        assert np.array_equal(audio.samples, decode_audio(io.BytesIO(content)))

    def test_codecs_that_the_server_refuses_are_read(self) -> None:
        """
        Its lists are for uploads; the caller's own files are whatever FFmpeg reads.
        """
        content = encoded("wav", "adpcm_yamaha")
        audio = read_audio(io.BytesIO(content))
        assert np.array_equal(audio.samples, decode_audio(io.BytesIO(content)))

    @pytest.mark.parametrize(
        ("version", "passed"), [("18.1.0", ["metadata_errors"]), ("19.0.2", [])]
    )
    def test_an_option_is_passed_where_pyav_has_it(
        self, monkeypatch: pytest.MonkeyPatch, version: str, passed: list[str]
    ) -> None:
        """
        PyAV 19 refuses the one that older versions need for names in odd letters.
        """
        monkeypatch.setattr(av, "__version__", version)
        path = audio_module.__file__
        spec = importlib.util.spec_from_file_location(
            "whispercache.engine.audio.decoder", path
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(__import__("sys").modules, spec.name, module)
        spec.loader.exec_module(module)
        asked: dict[str, object] = {}
        monkeypatch.setattr(av, "open", lambda _file, **options: asked.update(options))
        module.open_audio("talk.wav")
        assert [*asked] == ["mode", *passed]

    @pytest.mark.parametrize(
        "given", [str, Path, lambda path: io.BytesIO(path.read_bytes())]
    )
    def test_a_leased_model_reads_files_as_well(
        self, monkeypatch: pytest.MonkeyPatch, given: Callable[[Path], Any]
    ) -> None:
        """
        The decoder of faster-whisper 1.2.1 cannot, with PyAV 19.
        """
        monkeypatch.setattr(faster_whisper.audio, "av", None)
        path = Path(clip("en-bread"))
        with ModelCache() as cache, model_of(cache, micro()).lease() as whisper:
            segments, info = whisper.transcribe(given(path))
            assert text_of(segments) == TEXT
        assert info.duration == len(read_audio(path).samples) / RATE

    def test_other_rates_and_stereo_are_left_to_faster_whisper(self) -> None:
        """
        No model that is known asks for them.
        """
        asked: list[object] = []

        def plain(*arguments: object, **options: object) -> None:
            asked.append((arguments, options))

        decode = in_place_of(plain)
        decode("talk.wav", 8_000)
        decode("talk.wav", split_stereo=True)
        assert asked == [
            (("talk.wav", 8_000), {}),
            (("talk.wav", RATE), {"split_stereo": True}),
        ]


LOST_S = {
    "tone.flac": 0.86,
    "tone.mp3": 0.84,
    "tone.ogg": 2.0,
    "tone.m4a": 0.84,
    "tone.mov": 0.93,
    "tone.webm": 3.02,
    "tone.mkv": 3.76,
    "tone.ts": 0.83,
    "tone.mpeg": 0.91,
    "tone.asf": 0.93,
}
"""
Seconds that a hole of a tenth takes out of 8: some containers drop their page of it.
"""


class TestDamage:
    """
    What is broken is left out, what follows is heard, and what was lost is told.
    """

    @pytest.mark.parametrize("name", LOST_S)
    def test_a_hole_takes_out_no_more_than_itself(self, name: str) -> None:
        """
        What is told and what was heard make up the whole.
        """
        audio = heard(with_a_hole(of_kind(name)))
        assert audio.damage is not None
        assert audio.damage.lost_s == pytest.approx(LOST_S[name], abs=0.03)
        whole_s = len(audio.samples) / RATE + audio.damage.lost_s
        assert whole_s == pytest.approx(SPOKEN_S, abs=0.05)
        assert f"{audio.damage.lost_s:.1f} s" in str(audio.damage)

    @pytest.mark.parametrize("name", ["tone.mp3", "tone.ogg", "tone.aac", "tone.ts"])
    def test_joined_files_are_heard_to_the_end(self, name: str) -> None:
        """
        Their times go back to 0 or on. Nothing is said to be lost: the seam is shorter
        than any syllable.
        """
        whole = of_kind(name)
        audio = heard(whole + whole)
        assert len(audio.samples) / RATE == pytest.approx(2 * SPOKEN_S, abs=0.1)
        assert audio.damage is None

    @pytest.mark.parametrize(
        "tag",
        [
            b"ID3\x04\0\0\0\0\x4e\x10" + bytes(10_000),
            b"TAG" + b"x" * 125,
            b"APETAGEX" + b"\0\1\2\3" * 2_000,
        ],
        ids=["ID3v2", "ID3v1", "APE"],
    )
    def test_a_tag_between_joined_files_is_no_loss(self, tag: bytes) -> None:
        """
        Tracks bring their pictures and titles along.
        """
        whole = of_kind("tone.mp3", 4.0)
        audio = heard(whole + tag + whole)
        assert len(audio.samples) / RATE == pytest.approx(8.0, abs=0.1)
        assert audio.damage is None

    @pytest.mark.parametrize(("rate_hz", "layout"), [(48_000, "mono"), (22_050, "5.1")])
    def test_joined_files_may_differ(self, rate_hz: int, layout: str) -> None:
        """
        In their rate and channels, which ended faster-whisper, or the process.
        """
        first, second = (
            _adts(44_100, "stereo", 2.0),
            _adts(rate_hz, layout, 2.0),
        )
        for content in (first + second, second + first):
            assert seconds_of(content) == pytest.approx(4.0, abs=0.2)

    def test_mp3_files_of_different_rates_are_joined(self) -> None:
        """
        Each at its own.
        """
        first = encoded("mp3", "libmp3lame", 2.0, 44_100)
        second = encoded("mp3", "libmp3lame", 2.0, 16_000)
        assert seconds_of(first + second + first) == pytest.approx(6.0, abs=0.3)

    @pytest.mark.parametrize("container", ["matroska", "mpegts", "mov"])
    def test_times_that_jump_are_told_and_not_heard(self, container: str) -> None:
        """
        A gap is not filled: a recorder may have been paused.
        """
        audio = heard(_jumping(container, 5.0))
        assert len(audio.samples) / RATE == pytest.approx(4.0, abs=0.1)
        assert audio.damage is not None
        assert audio.damage.missing_s == pytest.approx(5.0, abs=0.05)
        assert audio.damage.packets == 0

    @pytest.mark.parametrize("name", ["tone.flac", "tone.m4a"])
    def test_a_file_that_breaks_off_says_what_is_missing(
        self, tmp_path: Path, name: str
    ) -> None:
        """
        Where its header comes first, and counts.
        """
        whole = of_kind(name) if name == "tone.flac" else _faststart(tmp_path)
        audio = heard(whole[: len(whole) * 6 // 10])
        assert audio.damage is not None
        whole_s = len(audio.samples) / RATE + audio.damage.lost_s
        assert whole_s == pytest.approx(SPOKEN_S, abs=0.05)
        assert "missing" in str(audio.damage)

    def test_any_error_of_a_packet_is_that_packets_own(self) -> None:
        """
        FFmpeg has many words for it; some are those of missing permissions.
        """
        dice = np.random.default_rng(3)
        for name in ("tone.ts", "tone.aac", "tone.m4a"):
            for _ in range(6):
                content = bytearray(of_kind(name))
                for _ in range(40):
                    content[dice.integers(300, len(content) * 9 // 10)] ^= 0xFF
                try:
                    audio = heard(bytes(content))
                except AudioError:  # its index is broken, or its beginning
                    assert name == "tone.m4a"
                else:
                    assert len(audio.samples) > 2 * RATE

    def test_a_container_that_breaks_off_is_heard_to_there(self) -> None:
        """
        And that is told, also where nobody knows how much is lost. Without a single
        sample it is an error.
        """
        content = of_kind("tone.mp3")
        for n_packets in (100, 0):
            with av.open(io.BytesIO(content)) as container:
                recording = Recording(cast("Any", _BreaksOff(container, n_packets)))
                if n_packets:
                    n_bytes = sum(piece.nbytes for piece in recording.pieces())
                    assert n_bytes / 2 / RATE == pytest.approx(2.6, abs=0.1)
                    assert str(recording.damage()) == "it breaks off"
                else:
                    with pytest.raises(av.error.InvalidDataError):
                        list(recording.pieces())

    @pytest.mark.parametrize("name", ["libopus", "vorbis"])
    def test_a_chain_whose_next_link_ffmpeg_cannot_follow_is_heard_to_there(
        self, name: str
    ) -> None:
        """
        Opus of other channels, or another codec, joined in ogg: other errors than of
        broken data, which had the whole file refused. FFmpeg 7 follows the opus.
        """
        first = encoded("ogg", name, 2.0)
        second = _in_frames("ogg", "libopus", 48_000, "mono", 2.0)
        audio = heard(first + second)
        if audio.damage is None:
            assert len(audio.samples) / RATE == pytest.approx(4.0, abs=0.1)
        else:
            assert len(audio.samples) / RATE == pytest.approx(2.0, abs=0.1)
            assert audio.damage.breaks_off

    @pytest.mark.parametrize("missing", [OSError, MemoryError, av.error.HTTPError])
    def test_what_no_content_is_to_blame_for_is_an_error(
        self, missing: type[Exception]
    ) -> None:
        """
        A connection that fails in mid-file, say: another try may hear all of it.
        """
        kind = getattr(av.error, missing.__name__)
        with av.open(io.BytesIO(of_kind("tone.mp3"))) as container:
            broken = _BreaksOff(container, 100, kind(1, "gone"))
            recording = Recording(cast("Any", broken))
            with pytest.raises(kind):
                list(recording.pieces())

    def test_fragments_of_a_live_stream_miss_nothing_before_them(self) -> None:
        """
        An mp4 whose first fragments were sent to somebody else, or never.
        """
        flags = "empty_moov+default_base_moof"
        options = {"movflags": flags, "frag_duration": "200000"}
        whole = _in_frames("mp4", "aac", RATE, "mono", 4.0, **options)
        head = whole.index(b"moof") - 4
        later = whole.index(b"moof", len(whole) // 2) - 4
        audio = heard(whole[:head] + whole[later:])
        assert 1.0 < len(audio.samples) / RATE < 3.0
        assert audio.damage is None

    def test_the_seconds_of_broken_packets_are_a_few_words(self) -> None:
        """
        Each kind alone, and both.
        """
        damage = AudioDamage(packets=1, broken_s=0.84, missing_s=0.0)
        assert str(damage) == "about 0.8 s could not be decoded (1 packet)"
        damage = AudioDamage(packets=36, broken_s=0.84, missing_s=2.0)
        assert str(damage) == (
            "about 0.8 s could not be decoded (36 packets) and 2.0 s are missing, by "
            "its own times"
        )
        assert damage.lost_s == pytest.approx(2.84)


def _adts(rate_hz: int, layout: str, seconds: float) -> bytes:
    """
    AAC without a container, which can be joined like mp3.
    """
    return _in_frames("adts", "aac", rate_hz, layout, seconds)


def _in_frames(
    container: str,
    codec: str,
    rate_hz: int,
    layout: str,
    seconds: float,
    **options: str,
) -> bytes:
    """
    Tones of any number of channels, from frames of 1024 samples.
    """
    target = io.BytesIO()
    with av.open(target, "w", format=container, options=options) as file:
        stream = cast("av.AudioStream", file.add_stream(codec, rate_hz))
        stream.layout = layout
        for at in range(0, int(seconds * rate_hz), 1024):
            frame = av.AudioFrame("fltp", layout, 1024)
            frame.sample_rate, frame.pts = rate_hz, at
            for plane in frame.planes:
                plane.update(np.sin(np.arange(1024) / 20).astype(np.float32).tobytes())
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return target.getvalue()


def _jumping(container: str, jump_s: float) -> bytes:
    """
    Four seconds, of which the last two come *jump_s* later than they should.
    """
    target = io.BytesIO()
    with av.open(target, "w", format=container) as file:
        stream = cast("av.AudioStream", file.add_stream("aac", 48_000))
        stream.layout = "mono"
        packets = []
        for at in range(0, 4 * 48_000, 1024):
            frame = av.AudioFrame("fltp", "mono", 1024)
            frame.sample_rate, frame.pts = 48_000, at
            frame.planes[0].update(np.zeros(1024, np.float32).tobytes())
            packets += stream.encode(frame)
        packets += stream.encode(None)
        for packet in packets:
            assert packet.pts is not None
            assert packet.time_base is not None
            if packet.pts * packet.time_base >= 2:
                packet.pts += int(jump_s / packet.time_base)
                packet.dts = packet.pts
        file.mux(packets)
    return target.getvalue()


def _faststart(folder: Path) -> bytes:
    """
    An m4a whose index comes first.
    """
    path = folder / "tone.m4a"
    whole = of_kind("tone.m4a")
    with (
        av.open(io.BytesIO(whole)) as source,
        av.open(str(path), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(source.streams.audio[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return path.read_bytes()


class _BreaksOff:
    """
    A container in which nothing can be read after some packets.
    """

    def __init__(
        self, container: Any, n_packets: int, error: Exception | None = None
    ) -> None:
        self.streams, self.format = container.streams, container.format
        self._container, self._n_packets = container, n_packets
        self._error = error or av.error.InvalidDataError(1, "broken")

    def demux(self, stream: av.AudioStream) -> Iterator[Any]:
        """
        The packets that are left.
        """
        yield from itertools.islice(self._container.demux(stream), self._n_packets)
        raise self._error


class TestNothingToHear:
    """
    What cannot be decoded is an AudioError, whatever FFmpeg says.
    """

    @pytest.mark.slow
    @pytest.mark.parametrize("name", VALID)
    def test_a_truncated_file_is_heard_or_refused(self, name: str) -> None:
        """
        At every seventh byte of it, or a multiple. `av.error.EOFError` is no ValueError
        and no OSError, and ended a whole batch.
        """
        container, codec, rate_hz = VALID[name]
        whole = encoded(container, codec, 0.05, rate_hz)
        for end in range(0, len(whole), 7 * (1 + len(whole) // 4_000)):
            try:
                audio = read_audio(io.BytesIO(whole[:end]))
            except AudioError as error:
                refused = error.audio
                assert refused == "BytesIO"
            else:
                assert audio.samples.size

    @pytest.mark.parametrize("name", ["tone.asf", "tone.ogg", "tone.flac", "tone.webm"])
    def test_a_truncated_path_is_no_missing_file(
        self, tmp_path: Path, name: str
    ) -> None:
        """
        FFmpeg calls it "permission denied" here and there; the file is readable.
        """
        path = tmp_path / name
        whole = of_kind(name, 0.1)
        for end in range(0, 600, 7):
            path.write_bytes(whole[:end])
            with pytest.raises(AudioError, match=name):
                read_audio(path)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "."),
            (b"It was a bright cold day in April.\n" * 50, "Invalid data"),
            (wav(b""), "no audio"),
            (wav(tone(1.0), kind=0x7A21), "codec"),
            (wav(tone(1.0), rate_hz=0), "."),
            (wav(tone(1.0), channels=0), "."),
            (encoded("ogg", "libopus")[:500], "ends before its audio"),
        ],
        ids=["empty", "text", "no samples", "codec", "0 Hz", "0 channels", "cut"],
    )
    def test_the_reason_is_told(
        self, tmp_path: Path, content: bytes, reason: str
    ) -> None:
        """
        With the file's name, in one line.
        """
        path = tmp_path / "talk.wav"
        path.write_bytes(content)
        for source, name in ((path, "talk.wav"), (io.BytesIO(content), "BytesIO")):
            with pytest.raises(AudioError, match=reason) as caught:
                read_audio(source)
            assert name in caught.value.audio
            assert "\n" not in str(caught.value)
        with path.open("rb") as file, pytest.raises(AudioError, match=r"talk\.wav"):
            read_audio(file)

    def test_pictures_alone_are_no_audio(self) -> None:
        """
        A film without sound, say.
        """
        target = io.BytesIO()
        with av.open(target, "w", format="matroska") as file:
            stream = cast("av.VideoStream", file.add_stream("mjpeg", 1))
            stream.width, stream.height, stream.pix_fmt = 16, 16, "yuvj420p"
            file.mux(stream.encode(av.VideoFrame(16, 16, "yuvj420p")))
        with pytest.raises(AudioError, match="no audio in it"):
            read_audio(io.BytesIO(target.getvalue()))

    def test_what_python_says_about_a_path_stands(self, tmp_path: Path) -> None:
        """
        FileNotFoundError and its kin, with the path.
        """
        with pytest.raises(FileNotFoundError):
            read_audio(tmp_path / "missing.wav")
        with pytest.raises(IsADirectoryError):
            read_audio(tmp_path)

    def test_a_playlist_whose_file_is_gone_is_not_missing_itself(
        self, tmp_path: Path
    ) -> None:
        """
        The path is there; FFmpeg's "no such file" is about another one.
        """
        path = tmp_path / "talk.ffconcat"
        path.write_text("ffconcat version 1.0\nfile 'gone.wav'\n")
        with pytest.raises(AudioError, match=r"talk\.ffconcat"):
            read_audio(path)

    @pytest.mark.parametrize("source", [b"RIFF", 7, None, [0.0], object()])
    def test_what_is_neither_path_nor_stream_is_refused(self, source: Any) -> None:
        """
        And what to do is said.
        """
        with pytest.raises(AudioError, match=r"io\.BytesIO"):
            read_audio(source)

    def test_a_stream_of_another_kind_says_how_to_read_it(self, tmp_path: Path) -> None:
        """
        A file that was opened as text, and an upload of FastAPI's or Starlette's.
        """
        path = tmp_path / "tone.mp3"
        path.write_bytes(of_kind("tone.mp3", 1.0))
        with (
            path.open(errors="replace") as text,
            pytest.raises(AudioError, match=r"open it with mode 'rb'"),
        ):
            read_audio(cast("Any", text))
        with path.open("rb") as file:
            upload = UploadFile(file)
            with pytest.raises(AudioError, match=r"BytesIO\(await audio\.read\(\)\)"):
                read_audio(cast("Any", upload))
            assert len(read_audio(upload.file).samples) > RATE // 2

    def test_a_reader_that_fails_in_mid_file_says_so(self) -> None:
        """
        Nothing is cut for that: who reads may try again.
        """

        class Torn(io.BytesIO):
            def read(self, size: int | None = -1, /) -> bytes:
                if self.tell() > 100_000:
                    raise OSError(5, "the tape is torn")
                return super().read(size)

        with pytest.raises(AudioError, match="the tape is torn"):
            read_audio(Torn(of_kind("tone.wav")))


class TestTold:
    """
    Who transcribes learns what was lost, wherever he does.
    """

    @pytest.fixture
    def damaged(self, tmp_path: Path) -> str:
        """
        An mp3 of 8 s with a hole of 0.8 s.
        """
        path = tmp_path / "damaged.mp3"
        path.write_bytes(with_a_hole(of_kind("tone.mp3")))
        return str(path)

    @pytest.fixture
    def run(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> Callable[..., tuple[int, str, str]]:
        """
        Runs the command in this process: exit code, stdout, stderr.
        """
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        return lambda *arguments: (main(arguments), *capsys.readouterr())

    def test_a_model_hears_all_that_is_left_and_a_warning_says_what_is_not(
        self, caplog: pytest.LogCaptureFixture, damaged: str
    ) -> None:
        """
        In the library's log, by the file's name.
        """
        with ModelCache(variants=False) as cache:
            segments, info = model_of(cache, micro()).transcribe(damaged, beam_size=1)
            list(segments)
        assert info.duration == pytest.approx(7.2, abs=0.05)
        (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
        assert record.name == "whispercache"
        assert record.getMessage() == (
            f"{damaged!r} is damaged: about 0.8 s could not be decoded (1 packet)"
        )

    def test_transcribe_says_it_once_and_goes_on(
        self, run: Callable[..., tuple[int, str, str]], damaged: str, tmp_path: Path
    ) -> None:
        """
        Damaged files are transcribed; what broke off before its audio is passed over,
        and the exit code tells that.
        """
        broken = []
        for name in ("tone.ogg", "tone.flac", "tone.webm", "tone.ts", "tone.m4a"):
            path = tmp_path / name
            path.write_bytes(of_kind(name)[:150])
            broken.append(str(path))
        models = [
            argument
            for says in ("alpha speaks", "beta speaks")
            for argument in ("--model", str(micro(says)))
        ]
        options = ("--device", "cpu", "--beam-size", "1", "--no-variants")
        code, out, err = run("transcribe", *broken, damaged, *models, *options)
        assert code == 2
        assert ("alpha speaks" in out, "beta speaks" in out) == (True, True)
        *errors, warning = err.splitlines()
        assert warning == (
            f"whispercache: warning: {damaged} is damaged: about 0.8 s could not be "
            "decoded (1 packet)"
        )
        for file, line in zip(broken, errors, strict=True):
            assert line.startswith(f"whispercache: error: cannot decode audio {file!r}")

    def test_compare_notes_it_in_this_run_and_the_next(
        self, damaged: str, tmp_path: Path
    ) -> None:
        """
        Once for each file; what broke off is passed over.
        """
        broken = tmp_path / "tone.ogg"
        broken.write_bytes(of_kind("tone.ogg")[:500])
        for is_kept in (False, True):
            found = compare(
                [damaged, str(broken)],
                models=[str(micro("alpha speaks")), str(micro("beta speaks"))],
                device="cpu",
                out=tmp_path / "out",
                beam_size=1,
                load_options={"cpu_threads": 1},
            )
            assert [each.is_kept for each in found.results] == [is_kept] * 2
            assert [each.file for each in found.failures] == [str(broken)]
            (note,) = [note for note in found.notes if "damaged" in note]
            assert note.startswith(f"{damaged} is damaged: about 0.8 s could not be")
            page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
            assert "is damaged: about 0.8 s" in page

    @pytest.mark.process
    def test_a_server_has_it_in_its_log(
        self, caplog: pytest.LogCaptureFixture, damaged: str, tmp_path: Path
    ) -> None:
        """
        From the process that decoded.
        """

        async def main() -> float:
            async with Decoder(processes=1) as decoder:
                return await decoder.decode(Path(damaged), tmp_path / "samples")

        assert asyncio.run(main()) == pytest.approx(7.2, abs=0.05)
        assert "an upload is damaged: about 0.8 s could not be decoded" in caplog.text

    def test_integers_are_refused_with_what_to_do(self) -> None:
        """
        What was scaled wrong would be noise.
        """
        with ModelCache(variants=False) as cache:
            model = model_of(cache, micro())
            with pytest.raises(AudioError, match=r"astype\('float32'\) / 128"):
                model.transcribe(np.zeros(16_000, np.int8))
            with pytest.raises(AudioError, match=r"/ 2147483648"):
                model.transcribe(np.zeros(16_000, np.int32))
            assert cache.stats().requests == 0
