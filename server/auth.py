"""API keys: where they are read from, and the check that every request passes."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import stat
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.settings import Settings, SettingsError, check_key

logger = logging.getLogger(__name__)

# Probes of an orchestrator carry no key, and these say nothing about models or clients.
OPEN_PATHS = frozenset({"/health", "/ready"})

# Methods that leave what is stored as it is. POST is one here: it asks for answers and figures.
# What the server learns from such requests, by its own settings, is no change of theirs.
READING_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "POST"})


class InvalidKeyError(Exception):
    """A request without a key, or with one that is not known here."""


class PermissionDeniedError(Exception):
    """A request that would change what is stored, with a key that may not."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Who is let in, and who may change what is stored.

    Attributes
    ----------
    clients : tuple of SecretStr
        Without operators' keys, these may do everything.
    operators : tuple of SecretStr
        May do everything; where there are any, nobody else may change what is stored.
    """

    clients: tuple[SecretStr, ...] = ()
    operators: tuple[SecretStr, ...] = ()

    @property
    def who_may_write(self) -> str:
        """Say who may write and delete profiles, and how that is changed."""
        remedy = "set PALETTE_OPERATOR_KEYS or PALETTE_OPERATOR_KEY_FILE to keep that to operators"
        if self.operators:
            return "only operators' keys may write and delete profiles"
        if self.clients:
            return f"every API key may write and delete profiles: {remedy}"
        return (
            f"no key is asked for: who reaches this server may write and delete profiles; {remedy}"
        )


def read_keys(settings: Settings) -> Keys:
    """Return the keys of the settings and of the key files; none: everybody is let in.

    Raises
    ------
    SettingsError
        For a key file that cannot be read or holds no key, and for a server that other machines
        can reach without a key, unless the operator has said that this is wanted.
    """
    keys = Keys(
        settings.api_keys + _keys_in_file("api_key_file", settings.api_key_file),
        settings.operator_keys + _keys_in_file("operator_key_file", settings.operator_key_file),
    )
    is_open = not (keys.clients or keys.operators)
    if is_open and not _is_loopback(settings.host) and not settings.insecure:
        msg = (
            f"host {settings.host!r} can be reached from other machines, and no API key is set: "
            "anybody there could use the model. Set PALETTE_API_KEYS or --api-key-file; or, where "
            "something in front of this server checks who comes in, --insecure "
            "(PALETTE_INSECURE=true)"
        )
        raise SettingsError(msg)
    return keys


def _keys_in_file(setting: str, path: Path | None) -> tuple[SecretStr, ...]:
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
        msg = f"{setting}: {path} cannot be used: {reason}"
        raise SettingsError(msg) from None
    if not keys:
        msg = f"{setting}: {path} holds no key; write one a line"
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

    Raises `InvalidKeyError`, and `PermissionDeniedError` where the key may not change what is
    stored. Paths that do not exist are no exception, so that nobody can map the server without a
    key; nor are methods, so that a new route cannot forget to ask.
    """

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self.app = app
        self._operators = [_digest(key.get_secret_value().encode()) for key in keys.operators]
        clients = [_digest(key.get_secret_value().encode()) for key in keys.clients]
        self._known = clients + self._operators

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on once its key is known."""
        if scope["type"] == "http" and self._known and scope["path"] not in OPEN_PATHS:
            self._check(Headers(scope=scope).getlist("authorization"), scope["method"])
        await self.app(scope, receive, send)

    def _check(self, given: list[str], method: str) -> None:
        if not given:
            msg = "no API key was sent: this server wants the header `Authorization: Bearer KEY`"
            raise InvalidKeyError(msg)
        # Two headers are refused: a proxy in front may have looked at the other one.
        scheme, _, key = given[0].partition(" ")
        digest = _digest(key.strip(" ").encode("latin-1"))
        if not _is_among(self._known, digest) or scheme.lower() != "bearer" or len(given) > 1:
            msg = "the API key sent is not valid here: check it, or ask the server's operator"
            raise InvalidKeyError(msg)
        if not self._operators or method in READING_METHODS:
            return
        if not _is_among(self._operators, digest):
            msg = (
                "this API key may not change what the server stores: send one of the operators' "
                "keys (PALETTE_OPERATOR_KEYS, PALETTE_OPERATOR_KEY_FILE), or ask the server's "
                "operator for the change"
            )
            raise PermissionDeniedError(msg)


def _is_among(digests: list[bytes], given: bytes) -> bool:
    is_among = False
    for known in digests:  # all of them, so that the time says nothing
        is_among |= hmac.compare_digest(known, given)
    return is_among


def _digest(key: bytes) -> bytes:
    """Return 32 bytes whatever the key's length, which a comparison would otherwise give away."""
    return hashlib.sha256(key).digest()
