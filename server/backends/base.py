"""The interface between alignment and a source of candidates: what every backend promises.

A backend turns one conversation into N candidate answers of the base model, p0(y|x). It knows
nothing of rewards or palettes. One backend a file beside this one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rewards import Judgement, Message, Sample

FinishReason = Literal["stop", "length", "tool_calls"]
Feature = Literal[
    "top_k",
    "min_p",
    "penalties",
    "logit_bias",
    "json_schema",
    "tools",
    "logprobs",
    "raw_prompts",
]


class BackendError(Exception):
    """Root of what can go wrong while a backend renders or generates."""


class ModelLoadError(BackendError):
    """The model cannot be loaded; the message says what is missing and what to do."""


class PromptError(BackendError):
    """The conversation cannot be rendered by the model's chat template."""


class ContextLengthError(BackendError):
    """Prompt and answer together do not fit in the model's context."""


class BackendUnavailableError(BackendError):
    """The backend is not running (not started, closed, or failed); the request may be retried."""


class UpstreamError(BackendError):
    """The server behind this one failed or refuses us; the message names what to set right."""


class UpstreamTimeoutError(UpstreamError):
    """The server behind this one did not answer in time."""


class UpstreamBusyError(BackendUnavailableError):
    """The server behind this one takes no more requests for now.

    Attributes
    ----------
    retry_after_s : int
    """

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How one candidate is drawn; part of p0, so a calibration holds for one of these.

    Attributes
    ----------
    temperature : float
        0 is greedy: every candidate of a prompt is then the same text.
    top_p : float
        Nucleus mass in (0, 1]; 1 keeps every token.
    top_k : int
        Number of likeliest tokens kept; 0 keeps every token.
    max_tokens : int
        Longest answer, in tokens, the end token included.
    stop : tuple of str
        An answer ends before the first of these.
    min_p : float
        Tokens less likely than this share of the likeliest are left out; 0 keeps every token.
    presence_penalty, frequency_penalty : float
        Subtracted from the logits of tokens already in the answer: once, and once an occurrence.
    repetition_penalty : float
        Divides (multiplies) positive (negative) logits of tokens in prompt and answer; 1 is none.
    logit_bias : tuple of (int, float)
        Token id and what is added to its logit.
    json_schema : str, optional
        JSON schema that every answer conforms to; ``{"type": "object"}`` is any JSON object.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    json_schema: str | None = None


@dataclass(frozen=True, slots=True)
class Tools:
    """Functions that the model may call.

    Attributes
    ----------
    definitions : tuple of str
        OpenAI's tool objects, as JSON text. A backend that cannot hold calls to a definition with
        ``"strict": true`` refuses it in `Backend.render`.
    choice : str
        "auto", "none", "required", or the name of the function to call.
    is_parallel : bool
        Whether one answer may call several.
    """

    definitions: tuple[str, ...]
    choice: str = "auto"
    is_parallel: bool = True


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call in an answer; `arguments` is JSON text as the model wrote it."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation rendered by the model's chat template, or a text to be continued.

    Attributes
    ----------
    messages : tuple of Message
        Of a text to be continued: one user message that holds it.
    token_ids : tuple of int
        What the model reads, generation prompt included; empty where only the upstream knows.
    tools : Tools, optional
    is_raw : bool
        Whether the model reads the text as it is, without a chat template.
    """

    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]
    tools: Tools | None = None
    is_raw: bool = False


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token of an answer with its log-probability under the model, in nats; NaN if unasked.

    Log-probabilities are the model's own, before temperature, top-p and top-k (as vLLM's default),
    so that they do not depend on sampling settings.
    """

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """One finished answer.

    Attributes
    ----------
    index : int
        Position among the N candidates of the request, from 0.
    text : str
        The answer without special tokens and without the stop string.
    tokens : tuple of TokenLogprob
        Every sampled token of the answer (end token excluded), with log-probabilities.
    n_tokens : int
        Tokens sampled for it, the end token included: what was spent.
    finish_reason : {"stop", "length", "tool_calls"}
    tool_calls : tuple of ToolCall
        Calls parsed out of the answer; `text` is what is left.
    reasoning : str
        What a reasoning model thought before it answered; no part of `text`.
    n_prompt_tokens : int, optional
        Tokens of the prompt, where only the upstream can count them.
    token_ids : tuple of int
        Ids of `tokens`; empty where only the upstream knows.
    """

    index: int
    text: str
    tokens: tuple[TokenLogprob, ...] = field(repr=False)
    n_tokens: int
    finish_reason: FinishReason
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str = field(default="", repr=False)
    n_prompt_tokens: int | None = None
    token_ids: tuple[int, ...] = field(default=(), repr=False)


