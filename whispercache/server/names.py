"""
The names that clients have for models: OpenAI's own, and all spellings of known sizes.
Pure: nothing is opened or fetched for a name.
"""

from __future__ import annotations

import re

from whispercache.keys import ALIASES, MODELS, OTHER_NAMES

# OpenAI's models for audio, with whatever version it gives them next.
# Source: openai-python 3.57, types/audio_model.py.
_OPENAI = re.compile(
    r"(openai/)?(whisper(-\d+)?|gpt-([a-z0-9.]+-)*transcribe(-[a-z0-9-]+)?)"
)

# Who publishes the known sizes, in formats of their own: the names are what counts.
_PUBLISHERS = frozenset(
    {
        *("openai", "systran", "guillaumekln", "deepdml", "mobiuslabsgmbh"),
        *("distil-whisper", "ggerganov", "ggml-org", "mlx-community", "xenova"),
        *("onnx-community",),
    }
)
# What stands around a size there. Source: names on huggingface.co of these publishers;
# whisper.cpp's models; Groq's "distil-whisper-large-v3-en".
_BEFORE = re.compile(r"ggml-")
_AFTER = re.compile(
    r"(-ct2|-mlx(-(q4|4bit|8bit|fp16|fp32))?|-onnx|(-q\d_\d)?\.bin|-q\d_\d"
    r"|(?<=distil-whisper-large-v3)-en)$"
)

# All names of each known size, in small letters.
_SIZES: dict[str, str] = {
    name.lower(): size
    for names in ({size: size for size in MODELS}, ALIASES, OTHER_NAMES)
    for name, size in names.items()
}


def is_openais(name: str) -> bool:
    """
    Returns True for a model of OpenAI's audio API, such as ``"gpt-4o-transcribe"``.
    """
    return _OPENAI.fullmatch(name.lower()) is not None


def size_of(name: str) -> str | None:
    """
    Returns the canonical size that a name means; None if it means none.

    ``"whisper-small"``, ``"openai/whisper-small"``, ``"Systran/faster-whisper-small"``,
    ``"ggml-small.bin"`` and ``"mlx-community/whisper-small-mlx"`` are ``"small"``. A
    model of somebody else's is none of the known ones, however it is called.
    """
    text = name.strip().lower()
    owner, _, last = text.rpartition("/")
    if "/" in text and owner not in _PUBLISHERS:
        return None
    bare = _AFTER.sub("", _BEFORE.sub("", last))
    found = (_SIZES.get(each) for each in (text, last, bare, bare.replace("_", "-")))
    return next(filter(None, found), None)
