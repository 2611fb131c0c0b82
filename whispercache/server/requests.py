"""
The route that lists the requests under way, and the last ones that are over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from .errors import responses
from .seen import MOST_LISTED, Outcome, Phase

if TYPE_CHECKING:
    from .seen import RequestsSeen, SeenRequest

router: APIRouter = APIRouter(tags=["requests"])


class Seconds(BaseModel):
    """
    The seconds that a request spent in each phase so far.
    """

    arriving: float = Field(0, description="Its upload came in.")
    decoding: float = Field(0, description="Its audio was decoded.")
    waiting: float = Field(0, description="Others were served, or room was made.")
    downloading: float = Field(0, description="The model's files were not here.")
    loading: float = Field(0, description="The model was loaded.")
    working: float = Field(0, description="The model computed, or was told to.")
    total: float = Field(description="From its arrival until now, or until its end.")


class RequestInfo(BaseModel):
    """
    A request, without a word of what was said, and without names of files.
    """

    id: str = Field(description="As in the answer's header X-Request-ID, and the log.")
    at_s: float = Field(description="When it came, in seconds since 1970 (UTC).")
    route: str | None = Field(
        description='As "POST /v1/audio/transcriptions", or "WYOMING transcribe"; null '
        "until it is known."
    )
    who: str | None = Field(description="The name of its key, if that has one.")
    model: str | None = Field(description="The served model that it is for.")
    audio_s: float | None = Field(description="Seconds of audio, once decoded.")
    priority: str | None = Field(
        description="As it was asked for, or as its key has it."
    )
    phase: Phase | Literal["over"]
    seconds: Seconds
    status: int | None = Field(
        description="HTTP's, once it is told; 499 where the client hung up before."
    )
    outcome: Outcome | None = Field(
        description='"refused": its own fault or too much to do; "failed": the '
        'server\'s; "left": the client hung up. null while it is under way.'
    )
    error: str | None = Field(description='A code as in the answer: "model_busy".')


class Requests(BaseModel):
    """
    The requests that ask for work: those that only look are not among them.
    """

    under_way: list[RequestInfo] = Field(description="The oldest first.")
    left_out: int = Field(description=f"Those under way beyond {MOST_LISTED}.")
    lately: list[RequestInfo] = Field(description="Those that are over, newest first.")


@router.get("/api/requests", responses=responses(401))
async def show_requests(request: Request) -> Requests:
    """
    Returns the requests under way and the last that are over, with the time that they
    spent in each phase.
    """
    return listed(request.app.state.seen)


def listed(seen: RequestsSeen) -> Requests:
    """
    Returns the requests seen as the route does.
    """
    under_way = seen.under_way()
    return Requests(
        under_way=[_info(each) for each in under_way[:MOST_LISTED]],
        left_out=max(0, len(under_way) - MOST_LISTED),
        lately=[_info(each) for each in seen.lately()],
    )


def _info(request: SeenRequest) -> RequestInfo:
    seconds = {name: round(spent_s, 6) for name, spent_s in request.seconds().items()}
    total_s = round(sum(seconds.values()), 6)
    return RequestInfo(
        id=request.id,
        at_s=request.at_s,
        route=request.route and f"{request.method} {request.route}",
        who=request.who,
        model=request.model,
        audio_s=request.audio_s,
        priority=request.priority,
        phase=request.phase or "over",
        seconds=Seconds.model_validate({**seconds, "total": total_s}),
        status=request.status,
        outcome=request.outcome,
        error=request.error,
    )
