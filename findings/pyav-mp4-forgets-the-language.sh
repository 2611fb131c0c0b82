#!/bin/sh
# PyAV 18.1 (FFmpeg): the language of a track, as the two letters that Whisper gives ("en"), is
# lost in MP4, MOV and MPEG-TS, without an error. They take codes of three letters only, while
# Matroska, WebM and Ogg keep what they are given. So the tracks of a transcribed film have no
# language in one format, and have it in the other. MOV takes no "deu" either, only "ger".
#
# Seen: "en" is kept by matroska, and None in mp4, mov and mpegts, which keep "eng".
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet av==18.1.0 numpy
"$work/venv/bin/python" - <<'PYTHON'
import io

import av
import numpy as np

RATE = 16_000


def kept(form: str, language: str) -> str | None:
    out = io.BytesIO()
    with av.open(out, "w", format=form) as file:
        stream = file.add_stream("aac", rate=RATE, layout="mono")
        stream.metadata["language"] = language
        for at in range(0, RATE, 1024):
            samples = np.zeros((1, 1024), np.float32)
            frame = av.AudioFrame.from_ndarray(samples, "fltp", "mono")
            frame.sample_rate, frame.pts = RATE, at
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    out.seek(0)
    with av.open(out) as file:
        return file.streams.audio[0].metadata.get("language")


forms = ("matroska", "mp4", "mov", "mpegts")
seen = {form: [kept(form, code) for code in ("en", "eng", "deu", "ger")] for form in forms}
print("PyAV", av.__version__, seen)
assert seen["matroska"] == ["en", "eng", "deu", "ger"]
assert seen["mp4"] == seen["mpegts"] == [None, "eng", "deu", "ger"], "two letters are kept now"
assert seen["mov"] == [None, "eng", None, "ger"], "mov has changed"
PYTHON
