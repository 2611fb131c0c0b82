"""
Forms of one upload and a few short fields. The fields stay in memory while a request
waits, so there must not be much of them.
"""

from __future__ import annotations

import json
import re
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote

from fastapi.routing import APIRoute
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from whispercache.planning.priority import INTERACTIVE, name_of, parse_priority
from whispercache.units import parse_duration

from . import seen
from .errors import ApiError, nonsense
from .guard import KEY_LEVEL

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator

    from starlette._utils import AwaitableOrContextManager
    from starlette.datastructures import UploadFile
    from starlette.responses import Response

# Names of fields, as OpenAI's API has them.
FILE = "file"
GRANULARITIES = "timestamp_granularities"
CHUNKING = "chunking_strategy"
TEMPERATURE = "temperature"
# That of whisper-asr-webservice.
AUDIO_FILE = "audio_file"

# Lists of what people write themselves.
_FREE = ("keywords", "known_speaker_names", "known_speaker_references")
_SEVERAL = "|".join((GRANULARITIES, "include", "languages", TEMPERATURE, *_FREE))
# With brackets or without, with numbers in them (qs, PHP), or after dots.
_SPELLED = re.compile(
    rf"(?P<several>{_SEVERAL})(?P<place>(\[[^\[\]]*\]|\.\d+)*)"
    rf"|{CHUNKING}[\[.](?P<part>\w+)\]?"
)
_UNNAMED = b'; filename=""'
_AS_FILE = f'; name="{FILE}"'.encode()
_LONGEST_SHOWN = 100


class SmallForm(APIRoute):
    """
    A route whose forms hold one file, and little else.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """
        Returns the route's handler, which gets requests with limits.
        """
        # FastAPI reads the form itself; it is given a request that reads it within
        # limits.
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await handle(_Request(request.scope, request.receive))

        return handler


class _Request(Request):
    def form(self, **_limits: object) -> AwaitableOrContextManager[FormData]:
        # FastAPI awaits it, and closes it by itself.
        return cast("AwaitableOrContextManager[FormData]", self._read())

    async def _read(self) -> FormData:
        kind, _ = parse_options_header(self.headers.get("content-type"))
        if kind != b"multipart/form-data":
            return FormData()  # which lacks a file, whatever the body holds
        async with aclosing(self.stream()) as body:
            # Starlette's own limits are far above what these forms need.
            parser = _Parser(
                self.headers,
                body,
                max_files=1,
                # Clients repeat the one list, a field for each of its values.
                max_fields=50,
                max_part_size=64 * 1024,
            )
            try:
                form = await parser.parse()
            except MultiPartException as error:
                raise parser.refusal(error) from None
        return FormData(list(_in_one_spelling(form.multi_items())))


class _Parser(MultiPartParser):
    """
    Takes a part that is called `FILE` for a file, also where it has no file name, and a
    file whose part has no name for that one.
    """

    _name = ""  # of the part that is read; none before the first

    def on_part_begin(self) -> None:
        self._header, self._value = bytearray(), bytearray()
        self._name = ""
        super().on_part_begin()

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]
        super().on_header_field(data, start, end)

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        super().on_header_value(data, start, end)

    def on_header_end(self) -> None:
        """
        Gives the file the name that it lacks.
        """
        # Without a file name, Starlette takes a part for a text, of which it holds no
        # more than a field's length.
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self._value))
            self._name = options.get(b"name", b"").decode(errors="replace")
            if self._name in (FILE, AUDIO_FILE) and b"filename" not in options:
                super().on_header_value(_UNNAMED, 0, len(_UNNAMED))
            elif not self._name and b"filename" in options:
                self._name = FILE
                super().on_header_value(_AS_FILE, 0, len(_AS_FILE))
        self._header.clear()
        self._value.clear()
        super().on_header_end()

    def refusal(self, error: MultiPartException) -> ApiError:
        name = self._name[:_LONGEST_SHOWN]
        message = f"{name}: {error.message}" if name else error.message
        return ApiError(400, message, code="invalid_request", param=name or None)


def _in_one_spelling(
    items: Iterable[tuple[str, UploadFile | str]],
) -> Iterator[tuple[str, UploadFile | str]]:
    """
    Yields the fields of a form, with all spellings of a list, or of a field that has
    fields, replaced by one.
    """
    # As keys, so that each value is there once and in order.
    lists: dict[str, dict[str, None]] = {}
    parts: dict[str, str] = {}
    items = list(items)
    n_temperatures = [name for name, _ in items].count(TEMPERATURE)
    for name, value in items:
        match = _SPELLED.fullmatch(unquote(name)) if isinstance(value, str) else None
        if match is None or not isinstance(value, str):
            yield name, value
        elif match["part"]:
            parts[match["part"]] = value
        elif name == TEMPERATURE and n_temperatures == 1 and "[" not in value:
            # Alone it is a number.
            yield name, value
        else:
            chosen = lists.setdefault(match["several"], {})
            chosen.update(dict.fromkeys(_listed(value, match["several"])))
    if parts:
        yield CHUNKING, json.dumps(parts)
    for name, chosen in lists.items():
        # Nothing but empty values is refused: an empty list is no wish. The spelling is
        # that of OpenAI's own client.
        yield from ((f"{name}[]", one) for one in chosen or ("",))


def _listed(text: str, name: str) -> Iterator[str]:
    """
    Yields the values of a list in any notation: alone, with commas, as JSON or Python.
    """
    # What people say may have commas and capitals in it.
    is_free = name in _FREE
    inner = text.strip()
    if is_free and not inner.startswith("["):
        yield from filter(None, (inner,))
        return
    for part in inner.strip("[](){}").split(","):
        if value := part.strip().strip("\"'").strip():
            yield value if is_free else value.lower()


def check_keep_alive(text: str) -> None:
    """
    Refuses a time that is none in Ollama's words, by an `ApiError`.
    """
    try:
        parse_duration(text, "keep_alive")
    except ValueError as error:
        raise nonsense("keep_alive", str(error)) from None


def level_of(request: Request, field: str | None = None) -> float:
    """
    Returns the level of a request's priority, by its *field* or else by its header; by
    its key if there is neither, and the usual one without such a key. Refuses others by
    an `ApiError`, and those above that of the key: all clients would take them.
    """
    most: float = request.scope.get(KEY_LEVEL, INTERACTIVE)
    text = field or request.headers.get("x-priority")
    if not text:
        if most != INTERACTIVE:
            seen.asks_for(name_of(most))
        return most
    try:
        level = parse_priority(text)
    except ValueError as error:
        raise nonsense("priority", str(error)) from None
    if level > most:
        told = "a request may wait for others, not go before them"
        raise nonsense("priority", f"{told}: it is {name_of(most)} at most")
    seen.asks_for(text)
    return level
