#!/bin/sh
# pysubs2 1.8: `load_from_whisper()` takes the text of segments for markup of the ASS format.
# What stands in braces is gone from SRT and WebVTT, and "\N", as in the path of a Windows
# folder, breaks the line and is lost. Reading SRT, "<" and ">" of a comparison are taken for a tag,
# with all between them.
#
# Seen: "{laughs} see C:\New" is "see C:" and "ew" on a second line; of "if a < b and c > d", read
# from SRT, "if a  d" is left.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet pysubs2==1.8.1
"$work/venv/bin/python" - <<'PYTHON'
import pysubs2

print("pysubs2", pysubs2.VERSION)
heard = [{"start": 0.0, "end": 2.0, "text": " {laughs} see C:\\New"}]
for form in ("srt", "vtt"):
    made = pysubs2.load_from_whisper(heard).to_string(form)
    print(made)
    assert "laughs" not in made and "see C:\new" in made, "the text is kept now"
subtitles = "1\n00:00:00,000 --> 00:00:02,000\nif a < b and c > d\n"
kept = pysubs2.SSAFile.from_string(subtitles)[0].plaintext
print(kept)
assert kept.split() == ["if", "a", "d"], "comparisons are kept now"
PYTHON
