"""
The fields of the forms that clients send, as their APIs name them, and the request that
each means.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from whispercache.engine.calls.languages import language_code

from .asked import BATCH, LOGPROBS, NO_SPEAKERS, AnyKind, Asked, Kind, Task
from .errors import nonsense
from .forms import CHUNKING, TEMPERATURE

# As JavaScript writes what is not there.
_NOTHING = ("null", "undefined")
# What people write themselves, where they may mean it.
_TEXTS = ("prompt", "hotwords", "keywords[]", "model")

_Prompt = Annotated[
    str | None,
    # A model looks at the last 223 tokens of it.
    Field(max_length=10_000, description="Words that came before, or may come."),
]
_Language = Annotated[
    str | None,
    Field(description="Code, name or locale: de, deu, German, de-AT; or auto."),
]
_Temperature = Annotated[float, Field(ge=0, le=1)]


class Form(BaseModel):
    """
    A form that notes the fields which it does not know.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow")

    def unknown(self) -> list[str]:
        """
        Returns the names of the fields that mean nothing here.
        """
        return list(self.model_extra or ())


class Chunking(Form):
    """
    OpenAI's parameters of voice activity detection.
    """

    type: Literal["auto", "server_vad"]
    threshold: Annotated[float | None, Field(ge=0, le=1)] = None
    prefix_padding_ms: Annotated[int | None, Field(ge=0, le=10_000)] = None
    silence_duration_ms: Annotated[int | None, Field(ge=0, le=60_000)] = None

    def parameters(self) -> dict[str, float]:
        """
        Returns the same by faster-whisper's names.
        """
        named = {
            "threshold": self.threshold,
            "speech_pad_ms": self.prefix_padding_ms,
            "min_silence_duration_ms": self.silence_duration_ms,
        }
        return {name: value for name, value in named.items() if value is not None}


class Upload(Form):
    """
    A form with a file in it, in which JavaScript's nothing is left out.
    """

    file: Annotated[UploadFile, Field(description="Anything that FFmpeg reads.")]

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value
            for name, value in values.items()
            if name in _TEXTS or not isinstance(value, str) or value not in _NOTHING
        }


