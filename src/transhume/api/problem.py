"""Errors on the wire: the classes of `transhume.model.errors` as problem details (RFC 9457), and back.

    {"type": "about:blank", "title": "conflict", "status": 409, "code": "conflict",
     "detail": "VM web is already migrating (m1f3a9c02); ...", "reasons": [...]}

`code` is what a program looks at and `detail` is the sentence for a person. `reasons` comes with
`preflight-failed` only.
"""

from __future__ import annotations

import json
from typing import Any

from transhume.model.errors import ERRORS_BY_CODE, HostLost, PreflightFailed, TranshumeError

CONTENT_TYPE = "application/problem+json"

PROBLEM: dict[str, Any] = {
    "description": "A problem; its code says which",
    "content": {
        CONTENT_TYPE: {
            "schema": {
                "type": "object",
                "required": ["type", "title", "status", "code", "detail"],
                "properties": {
                    "type": {"type": "string"},
                    "title": {"type": "string"},
                    "status": {"type": "integer"},
                    "code": {"type": "string"},
                    "detail": {"type": "string"},
                    "reasons": {"type": "array", "items": {"type": "string"}},
                },
            }
        }
    },
}
"""How the OpenAPI document tells of errors."""

_MOST_TEXT = 4000
"""What is kept of an answer that is no problem, for the message about it."""


def to_problem(error: TranshumeError, status: int | None = None) -> dict[str, Any]:
    """The body that tells of `error`. `status` overrides the class's own HTTP status."""
    problem: dict[str, Any] = {
        "type": "about:blank",
        "title": error.code.replace("-", " "),
        "status": error.status if status is None else status,
        "code": error.code,
        "detail": error.message,
    }
    if isinstance(error, PreflightFailed):
        problem["reasons"] = list(error.reasons)
    return problem


def encode_problem(error: TranshumeError, status: int | None = None) -> bytes:
    return json.dumps(to_problem(error, status)).encode()


def from_problem(status: int, body: bytes, peer: str) -> TranshumeError:
    """The error that `body` tells of. What is no problem becomes a `HostLost`: whatever answers at `peer`
    is not a daemon of this farm, or one that is starting or ending."""
    try:
        problem = json.loads(body)
        code, detail = problem["code"], problem["detail"]
        reasons = problem.get("reasons", ())
    except (ValueError, KeyError, TypeError, AttributeError):
        text = body[:_MOST_TEXT].decode(errors="replace").strip()[:200]
        return HostLost(f"{peer} answered {status} and not as a Transhume daemon does: {text!r}")
    if code == PreflightFailed.code:
        return PreflightFailed(str(detail), tuple(str(reason) for reason in reasons))
    return ERRORS_BY_CODE.get(str(code), TranshumeError)(str(detail))
