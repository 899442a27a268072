"""One table: exception -> HTTP status and OpenAI's error envelope."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from rewards import RewardError, RewardQueueFullError, ScoringError
from server.admission import QueueFullError
from server.auth import InvalidKeyError, PermissionDeniedError
from server.backends.base import (
    BackendError,
    BackendUnavailableError,
    ContextLengthError,
    PromptError,
    UpstreamBusyError,
    UpstreamError,
    UpstreamTimeoutError,
)
from server.calibration import CalibrationMissingError
from server.draining import DrainingError, RequestTimeoutError
from server.profile_file import ProfileError
from server.profiles import (
    ProfileConflictError,
    ProfileInUseError,
    ProfileNameError,
    ProfileNotFoundError,
)
from server.promise import InfeasiblePaletteError
from server.replay import AnswerNotFoundError
from server.request_id import current_request
from server.shelf import UnknownCalibrationError
from solver import PaletteError, PilotError, SolverError, UnknownValueError

logger = logging.getLogger(__name__)


class ModelNotFoundError(Exception):
    """The client asked for a model that this server does not have."""


class ClientLeftError(Exception):
    """The client closed the connection; nobody is there to answer."""


class BodyTooLargeError(Exception):
    """The request's body is over the limit."""


class BodyTooComplexError(Exception):
    """The request's body has too many fields, or is nested too deeply."""


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
            "message": _told(self.message),
            "type": self.type,
            "param": None if self.param is None else _told(self.param),
            "code": self.code,
        }
        if self.palette is not None:
            error["palette"] = self.palette
        return {"error": error}


def _told(text: str) -> str:
    """Return the text as it can be sent, though it may repeat what the request has in it.

    Half of a surrogate pair is no UTF-8, and megabytes are no message.
    """
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return text.encode(errors="replace").decode()


# The first class that fits counts: subclasses stand before their bases.
_TABLE: tuple[tuple[type[Exception], int, str, str | None], ...] = (
    (InvalidKeyError, 401, "invalid_request_error", "invalid_api_key"),
    (PermissionDeniedError, 403, "invalid_request_error", "permission_denied"),
    (InfeasiblePaletteError, 422, "invalid_request_error", "palette_infeasible"),
    (CalibrationMissingError, 422, "invalid_request_error", "calibration_missing"),
    (UnknownCalibrationError, 400, "invalid_request_error", "unknown_calibration"),
    (UnknownValueError, 400, "invalid_request_error", "unknown_value"),
    (PaletteError, 400, "invalid_request_error", "invalid_palette"),
    (PilotError, 400, "invalid_request_error", "invalid_palette"),
    (ModelNotFoundError, 404, "invalid_request_error", "model_not_found"),
    (AnswerNotFoundError, 404, "invalid_request_error", "answer_not_found"),
    (ProfileNotFoundError, 404, "invalid_request_error", "profile_not_found"),
    (ProfileNameError, 400, "invalid_request_error", "invalid_value"),
    (ProfileConflictError, 409, "invalid_request_error", "version_conflict"),
    (ProfileInUseError, 409, "invalid_request_error", "profile_in_use"),
    (ProfileError, 500, "server_error", "profiles_failed"),
    (BodyTooLargeError, 413, "invalid_request_error", "body_too_large"),
    (BodyTooComplexError, 400, "invalid_request_error", "body_too_complex"),
    (ContextLengthError, 400, "invalid_request_error", "context_length_exceeded"),
    (PromptError, 400, "invalid_request_error", "invalid_messages"),
    (ClientLeftError, 499, "invalid_request_error", "client_left"),
    (QueueFullError, 429, "rate_limit_error", "queue_full"),
    (RewardQueueFullError, 429, "rate_limit_error", "reward_queue_full"),
    (DrainingError, 503, "server_error", "draining"),
    (RequestTimeoutError, 504, "server_error", "request_timeout"),
    (UpstreamBusyError, 429, "rate_limit_error", "upstream_busy"),
    (BackendUnavailableError, 503, "server_error", "backend_unavailable"),
    (UpstreamTimeoutError, 504, "server_error", "upstream_timeout"),
    (UpstreamError, 502, "server_error", "upstream_failed"),
    (BackendError, 500, "server_error", "generation_failed"),
    (RewardError, 500, "server_error", "scoring_failed"),
    (SolverError, 500, "server_error", "solver_failed"),
)


# Nothing an operator should look at: the access log has them.
_NO_FAULT = (DrainingError, RequestTimeoutError)

_NO_ROUTE = {
    404: ("unknown_url", "there is no such address here; /docs has those there are"),
    405: ("method_not_allowed", "this address is there, but not for this method; /docs has both"),
}

# pydantic speaks of Python's types where clients send JSON.
_SENTENCES = {
    "missing": "required",
    "extra_forbidden": "not a parameter of this server; leave it out",
    "model_attributes_type": "must be a JSON object",
    "model_type": "must be a JSON object",
    "dict_type": "must be a JSON object",
    "list_type": "must be a JSON array",
}

