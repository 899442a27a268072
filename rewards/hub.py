"""The Hugging Face hub where it cannot be reached: models come from the local cache alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

REMEDY = (
    "give a folder that it was downloaded to elsewhere, or set HTTPS_PROXY (to go through a "
    "proxy) or HF_ENDPOINT (to use a mirror); HF_HUB_OFFLINE=1 uses what is downloaded unasked"
)

# What fails at once may be well in a moment: it is tried again for so long.
_PATIENCE_S = 3.0
_PAUSE_S = 1.0
# Of httpx, or its successor.
_NO_CONNECTION = {"ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol"}

_why: str | None = None


@contextmanager
def cache_where_no_hub(*, is_needed: bool = True) -> Iterator[None]:
    """Ask the hub once whether it is there; without it, only what was downloaded is used.

    Its client asks six times for each file that is not downloaded, and waits its whole time-out
    for each that is: half a minute to minutes, for the same answer.

    Parameters
    ----------
    is_needed : bool
        Without, nothing is asked and nothing changed.
    """
    global _why
    # Only now: it comes with transformers, which a file without models does not need.
    from huggingface_hub import constants

    if not is_needed or constants.HF_HUB_OFFLINE:
        yield
        return
    reason = _why_away(constants.ENDPOINT, constants.HF_HUB_ETAG_TIMEOUT)
    if reason is None:
        yield
        return
    _why = f"{constants.ENDPOINT} cannot be reached ({reason})"
    logger.warning("%s: only models that are downloaded already are used", _why)
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        _why = None
        constants.HF_HUB_OFFLINE = False


def offline_variables() -> dict[str, str]:
    """Return what tells a process that is started now of a hub that is away."""
    return {} if _why is None else {"HF_HUB_OFFLINE": "1"}


def why_missing(error: Exception) -> str | None:
    """Return why a model could not be read, and the remedy, where it is that there is no hub."""
    if _why is None or not isinstance(error, OSError):
        return None
    return f"{_why}, and it is not downloaded; {REMEDY}"


def _why_away(url: str, timeout_s: float) -> str | None:
    """Return why no connection to the hub can be made; None when one can, however slow it is."""
    from huggingface_hub import get_session

    begun = time.monotonic()
    while True:
        try:
            get_session().head(url, timeout=timeout_s)
        except Exception as error:  # noqa: BLE001 - of the library that its client happens to use
            names = {kind.__name__ for kind in type(error).__mro__}
            if not names & _NO_CONNECTION:
                return None  # somebody is there: its client knows how long to wait
            reason = str(error) or type(error).__name__
        else:
            return None
        if time.monotonic() - begun >= _PATIENCE_S:
            return reason
        time.sleep(_PAUSE_S)
