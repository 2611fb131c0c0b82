"""
The claims of the small files beside a model.bin, checked against its header.

CTranslate2 and faster-whisper take these files on trust. Where they are wrong, a call
fails, hears another language than was spoken, or ends the process. Only certain faults
are refused: files of the known models, of fine-tunes and of distilled ones differ much.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import compress, repeat
from pathlib import Path
from typing import TYPE_CHECKING

from whispercache.errors import CorruptModel, LoadFailed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tokenizers import Tokenizer

    from .sizes.header import ModelHeader

_END, _START = "<|endoftext|>", "<|startoftranscript|>"
_NO_TIMESTAMPS, _TRANSCRIBE = "<|notimestamps|>", "<|transcribe|>"
_CANTONESE = "<|yue|>"
# Those that faster-whisper looks up: tasks and languages. Timestamps are counted from
# the one before them, whatever stands there.
_SPECIAL = re.compile(r"<\|(?:endoftext|startof\w+|trans\w+|no[cst]\w+|[a-z]{2,3})\|>")
_ADDED_TOKENS = re.compile(rb'"added_tokens"\s*:\s*')
# Three times what Whisper's take with all timestamps.
_ADDED_BYTES = 1024**2

# What each call reads from the configuration without looking if it is there.
_BEGIN, _LANGUAGES, _HEADS = "suppress_ids_begin", "lang_ids", "alignment_heads"
_OF_TRANSFORMERS = frozenset({"architectures", "model_type", "transformers_version"})

_CONVERT = (
    "take the config.json that ct2-transformers-converter wrote beside its model.bin, "
    "or convert the model again"
)
_TAKE_TOKENIZER = "take the tokenizer.json of the model that was converted"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """
    The tokens of a model, as CTranslate2 numbers them.

    Attributes:
        file: Name of the file.
        size: Number of tokens.
        special: Numbers of the special tokens, timestamps left out.
        is_multilingual: The model knows more than English, as CTranslate2 decides it:
            by the presence of an empty token.
    """

    file: str
    size: int
    special: Mapping[str, int]
    is_multilingual: bool

    @property
    def tokenizer(self) -> str:
        """
        The repository of the tokenizer that has these tokens, if they are Whisper's.

        large-v3 inserted Cantonese before the tasks: with another tokenizer than its
        own, ``transcribe`` would mean ``translate``.
        """
        if not self.is_multilingual:
            return "openai/whisper-tiny.en"
        has_cantonese = _CANTONESE in self.special
        return f"openai/whisper-{'large-v3' if has_cantonese else 'tiny'}"


@dataclass(frozen=True, slots=True)
class Claims:
    """
    The true statements of the files beside a model.bin.

    Attributes:
        vocabulary: The model's tokens.
        alignment_problem: Why word timestamps would end the process; nothing if not.
        tells_words: It names heads that are there, which word timestamps need.
        can_detect: It names languages to detect, or it knows but English.
    """

    vocabulary: Vocabulary
    alignment_problem: str
    tells_words: bool
    can_detect: bool = True


def check_claims(directory: str, header: ModelHeader) -> Claims:
    """
    Checks the files beside the model.bin of *header*.

    Blocks: reads them, all of the vocabulary and some of tokenizer.json.

    Raises:
        CorruptModel: they are broken, missing, or not of this model.
        LoadFailed: they cannot be read.

    Source: 13 ms for tiny.en and 20 for base, the least of 15 tries on two busy cores
    (Python 3.11); a model's files are looked at once for each state of them.
    """
    content = _read(directory, "config.json")
    if content is None:
        raise CorruptModel(directory, "config.json is missing", cure=_CONVERT)
    config = _as_object(directory, "config.json", content, _CONVERT)
    vocabulary = read_vocabulary(directory)
    rows = header.architecture.vocabulary
    # Fewer are allowed: converters may pad the embeddings.
    if vocabulary.size > rows:
        raise CorruptModel(
            directory,
            f"{vocabulary.file} has {vocabulary.size} tokens, and model.bin {rows}",
            cure="take the vocabulary that was converted with it",
        )
    _check_config(directory, config, vocabulary, rows)
    _check_mels(directory, header.architecture.mels)
    _check_tokenizer(directory, vocabulary)
    problem = _alignment_problem(config, header)
    can_detect = bool(config.get(_LANGUAGES)) or not vocabulary.is_multilingual
    tells_words = bool(config.get(_HEADS)) and not problem
    return Claims(vocabulary, problem, tells_words, can_detect)


# config.json --------------------------------------------------------------------------


def _check_config(
    directory: str, config: Mapping[str, object], vocabulary: Vocabulary, rows: int
) -> None:
    # CTranslate2 looks nothing up before it uses it. Source: src/models/whisper.cc:321
    # and 601, include/ctranslate2/decoding_utils.h:44 @ 0d8bcd3.
    needed = [_BEGIN, _LANGUAGES] if vocabulary.is_multilingual else [_BEGIN]
    for name in needed:
        if name not in config:
            is_other = bool(_OF_TRANSFORMERS & config.keys())
            whose = "is that of Transformers, not of CTranslate2" if is_other else ""
            reason = f"config.json {whose or f'has no {name}'}"
            raise CorruptModel(directory, reason, cure=_CONVERT)
        # null counts as an empty list.
        ids = config[name] or []
        if not isinstance(ids, list) or not all(_is_below(each, rows) for each in ids):
            reason = f"config.json has {name} that are no tokens of {rows} in model.bin"
            raise CorruptModel(directory, reason, cure=_CONVERT)


def _alignment_problem(config: Mapping[str, object], header: ModelHeader) -> str:
    """
    Returns the fault of the heads that word timestamps are read from, if they have one.
    If none are named, CTranslate2 reports that by itself.

    A head that is not there ends the process. All else works, and well-known distilled
    models name the heads of the model that they were distilled from: so this is no
    reason to refuse the model.

    Source: CTranslate2 src/layers/transformer.cc:577-603 @ 0d8bcd3; issues 688 and 1283
    of SYSTRAN/faster-whisper, and 2 of kotoba-tech/kotoba-whisper.
    """
    # CTranslate2 raises an error of its own then.
    if _HEADS not in config:
        return ""
    heads = config[_HEADS]
    if not isinstance(heads, list) or not heads:
        return f"{_HEADS} in config.json is not a list of layers and heads"
    layers, width = header.architecture.decoder_layers, header.decoder_heads
    for pair in heads:
        match pair:
            case [layer, head] if _is_below(layer, layers) and _is_below(head, width):
                continue
        return (
            f"{_HEADS} in config.json names {pair}, and model.bin has {layers} layers "
            f"of {width} heads in its decoder, counted from 0"
        )
    return ""


def _is_below(value: object, limit: int) -> bool:
    # JSON's true is an int, too.
    return type(value) is int and 0 <= value < limit


def unalignable(directory: str, problem: str) -> CorruptModel:
    """
    Returns the error that refuses word timestamps for an `alignment_problem`.
    """
    cure = (
        "correct them in its config.json, or leave them out when it is converted; all "
        "but word timestamps works without"
    )
    return CorruptModel(directory, problem, cure=cure)


def undetectable(directory: str) -> CorruptModel:
    """
    Returns the error that refuses to detect a language where config.json has none.
    """
    cure = (
        "name the language of each call, or take over lang_ids from the config.json of "
        "the model that was fine-tuned"
    )
    return CorruptModel(directory, f"its config.json has no {_LANGUAGES}", cure=cure)


# preprocessor_config.json -------------------------------------------------------------


def _check_mels(directory: str, mels: int) -> None:
    name = "preprocessor_config.json"
    cure = f"take the {name} of the original model, or delete it"
    content = _read(directory, name)
    # Without the file the header's number is used.
    if content is None:
        return
    try:
        config = _as_object(directory, name, content, cure)
    except CorruptModel as error:
        # faster-whisper, too, goes on without what it cannot parse.
        if isinstance(error.__cause__, json.JSONDecodeError):
            return
        raise
    told = config.get("feature_size", mels)
    # It takes whatever int() takes.
    if not re.fullmatch(rf"{mels}(\.0+)?", str(told).strip()):
        reason = f"{name} says {told} mel bands, and model.bin takes {mels}"
        raise CorruptModel(directory, reason, cure=cure)


# Tokens -------------------------------------------------------------------------------


def check_tokens(
    directory: str, vocabulary: Vocabulary, tokenizer: Tokenizer, origin: str
) -> None:
    """
    Checks that the special tokens of a tokenizer from *origin* have the numbers that
    the model gives them. A token that only one of the two knows does no harm.

    Raises:
        CorruptModel: one has another number, or one is missing that each call needs.
    """
    cure = f"{_TAKE_TOKENIZER}; of OpenAI's it would be {vocabulary.tokenizer}'s"
    needed = _needed(vocabulary)
    for token, number in vocabulary.special.items():
        found = tokenizer.token_to_id(token)
        if found is None and token in needed:
            reason = f"{origin} has no {token}, which {vocabulary.file} has"
            raise CorruptModel(directory, reason, cure=cure)
        if found not in (None, number):
            reason = (
                f"{token} is {found} in {origin} and {number} in {vocabulary.file}, "
                "so they are of different models"
            )
            raise CorruptModel(directory, reason, cure=cure)


def _needed(vocabulary: Vocabulary) -> tuple[str, ...]:
    always = (_END, _START, _NO_TIMESTAMPS)
    return (*always, _TRANSCRIBE) if vocabulary.is_multilingual else always


def read_vocabulary(directory: str) -> Vocabulary:
    """
    Reads the tokens of a model. Where both files are there, CTranslate2 takes the JSON.

    Raises:
        CorruptModel, LoadFailed: there are none, or they cannot be read.
    """
    cure = "take the vocabulary that was converted with model.bin"
    name = "vocabulary.json"
    content = _read(directory, name)
    if content is not None:
        tokens = _parsed(directory, name, content, cure)
        if not isinstance(tokens, list) or set(map(type, tokens)) - {str}:
            raise CorruptModel(directory, f"{name} is no list of tokens", cure=cure)
        return _vocabulary(name, tokens)
    name = "vocabulary.txt"
    content = _read(directory, name)
    if content is None:
        reason = "vocabulary.json or vocabulary.txt is missing"
        raise CorruptModel(directory, reason, cure=cure)
    return _vocabulary(name, _lines(content.decode(errors="replace")))


def _lines(text: str) -> list[str]:
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    # Windows' line ends, as git may have made them.
    # Some tokens end with a carriage return: only if all do is it none of theirs.
    if all(line.endswith("\r") for line in lines):
        return [line[:-1] for line in lines]
    return lines


def _vocabulary(file: str, tokens: Sequence[str]) -> Vocabulary:
    special: dict[str, int] = {}
    # Tens of thousands are words: those are passed over without a step of this loop.
    may_be = map(str.startswith, tokens, repeat("<|"))
    for number, token in compress(enumerate(tokens), may_be):
        if _SPECIAL.fullmatch(token):
            # Of a token that is there twice, CTranslate2 takes the first.
            special.setdefault(token, number)
    return Vocabulary(file, len(tokens), special, "" in tokens)


def _check_tokenizer(directory: str, vocabulary: Vocabulary) -> None:
    name = "tokenizer.json"
    content = _read(directory, name)
    # The special tokens are in its first part. The rest, megabytes, is parsed only if
    # that part is unusual: the order of tokens decides their numbers, whatever the file
    # says. Source: tokenizers 0.23, with files made up.
    if content is None or _is_usual(_added(content), vocabulary):
        return
    # Names the place of an error, which the tokenizers' own parser does not.
    _parsed(directory, name, content, _TAKE_TOKENIZER)
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # tokenizers raises nothing narrower
        reason = f"{name} is no tokenizer ({error})"
        raise CorruptModel(directory, reason, cure=_TAKE_TOKENIZER) from error
    check_tokens(directory, vocabulary, tokenizer, name)


def _is_usual(added: Sequence[tuple[str, int]], vocabulary: Vocabulary) -> bool:
    """
    Tells whether the tokens are in the order of their numbers, without a gap, none that
    is needed is missing, and the numbers are those of the model.
    """
    numbers = [number for _, number in added]
    found = dict(added)
    return (
        bool(added)
        and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        and all(token in found for token in _needed(vocabulary))
        and all(found.get(each, n) == n for each, n in vocabulary.special.items())
    )


def _added(content: bytes) -> list[tuple[str, int]]:
    place = _ADDED_TOKENS.search(content)
    if place is None:
        return []
    text = content[place.end() : place.end() + _ADDED_BYTES].decode(errors="replace")
    try:
        added, _ = json.JSONDecoder().raw_decode(text)
        return [(token["content"], token["id"]) for token in added]
    except (ValueError, TypeError, KeyError):
        return []


# Files --------------------------------------------------------------------------------


def _as_object(
    directory: str, name: str, content: bytes, cure: str
) -> Mapping[str, object]:
    found = _parsed(directory, name, content, cure)
    if not isinstance(found, dict):
        raise CorruptModel(directory, f"{name} holds no JSON object", cure=cure)
    return found


def _parsed(directory: str, name: str, content: bytes, cure: str) -> object:
    try:
        return json.loads(content)
    # ValueError is that of JSON and that of UTF-8.
    except (ValueError, RecursionError) as error:
        reason = f"{name} is not JSON ({error})"
        raise CorruptModel(directory, reason, cure=cure) from error


def _read(directory: str, name: str) -> bytes | None:
    try:
        return Path(directory, name).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = f"{name} cannot be read ({error.strerror}); check its permissions"
        raise LoadFailed(directory, reason) from error
