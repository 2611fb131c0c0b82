"""
Key files, and the origins of pages that may use a server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from caches import cache_of
from served import CLIP, URL, client_of_micro, options_of
from starlette.testclient import TestClient

from whispercache.server import command, create_app
from whispercache.server.origins import option_for

if TYPE_CHECKING:
    from pathlib import Path

    from whispercache import ModelCache

pytestmark = pytest.mark.process

cache = cache_of("module", ram="2GiB", variants=False)
client = client_of_micro()


def test_a_key_file_has_comments(tmp_path: Path) -> None:
    """
    Lines that begin with #, what follows one after a space, and lines without anything;
    and names before a colon and a space.
    """
    file = tmp_path / "keys"
    file.write_text(
        "\ufeff# who may use it\n\n  alice-1  \n\t# bob left\nbob#2\n"
        "sales: carol\t# till May\n   \n#dave\nno:name\n",
        encoding="utf-8",
    )
    keys = {"alice-1": "", "bob#2": "", "carol": "sales", "no:name": ""}
    assert command.read_keys(file) == keys
    other = tmp_path / "more"
    other.write_text("erin\r\nal: alice-1\r\n", encoding="utf-8")
    found = command._keys([file, other])
    assert found == {**keys, "alice-1": "al", "erin": ""}
    assert list(found) == ["alice-1", "bob#2", "carol", "no:name", "erin"]
    file.write_text("# nobody\n\n", encoding="utf-8")
    with pytest.raises(ValueError, match="keys holds no key"):
        command._keys([file, other])
    file.write_bytes(CLIP.read_bytes())
    with pytest.raises(ValueError, match="keys is no key file: it is not UTF-8"):
        command._keys([other, file])


def test_a_comment_is_no_key(tmp_path: Path, cache: ModelCache) -> None:
    """
    Nor is the line that it stands in.
    """
    file = tmp_path / "keys"
    file.write_text("# staff\nsecret\n", encoding="utf-8")
    app = create_app(options_of(keys=tuple(command._keys([file]))), cache)
    with TestClient(app) as client:
        for key, status in (("secret", 200), ("# staff", 401), ("#", 401), ("", 401)):
            headers = {"authorization": f"Bearer {key}"}
            assert client.get("/v1/models", headers=headers).status_code == status


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("https://app.example/", "https://app.example"),
        ("https://app.example/page", "https://app.example"),
        ("https://App.Example", "https://app.example"),
        ("HTTPS://app.example", "https://app.example"),
        ("https://app.example:443", "https://app.example"),
        ("http://app.example:80/", "http://app.example"),
        ("http://app.example:443/x?y#z", "http://app.example:443"),
        ("https://me:pass@app.example", "https://app.example"),
        ("app.example", "https://app.example"),
        ("app.example:8443/", "https://app.example:8443"),
        ("localhost:3000", "http://localhost:3000"),
        ("127.0.0.1:3000", "http://127.0.0.1:3000"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
        ("http://[0:0:0:0:0:0:0:1]:8000", "http://[::1]:8000"),
        (" https://app.example ", "https://app.example"),
        ("https://app.example:0443", "https://app.example"),
        ("NULL", "null"),
        ("file:///home/me/page.html", "null"),
        ("http://localhost:3000:*", "http://localhost:*"),
        ("http://Localhost:*", "http://localhost"),
    ],
)
def test_an_origin_that_cannot_match_is_told_the_right_one(
    given: str, sent: str
) -> None:
    """
    As browsers send it; which is accepted.
    """
    with pytest.raises(ValueError, match="is no origin; browsers send") as caught:
        options_of(origins=(given,))
    assert str(caught.value).endswith(f"browsers send {sent}")
    assert options_of(origins=(sent,)).origins == (sent,)


@pytest.mark.parametrize(
    "given",
    [
        "",
        "https://",
        "https://*.app.example",
        "https://app.example:port",
        "https://app.example:70000",
        "https://[::1",
        "https://a b.example",
        "**",
        "https://app.example, https://other.example",
    ],
)
def test_what_is_no_origin_at_all_is_refused(given: str) -> None:
    """
    With what there is to say instead.
    """
    with pytest.raises(
        ValueError, match=r"name each site as in https://app\.example, "
    ):
        options_of(origins=(given,))


@pytest.mark.parametrize(
    "given",
    [
        "https://app.example",
        "http://localhost:3000",
        "http://[::1]:8000",
        "http://192.168.0.7",
        "chrome-extension://abcdefghijklmnop",
        "tauri://localhost",
        "https://xn--bcher-kva.example:8443",
        "app://obsidian.md",
        "file://",
        "http://localhost:*",
        "http://[::1]:*",
        "https://app.example:*",
    ],
)
def test_what_browsers_send_is_an_origin(given: str) -> None:
    """
    Of sites, extensions and applications.
    """
    assert options_of(origins=(given,)).origins == (given,)


def test_programs_go_by_their_names() -> None:
    """
    For all origins that their windows have.
    """
    origins = options_of(origins=("obsidian", "tauri", "electron")).origins
    for each in (
        *("app://obsidian.md", "capacitor://localhost", "tauri://localhost"),
        *("http://tauri.localhost", "file://"),
    ):
        assert each in origins
        assert option_for(each).startswith("--allow-origin ")
        assert "://" not in option_for(each)
    assert options_of(origins=("tauri", "tauri://localhost")).origins == (
        options_of(origins=("tauri",)).origins
    )
    # Pages without an origin are anybody's.
    assert "null" not in origins


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("https://speech.example", "speech.example"),
        ("speech.example:8000", "speech.example"),
        ("http://speech.example:8000/v1", "speech.example"),
        ("[::1]:8000", "::1"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("speech.example/v1", "speech.example"),
    ],
)
def test_a_host_that_cannot_match_is_told_the_right_one(given: str, sent: str) -> None:
    """
    As clients send it, without a port; which is accepted.
    """
    with pytest.raises(ValueError, match="is no host name that a client sends") as no:
        options_of(hosts=(given,))
    assert f"name it as in {sent}, " in str(no.value)
    assert options_of(hosts=(sent,)).hosts == (sent,)


@pytest.mark.parametrize("given", ["*", "", "*.example", "a b", "http://", "::zz"])
def test_what_is_no_host_at_all_is_refused(given: str) -> None:
    """
    With what there is to say instead.
    """
    with pytest.raises(ValueError, match=r"name each as in speech\.example"):
        options_of(hosts=(given,))


def test_hosts_have_names_for_containers_and_any_case() -> None:
    """
    Docker's and Podman's.
    """
    hosts = options_of(hosts=("docker", "Speech.Example", "[::1]", "127.0.0.1")).hosts
    assert {"host.docker.internal", "host.containers.internal"} < set(hosts)
    assert {"speech.example", "::1", "127.0.0.1"} < set(hosts)


def test_a_refusal_tells_the_option_that_would_let_it_in(cache: ModelCache) -> None:
    """
    By the short name where there is one.
    """
    with TestClient(create_app(options_of(hosts=("testserver",)), cache)) as client:
        for headers, option in (
            ({"origin": "app://obsidian.md"}, "--allow-origin obsidian"),
            ({"origin": "tauri://localhost"}, "--allow-origin tauri"),
            (
                {"origin": "http://localhost:3000"},
                "--allow-origin http://localhost:3000",
            ),
            ({"sec-fetch-site": "cross-site"}, "--allow-origin"),
            ({"host": "host.docker.internal:8000"}, "--allow-host docker"),
            ({"host": "speech.example"}, "--allow-host speech.example"),
        ):
            answer = client.post("/api/models/m/load", headers=headers)
            assert answer.status_code == 403
            assert answer.json()["error"]["message"].endswith(option), headers


def test_a_site_may_have_any_port(cache: ModelCache) -> None:
    """
    And no other name that begins or ends like it.
    """
    app = create_app(options_of(origins=("http://localhost:*", "obsidian")), cache)
    with TestClient(app) as client:
        for origin, may in (
            ("http://localhost:3000", True),
            ("http://localhost", True),
            ("app://obsidian.md", True),
            ("https://localhost:3000", False),
            ("http://localhost:3000.evil.example", False),
            ("http://localhost.evil.example", False),
            ("http://localhost:", False),
            ("http://localhost:123456", False),
            ("app://obsidianxmd", False),
        ):
            page = {"origin": origin, "sec-fetch-site": "cross-site"}
            answer = client.post("/api/models/m/load", headers=page)
            assert (answer.status_code == 200) is may, origin
            reads = answer.headers.get("access-control-allow-origin")
            assert (reads == origin) is may, origin
        assert "X-Request-ID" in answer.headers["access-control-expose-headers"]


ORIGINS = ("https://app.example", "https://evil.example", "null")


@pytest.mark.parametrize(
    ("allowed", "may"),
    [
        ((), set()),
        (("https://app.example",), {"https://app.example"}),
        (("null",), {"null"}),
        (("*",), set(ORIGINS)),
        (("*", "null"), set(ORIGINS)),
    ],
)
def test_pages_without_an_origin_and_pages_of_any(
    cache: ModelCache, allowed: tuple[str, ...], may: set[str]
) -> None:
    """
    They may ask, and read the answer; so says the browser's question before, too.
    """
    app = create_app(options_of(origins=allowed, keys=("secret",)), cache)
    with TestClient(app) as client:
        for origin in ORIGINS:
            page = {"origin": origin, "sec-fetch-site": "cross-site"}
            before = client.options(
                URL,
                headers={
                    **page,
                    "access-control-request-method": "POST",
                    "access-control-request-headers": "authorization",
                },
            )
            key = {"authorization": "Bearer secret"}
            answer = client.post("/api/models/m/load", headers={**page, **key})
            reads = answer.headers.get("access-control-allow-origin")
            is_allowed = origin in may
            assert (answer.status_code == 200) is is_allowed
            assert (reads in (origin, "*")) is is_allowed
            may_ask = before.headers.get("access-control-allow-headers", "")
            if is_allowed:
                assert before.status_code == 200
                assert "authorization" in may_ask
            else:
                assert before.headers.get("access-control-allow-origin") is None
            # Without the key it takes more than a page.
            answer = client.post("/api/models/m/load", headers=page)
            assert answer.status_code == (401 if is_allowed else 403)
