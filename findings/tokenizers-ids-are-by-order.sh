#!/bin/sh
# tokenizers 0.22: the `id` of an added token in tokenizer.json is not what it gets, if the
# token is not in the vocabulary. Ids are given by the order of the list, from the size of
# the vocabulary on, without a warning. So a file whose ids look right may still number a
# model's special tokens otherwise than the model does.
#
# Seen: ids 10 and 7 in the file, 2 and 3 in use.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet tokenizers==0.22.1
"$work/venv/bin/python" - <<'PYTHON'
import json

import tokenizers

FLAGS = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
written = {"<|one|>": 10, "<|two|>": 7}
file = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [{"id": n, "content": t, **FLAGS} for t, n in written.items()],
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
    }
)
tokenizer = tokenizers.Tokenizer.from_str(file)
used = {token: tokenizer.token_to_id(token) for token in written}
print("tokenizers", tokenizers.__version__, "written:", written, "used:", used)
assert used == {"<|one|>": 2, "<|two|>": 3}, "ids are no longer given by order"
PYTHON
