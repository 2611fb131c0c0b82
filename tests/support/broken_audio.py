"""
A corpus of uploads that a server must survive, made by code in a second or two.

Each says what is to become of it. Nothing of it is audio that anybody said: tones,
silence, and what others have found to break decoders.
"""

from __future__ import annotations

import functools
import gzip
import io
import json
import math
import struct
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import av
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["Broken", "Expectation", "corpus", "encoded", "playlists", "silence_bomb"]

Expectation = Literal["decodes", "refused", "too long"]

_RATE_HZ = 16_000
BOMB_S = 8 * 3600.0
"""
Seconds of silence in the bomb; everything else lasts for less than 10 s.
"""


@dataclass(frozen=True, slots=True)
class Broken:
    """
    One upload.

    Attributes:
        name: What is wrong with it.
        path: The file; its suffix is part of the test.
        content_type: What its client claims.
        expectation: ``"decodes"`` if some of it can be heard.
        seconds: How much of it, or None if that is the decoder's own affair.
    """

    name: str
    path: Path
    content_type: str
    expectation: Expectation
    seconds: float | None = None


def corpus(directory: Path, victim: str = "/etc/passwd", url: str = "") -> list[Broken]:
    """
    All of them, as files in *directory*.

    Args:
        directory: An existing, empty directory.
        victim: A file that playlists name; it must never be opened.
        url: An address that playlists name; it must never be asked.
    """
    return [
        *_valid(directory),
        *_no_audio(directory),
        *_truncated(directory),
        *_lying(directory),
        *_costly(directory),
        *playlists(directory, victim, url or "http://127.0.0.1:9/"),
    ]


def _file(
    directory: Path,
    file_name: str,
    content: bytes,
    expectation: Expectation,
    seconds: float | None = None,
    *,
    content_type: str = "audio/wav",
) -> Broken:
    path = directory / file_name
    path.write_bytes(content)
    return Broken(path.name, path, content_type, expectation, seconds)


def tone(seconds: float, rate_hz: int = _RATE_HZ, channels: int = 1) -> bytes:
    """
    A tone of 440 Hz: 16 bit, interleaved.
    """
    times = np.arange(int(seconds * rate_hz)) / rate_hz
    wave = (8000 * np.sin(2 * math.pi * 440 * times)).astype("<i2")
    return np.repeat(wave, channels).tobytes()


def wav(
    samples: bytes,
    *,
    rate_hz: int = _RATE_HZ,
    channels: int = 1,
    n_bits: int = 16,
    kind: int = 1,
    claimed_bytes: int | None = None,
) -> bytes:
    """
    A WAV file with any header.
    """
    frame_bytes = channels * n_bits // 8
    head = struct.pack(
        "<HHIIHH",
        kind,
        channels,
        rate_hz,
        rate_hz * frame_bytes % 2**32,
        frame_bytes % 2**16,
        n_bits,
    )
    n_bytes = len(samples) if claimed_bytes is None else claimed_bytes
    riff_bytes = min(2**32 - 1, n_bytes + 36)
    return b"".join(
        (
            struct.pack("<4sI4s4sI", b"RIFF", riff_bytes, b"WAVE", b"fmt ", len(head)),
            head,
            struct.pack("<4sI", b"data", n_bytes),
            samples,
        )
    )


@functools.cache
def encoded(
    container: str, codec: str, seconds: float = 1.0, rate_hz: int = 48_000
) -> bytes:
    """
    A tone as *codec* in *container*, in stereo.
    """
    target = io.BytesIO()
    with av.open(target, "w", format=container) as file:
        stream = file.add_stream(codec, rate_hz, options={"strict": "-2"})
        assert isinstance(stream, av.AudioStream)
        stream.layout = "stereo"
        stream.bit_rate = 128_000
        frame = av.AudioFrame("s16", "stereo", int(seconds * rate_hz))
        frame.planes[0].update(tone(seconds, rate_hz, 2))
        frame.sample_rate = rate_hz
        fifo = av.AudioFifo()
        resampler = av.AudioResampler(stream.format, "stereo", rate_hz)
        for converted in resampler.resample(frame):
            fifo.write(converted)
        for piece in fifo.read_many(stream.frame_size or 1024, partial=True):
            file.mux(stream.encode(piece))
        file.mux(stream.encode(None))
    return target.getvalue()


