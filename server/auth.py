"""API keys: where they are read from, and the check that every request passes."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import stat
from collections.abc import Iterable

from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.settings import Settings, SettingsError, check_key

logger = logging.getLogger(__name__)

# Probes of an orchestrator carry no key, and these say nothing about models or clients.
OPEN_PATHS = frozenset({"/health", "/ready"})


class InvalidKeyError(Exception):
    """A request without a key, or with one that is not known here."""


def read_keys(settings: Settings) -> tuple[SecretStr, ...]:
    """Return the keys of the settings and of the key file; none: everybody is let in.

    Raises
    ------
    SettingsError
        For a key file that cannot be read or holds no key, and for a server that other machines
        can reach without a key, unless the operator has said that this is wanted.
    """
    keys = settings.api_keys + _keys_in_file(settings)
    if not keys and not _is_loopback(settings.host) and not settings.insecure:
        msg = (
            f"host {settings.host!r} can be reached from other machines, and no API key is set: "
            "anybody there could use the model. Set PALETTE_API_KEYS or --api-key-file; or, where "
            "something in front of this server checks who comes in, --insecure "
            "(PALETTE_INSECURE=true)"
        )
        raise SettingsError(msg)
    return keys


def _keys_in_file(settings: Settings) -> tuple[SecretStr, ...]:
    path = settings.api_key_file
    if path is None:
        return ()
    try:
        if path.stat().st_mode & stat.S_IROTH:
            logger.warning("every user of this machine can read %s: chmod 600 it", path)
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        keys = [check_key(line) for line in lines if line and not line.startswith("#")]
    except (OSError, ValueError) as error:
        # The message of a decoding error quotes bytes of the file.
        reason = error.strerror if isinstance(error, OSError) else "not one printable key a line"
        msg = f"api_key_file: {path} cannot be used: {reason}"
        raise SettingsError(msg) from None
    if not keys:
        msg = f"api_key_file: {path} holds no key; write one a line"
        raise SettingsError(msg)
    return tuple(SecretStr(key) for key in keys)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name; where it leads is not known here
        return False


class Auth:
    """ASGI middleware: without a known key nothing but the probes is to be had.

    Raises `InvalidKeyError`; paths that do not exist are no exception, so that nobody can map the
    server without a key.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[SecretStr]) -> None:
        self.app = app
        self._digests = [_digest(key.get_secret_value().encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on once its key is known."""
        if scope["type"] == "http" and self._digests and scope["path"] not in OPEN_PATHS:
            self._check(Headers(scope=scope).getlist("authorization"))
        await self.app(scope, receive, send)

    def _check(self, given: list[str]) -> None:
        if not given:
            msg = "no API key was sent: this server wants the header `Authorization: Bearer KEY`"
            raise InvalidKeyError(msg)
        # Two headers are refused: a proxy in front may have looked at the other one.
        scheme, _, key = given[0].partition(" ")
        digest = _digest(key.strip(" ").encode("latin-1"))
        is_known = False
        for known in self._digests:  # all of them, so that the time says nothing
            is_known |= hmac.compare_digest(known, digest)
        if not is_known or scheme.lower() != "bearer" or len(given) > 1:
            msg = "the API key sent is not valid here: check it, or ask the server's operator"
            raise InvalidKeyError(msg)


def _digest(key: bytes) -> bytes:
    """Return 32 bytes whatever the key's length, which a comparison would otherwise give away."""
    return hashlib.sha256(key).digest()
