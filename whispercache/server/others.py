"""
The forms of other servers, for clients that know only those: whisper-asr-webservice's
(Bazarr, Subgen) and whisper.cpp's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Form, Query, Request, Response
from pydantic import BaseModel

from whispercache.engine.calls.languages import LANGUAGES
from whispercache.version import __version__

from . import seen
from .answers import told
from .asked import Asked
from .audio import FORM, RESPONSES
from .calls import while_present
from .errors import responses
from .fields import Asr, AsrUpload, Inference
from .forms import SmallForm, level_of
from .hearing import Answer, Hearing, Lifetime
from .service import Served, Service
from .transcripts import Plain, Verbose

if TYPE_CHECKING:
    from .fields import Form as AnyForm
    from .offers import Offer

router: APIRouter = APIRouter(tags=["other servers' APIs"], route_class=SmallForm)

AudioFile = Annotated[AsrUpload, Form(media_type=FORM)]


class Detected(BaseModel):
    """
    The language that is spoken.
    """

    detected_language: str
    language_code: str
    confidence: float


@router.post("/asr", response_model=None, responses=RESPONSES)
async def asr(
    request: Request,
    service: Served,
    lifetime: Lifetime,
    form: AudioFile,
    query: Annotated[Asr, Query()],
) -> Answer:
    """
    Writes down speech, as whisper-asr-webservice does.
    """
    offer = _offer(request, service, query.model, query, form)
    hearing = Hearing(
        service,
        lifetime,
        form.audio_file,
        offer,
        query.asked(),
        is_raw=not query.encode,
        level=level_of(request),
    )
    answer = await while_present(request, hearing.answer())
    assert isinstance(answer, Response)
    # As there: whatever the format is.
    answer.headers["Content-Type"] = "text/plain; charset=utf-8"
    answer.headers["Asr-Engine"] = "faster_whisper"
    return answer


@router.post("/detect-language", responses=RESPONSES)
async def detect_language(
    request: Request,
    service: Served,
    lifetime: Lifetime,
    form: AudioFile,
    query: Annotated[Asr, Query()],
) -> Detected:
    """
    Detects the language that is spoken, as whisper-asr-webservice does.
    """
    offer = _offer(request, service, query.model, query, form)
    asked = Asked(vad=query.vad_filter)
    hearing = Hearing(
        service,
        lifetime,
        form.audio_file,
        offer,
        asked,
        is_raw=not query.encode,
        level=level_of(request),
    )
    _, info = await while_present(request, hearing.begin())
    return Detected(
        detected_language=LANGUAGES[info.language],
        language_code=info.language,
        confidence=info.language_probability,
    )


@router.get("/status", responses=responses(401))
async def status() -> dict[str, str]:
    """
    Tells the version, as Subgen does: Bazarr tests its connection by that.
    """
    return {"version": f"whispercache {__version__}"}


@router.post(
    "/inference",
    response_model=Plain | Verbose,
    response_model_exclude_none=True,
    responses=RESPONSES,
)
async def inference(
    request: Request,
    service: Served,
    lifetime: Lifetime,
    fields: Annotated[Inference, Form(media_type=FORM)],
) -> Answer:
    """
    Writes down speech, as whisper.cpp's server does.
    """
    offer = _offer(request, service, fields.model, fields)
    asked, level = fields.asked(), level_of(request)
    hearing = Hearing(service, lifetime, fields.file, offer, asked, level=level)
    return await while_present(request, hearing.answer())


def _offer(
    request: Request, service: Service, name: str | None, *forms: AnyForm
) -> Offer:
    """
    Returns the model that is meant: the default one for those who cannot name it.
    """
    offer = service.offer(name) if name else service.offers.default
    seen.wants(offer.name)
    unknown = [each for form in forms for each in form.unknown()]
    told(request).note(offer.name, unknown, strict=service.options.strict)
    return offer
