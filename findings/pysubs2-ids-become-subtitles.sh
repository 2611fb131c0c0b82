#!/bin/sh
# pysubs2 1.8: of WebVTT, cue identifiers that are words are shown as text. Only numbers are
# taken for identifiers; a word is added to the cue before it. Entities are left as they are:
# "AT&amp;T" is shown so, and becomes so in SRT, which has no entities.
#
# Seen: the identifier "second" is at the end of the first of two cues, "AT&amp;T" in the text.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet pysubs2==1.8.1
"$work/venv/bin/python" - <<'PYTHON'
import pysubs2

CUES = """WEBVTT

first
00:00:01.000 --> 00:00:02.000
AT&amp;T rises

second
00:00:03.000 --> 00:00:04.000
and falls
"""
print("pysubs2", pysubs2.VERSION)
read = pysubs2.SSAFile.from_string(CUES)
texts = [event.plaintext for event in read]
print(texts)
print(read.to_string("srt"))
assert len(texts) == 2 and texts[1] == "and falls"
assert texts[0].split() == ["AT&amp;T", "rises", "second"], "this has changed"
PYTHON
