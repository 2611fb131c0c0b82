"""
Decoding: whispercache's decoder beside faster-whisper's, on whole files.

    python benchmarks/decode.py [--rounds 15] [--minutes 2] [--write]

The example clips, one after the other, in the containers that people send. Both decode
each file in turn; the ratio is the median of each turn's own, so that what else the
machine does falls on both. Samples are compared, bit by bit. Peak memory is that of a
process of its own for each, above what it has once all is imported, for an hour of wav.
"""

from __future__ import annotations

import io
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

sys.path.insert(0, str(Path(__file__).parent.parent))

import av
import numpy as np
from faster_whisper import decode_audio
from report import Table, machine, parsed, write

from whispercache import read_audio

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Samples = NDArray[np.float32]

CLIPS = Path(__file__).parent.parent / "examples" / "clips"
RATE_HZ = 16_000
KINDS = {
    "wav": ("wav", "pcm_s16le", 44_100),
    "flac": ("flac", "flac", 48_000),
    "mp3": ("mp3", "libmp3lame", 44_100),
    "m4a": ("ipod", "aac", 44_100),
    "ogg, opus": ("ogg", "libopus", 48_000),
    "webm, opus": ("webm", "libopus", 48_000),
    "ts": ("mpegts", "aac", 48_000),
    "wav, 16 kHz": ("wav", "pcm_s16le", RATE_HZ),
}
DECODERS: dict[str, Callable[[str], Samples]] = {
    "faster-whisper": decode_audio,
    "whispercache": lambda path: read_audio(path).samples,
}
LONG_S = 3600

PEAK = """
import re, sys
from pathlib import Path
from faster_whisper import decode_audio
from whispercache import read_audio
def peak():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) / 1024
decode = decode_audio if sys.argv[1] == "faster-whisper" else read_audio
decode(sys.argv[3])
before = peak()
kept = decode(sys.argv[2])
print(peak() - before)
"""


def speech(seconds: float) -> Samples:
    parts = [read_audio(path).samples for path in sorted(CLIPS.glob("*.flac"))]
    once = np.concatenate(parts)
    return np.resize(once, int(seconds * RATE_HZ))


def encoded(samples: Samples, container: str, codec: str, rate_hz: int) -> bytes:
    target = io.BytesIO()
    with av.open(target, "w", format=container) as file:
        stream = cast("av.AudioStream", file.add_stream(codec, rate_hz))
        stream.layout = "mono"
        resampler = av.AudioResampler(
            stream.format, "mono", rate_hz, stream.frame_size or 1024
        )
        values = (samples[None] * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(values, "s16", "mono")
        frame.sample_rate = RATE_HZ
        for piece in (*resampler.resample(frame), *resampler.resample(None)):
            file.mux(stream.encode(piece))
        file.mux(stream.encode(None))
    return target.getvalue()


def turns(path: str, rounds: int) -> dict[str, list[float]]:
    """
    Returns the seconds of each decoder, turn by turn.
    """
    results = [decode(path) for decode in DECODERS.values()]
    first, second = results
    assert np.array_equal(first, second), f"{path}: samples differ"
    taken: dict[str, list[float]] = {name: [] for name in DECODERS}
    for number in range(rounds):
        order = list(DECODERS) if number % 2 else list(reversed(DECODERS))
        for name in order:
            started_s = time.perf_counter()
            DECODERS[name](path)
            taken[name].append(time.perf_counter() - started_s)
    return taken


def peak_mib(decoder: str, path: Path, short: Path) -> float:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, decoder, str(path), str(short)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    return float(done.stdout)


def main() -> None:
    options = parsed(__doc__, rounds=15, minutes=2.0)
    try:
        decode_audio(str(CLIPS / "en-bread.flac"))
    except TypeError as error:
        print(f"Nothing to compare with, faster-whisper fails: {error}.")
        print("It is too old for this PyAV: pip install 'av<19'")
        return
    columns = ["", *(f"{name}, ms" for name in DECODERS), "ratio"]
    table = Table(f"{options.minutes:g} minutes of speech", columns)
    memory = Table(
        f"An hour of wav: {LONG_S * RATE_HZ * 4 / 2**20:.0f} MiB of samples",
        ["", "peak, MiB"],
    )
    samples = speech(options.minutes * 60)
    with tempfile.TemporaryDirectory() as folder:
        for name, (container, codec, rate_hz) in KINDS.items():
            path = Path(folder, "speech")
            path.write_bytes(encoded(samples, container, codec, rate_hz))
            taken = turns(str(path), options.rounds)
            pairs = zip(*reversed(taken.values()), strict=True)
            ratio = statistics.median(ours / theirs for ours, theirs in pairs)
            medians = (statistics.median(each) * 1e3 for each in taken.values())
            table.add(name, *(f"{each:.0f}" for each in medians), f"{ratio:.2f}")
        long, short = Path(folder, "long.wav"), CLIPS / "en-bread.flac"
        long.write_bytes(encoded(speech(LONG_S), "wav", "pcm_s16le", RATE_HZ))
        for name in DECODERS:
            memory.add(name, f"{peak_mib(name, long, short):.0f}")
    write("decode", [machine(), table, memory], to_file=options.write)


if __name__ == "__main__":
    main()
