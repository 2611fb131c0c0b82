"""
The names of languages, and the languages that a model knows.

Whisper goes by codes (``"de"``). Here names, locale tags and older codes are accepted
as well, and a model's languages are read from its files, before it is loaded.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from whispercache.engine.claims import unalignable
from whispercache.engine.files import claims_of
from whispercache.engine.sizes.architecture import (
    CANTONESE_TOKENS,
    ENGLISH_TOKENS,
    Architecture,
)

from .parameters import check_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping

    from whispercache.engine.files import ModelFiles
    from whispercache.errors import CorruptModel

_NAMES = """\
af afrikaans; am amharic; ar arabic; as assamese; az azerbaijani; ba bashkir;
be belarusian; bg bulgarian; bn bengali; bo tibetan; br breton; bs bosnian;
ca catalan; cs czech; cy welsh; da danish; de german; el greek; en english;
es spanish; et estonian; eu basque; fa persian; fi finnish; fo faroese;
fr french; gl galician; gu gujarati; ha hausa; haw hawaiian; he hebrew;
hi hindi; hr croatian; ht haitian creole; hu hungarian; hy armenian;
id indonesian; is icelandic; it italian; ja japanese; jw javanese;
ka georgian; kk kazakh; km khmer; kn kannada; ko korean; la latin;
lb luxembourgish; ln lingala; lo lao; lt lithuanian; lv latvian; mg malagasy;
mi maori; mk macedonian; ml malayalam; mn mongolian; mr marathi; ms malay;
mt maltese; my myanmar; ne nepali; nl dutch; nn nynorsk; no norwegian;
oc occitan; pa punjabi; pl polish; ps pashto; pt portuguese; ro romanian;
ru russian; sa sanskrit; sd sindhi; si sinhala; sk slovak; sl slovenian;
sn shona; so somali; sq albanian; sr serbian; su sundanese; sv swedish;
sw swahili; ta tamil; te telugu; tg tajik; th thai; tk turkmen; tl tagalog;
tr turkish; tt tatar; uk ukrainian; ur urdu; uz uzbek; vi vietnamese;
yi yiddish; yo yoruba; zh chinese; yue cantonese"""


def _by_name(text: str) -> dict[str, str]:
    entries = (entry.strip().split(" ", 1) for entry in text.split(";"))
    return {name: code for code, name in entries}


# Names in English by code. Source: openai/whisper, tokenizer.py, ``LANGUAGES``; a test
# compares the codes with faster-whisper's.
LANGUAGES: Mapping[str, str] = MappingProxyType(
    {code: name for name, code in _by_name(_NAMES).items()}
)

# Source: openai/whisper, tokenizer.py, ``TO_LANGUAGE_CODE``.
_OTHER_NAMES = _by_name("""\
my burmese; es castilian; nl flemish; ht haitian; lb letzeburgesch; zh mandarin;
ro moldavian; ro moldovan; pa panjabi; ps pushto; si sinhalese; es valencian""")

# Codes of three letters. Those of groups, such as Serbo-Croatian's, stand for several.
# Source: ISO 639-3; of 639-2 the bibliographic ones, which are in media files.
_THREE_LETTERS = """\
af afr; am amh; ar ara; as asm; az aze; ba bak; be bel; bg bul; bn ben; bo bod; bo tib;
br bre; bs bos; ca cat; cs ces; cs cze; cy cym; cy wel; da dan; de deu; de ger; el ell;
el gre; en eng; es spa; et est; eu baq; eu eus; fa fas; fa per; fi fin; fo fao; fr fra;
fr fre; gl glg; gu guj; ha hau; he heb; hi hin; hr hrv; ht hat; hu hun; hy arm; hy hye;
id ind; is ice; is isl; it ita; ja jpn; jw jav; ka geo; ka kat; kk kaz; km khm; kn kan;
ko kor; la lat; lb ltz; ln lin; lo lao; lt lit; lv lav; mg mlg; mi mao; mi mri; mk mac;
mk mkd; ml mal; mn mon; mr mar; ms may; ms msa; mt mlt; my bur; my mya; ne nep; nl dut;
nl nld; nn nno; no nor; oc oci; pa pan; pl pol; ps pus; pt por; ro ron; ro rum; ru rus;
sa san; sd snd; si sin; sk slk; sk slo; sl slv; sn sna; so som; sq alb; sq sqi; sr srp;
su sun; sv swe; sw swa; ta tam; te tel; tg tgk; th tha; tk tuk; tl tgl; tr tur; tt tat;
uk ukr; ur urd; uz uzb; vi vie; yi yid; yo yor; zh chi; zh zho"""

# Codes that operating systems and speech services have for languages of Whisper's.
# Source: IANA language subtag registry: deprecated codes, languages of macrolanguages
# (``nb`` is Norwegian, ``cmn`` Chinese, ``fil`` Tagalog) and the extended ``zh-yue``.
_OTHER_CODES = _by_name(
    "zh cmn; tl fil; id in; he iw; yi ji; jw jv; ro mo; no nb; yue zh-yue; ar arb; "
    f"fa pes; fa prs; ms zsm; no nob; sw swh; {_THREE_LETTERS}"
)

_CODES: Mapping[str, str] = {
    **_by_name(_NAMES),
    **{code: code for code in LANGUAGES},
    **_OTHER_NAMES,
    **_OTHER_CODES,
}
# As people say it, as JavaScript and Python do, and as ISO 639 (undetermined).
_DETECT = ("", "auto", "null", "undefined", "none", "und")
_LOCALE = re.compile(r"([a-z]{2,3})(?:-[a-z0-9]{1,8})+")
_LONGEST_SHOWN = 20


def language_code(language: str | None) -> str | None:
    """
    Returns Whisper's code of a language, or None to detect it.

    ``"de"``, ``"German"``, ``"de-AT"``, ``"deu"`` and ``"de_DE.UTF-8"`` are ``"de"``;
    None, empty text, ``"auto"`` and ``"null"`` ask for detection.

    Raises:
        TypeError: it is no text.
        ValueError: there is no such language.
    """
    if language is None:
        return None
    if not isinstance(language, str):
        raise TypeError(f"language must be a code such as 'en', not {language!r}")
    text = language.strip().lower().replace("_", "-")
    if text in _DETECT:
        return None
    # Names of two words are spelled with a hyphen by some: "haitian-creole".
    for spelled in (text, text.replace("-", " ")):
        if spelled in _CODES:
            return _CODES[spelled]
    # A POSIX locale may have an encoding and a modifier: "de_DE.UTF-8@euro".
    locale = text.partition(".")[0].partition("@")[0]
    if match := _LOCALE.fullmatch(locale):
        parts = locale.split("-")
        # "zh-yue" is another language than "zh", so the longer tag goes first.
        for tag in ("-".join(parts[:2]), match[1]):
            if tag in _CODES:
                return _CODES[tag]
    # Only codes: "german.utf-8" is no locale.
    elif locale in _CODES and locale in {*LANGUAGES, *_OTHER_CODES}:
        return _CODES[locale]
    raise ValueError(
        f"language {language[:_LONGEST_SHOWN]!r} is none that Whisper knows; give a "
        "code such as 'en' or a name such as 'german', or leave it out to have it "
        "detected"
    )


@dataclass(frozen=True, slots=True)
class Knowledge:
    """
    The languages and tokens that a model has.

    Attributes:
        n_tokens: Number of its tokens.
        is_multilingual: It knows other languages than English.
        languages: Codes of the languages that it knows, in Whisper's order.
        words_error: The error of a call that asks for word timestamps; None if it has
            them, or CTranslate2 raises one by itself.
        can_detect: It can detect the language that is spoken.
    """

    n_tokens: int
    is_multilingual: bool
    languages: tuple[str, ...]
    words_error: CorruptModel | None = None
    can_detect: bool = True


def knowledge_of(files: ModelFiles) -> Knowledge | None:
    """
    Returns the languages and tokens of the model of *files*; None if nothing is known
    of it. Looks at no file twice, as `claims_of`.

    Raises:
        CorruptModel, LoadFailed: the files have changed for the worse since.
    """
    files = files.original or files
    source = files.source
    if source is None:
        return None
    if isinstance(source, Architecture):
        return _by_size(source.vocabulary)
    claims = claims_of(files)
    special, is_multilingual = claims.vocabulary.special, True
    # Distilled models and fine-tunes may lack some.
    codes = tuple(code for code in LANGUAGES if f"<|{code}|>" in special)
    if not claims.vocabulary.is_multilingual:
        codes, is_multilingual = ("en",), False
    problem = claims.alignment_problem
    error = unalignable(files.directory, problem) if problem else None
    n_tokens = source.architecture.vocabulary
    return Knowledge(n_tokens, is_multilingual, codes, error, claims.can_detect)


def check_language(model: object, code: str | None, known: Knowledge | None) -> None:
    """
    Refuses a language that a model does not know. An English-only model refuses none:
    it takes all for English, and faster-whisper warns of that.

    Raises:
        ValueError: it does not.
    """
    if code is None or known is None or not known.is_multilingual:
        return
    if code in known.languages:
        return
    hint = "leave the language out to have it detected"
    if code == "yue":
        hint = (
            "Cantonese came with large-v3; take a model since then, or Chinese ('zh')"
        )
    raise ValueError(
        f"{model} does not know {LANGUAGES[code].title()} ({code!r}): {hint}"
    )


def check_knowledge(
    model: object, values: Mapping[str, object], known: Knowledge | None
) -> None:
    """
    Refuses a call in a language or with tokens that a model does not know, or for word
    timestamps that it cannot give.

    Raises:
        ValueError: it does not.
        CorruptModel: it names heads for words that are not there.
    """
    if known is None:
        return
    language = values.get("language")
    if isinstance(language, str) and language in LANGUAGES:
        check_language(model, language, known)
    check_tokens(values, known.n_tokens)
    if values.get("word_timestamps") and known.words_error is not None:
        raise known.words_error


@functools.lru_cache(maxsize=64)
def _by_size(n_tokens: int) -> Knowledge:
    # Compared, not looked up, so that any size has an answer.
    if n_tokens <= ENGLISH_TOKENS:
        return Knowledge(n_tokens, is_multilingual=False, languages=("en",))
    codes = (c for c in LANGUAGES if c != "yue" or n_tokens >= CANTONESE_TOKENS)
    return Knowledge(n_tokens, is_multilingual=True, languages=tuple(codes))
