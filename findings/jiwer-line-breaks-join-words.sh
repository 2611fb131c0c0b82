#!/bin/sh
# jiwer 4.0: one line break between two words makes them one word, while two line breaks part
# them. Words are parted at spaces only, and what becomes a space before that is any run of two
# or more of the white space, never a single break, tab or no-break space. So a reference that is
# broken into lines, as captions are, counts errors against the same text in one line.
#
# Seen: an error rate of 0.67 with one break, 0 with two; 2.0 for a no-break space.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jiwer==4.0.0
"$work/venv/bin/python" - <<'PYTHON'
import importlib.metadata

import jiwer

print("jiwer", importlib.metadata.version("jiwer"))
line = "hello world foo bar"
seen = [jiwer.wer(f"hello world{gap}foo bar", line) for gap in ("\n", "\n\n", " ")]
no_break = jiwer.wer("hello\u00a0world", "hello world")
print("one break, two, a space:", *seen, "a no-break space:", no_break)
assert seen[0] > 0.6 and seen[1:] == [0, 0], "breaks have changed"
assert no_break == 2, "no-break spaces have changed"
PYTHON
