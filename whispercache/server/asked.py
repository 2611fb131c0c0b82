"""
A request for a transcript, whatever form it came in. Pure: checks, and the parameters
of the call that does what was asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from whispercache.engine.calls.languages import check_language

from .errors import nonsense
from .forms import GRANULARITIES, TEMPERATURE, check_keep_alive

if TYPE_CHECKING:
    from collections.abc import Mapping

    from whispercache.engine.calls.languages import Knowledge

Task: TypeAlias = Literal["transcribe", "translate"]
# OpenAI's formats, and those of whisper-asr-webservice.
Kind: TypeAlias = Literal["json", "text", "srt", "vtt", "verbose_json"]
AnyKind: TypeAlias = Kind | Literal["txt", "tsv", "segments"]

NO_WORDS = (
    "this model cannot tell when words were said, since its config.json names no "
    "alignment_heads of it; ask for segments, or for another model"
)
NO_SPEAKERS = "speakers are not told apart here; leave it out, or use another service"

# Windows at once, where a request asks for batches and not for their size. Source:
# faster-whisper's own default.
BATCH = 8
_WINDOW_S = 30
# Bytes of a prompt and hot words together: mostly below the 223 tokens that count.
_MOST_HINTS = 800
LOGPROBS = "logprobs"


@dataclass(frozen=True, slots=True)
class Asked:
    """
    A request for a transcript: the task, the format, and the parameters.

    Attributes:
        task: To write down, or to translate to English.
        kind: The format of the answer.
        prompt: Text that came before, or may come.
        temperatures: Tried one after the other; Whisper's usual ones if there are none.
        keep_alive: How long the model stays, in Ollama's words.
        language: A code; None to detect it.
        languages: Codes of those that it may be, if it is not known.
        granularities: ``"word"``, ``"segment"``, both or none of them.
        stream: Events, as the text is heard.
        vad: Speech is looked for, and nothing else heard; None if that is not said.
        vad_parameters: Those of faster-whisper's ``VadOptions``.
        batch_size: Windows at once; None without batches, whose segments are windows.
        hotwords: Words that may be said, for every window.
        words: Segments begin and end with their words, and have them.
        logprobs: The log probabilities of words are asked for.
        seed: The same text is wanted again, if not None.
    """

    task: Task = "transcribe"
    kind: AnyKind = "json"
    prompt: str | None = None
    temperatures: tuple[float, ...] = ()
    keep_alive: str | None = None
    language: str | None = None
    languages: tuple[str, ...] = ()
    granularities: tuple[str, ...] = ()
    stream: bool = False
    vad: bool | None = None
    vad_parameters: Mapping[str, float] = field(default_factory=dict)
    batch_size: int | None = None
    hotwords: str | None = None
    words: bool = False
    logprobs: bool = False
    seed: int | None = None

    @property
    def wants_words(self) -> bool:
        """
        True if words are needed, with their times and probabilities.
        """
        return self.words or self.logprobs or "word" in self.granularities

    @property
    def words_field(self) -> str:
        """
        The field that asks for words.
        """
        if "word" in self.granularities:
            return GRANULARITIES
        return "include" if self.logprobs else "word_timestamps"

    def check(self) -> None:
        """
        Refuses parameters that make no sense together, by an `ApiError`.
        """
        # Other formats have no place for them; segments are where they always are.
        if "word" in self.granularities and self.kind != "verbose_json":
            raise nonsense(
                GRANULARITIES, "words come with response_format=verbose_json only"
            )
        if self.logprobs and self.kind != "json":
            raise nonsense("include", f"{LOGPROBS} come with response_format=json only")
        self._check_sampling()
        if self.batch_size is not None and self.vad is False:
            message = "batches are cut at pauses, so they need vad_filter"
            raise nonsense("batch_size", message)
        hints = f"{self.prompt or ''}{self.hotwords}"
        if self.hotwords and len(hints.encode()) > _MOST_HINTS:
            message = (
                f"with the prompt at most {_MOST_HINTS} bytes: a window has no room"
            )
            raise nonsense("hotwords", message)
        if self.keep_alive is not None:
            # Now, and not when the lease is taken, after minutes of waiting.
            check_keep_alive(self.keep_alive)

    def _check_sampling(self) -> None:
        if self.seed is not None and any(self.temperatures):
            raise nonsense(
                "seed", "sampled text cannot be had again; leave out the temperature"
            )
        if self.batch_size is not None and len(self.temperatures) > 1:
            raise nonsense(TEMPERATURE, "a batch has one temperature")

    def check_model(self, name: str, known: Knowledge | None) -> None:
        """
        Refuses what the model of that *name* cannot do, as far as that is known.
        """
        if known is None:
            return
        named = tuple(filter(None, (self.language, *self.languages)))
        if not known.is_multilingual:
            self._check_english(named)
            return
        if not known.can_detect and self.language is None:
            raise nonsense("language", "this model cannot detect the language; name it")
        for code in named:
            try:
                check_language(name, code, known)
            except ValueError as error:
                field_ = "languages" if self.languages else "language"
                raise nonsense(field_, str(error)) from None

    def _check_english(self, named: tuple[str, ...]) -> None:
        message = "this model understands English only"
        if named and "en" not in named:
            raise nonsense("languages" if self.languages else "language", message)
        if self.task == "translate":
            raise nonsense("model", message)

    def fitted(self, audio_s: float) -> Asked:
        """
        Returns the request for audio of that length: with no more windows at once than
        it can have, as memory is reserved for all of them.
        """
        if self.batch_size is None:
            return self
        # Two neighbours have more than a window of speech, or they would be one.
        most = 1 if audio_s <= _WINDOW_S else math.ceil(2 * audio_s / _WINDOW_S)
        return replace(self, batch_size=min(self.batch_size, most))

    def options(self, *, vad: bool = False) -> dict[str, Any]:
        """
        Returns the same as parameters of `Engine.transcribe`; *vad* for those who do
        not say whether they want it.
        """
        options: dict[str, Any] = {
            "task": self.task,
            "language": self.language,
            # None where there is none: an empty prompt would be tokens too.
            "initial_prompt": None if self.hotwords else self.prompt,
            "word_timestamps": self.wants_words,
        }
        if self.languages:
            options["languages"] = list(self.languages)
        # At 0 Whisper itself raises it where it hears nonsense, as OpenAI's does.
        if self.temperatures:
            options[TEMPERATURE] = list(self.temperatures)
        elif self.seed is not None:
            # Nothing is drawn, so that all who ask get the same.
            options[TEMPERATURE] = [0.0]
        if self.hotwords:
            # Together, as what was said before comes from a place of its own: it and
            # hot words would take all of a window's tokens.
            options |= {
                "hotwords": " ".join(filter(None, (self.hotwords, self.prompt))),
                "condition_on_previous_text": False,
            }
        return options | self._pauses(filters=vad if self.vad is None else self.vad)

    def _pauses(self, *, filters: bool) -> dict[str, Any]:
        is_batched = self.batch_size is not None
        if not filters and not is_batched:
            return {}
        found: dict[str, Any] = {"vad_filter": True}
        if self.vad_parameters:
            found["vad_parameters"] = dict(self.vad_parameters)
        if is_batched:
            # As it is by default, without times within a window: with them the words
            # after a window's last time are lost (faster-whisper 1.2.1).
            found["batch_size"] = self.batch_size
        return found
