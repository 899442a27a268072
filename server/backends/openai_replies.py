"""Candidates from replies in the form of OpenAI's chat completions, whole or streamed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from server.backends.base import (
    Candidate,
    FinishReason,
    TokenLogprob,
    ToolCall,
    UpstreamError,
)

_FINISH: dict[str, FinishReason] = {
    "stop": "stop",
    "eos": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
}


@dataclass(slots=True)
class _Growing:
    """One choice, as far as it has come."""

    text: str = ""
    reasoning: str = ""
    entries: list[dict[str, Any]] = field(default_factory=list)
    tool_calls: tuple[ToolCall, ...] = ()
    n_pieces: int = 0
    is_finished: bool = False


class Answers:
    """Puts the pieces of one reply together: a whole one, or the chunks of a stream.

    The candidate that finishes last is delivered by `end`, for only then has the upstream told what
    all of them cost.

    Parameters
    ----------
    indices : sequence of int
        Position of each choice among the candidates of the request.
    has_logprobs : bool
        Whether they were asked for: an answer without them is then a failure.
    deliver : callable
        Gets each candidate as soon as it is finished.

    Attributes
    ----------
    failures : dict of int to UpstreamError
        Candidates that the upstream ended without an answer, by position.
    """

    def __init__(
        self, indices: Sequence[int], *, has_logprobs: bool, deliver: Callable[[Candidate], None]
    ) -> None:
        self.failures: dict[int, UpstreamError] = {}
        self._indices = indices
        self._has_logprobs = has_logprobs
        self._deliver = deliver
        self._growing = [_Growing() for _ in indices]
        self._n_finished = self._n_spent = 0
        self._last: Candidate | None = None
        self._usage: dict[str, Any] = {}

    def take(self, piece: Any) -> None:
        """Read one piece.

        Raises
        ------
        UpstreamError
            When it is not in OpenAI's form.
        """
        try:
            self._usage = piece.get("usage") or self._usage
            for choice in piece.get("choices") or ():
                # Servers that do not know `n` leave the others out; more than asked for is noise.
                if 0 <= choice["index"] < len(self._growing):
                    self._take_choice(choice["index"], choice)
        except (AttributeError, KeyError, TypeError) as error:
            msg = f"the upstream model server's answer is not in OpenAI's form ({error!r:.80})"
            raise UpstreamError(msg) from error

    def end(self) -> None:
        """Deliver the last candidate; call it when the reply has come to its end."""
        if self._last is None:
            return
        last, usage = self._last, self._usage
        n_prompt, total = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if isinstance(total, int):
            # Those before were counted by their log-probabilities; this makes the sum exact.
            last = replace(last, n_tokens=max(total - self._n_spent, len(last.tokens)))
        self._deliver(
            replace(last, n_prompt_tokens=n_prompt if isinstance(n_prompt, int) else None)
        )

    def _take_choice(self, at: int, choice: dict[str, Any]) -> None:
        growing = self._growing[at]
        if growing.is_finished:
            return
        message = choice.get("delta") or choice.get("message") or {}
        text = message.get("content") or message.get("refusal") or ""
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
        growing.text += text
        growing.reasoning += reasoning
        growing.n_pieces += bool(text or reasoning)
        growing.tool_calls += tuple(
            ToolCall(call["function"]["name"], call["function"]["arguments"])
            for call in message.get("tool_calls") or ()
        )
        growing.entries += (choice.get("logprobs") or {}).get("content") or ()
        if choice.get("finish_reason"):
            self._finish(at, choice)

    def _finish(self, at: int, choice: dict[str, Any]) -> None:
        growing, index, told = self._growing[at], self._indices[at], choice["finish_reason"]
        growing.is_finished = True
        self._n_finished += 1
        if told not in _FINISH:
            msg = f"the upstream model server ended an answer with finish_reason {told!r:.40}"
            self.failures[index] = UpstreamError(msg)
            return
        if self._has_logprobs and growing.text and not growing.entries:
            msg = (
                "the upstream model server left log-probabilities out of an answer, though it "
                "reported them when this server started"
            )
            self.failures[index] = UpstreamError(msg)
            return
        is_cut = told == "length"
        is_end_told = not is_cut and _ends_with_end_token(growing, choice)
        entries = growing.entries[:-1] if is_end_told else growing.entries
        candidate = Candidate(
            index=index,
            text=growing.text,
            tokens=tuple(_token(entry) for entry in entries),
            n_tokens=(len(entries) if growing.entries else growing.n_pieces) + (not is_cut),
            finish_reason=_FINISH[told],
            tool_calls=growing.tool_calls,
            reasoning=growing.reasoning,
        )
        if self._n_finished == len(self._indices):
            self._last = candidate
        else:
            self._n_spent += candidate.n_tokens
            self._deliver(candidate)


def _ends_with_end_token(growing: _Growing, choice: dict[str, Any]) -> bool:
    """Return whether the last log-probability is the end token's, which OpenAI leaves out."""
    if not growing.entries:
        return False
    # vLLM and SGLang say what ended the answer: a stop string, or (null or an id) a token.
    for name in ("stop_reason", "matched_stop"):
        if name in choice:
            return not isinstance(choice[name], str)
    return "".join(entry["token"] for entry in growing.entries[:-1]) == growing.text


def _token(entry: dict[str, Any]) -> TokenLogprob:
    return TokenLogprob(
        token=entry["token"],
        logprob=float(entry["logprob"]),
        top=tuple(
            (other["token"], float(other["logprob"])) for other in entry.get("top_logprobs") or ()
        ),
    )
