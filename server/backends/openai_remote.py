"""Any OpenAI-compatible server as the source of candidates: vLLM, SGLang, llama.cpp, a hosted API.

What it can do is found out at the start, with a handful of short requests. Which weights stand
behind the model's name cannot be: the fingerprint holds address, name and what the server tells of
the model, so that a change of weights behind the same name goes unseen. Calibrate again after one.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import logging
import math
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import httpx
import numpy as np
from pydantic import SecretStr
from typing_extensions import override

from rewards import Judgement, Message, Sample
from rewards.likeliest import question_fields
from server.backends.base import (
    Backend,
    BackendError,
    BackendUnavailableError,
    Candidate,
    ContextLengthError,
    Feature,
    Prompt,
    PromptError,
    SamplingSettings,
    Tools,
    UpstreamError,
)
from server.backends.openai_asking import answer_of, n_prompt_tokens
from server.backends.openai_fetching import Failure, Fetcher, Job
from server.backends.openai_probe import UNKNOWN_CONTEXT, Discovery, discover
from server.backends.openai_transport import TransientError, Upstream
from server.backends.openai_wire import OWN_FIELDS, conversation_fields, sampling_fields

logger = logging.getLogger(__name__)

# OpenAI's own limit.
_LARGEST_N = 128
# Seeds are kept to 31 bits, with room for one a candidate: some servers read no more.
_N_SEEDS = 2**31 - 2**11
# Seconds between checks of an upstream in trouble: the first, and the longest.
_FIRST_CHECK_S = 1.0
_LONGEST_CHECK_S = 60.0
# More than any request has: none of them will come.
_EVERY = 2**31


class OpenAIRemoteBackend(Backend):
    """Candidates from an OpenAI-compatible server, many from one request or one from each.

    Where a request ends with some of its candidates missing, even after retries, those that came
    are yielded, fewer than were asked for, as long as they are `min_share` of them.

    Parameters
    ----------
    base_url : str
        Up to and with the version, such as ``http://127.0.0.1:8000/v1``.
    model : str, optional
        The model's name there; by default the only one it has.
    model_id : str, optional
        The name clients use; by default that of `model`.
    api_key : SecretStr, optional
        Goes to `base_url` only.
    n_per_request : "auto" or int
        Candidates asked for in one request. "auto" asks for all at once where the upstream has
        ``n`` and gives different answers under one seed; otherwise requests run in parallel.
    features : collection of str, optional
        What the upstream can do; by default what servers of its kind can.
    max_context : int, optional
        Tokens of prompt and answer; by default what the upstream says.
    min_share : float
        In (0, 1].
    max_connections, timeout_s, connect_timeout_s, max_retries
        See `Upstream`.
    extra_headers : mapping of str to str, optional
    extra_body : mapping of str to JSON, optional
        Fields added to every request, such as ``{"chat_template_kwargs": {...}}``.

    Raises
    ------
    ValueError
        For an address that is none, a number out of bounds, or a field in `extra_body` that
        requests set themselves.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str | None = None,
        model_id: str | None = None,
        api_key: SecretStr | None = None,
        n_per_request: Literal["auto"] | int = "auto",
        features: Collection[Feature] | None = None,
        max_context: int | None = None,
        min_share: float = 0.5,
        max_connections: int = 256,
        timeout_s: float = 300.0,
        connect_timeout_s: float = 5.0,
        max_retries: int = 2,
        extra_headers: Mapping[str, str] | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        if not 0 < min_share <= 1:
            raise ValueError(f"min_share is {min_share}; it must be above 0 and at most 1")
        if n_per_request != "auto" and not 1 <= n_per_request <= _LARGEST_N:
            raise ValueError(f"n_per_request must be auto or from 1 to {_LARGEST_N}")
        self.model_id = model_id or model or ""
        self.fingerprint = ""
        self.max_context = 0
        self._base_url = _checked(base_url, has_key=api_key is not None)
        self._model = model
        self._n_per_request = n_per_request
        self._asked_features = None if features is None else frozenset(features)
        self._asked_context = max_context
        self._min_share = min_share
        self._extra_body = dict(extra_body or {})
        if clash := sorted(OWN_FIELDS & self._extra_body.keys()):
            raise ValueError(f"extra_body may not have {clash[0]}: requests set it themselves")
        # Made at the start: it belongs to the event loop it is used from.
        self._connect: Callable[[], Upstream] = lambda: Upstream(
            self._base_url,
            api_key=api_key,
            headers=extra_headers or {},
            max_connections=max_connections,
            timeout_s=timeout_s,
            connect_timeout_s=connect_timeout_s,
            max_retries=max_retries,
        )
        self._upstream: Upstream | None = None
        self._found: Discovery | None = None
        self._fetcher: Fetcher | None = None
        self._watching: asyncio.Task[None] | None = None
        self._jobs: set[Job] = set()

    @override
    async def start(self) -> None:
        if self._upstream is not None:
            raise BackendUnavailableError("this backend was started before; create another")
        self._upstream = self._connect()
        found = await discover(
            self._upstream,
            self._model,
            features=self._asked_features,
            n_per_request=self._n_per_request,
            extra_body=self._extra_body,
        )
        self.model_id = self.model_id or found.model
        self.features = found.features
        self.max_context = self._asked_context or found.max_context
        identity = [self._base_url, found.model, found.identity, self._extra_body]
        text = json.dumps(identity, sort_keys=True)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        size = _LARGEST_N if self._n_per_request == "auto" else self._n_per_request
        self._fetcher = Fetcher(self._upstream, size if found.has_n else 1)
        self._found = found
        self._watching = asyncio.create_task(self._watch(self._upstream), name="watch upstream")
        logger.info(
            "%s at %s: %s, features %s",
            found.model,
            self._base_url,
            "n answers a request" if found.has_n else "parallel requests",
            ", ".join(sorted(found.features)) or "none",
        )

    @override
    async def close(self) -> None:
        self._found = None
        gone = BackendUnavailableError("the server is shutting down; retry later")
        for job in self._jobs:
            job.arrivals.put_nowait(Failure(_EVERY, gone))
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait({self._watching})
        if self._upstream is not None:
            await self._upstream.close()

    @override
    async def render(self, messages: Sequence[Message], tools: Tools | None = None) -> Prompt:
        if self._found is None:
            raise BackendUnavailableError("the upstream model server is not connected; retry later")
        if tools is not None and tools.choice == "auto" and not self._found.dialect.can_hold_strict:
            for definition in tools.definitions:
                if json.loads(definition).get("function", {}).get("strict"):
                    msg = (
                        "this upstream holds calls to a function's schema only when they are "
                        "required: leave `strict` out, or set tool_choice"
                    )
                    raise PromptError(msg)
        return Prompt(tuple(messages), (), tools)

    @override
    async def generate(
        self,
        prompt: Prompt,
        n_candidates: int,
        sampling: SamplingSettings,
        seed: int,
        *,
        top_logprobs: int = 0,
        wants_logprobs: bool = True,
    ) -> AsyncIterator[Candidate]:
        if n_candidates < 1 or sampling.max_tokens < 1:
            raise ValueError("n_candidates and max_tokens must be at least 1")
        if self._fetcher is None or self._found is None:
            raise BackendUnavailableError("the upstream model server is not connected; retry later")
        job = self._job(self._found, prompt, sampling, seed, top_logprobs)
        fetching = asyncio.create_task(self._fetcher.fetch(job, n_candidates))
        self._jobs.add(job)
        try:
            n_came = n_failed = 0
            n_needed = math.ceil(self._min_share * n_candidates)
            while n_came + n_failed < n_candidates:
                item = await job.arrivals.get()
                if isinstance(item, Candidate):
                    n_came += 1
                    yield item
                    continue
                n_failed += item.n
                is_upstream = isinstance(item.error, UpstreamError | BackendUnavailableError)
                if not is_upstream or n_candidates - n_failed < n_needed:
                    raise item.error
                logger.warning(
                    "%d of %d candidates did not come: %s", n_failed, n_candidates, item.error
                )
        finally:
            # Also when the consumer closes the iterator or its task is cancelled. Closing the
            # connections is what makes the upstream stop.
            self._jobs.discard(job)
            fetching.cancel()
            await asyncio.wait({fetching})

    @override
    def check_words(self, words: Sequence[Sequence[str]]) -> None:
        if "logprobs" not in self.features:
            raise ValueError(f"{self._base_url} reports no log-probabilities, so it cannot judge")

    @override
    async def ask(
        self, sample: Sample, questions: Sequence[str], words: Sequence[Sequence[str]]
    ) -> Judgement:
        upstream, found = self._upstream, self._found
        if upstream is None or found is None:
            raise BackendUnavailableError("the upstream model server is not connected; retry later")
        shared = {
            "model": found.model,
            **sampling_fields(
                SamplingSettings(max_tokens=1), found.dialect, found.max_tokens_field
            ),
            **self._extra_body,
        }

        async def ask_one(question: str) -> tuple[list[float], int]:
            replies: list[Any] = []
            body = shared | question_fields(sample, question)
            try:
                await upstream.retrying(lambda: upstream.chat(body, replies.append))
            except (PromptError, ContextLengthError) as error:
                # Its message may quote the conversation; that of a reward's failure is logged.
                msg = f"the upstream model server refuses the question ({type(error).__name__})"
                raise ValueError(msg) from None
            reply = replies[-1] if replies else None
            return answer_of(reply, words), n_prompt_tokens(reply)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(ask_one(question)) for question in questions]
        except ExceptionGroup as failures:
            # One failure cancels the rest, so there is one to tell.
            raise failures.exceptions[0] from None
        rows, n_tokens = zip(*(task.result() for task in tasks), strict=True)
        return Judgement(np.array(rows), sum(n_tokens))

    @override
    def health(self) -> dict[str, object]:
        if self._upstream is None or self._found is None:
            return {"state": "stopped"}
        if self._upstream.trouble is not None:
            return {"state": "failing", "reason": self._upstream.trouble}
        return {"state": "ok"}

    def _job(
        self,
        found: Discovery,
        prompt: Prompt,
        sampling: SamplingSettings,
        seed: int,
        top_logprobs: int,
    ) -> Job:
        fields = {
            "model": found.model,
            **conversation_fields(prompt),
            **sampling_fields(sampling, found.dialect, found.max_tokens_field),
            **self._extra_body,
        }
        if "logprobs" in self.features:
            fields["logprobs"] = True
            if top_logprobs:
                fields["top_logprobs"] = top_logprobs
        if self.max_context != UNKNOWN_CONTEXT:
            room = self.max_context - 1
            fields[found.max_tokens_field] = min(sampling.max_tokens, room)
        # Mixed, or requests of seeds 1 and 2 would have all candidates but one in common.
        mixed = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]) % _N_SEEDS
        return Job(
            fields,
            seed=mixed if found.has_seed else None,
            # Parsers of tool calls are at their best with whole answers.
            is_streamed=prompt.tools is None,
            arrivals=asyncio.Queue(),
        )

    async def _watch(self, upstream: Upstream) -> None:
        """While the upstream is in trouble, ask it for one token now and then."""
        assert self._found is not None
        body = {
            "model": self._found.model,
            "messages": [{"role": "user", "content": "Hello"}],
            self._found.max_tokens_field: 1,
            **self._extra_body,
        }
        while True:
            await upstream.troubled.wait()
            delay_s = _FIRST_CHECK_S
            while upstream.trouble is not None:
                await asyncio.sleep(delay_s)
                # A failed check leaves the trouble as it is, and the next is later.
                with suppress(BackendError, TransientError):
                    await upstream.chat(body, lambda _: None)
                delay_s = min(delay_s * 2, _LONGEST_CHECK_S)


def _checked(base_url: str, *, has_key: bool) -> str:
    """Return the address without a slash at its end."""
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise ValueError(f"the upstream's address is none: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError("the upstream's address has to begin with http:// or https:// and a host")
    if url.userinfo or url.query or url.fragment:
        raise ValueError("an upstream's address has no password, query or fragment: see api_key")
    if has_key and url.scheme == "http" and not _is_loopback(url.host):
        logger.warning("the API key goes to %s unencrypted; https would hide it", url.host)
    return base_url.rstrip("/")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
