"""
The micro models answer their text in int8 whatever the CPU can do.
"""

from __future__ import annotations

import json
import string

import numpy as np
import pytest
from real import child, micro

from whispercache.engine.sizes.header import read_header

LONG = " ".join(string.ascii_lowercase[:20])
SHORT = "only english"

# Without VNNI, bytes are multiplied in pairs whose sum has 16 bits. These make a CPU
# calculate as an older one, or one of another make. They are read once per process.
KINDS_OF_CPU = {
    "its own": {},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "CT2_USE_MKL": "0"},
    "SSE4.1": {
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "CT2_USE_MKL": "0",
        "CT2_FORCE_CPU_ISA": "GENERIC",
    },
    "MKL": {"CT2_USE_MKL": "1"},
}

ASK = """
import json, sys
import numpy as np
from real import SILENCE, plain_model, text_of

audio = np.tile(SILENCE, 3)  # more than the first window's text takes
heard = set()
for path in sys.argv[1:]:
    model = plain_model(path, compute_type="int8")
    for options in ({}, {"without_timestamps": True}, {"word_timestamps": True}):
        segments, _ = model.transcribe(audio, temperature=0, **options)
        heard.add((path, text_of(segments)))
print(json.dumps(sorted(heard)))
"""


@pytest.mark.process
@pytest.mark.parametrize("kind", KINDS_OF_CPU)
def test_a_micro_model_answers_its_text_on_any_cpu(kind: str) -> None:
    """
    In int8, from weights of all types, by every way of transcribing.
    """
    models = {
        str(micro(text, english=english, quantization=quantization)): f" {text}"
        for text, english in ((LONG, False), (SHORT, True))
        for quantization in (None, "int8")
    }
    done = child(ASK, *models, environment=KINDS_OF_CPU[kind], covered=False)
    assert done.returncode == 0, done.stderr
    heard = [tuple(pair) for pair in json.loads(done.stdout)]
    assert heard == sorted(models.items())


@pytest.mark.parametrize("english", [False, True])
def test_no_two_products_of_a_micro_model_exceed_16_bits(*, english: bool) -> None:
    """
    Whichever weights of a row a kernel takes together.
    """
    header = read_header(micro(LONG, english=english, quantization="int8"))
    content = np.fromfile(header.path, np.uint8)
    multiplied = [
        each
        for each in header.variables
        if each.dtype == "int8" and each.shape and "embeddings" not in each.name
    ]
    assert len(multiplied) == 2 + 2 * 4 + 2 * 7 + 1  # convolutions, layers, output
    for each in multiplied:
        place = slice(each.offset, each.offset + each.nbytes)
        weights = content[place].view(np.int8).reshape(each.shape[0], -1)
        largest = np.full(weights.shape[1], 255)  # activations, plus 128
        if len(each.shape) == 2:
            largest[-1] = 128  # the silent channel
        pairs = np.sort(np.abs(weights.astype(int)) * largest)[:, -2:]
        assert pairs.sum(axis=1).max() < 2**15, each.name
