#!/bin/sh
# faster-whisper 1.2.1: `decode_audio` hears only the first of two joined mp3 files, and
# says nothing. mp3 files may be joined byte by byte; players and FFmpeg's own program
# play both. The header frame of the second one is a packet that PyAV cannot decode; its
# exception ends the generator in which faster-whisper skips such packets.
#
# Seen: 10 s of 20 by `decode_audio`, 20 s packet by packet with PyAV.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet faster-whisper==1.2.1 ctranslate2==4.8.5 "av==18.1.0"
"$work/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import io

import av
import numpy as np
from faster_whisper import decode_audio

RATE = 44_100


def tone(seconds: int) -> bytes:
    out = io.BytesIO()
    samples = (np.sin(np.arange(RATE * seconds) / 20) * 9000).astype(np.int16)
    with av.open(out, "w", format="mp3") as file:
        stream = file.add_stream("libmp3lame", rate=RATE, layout="mono")
        for at in range(0, len(samples), 1152):
            frame = av.AudioFrame.from_ndarray(samples[None, at : at + 1152], "s16p", "mono")
            frame.rate, frame.pts = RATE, at
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return out.getvalue()


def packet_by_packet(data: bytes) -> float:
    n_samples = 0
    with av.open(io.BytesIO(data)) as file:
        for packet in file.demux(audio=0):
            try:
                n_samples += sum(frame.samples for frame in packet.decode())
            except av.error.InvalidDataError:
                continue
    return n_samples / RATE


print(*(f"{name} {importlib.metadata.version(name)}" for name in ("faster-whisper", "av")))
joined = tone(10) + tone(10)
heard_s = len(decode_audio(io.BytesIO(joined))) / 16_000
there_s = packet_by_packet(joined)
print(f"decode_audio: {heard_s:.1f} s; packet by packet: {there_s:.1f} s")
assert there_s > 19.5, "PyAV no longer decodes both"
assert heard_s < 11, "decode_audio hears more than the first"
PYTHON