# A backend that failed is looked at by its supervisor, and a model takes that long to load.
_BACKEND_RETRY_S = 10

# Characters of a message; the longest of ours, of an infeasible palette, is well below.
_LONGEST = 4000

# The innermost of a traceback; those before are the framework's.
_FRAMES = 8


def reply_to(error: Exception) -> ErrorReply:
    """Return what a client is told about an exception; an unknown one is logged and hidden.

    Its code is noted on the request's record, for the access log.
    """
    reply = _reply(error)
    record = current_request.get()
    if record is not None:
        record.error = reply.code or str(reply.status)
    return reply


def _reply(error: Exception) -> ErrorReply:
    if isinstance(error, ScoringError) and isinstance(error.__cause__, BackendError):
        error = error.__cause__  # of the chat model, which a judged value asked
    if isinstance(error, RequestValidationError):
        return _validation_reply(error.errors(), error.body)
    if isinstance(error, HTTPException):
        code, told = _NO_ROUTE.get(error.status_code, (None, str(error.detail)))
        return ErrorReply(error.status_code, told, code=code, headers=dict(error.headers or {}))
    for kind, status, category, code in _TABLE:
        if isinstance(error, kind):
            if status >= 500 and not isinstance(error, _NO_FAULT):
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
                headers=_headers(error),
            )
    logger.error("unexpected error\n%s", _where(error))
    return ErrorReply(
        500, "internal error; the server's log has it", "server_error", code="internal_error"
    )


def _headers(error: Exception) -> dict[str, str]:
    if isinstance(error, InvalidKeyError):
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(error, QueueFullError | RewardQueueFullError | UpstreamBusyError):
        return {"Retry-After": str(error.retry_after_s)}
    if isinstance(error, DrainingError):
        # The next request of this connection is better sent to another server.
        return {"Retry-After": str(error.retry_after_s), "Connection": "close"}
    if isinstance(error, BackendUnavailableError):
        return {"Retry-After": str(_BACKEND_RETRY_S)}
    return {}


def _where(error: BaseException) -> str:
    """Return the traceback of an exception and its causes without their messages.

    Nobody knows what an unexpected message quotes: a prompt has no place in a log.
    """
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    told = "" if before is None else f"{_where(before)}then\n"
    frames = "".join(traceback.format_tb(error.__traceback__, limit=-_FRAMES))
    return f"{told}{frames}{type(error).__module__}.{type(error).__qualname__}\n"


_params: dict[type[Exception], str] = {
    CalibrationMissingError: "palette.targets",
    PilotError: "palette.candidates",
    ModelNotFoundError: "model",
    AnswerNotFoundError: "id",
    ProfileNameError: "name",
    ProfileConflictError: "expected_version",
    ContextLengthError: "messages",
    PromptError: "messages",
}


def _validation_reply(findings: Sequence[Any], body: Any) -> ErrorReply:
    """Return pydantic's first finding in OpenAI's words; the others follow in the message."""
    first = findings[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "not JSON")
        return ErrorReply(400, f"The body is not valid JSON: {reason}", code="invalid_json")
    told = [f"{_param(finding, body) or 'body'}: {_sentence(finding)}" for finding in findings[:5]]
    return ErrorReply(
        400,
        "; ".join(dict.fromkeys(told)),
        param=_param(first, body),
        code={
            "missing": "missing_required_parameter",
            "extra_forbidden": "unknown_parameter",
            "unsupported": "unsupported_parameter",
            "context_length_exceeded": "context_length_exceeded",
            "invalid_prompt": "invalid_prompt",
        }.get(first["type"], "invalid_value"),
    )


def _param(finding: dict[str, Any], body: Any) -> str | None:
    """Return the place as OpenAI writes it: ``messages[0].content``.

    Where a field may have several forms, pydantic names the form too: what the body has no place
    for is left out, unless it is what is missing there.
    """
    path, here = "", body
    places = finding["loc"][1:]
    for depth, part in enumerate(places, start=1):
        if isinstance(here, list):
            is_there = isinstance(part, int) and part < len(here)
        else:
            is_there = isinstance(here, dict) and part in here
        is_missing = finding["type"] == "missing" and depth == len(places)
        if is_there or is_missing or body is None:
            path += f"[{part}]" if isinstance(part, int) else f".{part}"
        if is_there:
            here = here[part]
    return path.lstrip(".") or None


def _sentence(finding: dict[str, Any]) -> str:
    if finding["type"] == "too_short":
        n_least = finding["ctx"]["min_length"]
        return f"must have at least {n_least} item{'s' if n_least > 1 else ''}"
    return _SENTENCES.get(finding["type"]) or str(finding["msg"])


def install(app: FastAPI) -> None:
    """Make what the framework refuses an OpenAI error object too.

    All other exceptions pass through to `server.access`.
    """

    async def handle(_: Request, error: Exception) -> JSONResponse:
        reply = reply_to(error)
        return JSONResponse(reply.body(), reply.status, headers=reply.headers)

    for kind in (RequestValidationError, HTTPException):
        app.add_exception_handler(kind, handle)
