#!/bin/sh
# faster-whisper 1.2.1: the times of segments are places among the decoded samples, not in
# the file. A recording whose sound starts late, or which has gaps (video whose sound joins
# later, calls with discontinuous transmission), is decoded without them, so that subtitles
# come too early by all the gaps before them. Players go by the file's time stamps.
#
# Seen: a Matroska file of 13 s, with sound at 2 to 3, 7 to 8 and 12 to 13 s, becomes 3 s of
# samples; the last tone begins at 2 s instead of 12.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet faster-whisper==1.2.1 ctranslate2==4.8.5 "av==18.1.0"
"$work/venv/bin/python" - "$work/gaps.mkv" <<'PYTHON'
import importlib.metadata
import sys
from fractions import Fraction

import av
import numpy as np
from faster_whisper import decode_audio

RATE = 16_000
print("faster-whisper", importlib.metadata.version("faster-whisper"), "PyAV", av.__version__)
tone = (20_000 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)).astype(np.int16)
with av.open(sys.argv[1], "w") as file:
    stream = file.add_stream("pcm_s16le", rate=RATE, layout="mono")
    for begin_s in (2, 7, 12):
        for start in range(0, RATE, 800):
            piece = tone[None, start : start + 800]
            frame = av.AudioFrame.from_ndarray(piece, format="s16", layout="mono")
            frame.sample_rate, frame.time_base = RATE, Fraction(1, RATE)
            frame.pts = begin_s * RATE + start
            file.mux(stream.encode(frame))
    file.mux(stream.encode(None))
with av.open(sys.argv[1]) as file:
    length_s = file.duration / 1_000_000
heard_s = len(decode_audio(sys.argv[1])) / RATE
print("seconds of the file and of the samples:", length_s, heard_s)
assert length_s > 12.5, "the file is not what it was"
assert heard_s < 3.5, "gaps are kept now"
PYTHON
