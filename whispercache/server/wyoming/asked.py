"""
A client's wish: which model, in which language, with which words to listen for.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from whispercache.engine.calls.languages import (
    LANGUAGES,
    check_language,
    language_code,
)
from whispercache.errors import WhisperCacheError
from whispercache.server.errors import nonsense

if TYPE_CHECKING:
    from collections.abc import Mapping

    from whispercache.engine.calls.languages import Knowledge
    from whispercache.server.engine import Engine
    from whispercache.server.offers import Offer
    from whispercache.server.service import Service

_log = logging.getLogger("whispercache")

# Bytes of hot words: mostly below the 223 tokens that count. Home Assistant has names
# for all that there is in a house.
_MOST_BYTES = 800


@dataclass(frozen=True, slots=True)
class Asked:
    """
    The parameters of a ``transcribe`` event.

    Attributes:
        name: The model; by default the first that knows the language.
        language: Its code; None to have it detected.
        context: The client's own, for its next event.
        words: Names and terms to listen for.
    """

    name: str | None = None
    language: str | None = None
    context: dict[str, object] | None = None
    words: str = ""

    @classmethod
    def of(cls, data: Mapping[str, object]) -> Asked:
        """
        Returns what an event asks for; raises an `ApiError` if it makes no sense.
        """
        name, context = data.get("name"), data.get("context")
        if name is not None and not isinstance(name, str):
            raise nonsense("name", "name is the name of a model")
        if context is not None and not isinstance(context, dict):
            raise nonsense("context", "context is an object")
        try:
            language = language_code(data.get("language"))  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise nonsense("language", str(error)) from None
        # Names come first: what does not fit is left out at the end.
        words = [*_texts(data, "transcript_names"), *_texts(data, "transcript_terms")]
        return cls(name or None, language, context, _fitting(words))

    async def offer(self, service: Service) -> tuple[Offer, Knowledge | None]:
        """
        Returns the model that is to listen, and what is known of it. Raises an
        `ApiError` if there is none, or none that knows the language.
        """
        engine = service.engine
        offers = list(service.offers)
        # Home Assistant names no model, and offers all languages that any of them has.
        named = offers if self.name is None else [service.offer(self.name)]
        first: Exception | None = None
        for offer in named:
            known = await engine.knowledge(offer)
            try:
                self.check(offer.name, known)
            except Exception as error:  # raised below
                first = first or error
            else:
                return offer, known
        assert first is not None
        raise first

    def check(self, name: str, known: Knowledge | None) -> None:
        """
        Refuses a model that does not know the language, by an `ApiError`.
        """
        if known is None:
            return
        if not known.is_multilingual and self.language not in (None, "en"):
            raise nonsense("language", f"{name} understands English only")
        if not known.can_detect and self.language is None:
            raise nonsense("language", f"{name} cannot detect the language; name it")
        try:
            check_language(name, self.language, known)
        except ValueError as error:
            raise nonsense("language", str(error)) from None

    def options(self, *, vad: bool) -> dict[str, Any]:
        """
        Returns the same as parameters of ``WhisperModel.transcribe``. *vad* leaves out
        what is not speech: microphones hear silence and noise, too, of which Whisper
        makes words.
        """
        options: dict[str, Any] = {"language": self.language, "vad_filter": vad}
        if self.words:
            # With what was said before, they would take all of a window's tokens.
            options |= {"hotwords": self.words, "condition_on_previous_text": False}
        return options


def _fitting(words: list[str]) -> str:
    """
    Returns as many of the first words as a window has room for.
    """
    text = ""
    for word in words:
        longer = f"{text}, {word}" if text else word
        if len(longer.encode()) > _MOST_BYTES:
            break
        text = longer
    return text


def _texts(data: Mapping[str, object], name: str) -> list[str]:
    texts = data.get(name) or []
    if not isinstance(texts, list) or not all(isinstance(each, str) for each in texts):
        raise nonsense(name, f"{name} is a list of texts")
    return texts


async def languages_of(offer: Offer, engine: Engine) -> list[str]:
    """
    Returns the languages of a model; of one that is yet to be downloaded, or cannot be
    read, those that its name tells.
    """
    try:
        known = await engine.knowledge(offer)
    except WhisperCacheError as error:
        # Who asks for it is told. The other models are there all the same.
        _log.warning("the languages of %s are unknown: %s", offer.name, error)
        known = None
    if known is not None:
        return list(known.languages)
    return ["en"] if offer.place[0].endswith(".en") else list(LANGUAGES)
