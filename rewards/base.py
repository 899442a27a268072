"""The words of this package and the interface of a scorer, documented here once.

A *scorer* computes one number for one sample. A *value* is what a client aligns; it names the
scorer that measures it. Several values may share a scorer, which then runs once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


class CalledFunction(TypedDict):
    """Name and arguments of a call; the arguments are JSON text."""

    name: str
    arguments: str


class MessageCall(TypedDict):
    """One call of an assistant's message, as OpenAI writes it."""

    id: str
    type: str
    function: CalledFunction


class Message(TypedDict):
    """One turn of a conversation.

    Attributes
    ----------
    role : str
        ``system``, ``user``, ``assistant`` or another role that a chat template knows.
    content : str
    name, reasoning_content, tool_calls, tool_call_id : optional
        As in OpenAI's messages (``reasoning_content`` as in vLLM's), for the chat template of the
        model that answers. Rewards get messages of role and content alone.
    """

    role: str
    content: str
    name: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[MessageCall]]
    tool_call_id: NotRequired[str]


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer to one conversation: what is scored.

    Attributes
    ----------
    messages : tuple of Message
        The conversation up to, and without, the answer.
    answer : str
    token_logprobs : tuple of float or None
        Log-probabilities, in nats, of the answer's tokens under the model that wrote it, before
        temperature and top-p; None when the sampler did not report them.
    """

    messages: tuple[Message, ...]
    answer: str
    token_logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Value:
    """One thing people care about, as a client sees it.

    Attributes
    ----------
    name : str
    description : str
        What a higher number means.
    unit : str
        Unit of its rewards, such as ``logit`` or ``words``.
    """

    name: str
    description: str
    unit: str


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text that a model reads for one sample; equal renderings have equal scores.

    Attributes
    ----------
    text : str
        The text that holds the answer.
    start, end : int
        Where the answer stands in ``text``, in characters: truncation takes from before the
        answer first, from the answer's end next, from behind it never.
    first : str or None
        First member of a pair, of which ``text`` is the second; None for a single text.
    """

    text: str
    start: int
    end: int
    first: str | None = None


@dataclass(frozen=True, slots=True)
class Tokens:
    """One model input, truncated and unpadded.

    Attributes
    ----------
    ids : list of int
    type_ids : list of int
        Segment of each token, 0 or 1, same length as ``ids``.
    """

    ids: list[int]
    type_ids: list[int]

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.ids)


class Scorer(ABC):
    """Computes one number per sample. Subclass one of the two kinds below.

    Parameters
    ----------
    name : str
        Name in the rewards file; errors and health are reported under it.
    values : sequence of str
        Values that it feeds, for messages.

    Attributes
    ----------
    needs_logprobs : bool
        Whether it reads what the sampler reported, so that it cannot score a text from elsewhere.
    """

    needs_logprobs = False

    def __init__(self, name: str, values: Sequence[str]) -> None:
        self.name = name
        self.values = tuple(values)

    @abstractmethod
    def identity(self) -> dict[str, object]:
        """Return everything that its numbers depend on, as JSON; called after ``load``.

        Two scorers with equal identities give equal scores, whatever folder they live in. The
        suite's fingerprint is made of these.
        """

    def load(self, device: str) -> None:  # noqa: B027 - most direct scorers have nothing to load
        """Make ready to score; called once, on the thread that owns the device.

        Parameters
        ----------
        device : str
            A torch device, such as ``cpu`` or ``cuda:0``.

        Raises
        ------
        RewardModelError
            When the model is missing, damaged, or not the one that the configuration describes.
        """


class DirectScorer(Scorer):
    """A scorer that needs no device: it counts, reads what the sampler reported, or asks elsewhere.

    Attributes
    ----------
    n_threads : int
        Threads of its own, for a scorer that waits or runs long: calls of ``score`` that may run
        at once. 0: it is quick, and shares the text thread with all others.
    """

    n_threads = 0

    @abstractmethod
    def score(self, samples: Sequence[Sample]) -> FloatArray:
        """Return one number per sample, shape (n_samples,); runs off the event loop.

        Raises
        ------
        ScoringError
            When a sample lacks what is measured. It fails this request and no other.
        """


class BatchedScorer(Scorer):
    """A scorer whose model reads token batches on the device.

    ``render`` and ``encode`` run on the text thread, ``load`` and ``forward`` on the device
    thread; the batcher decides which inputs share a batch, across requests.

    Attributes
    ----------
    max_length : int
        Longest input in tokens; set by ``load``.
    """

    max_length: int

    @abstractmethod
    def render(self, sample: Sample) -> Rendered:
        """Return the text that the model reads for this sample."""

    @abstractmethod
    def encode(self, rendered: Sequence[Rendered]) -> list[Tokens]:
        """Return one input per rendering, each of 1 to ``max_length`` tokens."""

    @abstractmethod
    def forward(self, batch: Sequence[Tokens]) -> FloatArray:
        """Return one number per input, shape (n_inputs,), whatever it is batched with.

        What is raised here fails the requests of this batch; numbers that are not finite fail the
        requests they belong to.
        """