VALID = {
    "tone.wav": ("wav", "pcm_s16le", 44_100),
    "tone-24.wav": ("wav", "pcm_s24le", 96_000),
    "tone.flac": ("flac", "flac", 48_000),
    "tone.mp3": ("mp3", "libmp3lame", 44_100),
    "tone.ogg": ("ogg", "libopus", 48_000),
    "tone.m4a": ("ipod", "aac", 44_100),
    "tone.mov": ("mov", "alac", 44_100),
    "tone.webm": ("webm", "libopus", 48_000),
    "tone.mkv": ("matroska", "vorbis", 44_100),
    "tone.ts": ("mpegts", "aac", 48_000),
    "tone.mpeg": ("mpeg", "mp2", 48_000),
    "tone.aac": ("adts", "aac", 48_000),
    "tone.aiff": ("aiff", "pcm_s16be", 22_050),
    "tone.caf": ("caf", "pcm_s16le", 32_000),
    "tone.asf": ("asf", "wmav2", 44_100),
    "tone.au": ("au", "pcm_mulaw", 8_000),
}
"""
Kinds of audio that people send: container, codec, rate in Hz.
"""


def _valid(directory: Path) -> Iterator[Broken]:
    """
    What is odd and yet has to work.
    """
    for name, (container, codec, rate_hz) in VALID.items():
        content = encoded(container, codec, 1.0, rate_hz)
        # Encoders put some silence before and after.
        yield _file(directory, name, content, "decodes", 1.0, content_type="audio/mpeg")
    for name, like in (
        ("flac-called-mp3.mp3", "tone.flac"),
        ("mp3-called-png.png", "tone.mp3"),
        ("opus-called-playlist.m3u8", "tone.ogg"),
        ("wav-without-a-suffix", "tone.wav"),
    ):
        container, codec, rate_hz = VALID[like]
        content = encoded(container, codec, 1.0, rate_hz)
        yield _file(directory, name, content, "decodes", 1.0, content_type="image/png")
    yield _file(directory, "10ms.wav", wav(tone(0.01)), "decodes", 0.01)
    many = wav(tone(0.5, 96_000, 8), rate_hz=96_000, channels=8)
    yield _file(directory, "8-channels-96kHz.wav", many, "decodes", 0.5)
    both = encoded("mp3", "libmp3lame", 1.0, 44_100)
    both += encoded("mp3", "libmp3lame", 1.0, 48_000)
    yield _file(directory, "rate-changes.mp3", both, "decodes", 2.0)
    nan = np.full(_RATE_HZ, np.nan, "<f4").tobytes()
    yield _file(directory, "nan.wav", wav(nan, n_bits=32, kind=3), "decodes", 1.0)


def _no_audio(directory: Path) -> Iterator[Broken]:
    noise = np.random.default_rng(1).bytes(100_000)
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tone.wav", wav(tone(1.0)))
    silence = np.zeros(_RATE_HZ, np.int16).tobytes()
    contents = {
        "empty.wav": b"",
        "one-byte.wav": b"R",
        "text.mp3": b"It was a bright cold day in April.\n" * 100,
        "page.html": b"<!DOCTYPE html><html><body><p>Not found</p></body></html>",
        "object.json": json.dumps({"audio": "yes"}).encode(),
        "picture.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + noise,
        "archive.zip": zipped.getvalue(),
        "tone.wav.gz": gzip.compress(wav(tone(1.0))),
        "raw.pcm": tone(1.0),
        "raw-silence.pcm": silence,
        "video-only.mp4": _video(),
        "program.exe": b"MZ\x90\0" + bytes(60) + b"PE\0\0" + noise,
        "no-samples.wav": wav(b""),
        "no-frames.flac": encoded("flac", "flac")[:100],
    }
    for name, content in contents.items():
        yield _file(directory, name, content, "refused")