class Speech(Upload):
    """
    The form of OpenAI's audio API, and what other servers have added to it.
    """

    model: Annotated[str, Field(min_length=1, description="A model served here.")]
    language: _Language = None
    languages: Annotated[
        list[str],
        Field(alias="languages[]", max_length=20, description="It is one of these."),
    ] = []
    prompt: _Prompt = None
    response_format: Annotated[Kind, Field(description="Of a stream, too.")] = "json"
    temperature: Annotated[
        _Temperature, Field(description="At 0 Whisper raises it where it has to.")
    ] = 0.0
    temperatures: Annotated[
        list[_Temperature],
        Field(alias="temperature[]", description="Tried one after the other."),
    ] = []
    timestamp_granularities: Annotated[
        list[Literal["word", "segment"]],
        Field(
            alias="timestamp_granularities[]", description="Words need verbose_json."
        ),
    ] = []
    include: Annotated[
        list[Literal["logprobs"]],
        Field(alias="include[]", description="Log probabilities, word by word."),
    ] = []
    stream: Annotated[bool, Field(description="Send text as it is heard.")] = False
    chunking_strategy: Annotated[
        Chunking | None,
        Field(description='"auto", or {"type": "server_vad", …}: at pauses, batched.'),
    ] = None
    vad_filter: Annotated[
        bool | None, Field(description="Look for speech, and hear nothing else.")
    ] = None
    batch_size: Annotated[
        int | None, Field(ge=1, le=64, description="Windows at once, a segment each.")
    ] = None
    hotwords: Annotated[str | None, Field(description="Words that may be said.")] = None
    keywords: Annotated[
        list[str], Field(alias="keywords[]", description="The same, one by one.")
    ] = []
    seed: Annotated[
        int | None,
        Field(description="Any: the same text is had again, as nothing is drawn."),
    ] = None
    keep_alive: Annotated[
        str | None,
        Field(description='How long the model stays when idle: seconds, "5m", 0, -1.'),
    ] = None
    priority: Annotated[
        str | None,
        Field(
            description='Its turn: "interactive", "batch", or a number below 0; also '
            "by the header X-Priority."
        ),
    ] = None
    known_speaker_names: Annotated[
        list[str], Field(alias="known_speaker_names[]", description="Refused.")
    ] = []
    known_speaker_references: Annotated[
        list[str], Field(alias="known_speaker_references[]", description="Refused.")
    ] = []

    @field_validator("response_format", mode="before")
    @classmethod
    def _not_by_speaker(cls, value: object) -> object:
        if value == "diarized_json":
            raise PydanticCustomError("no_speakers", NO_SPEAKERS)
        return value

    @field_validator("known_speaker_names", "known_speaker_references")
    @classmethod
    def _without_speakers(cls, value: list[str]) -> list[str]:
        if value:
            raise PydanticCustomError("no_speakers", NO_SPEAKERS)
        return value

    @field_validator("chunking_strategy", mode="before")
    @classmethod
    def _chunking(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        text = value.strip()
        if not text.startswith("{"):
            return {"type": text.strip('"')}
        try:
            return json.loads(text)
        except ValueError as error:
            raise PydanticCustomError("json", "is no JSON") from error

    def unknown(self) -> list[str]:
        """
        Returns the names of the fields that mean nothing here, those within a field
        too.
        """
        within = self.chunking_strategy.unknown() if self.chunking_strategy else ()
        return [*super().unknown(), *(f"{CHUNKING}.{name}" for name in within)]

    def asked(self, task: Task) -> Asked:
        """
        Returns the request that the form means. Raises an `ApiError` for a language
        that there is none of, and for fields that contradict each other.
        """
        chunking = self.chunking_strategy
        if chunking is not None and self.vad_filter is False:
            raise nonsense(CHUNKING, "it cuts at pauses, so it needs vad_filter")
        batch_size = self.batch_size
        # A window of a batch is one segment: too long for a cue.
        has_cues = self.response_format not in ("json", "text")
        if batch_size is None and chunking is not None and not has_cues:
            batch_size = BATCH
        words = [*filter(None, (self.hotwords,)), *self.keywords]
        language, languages = self._spoken()
        return Asked(
            task=task,
            kind=self.response_format,
            language=language,
            languages=languages,
            prompt=self.prompt or None,
            temperatures=self._sampled(),
            granularities=tuple(self.timestamp_granularities),
            keep_alive=self.keep_alive or None,
            stream=self.stream,
            # A strategy is one for pauses.
            vad=True if chunking and self.vad_filter is None else self.vad_filter,
            vad_parameters=chunking.parameters() if chunking else {},
            batch_size=batch_size,
            hotwords=", ".join(words) or None,
            logprobs=LOGPROBS in self.include,
            seed=self.seed,
        )

    def _spoken(self) -> tuple[str | None, tuple[str, ...]]:
        """
        Returns the language, and those that it may be if it is not known.
        """
        possible = [code_of(each, "languages") for each in self.languages]
        # "auto" among them is any.
        languages = () if None in possible else tuple(filter(None, possible))
        language = code_of(self.language)
        if language is None and len(languages) > 1:
            return None, languages
        if language is None:
            # One that it may be is the one that it is.
            return next(iter(languages), None), ()
        if languages and language not in languages:
            named = ", ".join(languages)
            message = (
                f"language {language} is none of languages ({named}); leave one out"
            )
            raise nonsense("languages", message)
        return language, ()

    def _sampled(self) -> tuple[float, ...]:
        """
        Returns the temperatures; none for the usual ones.
        """
        if not self.temperatures:
            return (self.temperature,) if self.temperature else ()
        is_said = TEMPERATURE in self.model_fields_set
        if is_said and self.temperature not in self.temperatures:
            message = "give one number, or a list of them"
            raise nonsense(TEMPERATURE, message)
        return tuple(self.temperatures)


class AsrUpload(Form):
    """
    The form of whisper-asr-webservice, whose parameters are in the address.
    """

    audio_file: Annotated[UploadFile, Field(description="Anything that FFmpeg reads.")]


class Asr(Form):
    """
    The parameters of whisper-asr-webservice. Source: its app/webservice.py, 1.9.
    """

    task: Task = "transcribe"
    language: _Language = None
    initial_prompt: _Prompt = None
    encode: Annotated[
        bool, Field(description="false for raw samples: 16 bits, mono, 16 kHz.")
    ] = True
    vad_filter: bool | None = None
    word_timestamps: bool = False
    output: Literal["txt", "vtt", "srt", "tsv", "json"] = "txt"
    model: Annotated[str | None, Field(description="One that is served here.")] = None

    def asked(self) -> Asked:
        """
        Returns the request that they mean. Raises an `ApiError` for a language that
        there is none of.
        """
        kind: AnyKind = "segments" if self.output == "json" else self.output
        return Asked(
            task=self.task,
            kind=kind,
            language=code_of(self.language),
            prompt=self.initial_prompt or None,
            words=self.word_timestamps,
            vad=self.vad_filter,
        )


class Inference(Upload):
    """
    The form of whisper.cpp's server. Source: its examples/server/server.cpp.
    """

    response_format: Kind = "json"
    language: _Language = None
    detect_language: bool = False
    translate: bool = False
    prompt: _Prompt = None
    temperature: _Temperature = 0.0
    temperature_inc: Annotated[float, Field(ge=0, le=1)] = 0.2
    vad: bool | None = None
    vad_threshold: Annotated[float | None, Field(ge=0, le=1)] = None
    vad_min_speech_duration_ms: Annotated[int | None, Field(ge=0, le=60_000)] = None
    vad_min_silence_duration_ms: Annotated[int | None, Field(ge=0, le=60_000)] = None
    vad_speech_pad_ms: Annotated[int | None, Field(ge=0, le=10_000)] = None
    model: Annotated[str | None, Field(description="One that is served here.")] = None

    def asked(self) -> Asked:
        """
        Returns the request that the form means. Raises an `ApiError` for a language
        that there is none of.
        """
        named = {
            name: getattr(self, f"vad_{name}")
            for name in (
                *("threshold", "min_speech_duration_ms"),
                *("min_silence_duration_ms", "speech_pad_ms"),
            )
        }
        return Asked(
            task="translate" if self.translate else "transcribe",
            kind=self.response_format,
            language=None if self.detect_language else code_of(self.language),
            prompt=self.prompt or None,
            temperatures=_ladder(self.temperature, self.temperature_inc),
            vad=self.vad,
            vad_parameters={
                name: value for name, value in named.items() if value is not None
            },
        )


def _ladder(first: float, step: float) -> tuple[float, ...]:
    """
    Returns the temperatures from the first one to 1, in steps; the first alone if there
    is no step.
    """
    if not step:
        return (first,)
    # A step that is small is one of a tenth: each may take a window's whole time.
    step = max(step, 0.1)
    return tuple(round(first + i * step, 3) for i in range(int((1 - first) / step) + 1))


def code_of(language: str | None, field: str = "language") -> str | None:
    """
    Returns Whisper's code of a language, or None to detect it; raises an `ApiError` if
    there is none.
    """
    try:
        return language_code(language)
    except ValueError as error:
        raise nonsense(field, str(error)) from None
