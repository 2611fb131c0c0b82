#!/bin/sh
# soundfile 0.14 (libsndfile 1.2.2): of an mp3 file with a variable bit rate and without the
# header that tells its length, as recorders of streams and joined or cut files have it, only a
# part is read. The length is reckoned from the size of the first frames, and reading ends
# there, by blocks too, as if that were the end: no error, no warning.
#
# Seen with 36 s of speech: some 20 s by soundfile, all 36 s by PyAV.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet soundfile==0.14.0 "av==18.1.0" numpy
"$work/venv/bin/python" - "$(dirname "$0")/../examples/clips/en-harbour-long.flac" <<'PYTHON'
import io
import sys

import av
import soundfile

RATE = 44_100
QUALITY = 4 * 118  # LAME's V4 in FFmpeg's unit


def variable(path: str) -> bytes:
    out = io.BytesIO()
    resampler = av.AudioResampler("s16p", "mono", RATE, frame_size=1152)
    with av.open(path) as source, av.open(out, "w", "mp3", {"write_xing": "0"}) as file:
        options = {"flags": "+qscale", "global_quality": str(QUALITY)}
        stream = file.add_stream("libmp3lame", RATE, options=options, layout="mono")
        for frame in (*source.decode(audio=0), None):
            for piece in resampler.resample(frame):
                file.mux(stream.encode(piece))
        file.mux(stream.encode(None))
    return out.getvalue()


data = variable(sys.argv[1])
print("soundfile", soundfile.__version__, soundfile.__libsndfile_version__)
read_s = len(soundfile.read(io.BytesIO(data))[0]) / RATE
blocks_s = sum(len(block) for block in soundfile.blocks(io.BytesIO(data), 4096)) / RATE
with av.open(io.BytesIO(data)) as file:
    whole_s = sum(frame.samples for frame in file.decode(audio=0)) / RATE
print(f"read: {read_s:.1f} s, by blocks: {blocks_s:.1f} s, by PyAV: {whole_s:.1f} s")
assert whole_s > 36, "PyAV no longer reads the file"
assert max(read_s, blocks_s) < 0.8 * whole_s, "all of it is read now"
PYTHON
