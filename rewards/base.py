"""The words of this package and the interface of a scorer, documented here once.

A *scorer* computes one or several numbers, its *outputs*, for one sample. A *value* is what a
client aligns; it names the output that measures it, or a mix of some. Several values may share a
scorer, which then runs once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

FloatArray = NDArray[np.float64]

# The output of a scorer that has one.
SCORE = "score"


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
    reasoning : str
        What a reasoning model thought before it answered; a template reads it as ``{reasoning}``.
    prompt_ids, answer_ids : tuple of int or None
        What the chat model read and wrote, in its own tokens, without the end token: given where
        the answer is just that. It can then be judged without being read again.
    """

    messages: tuple[Message, ...]
    answer: str
    token_logprobs: tuple[float, ...] | None = None
    reasoning: str = ""
    prompt_ids: tuple[int, ...] | None = None
    answer_ids: tuple[int, ...] | None = None


# Any model of texts can read this.
TRIAL = Sample(
    (Message(role="user", content="What is the capital of France?"),), "Paris.", (-0.5, -0.1)
)


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
    marks : tuple of int
        Places of the tokens that are read, for scorers that read several.
    first : tuple of int
        Tokens of a first text that is embedded apart.
    """

    ids: list[int]
    type_ids: list[int]
    marks: tuple[int, ...] = ()
    first: tuple[int, ...] = ()

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a scorer's model.

    Attributes
    ----------
    model : str
        Folder, hub name or address.
    revision : str or None
        Of a hub model.
    n_parameters, n_bytes : int or None
        Its size; None where the model is elsewhere.
    """

    model: str
    revision: str | None = None
    n_parameters: int | None = None
    n_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the chat model says to questions about one sample.

    Attributes
    ----------
    logprobs : ndarray, shape (n_questions, n_sets of words)
        Of the first token of each reply being the first token of one of the words, in nats.
    n_tokens : int
        Of the prompts that put the questions, what the model had read already among them; 0 where
        nobody tells.
    """

    logprobs: FloatArray
    n_tokens: int


class Judge(Protocol):
    """The chat model, as far as rewards need it: it answers questions about a sample in one token.

    Attributes
    ----------
    fingerprint : str
        Identity of the model.
    """

    @property
    def fingerprint(self) -> str:
        """Return the identity of the model, known once it is loaded."""

    def check_words(self, words: Sequence[Sequence[str]]) -> None:
        """Refuse words that it cannot tell apart by their first token.

        Raises
        ------
        ValueError
            With the remedy; also for a model that cannot judge at all.
        """

    async def ask(
        self, sample: Sample, questions: Sequence[str], words: Sequence[Sequence[str]]
    ) -> Judgement:
        """Return what the model replies to questions about a sample.

        Each is put as the user's next message behind the sample. Cancelling it stops the model's
        work.

        Raises
        ------
        ValueError
            When this sample cannot be judged; whatever else is raised is the model's failure.
        """


class Scorer(ABC):
    """Computes its outputs of each sample. Subclass one of the three kinds below.

    Parameters
    ----------
    name : str
        Name in the rewards file; errors and health are reported under it.
    values : sequence of str
        Values that it feeds, for messages.

    Attributes
    ----------
    outputs : tuple of str
        Names of its numbers, in the order of the columns it gives; set by ``__init__``.
    needs_logprobs : bool
        Whether it reads what the sampler reported, so that it cannot score a text from elsewhere.
    """

    outputs: tuple[str, ...] = (SCORE,)
    needs_logprobs = False

    def __init__(self, name: str, values: Sequence[str]) -> None:
        self.name = name
        self.values = tuple(values)

    @abstractmethod
    def identity(self, output: str) -> dict[str, object]:
        """Return everything that an output depends on, as JSON; called after ``load``.

        Outputs with equal identities give equal scores, whatever folder their models live in. The
        suite's fingerprint is made of these.
        """

    def trial(self) -> Sample | None:
        """Return a sample that it scores whenever it works; None: failures are the samples' own.

        After a failure, this sample tells whether the scorer works again.
        """
        return None

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

    def close(self) -> None:  # noqa: B027 - few hold more than memory
        """Give back what is no memory: processes, connections. Called once, off the event loop."""

    def facts(self) -> Facts | None:
        """Return what is known of the model, once loaded; None without one."""
        return None

    def alternatives(self, samples: Sequence[Sample]) -> dict[str, FloatArray]:
        """Return what other settings would give for these samples: what to write -> scores.

        Only to tell a user which setting is likely meant; each of shape (n_samples,).
        """
        return {}


class DirectScorer(Scorer):
    """A scorer that needs no device: it counts, reads what the sampler reported, or asks elsewhere.

    Attributes
    ----------
    n_threads : int
        Threads of its own, for a scorer that waits or runs long: calls of ``score`` that may run
        at once. 0: it is quick, and shares the text thread with all others.
    patience_s : float
        How long, in seconds, its own limits let a call of ``score`` take; what takes longer than
        that and the suite's limit together counts as hung.
    """

    n_threads = 0
    patience_s = 0.0

    @abstractmethod
    def score(self, samples: Sequence[Sample]) -> FloatArray:
        """Return the outputs, shape (n_samples, n_outputs); runs off the event loop.

        With a single output the shape may be (n_samples,).

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
    linger_s : float
        Seconds for which a batch may wait for inputs that are to come; set by ``load`` where
        beginning a forward pass is dear.
    """

    max_length: int
    linger_s = 0.0

    @override
    def trial(self) -> Sample | None:
        return TRIAL

    @abstractmethod
    def render(self, sample: Sample) -> Rendered:
        """Return the text that the model reads for this sample."""

    @abstractmethod
    def encode(self, rendered: Sequence[Rendered]) -> list[Tokens]:
        """Return one input per rendering, each of 1 to ``max_length`` tokens."""

    @abstractmethod
    def forward(self, batch: Sequence[Tokens]) -> FloatArray:
        """Return the outputs, shape (n_inputs, n_outputs), whatever an input is batched with.

        With a single output the shape may be (n_inputs,).

        What is raised here fails the requests of this batch; numbers that are not finite fail the
        requests they belong to.
        """


@dataclass(frozen=True, slots=True)
class Judged:
    """A sample judged.

    Attributes
    ----------
    scores : ndarray, shape (n_outputs,)
    mass : dict of str to float
        Output -> probability that the reply begins with one of the words it is read by.
    n_tokens : int
        As of `Judgement`.
    """

    scores: FloatArray
    mass: dict[str, float]
    n_tokens: int


class JudgedScorer(Scorer):
    """A scorer that asks the chat model, on the event loop, one sample at a time.

    Attributes
    ----------
    judge : Judge or None
        Set before ``load``, which refuses to go on without one.
    """

    judge: Judge | None = None

    @abstractmethod
    async def ask(self, sample: Sample) -> Judged:
        """Return the outputs of a sample; equal samples get equal ones."""


def as_rows(scores: FloatArray, n_inputs: int, n_outputs: int) -> FloatArray:
    """Return what a scorer gave as shape (n_inputs, n_outputs).

    Raises
    ------
    ValueError
        When it has another shape.
    """
    if scores.shape != (n_inputs, n_outputs) and (n_outputs != 1 or scores.shape != (n_inputs,)):
        msg = f"scores of the shape {scores.shape} came back for {n_inputs} inputs"
        raise ValueError(f"{msg} and {n_outputs} outputs" if n_outputs > 1 else msg)
    return scores.reshape(n_inputs, n_outputs)