class Backend(ABC):
    """A source of candidates: create, `start`, use from one event loop, `close`.

    Attributes
    ----------
    model_id : str
        The name clients use for the model.
    fingerprint : str
        Identity of weights, tokenizer and chat template (hex); known after `start`. A calibration
        made with another fingerprint does not cover this backend.
    max_context : int
        Tokens that prompt and answer may have together; known after `start`.
    n_vocab : int or None
        Token ids are below this; known after `start`, None where only the upstream knows.
    features : frozenset of str
        What it can do beyond temperature, top-p, max_tokens and stop. Routes refuse a request that
        needs more, so that nothing is ever ignored.
    revision, chat_template : str or None
        Commit of a hub model, and a hash of the chat template (hex); known after `start`, None
        where they are not to be had. Both are part of `fingerprint`.
    """

    model_id: str
    fingerprint: str
    max_context: int
    n_vocab: int | None = None
    features: frozenset[Feature] = frozenset()
    revision: str | None = None
    chat_template: str | None = None

    @property
    def adapters(self) -> tuple[Backend, ...]:
        """Backends of the model with an adapter each; to be started after this one."""
        return ()

    @abstractmethod
    async def start(self) -> None:
        """Load the model.

        Raises
        ------
        ModelLoadError
            With what is missing and what to do.
        """

    @abstractmethod
    async def close(self) -> None:
        """Stop; requests in flight get `BackendUnavailableError`. Idempotent."""

    @abstractmethod
    async def render(self, messages: Sequence[Message], tools: Tools | None = None) -> Prompt:
        """Return the conversation as the model reads it.

        Raises
        ------
        PromptError
            When the chat template refuses the conversation.
        ContextLengthError
            When the prompt alone leaves no room for an answer.
        """

    async def read(self, text: str | Sequence[int]) -> Prompt:
        """Return a text, or its token ids, as a prompt to be continued without a chat template.

        Backends with the feature ``raw_prompts`` have it. Neither calls nor thinking are parsed out
        of what follows such a prompt.

        Raises
        ------
        PromptError
            When there is nothing to continue.
        ContextLengthError
            As `render`.
        """
        raise PromptError("this backend reads conversations only; use /v1/chat/completions")

    @abstractmethod
    def generate(
        self,
        prompt: Prompt,
        n_candidates: int,
        sampling: SamplingSettings,
        seed: int,
        *,
        top_logprobs: int = 0,
        wants_logprobs: bool = True,
    ) -> AsyncIterator[Candidate]:
        """Yield the candidates of one prompt, each as it finishes.

        Candidate ``i`` depends on the prompt, the sampling settings and ``(seed, i)`` alone, not
        on what else is in flight. Closing the iterator frees what the request holds.

        A backend in front of another server may yield fewer, when some failed there for good and
        enough others came; without an error, so that those can be served.

        Parameters
        ----------
        prompt : Prompt
            From `render`.
        n_candidates : int
        sampling : SamplingSettings
            ``max_tokens`` is cut to what the context leaves.
        seed : int
            In [0, 2**63).
        top_logprobs : int
            Alternatives reported for each token, at most 20.
        wants_logprobs : bool
            Without, `Candidate.tokens` may come with NaN for log-probabilities, which cost time.

        Raises
        ------
        BackendUnavailableError, UpstreamError
        """

    def check_words(self, words: Sequence[Sequence[str]]) -> None:
        """Refuse words that `ask` cannot tell apart; see `rewards.Judge`, which backends are.

        Raises
        ------
        ValueError
            Also by a backend that cannot be asked.
        """
        raise ValueError("this backend cannot be asked about answers; use another")

    async def ask(
        self, sample: Sample, questions: Sequence[str], words: Sequence[Sequence[str]]
    ) -> Judgement:
        """Return how likely the model's reply to a question begins with some words.

        See `rewards.Judge`. Questions take no place of a candidate: they never wait for candidates
        that wait for them.

        Raises
        ------
        ValueError
            For a sample that the model cannot be asked about.
        BackendUnavailableError, UpstreamError
        """
        raise BackendError("this backend cannot be asked about answers")

    @abstractmethod
    def health(self) -> dict[str, object]:
        """Return ``{"state": "ok" | "failing" | "stopped", ...}`` for the readiness probe."""
