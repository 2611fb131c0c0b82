"""
Speech to text with Flask: one cache for the process, shared by the threads of requests.

::

    python examples/flask_app.py
    curl -F file=@examples/clips/en-bread.flac localhost:8000/transcriptions
    curl -N -F file=@examples/clips/en-harbour-long.flac localhost:8000/segments
    gunicorn --chdir examples --threads 8 "flask_app:create_app()"

Threads share models, worker processes do not: add threads first. With several workers
``coordinate=True`` keeps them out of each other's memory. ``--preload`` is safe since
nothing is loaded before the fork.

What not to do:

- ``WhisperModel(...)`` in a request: each one pays for a load, and for the memory.
- ``@lru_cache`` around it: threads that miss together each load one, it counts models
  and not bytes, and what it drops may be in the middle of somebody's sentence.
- Keep ``segments`` unfinished: nothing can take their model's place. Or keep the model
  of a lease after its end: to touch it then can crash the process.
- Save the upload under a temporary name: that file stays when the request dies. The
  cache reads streams.

For the open internet, limit the length of the audio too, as ``whispercache serve``
does: ten hours of silence fit into a small file.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from typing import TYPE_CHECKING, BinaryIO, cast

from flask import Flask, Response, abort, request
from weights import find_model
from werkzeug.exceptions import HTTPException

from whispercache import (
    AudioError,
    CacheClosed,
    LeaseTimeout,
    LoadFailed,
    ModelCache,
    TooManyWaiters,
    WhisperCacheError,
)

if TYPE_CHECKING:
    from faster_whisper.transcribe import Segment, TranscriptionInfo

    from whispercache.results import LeasedIterator

MODELS = ("tiny.en", "base")  # nothing else is loaded, whatever clients ask for
DEVICE, COMPUTE_TYPE = "cpu", "int8"
MAX_UPLOAD_BYTES = 25 * 2**20
RETRY_S = 10.0


def new_cache() -> ModelCache:
    """
    A cache for the process. It loads nothing yet.
    """
    return ModelCache(keep_alive="10m", max_waiting=32, coordinate=True)


def create_app(cache: ModelCache | None = None) -> Flask:
    """
    The application, on *cache* or on one that is closed when the process exits.
    """
    app = Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = MAX_UPLOAD_BYTES
    app.register_error_handler(WhisperCacheError, refuse)
    app.register_error_handler(HTTPException, explain)
    shared = cache or new_cache()

    @app.post("/transcriptions")
    def transcribe() -> dict[str, object]:
        segments, info = begin(shared)
        with segments:  # the model may leave at the end of this block, not before
            found = [as_json(segment) for segment in segments]
        text = "".join(str(segment["text"]) for segment in found).strip()
        return {"language": info.language, "text": text, "segments": found}

    @app.post("/segments")
    def stream() -> Response:
        segments, _ = begin(shared)
        lines = (json.dumps(as_json(segment)) + "\n" for segment in segments)
        response = Response(lines, mimetype="application/x-ndjson")
        # Also if the client leaves: the server finds out at the next line.
        response.call_on_close(segments.close)
        return response

    @app.get("/health")
    def health() -> dict[str, int]:
        stats = shared.stats()
        return {"leases": stats.leases, "waiting": stats.waiting}

    return app


def begin(cache: ModelCache) -> tuple[LeasedIterator[Segment], TranscriptionInfo]:
    """
    Begin to transcribe the upload of this request, with the model that it names.
    """
    name = request.form.get("model", MODELS[0])
    if name not in MODELS:
        abort(400, f"no model {name!r}; there are {', '.join(MODELS)}")
    upload = request.files["file"]  # or 400
    model = cache.get_model(find_model(name), DEVICE, COMPUTE_TYPE, timeout_s=60)
    return model.transcribe(cast("BinaryIO", upload.stream))


def as_json(segment: Segment) -> dict[str, object]:
    """
    A segment as clients see it; times in seconds.
    """
    return {"start": segment.start, "end": segment.end, "text": segment.text}


def refuse(error: WhisperCacheError) -> tuple[dict[str, str], int, dict[str, str]]:
    """
    Whose fault it is, and when to come back. Messages may name paths of ours.
    """
    if isinstance(error, AudioError):
        return {"error": f"cannot read this audio: {error.reason}"}, 422, {}
    print(f"flask_app: {error}", file=sys.stderr)
    if isinstance(error, (LeaseTimeout, TooManyWaiters, LoadFailed, CacheClosed)):
        retry_s = getattr(error, "retry_in_s", None) or RETRY_S
        return {"error": "busy"}, 503, {"Retry-After": str(math.ceil(retry_s))}
    return {"error": "this server is not set up well"}, 500, {}


def explain(error: HTTPException) -> tuple[dict[str, str | None], int]:
    """
    Flask's own refusals, as JSON.
    """
    return {"error": error.description}, error.code or 500


def main() -> None:
    """
    Serve on this machine alone, for development.
    """
    # Python would just die of it, and close nothing.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with new_cache() as cache:
        create_app(cache).run(port=int(os.environ.get("PORT", "8000")))


if __name__ == "__main__":
    main()
