"""A model behind HTTP: the connection, further tries, and an end to every wait."""

from __future__ import annotations

import email.utils
import random
import re
import time
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import httpx

_MAX_REPLY_BYTES = 16 << 20
_FIRST_BACKOFF_S = 0.1
_REMEDIES = {
    401: "; set token_file to a file with a token that it accepts",
    403: "; set token_file to a file with a token that it accepts",
    404: "; correct the path of the url, or the model",
    405: "; correct the path of the url",
}


class EndpointError(Exception):
    """Why an endpoint gave nothing; never holds what was sent or what came back."""


class Endpoint:
    """Posts JSON to one address.

    Parameters
    ----------
    kind : str
        What speaks there, for messages.
    url : str
    timeout_s : float
        What the deadlines come from; told when one is missed.
    retries : int
    max_concurrent : int
        Most requests at once.
    remedies : mapping of int to str
        What to do about further statuses; told behind them.

    Attributes
    ----------
    where : str
        Kind and host.
    pool : ThreadPoolExecutor
        For the requests; there once it is open, as so many threads as may run at once.
    """

    pool: ThreadPoolExecutor

    def __init__(
        self,
        kind: str,
        url: str,
        *,
        timeout_s: float,
        retries: int,
        max_concurrent: int,
        remedies: Mapping[int, str],
    ) -> None:
        self.url = url
        self.timeout_s = timeout_s
        self.retries = retries
        self._max_concurrent = max_concurrent
        self._remedies = {**_REMEDIES, **remedies}
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port is not None else ""
        self.where = f"{kind} at {parts.hostname}{port}"

    def open(self, name: str, token_file: Path | None) -> None:
        """Make ready to post.

        Parameters
        ----------
        name : str
            Of the threads.
        token_file : Path or None
            Holds a bearer token; read now.

        Raises
        ------
        EndpointError
            When the file holds none.
        """
        headers = {"Content-Type": "application/json"}
        if token_file is not None:
            headers["Authorization"] = f"Bearer {_read_token(token_file)}"
        # No redirects: the texts would go where nobody meant them to.
        limits = httpx.Limits(max_connections=self._max_concurrent)
        self._client = httpx.Client(headers=headers, limits=limits, follow_redirects=False)
        self.pool = ThreadPoolExecutor(self._max_concurrent, name)
        weakref.finalize(self, _release, self._client, self.pool)

    def post(self, content: bytes, deadline: float) -> bytes:
        """Return the body of the first good response; on a thread of the pool.

        Raises
        ------
        EndpointError
            When there is none before the deadline, a moment of `time.monotonic`.
        """
        for attempt in range(self.retries + 1):
            try:
                status, retry_after, body = self._send(content, deadline)
            except httpx.TimeoutException:
                raise self.slow() from None
            except httpx.ConnectError as error:
                pause, problem = (
                    None,
                    f"it cannot be reached ({error}); start it, or correct the url",
                )
            except httpx.HTTPError as error:
                pause, problem = None, f"the connection broke ({type(error).__name__})"
            else:
                if status == httpx.codes.OK:
                    return body
                if 300 <= status < 400:
                    problem = f"it redirects ({status}), which is not followed; give the final url"
                    raise EndpointError(problem)
                pause, problem = (
                    retry_after,
                    f"it answered {status}{self._remedies.get(status, '')}",
                )
                if status != httpx.codes.TOO_MANY_REQUESTS and status < 500:
                    raise EndpointError(problem)
            if attempt == self.retries:
                break
            if pause is None:
                # Jitter: requests that failed together must not come back together.
                pause = _FIRST_BACKOFF_S * 2**attempt * random.uniform(0.5, 1.5)
            if time.monotonic() + pause >= deadline:
                problem += f", and another try in {pause:.3g} s would exceed timeout_s"
                break
            _pause(pause)
        raise EndpointError(f"{problem} (tries: {attempt + 1})")

    def _send(self, content: bytes, deadline: float) -> tuple[int, float | None, bytes]:
        """Return status, Retry-After in seconds if given, and the body, of one HTTP request."""
        url, left = self.url, deadline - time.monotonic()
        if left <= 0:
            raise self.slow()
        with self._client.stream("POST", url, content=content, timeout=left) as response:
            body = bytearray()
            if response.status_code == httpx.codes.OK:
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > _MAX_REPLY_BYTES:
                        raise EndpointError(f"its reply is longer than {_MAX_REPLY_BYTES} bytes")
                    if time.monotonic() > deadline:
                        raise self.slow()
            return response.status_code, _seconds(response.headers.get("Retry-After")), bytes(body)

    def slow(self) -> EndpointError:
        """Return the error of a missed deadline."""
        limit = f"{self.timeout_s:g} s"
        return EndpointError(f"no scores within {limit}; raise timeout_s, or give it more hardware")


def _read_token(path: Path) -> str:
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        problem = f"its token_file cannot be read ({type(error).__name__}: {path})"
        raise EndpointError(problem) from None
    if not re.fullmatch(r"[!-~]+", token):
        raise EndpointError(f"its token_file must hold one token and nothing else ({path})")
    return token


def _release(client: httpx.Client, pool: ThreadPoolExecutor) -> None:
    pool.shutdown(wait=False, cancel_futures=True)
    client.close()


def _pause(seconds: float) -> None:
    time.sleep(seconds)


def _seconds(retry_after: str | None) -> float | None:
    """Return the wait that a Retry-After header asks for, in seconds; None without a valid one."""
    if retry_after is None or re.fullmatch(r"\d{1,9}(\.\d+)?", retry_after):
        return None if retry_after is None else float(retry_after)
    try:
        moment = email.utils.parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(
        0.0, (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    )
