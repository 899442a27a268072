"""The request being answered: its id, on every log line, and what its access line will say."""

from __future__ import annotations

import logging
import re
import uuid
from contextvars import ContextVar
from dataclasses import dataclass

# No spaces: an id is one word of a log line.
_SANE = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(slots=True)
class RequestRecord:
    """What is known of one HTTP request: numbers and names of ours, never a client's text.

    Attributes
    ----------
    id : str
    model : str or None
        The served model, once an answer was made.
    palette : str or None
        ``met``, ``repaired``, ``best_effort``, or ``none`` for the base model's own answer.
    n_candidates, spent_tokens, served_tokens : int
        Sums over all that this request had answered.
    error : str or None
        Code of the error that the client was told.
    """

    id: str
    model: str | None = None
    palette: str | None = None
    n_candidates: int = 0
    spent_tokens: int = 0
    served_tokens: int = 0
    error: str | None = None


# Tasks started for a request inherit the record itself, so that they can add to it.
current_request: ContextVar[RequestRecord | None] = ContextVar("current_request", default=None)


def request_id(given: str | None) -> str:
    """Return the client's own id when it is fit for headers and logs, else a new one."""
    if given is not None and _SANE.fullmatch(given):
        return given
    return f"req_{uuid.uuid4().hex}"


class RequestIdFilter(logging.Filter):
    """Gives every log record a `request_id`: that of the request it was written for, or ``-``."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep the record."""
        if not hasattr(record, "request_id"):
            request = current_request.get()
            record.request_id = request.id if request else "-"
        return True
