"""Requests to an OpenAI-compatible server: connections, time limits, retries, errors translated.

httpx rather than the official client: a choice must be had from a stream as soon as it is finished,
a cancelled request must close its connection, and a retry may ask only for what is missing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from email.utils import parsedate_to_datetime
from time import time
from typing import Any, TypeVar

import httpx
from pydantic import SecretStr

from server.backends.base import (
    BackendError,
    BackendUnavailableError,
    ContextLengthError,
    PromptError,
    UpstreamBusyError,
    UpstreamError,
    UpstreamTimeoutError,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds before the first retry; doubled for each further one, up to the longest.
_FIRST_DELAY_S = 0.5
_LONGEST_DELAY_S = 8.0
# An upstream that wants a longer pause gets none from us: our own client is told to come back.
_LONGEST_RETRY_AFTER_S = 30.0
_TOO_LONG = re.compile(r"context.?(length|size|window)|prompt is too long", re.IGNORECASE)


class TransientError(Exception):
    """What failed may succeed when tried again.

    Attributes
    ----------
    error : BackendError
        What to raise when it is not.
    retry_after_s : float
        Pause the upstream asks for; 0 when it says nothing.
    trouble : str or None
        Why nobody can be served, should it last.
    """

    def __init__(
        self, error: BackendError, *, retry_after_s: float = 0.0, trouble: str | None = None
    ) -> None:
        super().__init__(str(error))
        self.error = error
        self.retry_after_s = retry_after_s
        self.trouble = trouble


class Upstream:
    """One OpenAI-compatible server.

    Parameters
    ----------
    base_url : str
        Up to and with the version, such as ``http://127.0.0.1:8000/v1``. Redirects are not
        followed, so that the key goes to this address only.
    api_key : SecretStr, optional
    headers : mapping of str to str
        Sent with every request.
    max_connections : int
        Requests in flight at most; others wait, and their time limit does not run meanwhile.
    timeout_s : float
        From a free connection to the last byte of the answer.
    connect_timeout_s : float
    max_retries : int
        Further attempts after one that may succeed next time. A timeout is not retried: the
        upstream would get the same work twice.

    Attributes
    ----------
    trouble : str or None
        Why nobody can be served at present, as the last request showed.
    troubled : asyncio.Event
        Set while there is trouble.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: SecretStr | None,
        headers: Mapping[str, str],
        max_connections: int,
        timeout_s: float,
        connect_timeout_s: float,
        max_retries: int,
    ) -> None:
        sent = dict(headers)
        if api_key is not None:
            sent["Authorization"] = f"Bearer {api_key.get_secret_value()}"
        self.base_url = base_url
        self.trouble: str | None = None
        self.troubled = asyncio.Event()
        self._timeout_s = timeout_s
        self._max_retries = max_retries
        # Counted here, not by the client: its pool loses places when waiting requests are cancelled
        # (encode/httpcore issue 1093).
        self._free = asyncio.Semaphore(max_connections)
        self._client = httpx.AsyncClient(
            base_url=base_url,
            headers=sent,
            timeout=httpx.Timeout(None, connect=connect_timeout_s),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=max_connections),
            follow_redirects=False,
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def models(self) -> list[dict[str, Any]]:
        """Return the model cards of ``GET /models``.

        Raises
        ------
        BackendError, TransientError
            As `chat`.
        """
        cards: list[dict[str, Any]] = []

        def take(reply: Any) -> None:
            try:
                cards.extend({**card, "id": str(card["id"])} for card in reply["data"])
            except (KeyError, TypeError) as error:
                msg = f"{self.base_url}/models is not OpenAI's list of models; check base_url"
                raise UpstreamError(msg) from error

        await self._request("GET", "models", None, take)
        return cards

    async def chat(self, body: dict[str, Any], take: Callable[[Any], None]) -> None:
        """Ask once for completions, and hand over the reply, or each chunk of it as it comes.

        Raises
        ------
        TransientError
            For what may succeed when tried again.
        PromptError, ContextLengthError
            When the upstream refuses this request, in its own words.
        UpstreamError
            When it refuses every request: key, model, address; or answers what is none.
        UpstreamTimeoutError
        """
        await self._request("POST", "chat/completions", body, take)

    async def retrying(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Return what `attempt` returns, trying again what may succeed next time.

        Raises
        ------
        BackendError
        """
        n_tried = 0
        while True:
            try:
                return await attempt()
            except TransientError as failure:
                pause_s = failure.retry_after_s
                if n_tried == self._max_retries or pause_s > _LONGEST_RETRY_AFTER_S:
                    if failure.trouble is not None:
                        self._note(failure.trouble)
                    raise failure.error from failure.__cause__
            delay_s = min(_FIRST_DELAY_S * 2**n_tried, _LONGEST_DELAY_S)
            # Jitter, so that requests refused together do not come back together.
            await asyncio.sleep(pause_s + delay_s * random.uniform(0.5, 1.0))
            n_tried += 1

    async def _request(
        self, method: str, path: str, body: dict[str, Any] | None, take: Callable[[Any], None]
    ) -> None:
        try:
            async with (
                self._free,
                asyncio.timeout(self._timeout_s),
                self._client.stream(method, path, json=body) as response,
            ):
                if response.status_code != 200:
                    raise self._failure(response, await _json_of(response))
                async for piece in _pieces(response):
                    if isinstance(piece, dict) and piece.get("error"):
                        raise self._failure(response, piece)
                    take(piece)
        except TimeoutError as error:
            msg = f"the upstream model server did not finish within {self._timeout_s:g} s"
            raise UpstreamTimeoutError(msg) from error
        except httpx.TransportError as error:
            kind = type(error).__name__
            gone = BackendUnavailableError(
                f"the upstream model server cannot be reached ({kind}); retry later"
            )
            trouble = f"{self.base_url} cannot be reached ({kind})"
            raise TransientError(gone, trouble=trouble) from error
        except (ValueError, httpx.DecodingError) as error:
            msg = f"the upstream model server's answer is not JSON ({type(error).__name__})"
            raise TransientError(UpstreamError(msg)) from error
        self._note(None)

    def _note(self, trouble: str | None) -> None:
        if trouble is not None and self.trouble is None:
            logger.warning("upstream: %s", trouble)
        if trouble is None and self.trouble is not None:
            logger.warning("upstream: %s is back", self.base_url)
        self.trouble = trouble
        if trouble is None:
            self.troubled.clear()
        else:
            self.troubled.set()

    def _failure(self, response: httpx.Response, reply: Any) -> Exception:
        """Return what a reply that is an error means.

        Its message goes to the client whose request is refused, and nowhere else: it may quote the
        prompt, or part of the key.
        """
        status, (message, code) = response.status_code, _told(reply)
        if status == 200:  # an error in a stream that had begun well
            status = int(code) if re.fullmatch(r"[45]\d\d", code) else 500
        if status in (400, 413, 422):
            if code == "context_length_exceeded" or _TOO_LONG.search(message):
                return ContextLengthError(message)
            return PromptError(f"the upstream model server refuses the request: {message}")
        if status in (401, 403):
            self._note(f"{self.base_url} refuses the API key ({status})")
            return UpstreamError(
                f"the upstream model server refuses this server's API key ({status}); its operator "
                "has to set another"
            )
        if status == 404:
            self._note(f"{self.base_url} does not know the model or the path (404)")
            return UpstreamError(
                "the upstream model server does not know the model or the path (404); the operator "
                "has to correct its address or the model's name there"
            )
        pause_s = _retry_after(response.headers.get("retry-after"))
        if status == 429 and code != "insufficient_quota":
            msg = "the upstream model server takes no more requests for now (429)"
            busy = UpstreamBusyError(msg, max(1, math.ceil(pause_s)))
            return TransientError(busy, retry_after_s=pause_s)
        if status in (502, 503):
            gone = BackendUnavailableError(
                f"the upstream model server is unavailable ({status}); retry later"
            )
            trouble = f"{self.base_url} is unavailable ({status})"
            return TransientError(gone, retry_after_s=pause_s, trouble=trouble)
        known = f" ({code})" if re.fullmatch(r"[\w.-]{1,40}", code) else ""
        told = "; redirects are not followed: set the address it leads to" * (status // 100 == 3)
        failed = UpstreamError(f"the upstream model server answered {status}{known}{told}")
        return TransientError(failed) if status == 408 or status >= 500 else failed


async def _pieces(response: httpx.Response) -> AsyncIterator[Any]:
    """Yield the JSON objects of a reply: one, or those of its server-sent events."""
    if not response.headers.get("content-type", "").startswith("text/event-stream"):
        yield json.loads(await response.aread())
        return
    # Read to its end, beyond "[DONE]": the connection can then be used again.
    async for line in _lines(response):
        if line.startswith(b"data:"):
            data = line.removeprefix(b"data:").strip()
            if data != b"[DONE]":
                yield json.loads(data)


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Yield lines; `httpx.Response.aiter_lines` also cuts at U+2028, which JSON may hold."""
    rest = b""
    async for content in response.aiter_bytes():
        *lines, rest = (rest + content).split(b"\n")
        for line in lines:
            yield line
    yield rest


async def _json_of(response: httpx.Response) -> Any:
    try:
        return json.loads(await response.aread())
    except ValueError:
        return None  # a proxy's page; the status says enough


def _told(reply: Any) -> tuple[str, str]:
    """Return message and code of an error reply, in the forms that are about."""
    error = reply.get("error", reply) if isinstance(reply, dict) else reply
    if isinstance(error, dict):
        message = error.get("message") or error.get("detail") or "no reason given"
        return str(message), str(error.get("code") or "")
    return str(error or "no reason given"), ""


def _retry_after(header: str | None) -> float:
    """Return seconds from a Retry-After header, which holds seconds or a date."""
    if not header:
        return 0.0
    try:
        if re.fullmatch(r"\d{1,9}(\.\d+)?", header):
            return float(header)
        return max(0.0, parsedate_to_datetime(header).timestamp() - time())
    except ValueError:
        return 0.0  # neither: our own pauses are long enough
