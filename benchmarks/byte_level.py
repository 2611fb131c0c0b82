"""
Vocabularies and tokenizers for models that are made up: bytes, and whole words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def _characters() -> list[str]:
    """
    Returns the character of each byte in byte-level BPE: itself, or one from 256 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    codes = {byte: 256 + place for place, byte in enumerate(others)}
    return [chr(codes.get(byte, byte)) for byte in range(256)]


_CHARACTERS = _characters()


def visible(text: str) -> str:
    """
    Writes *text* as byte-level BPE does: each byte as a printable character.
    """
    return "".join(_CHARACTERS[byte] for byte in text.encode())


def vocabulary(
    words: Iterable[str], languages: Iterable[str], *, english: bool
) -> tuple[list[str], list[str]]:
    """
    Returns all tokens in Whisper's order, and the special ones among them.
    """
    tokens = list(dict.fromkeys([*_CHARACTERS, *map(visible, words)]))
    # CTranslate2 takes a model for multilingual if it has the empty token.
    tokens += [] if english else [""]
    special = ["<|endoftext|>", "<|startoftranscript|>"]
    special += [f"<|{code}|>" for code in languages]
    special += ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>"]
    special += ["<|nospeech|>", "<|notimestamps|>"]
    stamps = [f"<|{step * 0.02:.2f}|>" for step in range(1501)]
    return tokens + special + stamps, special


def tokenizer(tokens: list[str], special: list[str]) -> dict[str, object]:
    """
    Returns the content of a tokenizer.json without merges.
    """
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": tokens.index(token), "content": token, **flags, "special": True}
        for token in special
    ]
    texts = tokens[: tokens.index("<|endoftext|>")]
    return {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {**level, "use_regex": True},
        "decoder": {**level, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: number for number, token in enumerate(texts)},
            "merges": [],
        },
    }
