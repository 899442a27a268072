"""The Hugging Face hub where it cannot be reached: models come from the local cache alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

logger = logging.getLogger(__name__)

_CONNECT_S = 5.0


@contextmanager
def cache_where_no_hub() -> Iterator[None]:
    """Ask the hub once whether it is there; without it, only what was downloaded is used.

    Its client would ask again and again for each file of each model: minutes, for the same answer.
    """
    # Only now: it comes with transformers, which a file without models does not need.
    from huggingface_hub import constants

    was_offline = constants.HF_HUB_OFFLINE
    try:
        if not was_offline:
            try:
                httpx.head(constants.ENDPOINT, timeout=_CONNECT_S)
            except httpx.TransportError as error:
                logger.warning(
                    "%s cannot be reached (%s): only models that are downloaded already are used",
                    constants.ENDPOINT,
                    error,
                )
                constants.HF_HUB_OFFLINE = True
        yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline
