"""What an OpenAI-compatible server can do, found out by asking it once at the start."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from server.backends.base import (
    BackendError,
    Candidate,
    Feature,
    ModelLoadError,
    PromptError,
    UpstreamError,
)
from server.backends.openai_replies import Answers
from server.backends.openai_transport import Upstream
from server.backends.openai_wire import STREAMED, Dialect, dialect_of

logger = logging.getLogger(__name__)

# Where nobody tells how long a context is, the upstream refuses what is too long.
UNKNOWN_CONTEXT = 2**31 - 1
_CONTEXT_FIELDS = ("max_model_len", "context_length", "context_window")
# Few, but enough that four answers are not the same by chance.
_N_TOKENS = 16
_N_ANSWERS = 4
_QUESTION = [{"role": "user", "content": "Tell me something unexpected."}]


@dataclass(frozen=True, slots=True)
class Discovery:
    """What was found out.

    Attributes
    ----------
    model : str
        Its name there.
    identity : dict
        What the model's card says of the weights; JSON, the same after a restart.
    max_context : int
        In tokens.
    features : frozenset of str
    max_tokens_field : {"max_tokens", "max_completion_tokens"}
    has_seed : bool
    has_n : bool
        Whether one request can have several answers, streamed, which differ under one seed.
    """

    model: str
    identity: dict[str, Any]
    max_context: int
    dialect: Dialect
    features: frozenset[Feature]
    max_tokens_field: str
    has_seed: bool
    has_n: bool


async def discover(
    upstream: Upstream,
    model: str | None,
    *,
    features: frozenset[Feature] | None,
    n_per_request: Literal["auto"] | int,
    extra_body: Mapping[str, Any],
) -> Discovery:
    """Return what the upstream can do.

    Parameters
    ----------
    upstream : Upstream
    model : str, optional
        By default the only one there.
    features : frozenset of str, optional
        What the operator says it can do; log-probabilities are tried all the same.
    n_per_request : "auto" or int
        What the operator wants; with 1, ``n`` is not tried.
    extra_body : mapping
        Fields of every request.

    Raises
    ------
    ModelLoadError
        When it cannot be reached, refuses us, does not have the model, or lacks log-probabilities
        or ``n`` that the operator says it has.
    """
    try:
        card, listed = await _card(upstream, model)
    except BackendError as error:
        raise ModelLoadError(f"{upstream.base_url}: {error}") from error
    asking = {"model": card["id"], "messages": _QUESTION, **extra_body}
    try:
        base = await _base(upstream, asking)
        has_seed = bool(await _ask(upstream, {**base, "seed": 7}))
        with_logprobs = await _ask(upstream, {**base, "logprobs": True})
        has_logprobs = any(answer.tokens for answer in with_logprobs)
        several = []
        if n_per_request != 1:
            # All that the requests will have together: some servers stream no log-probabilities.
            full = base | ({"seed": 7} if has_seed else {}) | STREAMED | {"n": _N_ANSWERS}
            full |= {"logprobs": True} if has_logprobs else {}
            several = await _ask(upstream, full, _N_ANSWERS)
    except BackendError as error:
        hint = f"; it lists {', '.join(listed)}" if listed and card["id"] not in listed else ""
        raise ModelLoadError(f"{upstream.base_url}: {error}{hint}") from error

    dialect = dialect_of(card.get("owned_by"))
    able = dialect.features if features is None else features
    if not has_logprobs:
        if features is not None and "logprobs" in features:
            msg = (
                f"{upstream.base_url} does not report log-probabilities; leave logprobs out of the "
                "features"
            )
            raise ModelLoadError(msg)
        logger.warning("%s reports no log-probabilities", upstream.base_url)
        able -= {"logprobs"}
    has_n = (
        len(several) == _N_ANSWERS
        and len({answer.text for answer in several}) > 1
        and (not has_logprobs or any(answer.tokens for answer in several))
    )
    if not has_n and n_per_request not in (1, "auto"):
        msg = (
            f"{upstream.base_url} does not give {_N_ANSWERS} different answers to n={_N_ANSWERS}; "
            "set n_per_request to 1 or auto"
        )
        raise ModelLoadError(msg)
    if not has_seed:
        logger.warning("%s takes no seed: answers cannot be repeated", upstream.base_url)
    return Discovery(
        model=card["id"],
        identity=_identity(card),
        max_context=next((card[key] for key in _CONTEXT_FIELDS if card.get(key)), UNKNOWN_CONTEXT),
        dialect=dialect,
        features=able,
        max_tokens_field="max_tokens" if "max_tokens" in base else "max_completion_tokens",
        has_seed=has_seed,
        has_n=has_n,
    )


async def _card(upstream: Upstream, model: str | None) -> tuple[dict[str, Any], list[str]]:
    """Return the model's card, as far as there is one, and the names of all models."""
    try:
        cards = {card["id"]: card for card in await upstream.retrying(upstream.models)}
    except UpstreamError:
        if model is None:
            raise
        cards = {}  # not every server lists its models; the first question shows what is wrong
    if model is None:
        if len(cards) != 1:
            msg = f"{upstream.base_url} has {len(cards)} models; name one of {', '.join(cards)}"
            raise ModelLoadError(msg)
        model = next(iter(cards))
    return cards.get(model, {"id": model}), list(cards)


async def _base(upstream: Upstream, asking: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a question that the upstream answers.

    Raises
    ------
    PromptError
        When it answers none.
    """
    # OpenAI's newer models refuse the older name; many servers do not know the newer one.
    for name in ("max_tokens", "max_completion_tokens"):
        fields = {**asking, name: _N_TOKENS}
        try:
            await _once(upstream, fields, 1)
        except PromptError:
            if name == "max_completion_tokens":
                raise
        else:
            return fields
    raise AssertionError


async def _ask(upstream: Upstream, fields: dict[str, Any], n: int = 1) -> list[Candidate]:
    """Return the answers to a question; none when the upstream does not take its fields."""
    try:
        return await _once(upstream, fields, n)
    except PromptError:
        return []


async def _once(upstream: Upstream, fields: dict[str, Any], n: int) -> list[Candidate]:
    async def attempt() -> list[Candidate]:
        found: list[Candidate] = []
        answers = Answers(range(n), has_logprobs=False, deliver=found.append)
        await upstream.chat(fields, answers.take)
        answers.end()
        return found

    return await upstream.retrying(attempt)


def _identity(card: dict[str, Any]) -> dict[str, Any]:
    """Return what stays the same as long as the weights do; `created` is often the start's time."""
    meta = {key: value for key, value in (card.get("meta") or {}).items() if "ctx" not in key}
    return {"root": card.get("root"), "parent": card.get("parent"), "meta": meta}
