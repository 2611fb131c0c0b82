"""
The parameters of a call, checked before a model is loaded for it. Pure.

Values that faster-whisper would refuse after seconds, hang on, or take for something
else are refused here, with the name of the parameter and what it may be.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, cast

if TYPE_CHECKING:
    from collections.abc import Collection

    Options: TypeAlias = Mapping[str, object]
    Check: TypeAlias = "Callable[[_Call, str, Any], object]"

# Seconds in the window of a Whisper model; it does not hear what is beyond them.
WINDOW_S = 30

_TASKS = ("transcribe", "translate")
# Temperatures that faster-whisper tries, one after the other, unless others are given.
_LADDER = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
# Most tokens that a model writes in a window: its positions, less one for the prompt.
# Source: faster_whisper/transcribe.py, ``WhisperModel.max_length``, 1.2.1.
_LONGEST_TEXT = 447

_LONGEST_SHOWN = 60
# Source: faster_whisper/vad.py, ``get_speech_timestamps``, 512 samples.
_VAD_WINDOW_S = 0.032


# What was given ----------------------------------------------------------------------


def filters_speech(options: Options, *, is_batched: bool) -> bool:
    """
    Tells whether a call looks for voice activity.
    """
    return _Call(options, is_batched).filters()


def temperatures_of(options: Options) -> tuple[object, ...]:
    """
    Returns the temperatures that a call may try.
    """
    given = options.get("temperature", _LADDER)
    return tuple(given) if isinstance(given, (list, tuple)) else (given,)


@dataclasses.dataclass(frozen=True, slots=True)
class _Call:
    """
    All parameters of one call, as far as they say which others matter.
    """

    options: Options
    is_batched: bool = False
    vad_names: Collection[str] = ()

    def is_plain(self) -> bool:
        return not self.is_batched

    def temperatures(self) -> tuple[object, ...]:
        return temperatures_of(self.options)

    def samples(self) -> bool:
        return not self.is_batched and any(map(_is_above_0, self.temperatures()))

    def searches(self) -> bool:
        return self.is_batched or not all(map(_is_above_0, self.temperatures()))

    def detects(self) -> bool:
        return self.options.get("language") is None

    def filters(self) -> bool:
        if self.is_batched:
            # The pipeline needs clips: without any it looks for speech by itself.
            is_asked = self.options.get("vad_filter", True)
            return bool(is_asked) and not self.options.get("clip_timestamps")
        clips = self.options.get("clip_timestamps", "0")
        return bool(self.options.get("vad_filter")) and clips == "0"


def _is_above_0(value: object) -> bool:
    try:
        return float(cast("float", value)) > 0
    except (TypeError, ValueError):
        # The parameter has a check of its own, which names it.
        return False


# Values ------------------------------------------------------------------------------


def _refuse(name: str, wanted: str, value: object, *, kind: bool = False) -> Exception:
    shown = repr(value)
    if len(shown) > _LONGEST_SHOWN:
        shown = f"{shown[:_LONGEST_SHOWN]}..."
    text = f"{name} must be {wanted}, not {shown}"
    return TypeError(text) if kind else ValueError(text)


def _count(name: str, value: object, least: int = 1, most: int | None = None) -> int:
    wanted = f"a whole number of {least} or more"
    if most is not None:
        wanted = f"a whole number from {least} to {most}"
    # NumPy's will do, and so will True.
    # operator.index() refuses 1.5 and "1", which int() would take.
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None:
        raise _refuse(name, wanted, value, kind=True)
    if number < least or (most is not None and number > most):
        raise _refuse(name, wanted, value)
    return number


def _number(
    name: str,
    value: object,
    wanted: str = "a number",
    is_fine: Callable[[float], bool] = lambda _: True,
) -> object:
    """
    Returns a number, as it was given, if *is_fine*; NaN never is.
    """
    is_text = isinstance(value, (str, bytes, bytearray))
    try:
        number = math.nan if is_text else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        is_text, number = True, math.nan
    # An integer too large for a float.
    except OverflowError:
        number = math.inf
    if is_text:
        raise _refuse(name, wanted, value, kind=True)
    if math.isnan(number) or not is_fine(number):
        raise _refuse(name, wanted, value)
    return value


def _text(_call: _Call, name: str, value: object) -> object:
    # Anything empty counts as no text in faster-whisper, whatever its type.
    if value and not isinstance(value, str):
        raise _refuse(name, "text or None", value, kind=True)
    return value


def _whole(_call: _Call, name: str, value: object) -> object:
    return _count(name, value)


def _is_amount(number: float) -> bool:
    return 0 <= number < math.inf


def _numeric(wanted: str, is_fine: Callable[[float], bool]) -> Check:
    return lambda _call, name, value: _number(name, value, wanted, is_fine)


def _threshold(_call: _Call, name: str, value: object) -> object:
    return value if value is None else _number(name, value, "a number or None")


def _where(matters: Callable[[_Call], bool], check: Check) -> Check:
    """
    Returns a check of a parameter that passes whatever is given where none *matters*.
    """
    return lambda call, name, value: (
        check(call, name, value) if matters(call) else value
    )


def _items(name: str, wanted: str, value: object) -> list[object]:
    if isinstance(value, (str, bytes, bytearray, Mapping)) or not isinstance(
        value, Iterable
    ):
        raise _refuse(name, wanted, value, kind=True)
    # A copy: faster-whisper adds to it, and a second try needs the original.
    return list(value)


# Parameters, one by one --------------------------------------------------------------


def _task(_call: _Call, name: str, value: object) -> object:
    if value not in _TASKS:
        raise _refuse(name, "'transcribe' or 'translate'", value)
    return value


def _temperature(call: _Call, name: str, value: object) -> object:
    wanted = "a finite number of 0 or more, or a list of some"
    several = list(value) if isinstance(value, (list, tuple)) else [value]
    if not several:
        raise _refuse(name, wanted, value)
    # The pipeline uses the first one only.
    for each in several[: 1 if call.is_batched else None]:
        _number(name, each, wanted, _is_amount)
    return several if isinstance(value, list) else value


def _reset_temperature(call: _Call, name: str, value: object) -> object:
    # Only compared where the text before is a prompt of the next window.
    is_used = call.options.get("condition_on_previous_text", True)
    return value if call.is_batched or not is_used else _number(name, value)


def _initial_prompt(call: _Call, name: str, value: object) -> object:
    if value is None or isinstance(value, str):
        return value
    if call.is_batched:
        raise _refuse(name, "text or None with batch_size", value, kind=True)
    wanted = "text, a list of token ids, or None"
    return [_count(name, each, 0) for each in _items(name, wanted, value)]


def _suppress_tokens(_call: _Call, name: str, value: object) -> object:
    if value is None:
        return value
    wanted = "a list of token ids, with -1 for the usual symbols, or None"
    return [_count(name, each, -1) for each in _items(name, wanted, value)]


def _punctuations(call: _Call, name: str, value: object) -> object:
    # Iterated over only where words are aligned.
    if call.options.get("word_timestamps") and not isinstance(value, Iterable):
        raise _refuse(name, "text", value, kind=True)
    return value


def _max_new_tokens(_call: _Call, name: str, value: object) -> object:
    return value if value is None else _count(name, value, 0, _LONGEST_TEXT)


def _chunk_length(call: _Call, name: str, value: object) -> object:
    if value is None:
        return value
    if not call.is_batched:
        # JSON and TOML may turn 30 into 30.0.
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return _count(name, value, 1, WINDOW_S)
    # The pipeline takes 0 for None.
    wanted = f"seconds, {WINDOW_S} at most"
    return _number(name, value, wanted, lambda number: 0 <= number <= WINDOW_S)


def _clip_timestamps(call: _Call, name: str, value: object) -> object:
    if call.is_batched:
        return _clips(name, value) if value else value
    wanted = "seconds in pairs: a list of numbers, or text such as '0,10.5'"
    seconds: list[object] = []
    if isinstance(value, str):
        try:
            seconds += [float(part) for part in value.split(",")] if value else []
        except ValueError:
            raise _refuse(name, wanted, value) from None
    else:
        seconds = _items(name, wanted, value)
    for each in seconds:
        _number(name, each, wanted, _is_amount)
    # No clip is the whole file, but the detection of the language looks at the first
    # one without a check.
    if not seconds:
        return [0.0]
    return value if isinstance(value, str) else seconds


def _clips(name: str, value: object) -> list[dict[str, object]]:
    wanted = "a list of {'start': seconds, 'end': seconds} with batch_size"
    clips = []
    for each in _items(name, wanted, value):
        if not isinstance(each, Mapping) or not {"start", "end"} <= set(each):
            raise _refuse(name, wanted, each, kind=True)
        # faster-whisper multiplies whatever else there is, too.
        for number in each.values():
            _number(name, number, wanted, _is_amount)
        clips.append(dict(each))
    return clips


def _detection_threshold(call: _Call, name: str, value: object) -> object:
    # None meant in earlier versions of faster-whisper that the first window decides.
    if value is None:
        return 0.0 if call.detects() else value
    return _number(name, value)


# Voice activity ----------------------------------------------------------------------


def _vad_parameters(call: _Call, name: str, value: object) -> object:
    if not call.filters() or value is None:
        return value
    if isinstance(value, Mapping):
        for key in value:
            if call.vad_names and key not in call.vad_names:
                names = ", ".join(call.vad_names)
                raise TypeError(f"{name} has {key!r}, which is none of {names}")
        # The pipeline puts its own limit in the place of this one.
        ignored = {_VAD_LIMIT} if call.is_batched else set()
        _check_vad(name, {key: value[key] for key in value if key not in ignored})
        return dict(value)
    if isinstance(value, type) or not hasattr(value, _VAD_LIMIT):
        raise _refuse(name, "a mapping, VadOptions or None", value, kind=True)
    known = (*_VAD_RULES, "neg_threshold", _VAD_LIMIT)
    fields = {key: getattr(value, key) for key in known if hasattr(value, key)}
    _check_vad(name, fields)
    # Options have no limit unless one is given, and the pipeline would not hear what is
    # beyond 30 s of a stretch of speech; in a mapping it sets the limit itself.
    own: Any = copy.copy(value)
    if call.is_batched:
        window_s: Any = call.options.get("chunk_length") or WINDOW_S
        setattr(own, _VAD_LIMIT, min(fields[_VAD_LIMIT], window_s))
    return own


_VAD_LIMIT = "max_speech_duration_s"
_VAD_RULES: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    "threshold": ("a number from 0 to 1", lambda number: 0 <= number <= 1),
    **dict.fromkeys(
        ("min_speech_duration_ms", "min_silence_duration_ms", "speech_pad_ms"),
        ("milliseconds, 0 or more", _is_amount),
    ),
}


def _check_vad(name: str, fields: Mapping[str, Any]) -> None:
    for key, (wanted, is_fine) in _VAD_RULES.items():
        if key in fields:
            _number(f"{name}[{key!r}]", fields[key], wanted, is_fine)
    if fields.get("neg_threshold") is not None:
        _number(f"{name}['neg_threshold']", fields["neg_threshold"], "a number or None")
    if _VAD_LIMIT in fields:
        # Shorter stretches than the padding around them are joined by it again.
        pad_s = float(fields.get("speech_pad_ms", 400)) / 1000
        least_s = 0.0 if 2 * pad_s >= _VAD_WINDOW_S else _VAD_WINDOW_S + 2 * pad_s
        wanted = f"seconds, more than {least_s:.3f} with the padding of {pad_s} s"
        wanted = wanted if least_s else "seconds above 0"
        key = f"{name}[{_VAD_LIMIT!r}]"
        _number(key, fields[_VAD_LIMIT], wanted, lambda s: s > least_s)


_ABOVE_0 = _numeric("a number above 0", lambda number: 0 < number < math.inf)

_CHECKS: Mapping[str, Check] = {
    "task": _task,
    "beam_size": _where(_Call.searches, _whole),
    "best_of": _where(_Call.samples, _whole),
    "patience": _where(_Call.searches, _ABOVE_0),
    "length_penalty": _numeric("a finite number", math.isfinite),
    "repetition_penalty": _ABOVE_0,
    "no_repeat_ngram_size": lambda _call, name, value: _count(name, value, 0),
    "temperature": _temperature,
    # The pipeline has no fallback, and looks at no threshold.
    "compression_ratio_threshold": _where(_Call.is_plain, _threshold),
    "log_prob_threshold": _where(_Call.is_plain, _threshold),
    "no_speech_threshold": _where(_Call.is_plain, _threshold),
    "prompt_reset_on_temperature": _reset_temperature,
    "initial_prompt": _initial_prompt,
    "prefix": _where(_Call.is_plain, _text),
    "suppress_tokens": _suppress_tokens,
    # The pipeline sets one of its own.
    "max_initial_timestamp": _where(
        _Call.is_plain, _numeric("a finite number of seconds, 0 or more", _is_amount)
    ),
    "prepend_punctuations": _punctuations,
    "append_punctuations": _punctuations,
    "vad_parameters": _vad_parameters,
    "max_new_tokens": _max_new_tokens,
    "chunk_length": _chunk_length,
    "clip_timestamps": _clip_timestamps,
    "hallucination_silence_threshold": _where(_Call.is_plain, _threshold),
    "hotwords": _text,
    "language_detection_threshold": _detection_threshold,
    "language_detection_segments": _where(_Call.detects, _whole),
}


def checked(
    options: Options, *, is_batched: bool = False, vad_names: Collection[str] = ()
) -> dict[str, object]:
    """
    Returns a copy of the parameters of one call, which faster-whisper can work with and
    write into. In ``vad_parameters`` only *vad_names* may be, if there are any.

    Raises:
        TypeError, ValueError: one of them is nonsense.
    """
    call = _Call(options, is_batched, vad_names)
    return {
        name: _CHECKS[name](call, name, value) if name in _CHECKS else value
        for name, value in options.items()
    }


def check_batch_size(value: object) -> int:
    """
    Returns the batch size, if it is one.

    Raises:
        TypeError, ValueError: not a whole number above 0.
    """
    return _count("batch_size", value)


def check_tokens(options: Options, n_tokens: int) -> None:
    """
    Refuses token ids that a model of *n_tokens* does not have. CTranslate2 does not,
    and would read and write beyond its memory.

    Raises:
        ValueError: one of them is not.
    """
    for name in ("initial_prompt", "suppress_tokens"):
        given = options.get(name)
        if isinstance(given, (list, tuple)):
            for each in given:
                if isinstance(each, int) and each >= n_tokens:
                    wanted = f"ids below {n_tokens}, the tokens of this model"
                    raise _refuse(name, wanted, each)
