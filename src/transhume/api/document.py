"""docs/API.md, made from the OpenAPI document of the daemon: `python -m transhume.api.document FILE`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from transhume import __version__
from transhume.api.farm_routes import farm_router
from transhume.farm.controller import Controller
from transhume.farm.feed import Kind
from transhume.farm.host_link import HostLink
from transhume.host.config import HostConfig
from transhume.model.errors import ERRORS_BY_CODE, HostLost, PreflightFailed, TranshumeError
from transhume.model.host import Host
from transhume.store.memory import MemoryStore

_HEAD = """# The API

Made from the daemon's OpenAPI document by `make docs`; do not edit.

Every daemon answers these requests on `api.sock` in its state folder, which root alone may use, and over TLS
to hosts of its farm. A member passes them on to the controller. The number in each path is the version of the
API: what is there stays while it is the same, and fields and kinds may be added. The document itself is at
`/openapi.json` of the controller's daemon. From Python: [howto/python.md](howto/python.md).
"""

_ERRORS = """## Errors

An error is a problem document (RFC 9457, `application/problem+json`). `code` is stable and for programs,
`detail` is a sentence for people; `preflight-failed` also has all its `reasons`.

    {"type": "about:blank", "title": "not found", "status": 404, "code": "not-found", "detail": "..."}

The code `refused` comes with status 400, or with 405, 411 or 413 when nobody looked at the request: its
method is not known, its body has no length, or is too large.
"""


def openapi() -> dict[str, Any]:
    """The OpenAPI document of everything under /v1. Needs no farm."""
    app = FastAPI(title="Transhume", version=__version__)
    app.include_router(farm_router(_idle_controller()))
    return app.openapi()


def markdown(document: dict[str, Any]) -> str:
    """The whole of docs/API.md."""
    schemas: dict[str, Any] = document["components"]["schemas"]
    parts = [_HEAD, _requests(document["paths"]), _ERRORS + _codes(), _kinds(), "## Records"]
    parts += [_record(name, schema) for name, schema in sorted(schemas.items())]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _idle_controller() -> Controller:
    """Routes name its verbs and none is called."""

    def nowhere(host: Host) -> HostLink:
        raise HostLost(f"this controller is made for its document and does not reach host {host.name}")

    config = HostConfig(name="document", state_dir=Path("/nonexistent"), address="192.0.2.1")
    return Controller(MemoryStore(), nowhere, config)


def _requests(paths: dict[str, Any]) -> str:
    blocks = ["## Requests"]
    for path, methods in sorted(paths.items()):
        for method, operation in sorted(methods.items()):
            blocks.append(_request(path, method.upper(), operation))
    return "\n\n".join(blocks)


def _request(path: str, method: str, operation: dict[str, Any]) -> str:
    lines = [f"### {method} {path}", ""]
    if operation.get("description"):
        lines += [_one_line(operation["description"]), ""]
    for parameter in operation.get("parameters", []):
        default = parameter["schema"].get("default")
        told = (
            f", default {default}"
            if default is not None
            else ""
            if parameter.get("required")
            else ", optional"
        )
        lines.append(f"- {parameter['in']} `{parameter['name']}`: {_type(parameter['schema'])}{told}")
    body = operation.get("requestBody")
    if body is not None:
        lines.append(f"- body: {_content(body['content'])}")
    for status, answer in sorted(operation["responses"].items()):
        if status.startswith("2"):
            content = _content(answer["content"]) if "content" in answer else "nothing"
            lines.append(f"- answer {status}: {content}")
    return "\n".join(lines)


def _content(content: dict[str, Any]) -> str:
    kind, body = next(iter(sorted(content.items(), key=lambda each: not each[1].get("schema"))))
    if not body.get("schema"):
        return f"`{kind}`"
    return _type(body["schema"])


def _record(name: str, schema: dict[str, Any]) -> str:
    lines = [f"### {name}", ""]
    if schema.get("description"):
        lines += [_one_line(schema["description"]), ""]
    if "enum" in schema:
        lines.append("One of " + ", ".join(f"`{value}`" for value in schema["enum"]) + ".")
        return "\n".join(lines)
    demanded = set(schema.get("required", []))
    lines += ["| field | what it is | |", "|---|---|---|"]
    for field, value in schema.get("properties", {}).items():
        lines.append(f"| `{field}` | {_type(value)} | {'needed' if field in demanded else ''} |")
    return "\n".join(lines)


def _type(schema: dict[str, Any]) -> str:
    """A type in words, with its limits."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(_type(each) for each in schema["anyOf"])
    kind = schema.get("type", "anything")
    if kind == "array":
        items = schema.get("items") or {}
        inner = "list of " + _type(items) if items else "list"
        return inner + _limits(schema)
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return "object of " + (
            _type(schema["additionalProperties"]) if schema["additionalProperties"] else "anything"
        )
    return str(kind) + _limits(schema)


_LIMITS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "multipleOf": "a multiple of {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "maxItems": "at most {} of them",
}


def _limits(schema: dict[str, Any]) -> str:
    # An inner list of a fixed length says so twice; its own words are enough.
    told = [words.format(schema[name]) for name, words in _LIMITS.items() if name in schema]
    return f" ({', '.join(told)})" if told else ""


def _codes() -> str:
    kinds: dict[str, type[TranshumeError]] = {**ERRORS_BY_CODE, PreflightFailed.code: PreflightFailed}
    rows = [
        f"| `{code}` | {kind.status} | {_first_sentence(kind.__doc__ or '')} |"
        for code, kind in sorted(kinds.items())
    ]
    return "\n| code | status | what it means |\n|---|---|---|\n" + "\n".join(rows)


def _kinds() -> str:
    kinds = ", ".join(f"`{kind.value}`" for kind in Kind)
    return f"## Kinds of events\n\n{kinds}. More may be added."


def _first_sentence(text: str) -> str:
    line = _one_line(text.split("\n\n", 1)[0])
    return line.replace("`", "").replace("|", "\\|")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def main() -> None:
    parser = argparse.ArgumentParser(prog="transhume.api.document", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.parse_args().file.write_text(markdown(openapi()))


if __name__ == "__main__":
    main()
