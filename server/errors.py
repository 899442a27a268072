"""One table: exception -> HTTP status and OpenAI's error envelope."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from rewards import RewardError
from server.admission import QueueFullError
from server.backends.base import (
    BackendError,
    BackendUnavailableError,
    ContextLengthError,
    PromptError,
)
from server.calibration import CalibrationMissingError
from server.promise import InfeasiblePaletteError
from solver import PaletteError, PilotError, SolverError, UnknownValueError

logger = logging.getLogger(__name__)


class ModelNotFoundError(Exception):
    """The client asked for a model that this server does not have."""


class ClientLeftError(Exception):
    """The client closed the connection; nobody is there to answer."""


class BodyTooLargeError(Exception):
    """The request's body is over the limit."""


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """What the client gets: a status, OpenAI's error object and headers."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    palette: dict[str, Any] | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """Return the JSON body; an infeasible palette's findings are in ``error.palette``."""
        error: dict[str, Any] = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        if self.palette is not None:
            error["palette"] = self.palette
        return {"error": error}


# The first class that fits counts: subclasses stand before their bases.
_TABLE: tuple[tuple[type[Exception], int, str, str | None], ...] = (
    (InfeasiblePaletteError, 422, "invalid_request_error", "palette_infeasible"),
    (CalibrationMissingError, 422, "invalid_request_error", "calibration_missing"),
    (UnknownValueError, 400, "invalid_request_error", "unknown_value"),
    (PaletteError, 400, "invalid_request_error", "invalid_palette"),
    (PilotError, 400, "invalid_request_error", "invalid_palette"),
    (ModelNotFoundError, 404, "invalid_request_error", "model_not_found"),
    (BodyTooLargeError, 413, "invalid_request_error", "body_too_large"),
    (ContextLengthError, 400, "invalid_request_error", "context_length_exceeded"),
    (PromptError, 400, "invalid_request_error", "invalid_messages"),
    (ClientLeftError, 499, "invalid_request_error", "client_left"),
    (QueueFullError, 429, "rate_limit_error", "queue_full"),
    (BackendUnavailableError, 503, "server_error", "backend_unavailable"),
    (BackendError, 500, "server_error", "generation_failed"),
    (RewardError, 500, "server_error", "scoring_failed"),
    (SolverError, 500, "server_error", "solver_failed"),
)


def reply_to(error: Exception) -> ErrorReply:
    """Return what a client is told about an exception; an unknown one is logged and hidden."""
    if isinstance(error, RequestValidationError):
        return _validation_reply(error.errors())
    if isinstance(error, HTTPException):
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
        return ErrorReply(error.status_code, str(error.detail), code=code)
    for kind, status, category, code in _TABLE:
        if isinstance(error, kind):
            if status >= 500:
                # The message of a backend or reward names models and devices, never texts.
                logger.error("%s: %s", type(error).__name__, error)
            param = getattr(error, "param", None)
            return ErrorReply(
                status,
                str(error),
                category,
                param=f"palette.{param}" if param else _params.get(kind),
                code=code,
                palette=getattr(error, "details", None),
                headers=(
                    {"Retry-After": str(error.retry_after_s)}
                    if isinstance(error, QueueFullError)
                    else {}
                ),
            )
    logger.exception("unexpected error", exc_info=error)
    return ErrorReply(500, "internal error; the server's log has it", "server_error")


_params: dict[type[Exception], str] = {
    InfeasiblePaletteError: "palette.targets",
    CalibrationMissingError: "palette.targets",
    PilotError: "palette.candidates",
    ModelNotFoundError: "model",
    ContextLengthError: "messages",
    PromptError: "messages",
}


def _validation_reply(findings: Sequence[Any]) -> ErrorReply:
    """Return pydantic's first finding in OpenAI's words; the others follow in the message."""
    first = findings[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "not JSON")
        return ErrorReply(400, f"The body is not valid JSON: {reason}", code="invalid_json")
    told = [f"{_param(finding) or 'body'}: {_sentence(finding)}" for finding in findings[:5]]
    return ErrorReply(
        400,
        "; ".join(dict.fromkeys(told)),
        param=_param(first),
        code={
            "missing": "missing_required_parameter",
            "extra_forbidden": "unknown_parameter",
        }.get(first["type"], "invalid_value"),
    )


def _param(finding: dict[str, Any]) -> str | None:
    """Return the place as OpenAI writes it: ``messages[0].content``."""
    path = ""
    for part in finding["loc"][1:]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.lstrip(".") or None


def _sentence(finding: dict[str, Any]) -> str:
    if finding["type"] == "extra_forbidden":
        return "not a parameter of this server; leave it out"
    if finding["type"] == "missing":
        return "required"
    return str(finding["msg"])


def install(app: FastAPI) -> None:
    """Make every error of the app, unknown paths included, an OpenAI error object."""

    async def handle(_: Request, error: Exception) -> JSONResponse:
        reply = reply_to(error)
        return JSONResponse(reply.body(), reply.status, headers=reply.headers)

    # Starlette looks handlers up by class; `Exception` alone would re-raise known errors too.
    for kind in (RequestValidationError, HTTPException, *(row[0] for row in _TABLE), Exception):
        app.add_exception_handler(kind, handle)
