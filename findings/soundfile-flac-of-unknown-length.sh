#!/bin/sh
# soundfile 0.14 (libsndfile 1.2.2): a FLAC file that does not tell its length, as the format
# allows and every encoder that writes to a pipe makes it, is reported to be millions of years
# long, and neither `read()` nor `blocks()` gives its samples: both raise. PyAV reads it.
#
# Seen: 9223372036854775807 frames, a ValueError by `read`, a LibsndfileError by `blocks`, and 1 s
# by PyAV.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet soundfile==0.14.0 "av==18.1.0" numpy
"$work/venv/bin/python" - <<'PYTHON'
import io

import av
import numpy as np
import soundfile

RATE = 16_000


class Pipe(io.BytesIO):
    def seekable(self) -> bool:
        return False

    seek = tell = None


out = Pipe()
with av.open(out, "w", format="flac") as file:
    stream = file.add_stream("flac", rate=RATE, layout="mono")
    samples = (9_000 * np.sin(np.arange(RATE) / 9)).astype(np.int16)
    for at in range(0, RATE, 4000):
        frame = av.AudioFrame.from_ndarray(samples[None, at : at + 4000], "s16", "mono")
        frame.sample_rate, frame.pts = RATE, at
        file.mux(stream.encode(frame))
    file.mux(stream.encode(None))
data = out.getvalue()


def raised(read) -> str:
    try:
        read()
    except (ValueError, soundfile.LibsndfileError) as error:
        return type(error).__name__
    return "nothing"


frames = soundfile.info(io.BytesIO(data)).frames
whole = raised(lambda: soundfile.read(io.BytesIO(data)))
blocks = raised(lambda: list(soundfile.blocks(io.BytesIO(data), 4096)))
with av.open(io.BytesIO(data)) as file:
    there = sum(piece.samples for piece in file.decode(audio=0))
print("soundfile", soundfile.__version__, frames, "frames; raised:", whole, blocks, "PyAV:", there)
assert there == RATE, "PyAV no longer reads it"
assert frames == 2**63 - 1, "a length is told now"
assert whole == "ValueError" and blocks == "LibsndfileError", "it is read now"
PYTHON
