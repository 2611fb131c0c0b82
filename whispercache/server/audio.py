"""
OpenAI's transcriptions and translations, as existing clients ask for them.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Form, Request

from .answers import told
from .asked import Task
from .calls import while_present
from .errors import responses
from .fields import Speech
from .forms import SmallForm, level_of
from .hearing import Answer, Hearing, Lifetime
from .service import Served, Service
from .transcripts import MEDIA_TYPES, Plain, Verbose

router: APIRouter = APIRouter(prefix="/v1/audio", tags=["audio"], route_class=SmallForm)

FORM = "multipart/form-data"
Fields = Annotated[Speech, Form(media_type=FORM)]

RESPONSES: dict[int | str, dict[str, object]] = {
    200: {
        "description": "What was heard, in the format asked for.",
        "content": {
            "application/json": {},
            **{kind.partition(";")[0]: {} for kind in MEDIA_TYPES.values()},
            "text/event-stream": {},
        },
    },
    **responses(400, 401, 403, 404, 408, 413, 429, 503),
}


@router.post(
    "/transcriptions",
    response_model=Plain | Verbose,
    response_model_exclude_none=True,
    responses=RESPONSES,
)
async def transcriptions(
    request: Request, service: Served, lifetime: Lifetime, fields: Fields
) -> Answer:
    """
    Writes down speech in its own language.
    """
    return await _answer(request, service, lifetime, fields, "transcribe")


@router.post(
    "/translations",
    response_model=Plain | Verbose,
    response_model_exclude_none=True,
    responses=RESPONSES,
)
async def translations(
    request: Request, service: Served, lifetime: Lifetime, fields: Fields
) -> Answer:
    """
    Writes down in English what is said in another language.
    """
    return await _answer(request, service, lifetime, fields, "translate")


async def _answer(
    request: Request, service: Service, lifetime: Lifetime, fields: Speech, task: Task
) -> Answer:
    asked = fields.asked(task)
    offer = service.offer(fields.model)
    told(request).note(offer.name, fields.unknown(), strict=service.options.strict)
    level = level_of(request, fields.priority)
    hearing = Hearing(service, lifetime, fields.file, offer, asked, level=level)
    return await while_present(request, hearing.answer())
