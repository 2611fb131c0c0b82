"""
Requests that are too large, without a key, or of other sites are refused.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pytest
from caches import cache_of
from served import URL, A, error_of, micros, serving, transcribe

if TYPE_CHECKING:
    from whispercache import ModelCache

pytestmark = pytest.mark.process

cache = cache_of(max_models=1)


def test_an_upload_that_is_too_large_is_refused(cache: ModelCache) -> None:
    """
    Before it is read, if it says how large it is; otherwise as soon as it is too much.
    """
    with serving(cache, models=micros(), max_upload_bytes=20_000) as client:
        answer = transcribe(client, A)
        assert answer.status_code == 413
        assert error_of(answer)["code"] == "upload_too_large"
        head = (
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        )
        chunks = (head if not i else b"\0" * 1000 for i in range(100))
        kind = {"content-type": "multipart/form-data; boundary=x"}
        answer = client.post(URL, content=chunks, headers=kind)
        assert answer.status_code == 413
    assert cache.stats().requests == 0


@pytest.mark.parametrize(
    "form",
    [
        {"files": [("file", b"a"), ("file", b"b")]},
        {"files": [("file", b"a")], "data": {"prompt": "x" * 70_000}},
        {"files": [("file", b"a")], "data": {str(i): "x" for i in range(60)}},
    ],
)
def test_a_form_holds_one_file_and_a_few_short_fields(
    cache: ModelCache, form: dict[str, Any]
) -> None:
    """
    Fields are kept in memory while a request waits; files are not.
    """
    with serving(cache, models=micros()) as client:
        answer = client.post(URL, **form)
        assert answer.status_code == 400
        assert "Too many" in answer.text or "exceeded" in answer.text


@pytest.mark.parametrize(
    "where", ["tempfile.SpooledTemporaryFile.write", "shutil.copyfileobj"]
)
def test_a_full_disk_is_no_fault_of_the_client(
    cache: ModelCache, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """
    503, while the upload arrives and afterwards.
    """

    def fail(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "secret")

    with serving(cache, models=micros()) as client:
        monkeypatch.setattr(where, fail)
        answer = transcribe(client, A)
        assert answer.status_code == 503
        assert error_of(answer)["code"] == "disk_full"
        assert "retry-after" in answer.headers
        assert "secret" not in answer.text


def test_audio_that_is_too_long_is_refused(cache: ModelCache) -> None:
    """
    Without a model: nothing is loaded for it.
    """
    with serving(cache, models=micros(), max_duration_s=1) as client:
        answer = transcribe(client, A)
        assert answer.status_code == 413
        assert error_of(answer)["code"] == "audio_too_long"
        assert "1 s" in error_of(answer)["message"]
    assert cache.stats().requests == 0


def test_without_a_key_only_the_page_and_the_probes_are_open(cache: ModelCache) -> None:
    """
    Any of the keys will do, and nothing else.
    """
    keys = ("first", "sécond")
    with serving(cache, models=micros(), keys=keys) as client:
        for path in ("/healthz", "/readyz"):
            assert client.get(path).status_code == 200
        closed = ("/v1/models", "/api/ps", "/metrics", "/nix")
        for path in closed:
            for given in (None, "Bearer", "Bearer fir", "Basic first", "first"):
                headers = {} if given is None else {"authorization": given}
                answer = client.get(path, headers=headers)
                assert answer.status_code == 401, (path, given)
                assert answer.headers["www-authenticate"] == "Bearer"
                assert error_of(answer)["code"] == "invalid_api_key"
        for key in keys:
            sent = [(b"authorization", f"Bearer {key}".encode())]
            answer = client.get("/v1/models", headers=sent)
            assert answer.status_code == 200
        assert transcribe(client, A).status_code == 401


def test_pages_of_other_sites_can_do_nothing(cache: ModelCache) -> None:
    """
    Neither through the browser of somebody who may, nor by a name rebound to us; an
    origin that was allowed can.
    """
    friend = "https://friend.example"
    with serving(
        cache, models=micros(), hosts=("127.0.0.1",), origins=(friend,)
    ) as client:
        path = f"/api/models/{A}/load"
        own = str(client.base_url).rstrip("/")
        for headers, status in (
            ({"origin": "https://evil.example"}, 403),
            ({"origin": "null"}, 403),
            ({"origin": own, "sec-fetch-site": "cross-site"}, 403),
            ({"sec-fetch-site": "same-site"}, 403),
            ({"host": "evil.example"}, 403),
            ({"host": "[::1"}, 403),
            ({"origin": "http://[::1"}, 403),
            ({"origin": own}, 200),
            ({"origin": own, "sec-fetch-site": "same-origin"}, 200),
            ({"origin": friend, "sec-fetch-site": "cross-site"}, 200),
            ({}, 200),
        ):
            answer = client.post(path, headers=headers)
            assert answer.status_code == status, headers
        allowed = "access-control-allow-origin"
        assert answer.headers.get(allowed) is None
        answer = client.get("/v1/models", headers={"origin": friend})
        assert answer.headers[allowed] == friend
        answer = client.get("/v1/models", headers={"origin": "https://evil.example"})
        assert allowed not in answer.headers