def _truncated(directory: Path) -> Iterator[Broken]:
    """
    Uploads that broke off, and such as were damaged on the way.
    """
    for name in ("tone.wav", "tone.flac", "tone.mp3", "tone.ogg", "tone.webm"):
        container, codec, rate_hz = VALID[name]
        whole = encoded(container, codec, 4.0, rate_hz)
        half = whole[: len(whole) // 2]
        # The start of a tone is no constant share of FLAC's bytes.
        seconds = None if codec == "flac" else 2.0
        yield _file(directory, f"truncated-{name}", half, "decodes", seconds)
    whole = encoded("ipod", "aac", 4.0, 44_100)
    assert whole.rindex(b"moov") > len(whole) // 2
    half = whole[: len(whole) // 2]
    yield _file(directory, "no-moov.m4a", half, "refused", content_type="audio/mp4")
    whole = encoded("flac", "flac", 4.0, 48_000)
    damaged = bytearray(whole)
    for position in range(len(whole) // 3, len(whole) // 2, 97):
        damaged[position] ^= 0xFF
    yield _file(directory, "damaged.flac", bytes(damaged), "decodes", None)


def _lying(directory: Path) -> Iterator[Broken]:
    """
    Headers that claim what is not there, or cannot be.
    """
    second = tone(1.0)
    gigabytes = b"".join(
        (
            struct.pack("<4sI4s", b"RF64", 2**32 - 1, b"WAVE"),
            struct.pack("<4sIQQQI", b"ds64", 28, 10**10, 10**10, 5 * 10**9, 0),
            wav(second, claimed_bytes=2**32 - 1)[12:],
        )
    )
    yield _file(directory, "10-GB-claimed.wav", gigabytes, "decodes", 1.0)
    most = wav(second, claimed_bytes=2**32 - 1)
    yield _file(directory, "4-GiB-claimed.wav", most, "decodes", 1.0)
    for name, header in (
        ("0-channels.wav", wav(second, channels=0)),
        ("1000-channels.wav", wav(tone(0.1, channels=1000), channels=1000)),
        ("0-Hz.wav", wav(second, rate_hz=0)),
        ("2-GHz.wav", wav(second, rate_hz=2 * 10**9)),
        ("4-GHz.wav", wav(second, rate_hz=4 * 10**9)),
        ("unknown-codec.wav", wav(second, kind=0x7A21)),
    ):
        yield _file(directory, name, header, "refused")
    rare = encoded("wav", "adpcm_yamaha")
    yield _file(directory, "codec-of-games.wav", rare, "refused")
    mp4 = bytearray(encoded("ipod", "aac", 1.0, 44_100))
    for table in (b"stsz", b"stts", b"stsc", b"stco"):
        # Type, version and flags; for stsz the size of all samples too.
        at = mp4.index(table) + (12 if table == b"stsz" else 8)
        mp4[at : at + 4] = b"\x0f\xff\xff\xff"
    yield _file(directory, "millions-of-samples-claimed.m4a", bytes(mp4), "refused")
    tag = b"ID3\x04\0\0" + bytes((0x7F, 0x7F, 0x7F, 0x7F))
    yield _file(directory, "256-MiB-tag-claimed.mp3", tag + b"TIT2", "refused")


def _costly(directory: Path) -> Iterator[Broken]:
    """
    Small files that are a lot of work.
    """
    bomb = silence_bomb(BOMB_S)
    yield _file(directory, "silence-bomb.flac", bomb, "too long", BOMB_S)
    n_bytes = 8 * 1024**2
    size = bytes(n_bytes >> shift & 0x7F for shift in (21, 14, 7, 0))
    tag = b"ID3\x04\0\0" + size + bytes(n_bytes)
    content = tag + encoded("mp3", "libmp3lame", 1.0, 44_100)
    yield _file(
        directory, "8-MiB-tag.mp3", content, "decodes", 1.0, content_type="audio/mpeg"
    )
    streams = b"".join(_ogg_page(serial) for serial in range(10_000))
    yield _file(
        directory, "10000-streams.ogg", streams, "refused", content_type="audio/ogg"
    )
    slow = wav(tone(1.0), rate_hz=1)
    yield _file(directory, "1-Hz.wav", slow, "too long")


def playlists(directory: Path, victim: str, url: str) -> Iterator[Broken]:
    """
    Files that only name other files, which a server must not fetch for anybody.
    """
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{}\n#EXT-X-ENDLIST\n"
    for kind, target in (("file", f"file://{victim}"), ("path", victim), ("url", url)):
        content = hls.format(target).encode()
        yield _file(directory, f"hls-{kind}.m3u8", content, "refused")
        yield _file(directory, f"hls-{kind}.mp3", content, "refused")
    dash = (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT9S"><Period><AdaptationSet mimeType="audio/mp4">'
        f'<Representation id="1" bandwidth="1"><BaseURL>{url}</BaseURL>'
        "</Representation></AdaptationSet></Period></MPD>"
    )
    scripts = {
        "concat.ffconcat": f"ffconcat version 1.0\nfile '{victim}'\nfile '{url}'\n",
        "session.sdp": (
            "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
            "m=audio 5004 RTP/AVP 0\n"
        ),
        "manifest.mpd": dash,
        "subtitles.srt": "1\n00:00:00,000 --> 00:00:09,000\nhello\n",
        "beats.sbg": "-SE\nts: pink/40 200+10/60\n0:00 ts\n",
        "list.pls": f"[playlist]\nFile1={url}\nNumberOfEntries=1\n",
        "picture.svg": f'<svg xmlns:x="x"><image x:href="{url}"/></svg>',
    }
    for name, text in scripts.items():
        yield _file(
            directory, name, text.encode(), "refused", content_type="audio/mpeg"
        )


def _video() -> bytes:
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as file:
        stream = file.add_stream("mpeg4", 10)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(10):
            frame = av.VideoFrame(64, 64, "yuv420p")
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return target.getvalue()


def silence_bomb(seconds: float) -> bytes:
    """
    A FLAC file of silence: 3.4 bytes for each second of it.

    Written by hand from the format's specification (RFC 9639), since encoders make
    smaller blocks, of which each costs the same.
    """
    n_blocks = math.ceil(seconds * _RATE_HZ / 65_535)
    # Block sizes, no frame sizes; 16 kHz, one channel, 16 bit, unknown length; no MD5.
    info = struct.pack(">HH6xQ16x", 65_535, 65_535, _RATE_HZ << 44 | 15 << 36)
    head = b"fLaC\x80" + len(info).to_bytes(3, "big") + info
    return head + b"".join(_silent_block(number) for number in range(n_blocks))


def _silent_block(number: int) -> bytes:
    # Sync code; a 16-bit block size at the end and 16 kHz; one channel, 16 bit.
    head = b"\xff\xf8\x75\x08" + chr(number).encode() + struct.pack(">H", 65_534)
    head += bytes((_crc8(head),))
    block = head + b"\0\0\0"  # a constant subframe, of value 0
    return block + _crc16(block).to_bytes(2, "big")


def _ogg_page(serial: int) -> bytes:
    packet = b"OpusHead\1\1\0\0\x80\xbb\0\0\0\0\0"
    page = struct.pack("<4sBBqIIIBB", b"OggS", 0, 2, 0, serial, 0, 0, 1, len(packet))
    page += packet
    return page[:22] + _crc32(page).to_bytes(4, "little") + page[26:]


def _crc(n_bits: int, polynomial: int) -> Callable[[bytes], int]:
    top, mask = 1 << n_bits - 1, (1 << n_bits) - 1
    table = []
    for byte in range(256):
        value = byte << n_bits - 8
        for _ in range(8):
            value = value << 1 ^ (polynomial if value & top else 0)
        table.append(value & mask)

    def crc(content: bytes) -> int:
        value = 0
        for byte in content:
            value = value << 8 & mask ^ table[value >> n_bits - 8 ^ byte]
        return value

    return crc


_crc8 = _crc(8, 0x07)
_crc16 = _crc(16, 0x8005)
_crc32 = _crc(32, 0x04C11DB7)
