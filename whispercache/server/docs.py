"""
The page of the API, made from its schema: it needs no script and no network.
"""

from __future__ import annotations

import json
import shlex
import string
from html import escape
from typing import TYPE_CHECKING, Any

from fastapi.responses import HTMLResponse

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fastapi import FastAPI

    from .service import Service

_HEAD = string.Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>whispercache: the API</title>
<link rel="icon" href="page/icon.svg">
<link rel="stylesheet" href="page/docs.css">
</head>
<body>
<h1>The API of this server</h1>
<p>The same in JSON, for programs: <a href="openapi.json">openapi.json</a>. The base URL
of OpenAI's clients is this server's address with <code>/v1</code>.</p>
<pre>curl $key-F file=@talk.wav -F $model \\
    <var>address</var>/v1/audio/transcriptions</pre>
""")


def add_docs(app: FastAPI, service: Service) -> None:
    """
    Serves the page at ``/docs``.
    """

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page_of(app.openapi(), service))


def page_of(schema: Mapping[str, Any], service: Service) -> str:
    """
    Returns the page for an OpenAPI schema, with an example that *service* answers.
    """
    keys = service.options.keys
    key = '-H "Authorization: Bearer $KEY" ' if keys else ""
    parts = [_HEAD.substitute(key=escape(key), model=_example(service))]
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            parts += _section(f"{method.upper()} {path}", operation, schema)
    return "\n".join([*parts, "</body>", "</html>", ""])


def _example(service: Service) -> str:
    """
    Returns the field that names a model, as a shell reads it.
    """
    if not service.options.strict_names:
        return "model=whisper-1"
    # The page needs no key, but what is served is for those who have one.
    if service.options.keys:
        return "model=<var>one of /v1/models</var>"
    return escape(shlex.quote(f"model={service.offers.default.name}"))


def _section(
    title: str, operation: Mapping[str, Any], schema: Mapping[str, Any]
) -> Iterator[str]:
    yield f"<h2>{escape(title)}</h2>"
    yield f"<p>{escape(operation.get('description', operation['summary']))}</p>"
    rows = list(_rows(operation, schema))
    if rows:
        yield "<table><tr><th>field<th>in<th>value<th>meaning</tr>"
        yield from rows
        yield "</table>"


def _rows(operation: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[str]:
    for each in operation.get("parameters", ()):
        yield _row(each["name"], each["in"], each["schema"], each.get("description"))
    content = operation.get("requestBody", {}).get("content", {})
    for body in content.values():
        for name, field in _resolved(body["schema"], schema)["properties"].items():
            yield _row(name, "form", field, field.get("description"))


def _row(name: str, place: str, field: Mapping[str, Any], meaning: str | None) -> str:
    default = field.get("default")
    value = _value(field)
    if default not in (None, []):
        value += f"; {json.dumps(default)} if left out"
    cells = (name, place, value, meaning or field.get("description", ""))
    return "<tr>" + "".join(f"<td>{escape(cell)}" for cell in cells) + "</tr>"


def _value(field: Mapping[str, Any]) -> str:
    """
    Returns the values that a field may have, in words.
    """
    if "anyOf" in field:
        options = [each for each in field["anyOf"] if each.get("type") != "null"]
        return " or ".join(map(_value, options))
    if "enum" in field:
        return " or ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    if field.get("type") == "array":
        return f"list of {_value(field['items'])}"
    if field.get("format") == "binary" or "contentMediaType" in field:
        return "file"
    kind = str(field.get("type", "object"))
    return "true or false" if kind == "boolean" else kind


def _resolved(part: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """
    Returns a part of a schema, or what it refers to.
    """
    reference = part.get("$ref")
    if reference is None:
        return part
    found: Mapping[str, Any] = schema["components"]["schemas"][reference.split("/")[-1]]
    return found
