"""What the chat model is asked about answers: how much, and whether it says yes or no at all."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from rewards.base import Judge, Judged, JudgedScorer, Sample

logger = logging.getLogger(__name__)

# Samples that a mean is taken over: a few odd answers do not count, and a change shows soon.
_N_MASSES = 100
# Below it, the model mostly says something else, and the odds of yes are those of a side remark.
_LEAST_MASS = 0.5


@dataclass(slots=True)
class Asked:
    """What the chat model was asked for somebody.

    Attributes
    ----------
    n_questions : int
    n_tokens : int
        Of the prompts that put them; 0 where nobody tells.
    """

    n_questions: int = 0
    n_tokens: int = 0

    def add(self, other: Asked) -> None:
        """Count more questions."""
        self.n_questions += other.n_questions
        self.n_tokens += other.n_tokens


@dataclass(slots=True)
class Judging:
    """What one scorer has asked since the start.

    Attributes
    ----------
    scorer : str
    asked : Asked
    """

    scorer: str
    asked: Asked = field(default_factory=Asked)
    _masses: deque[dict[str, float]] = field(default_factory=lambda: deque(maxlen=_N_MASSES))
    _n_samples: int = 0
    _is_warned: bool = False

    def add(self, judged: Judged) -> None:
        """Count one sample; the first time that its like get little mass, the log says so."""
        self.asked.add(asked_for(judged))
        self._masses.append(judged.mass)
        self._n_samples += 1
        if self._is_warned or self._n_samples % _N_MASSES:
            return
        told = little_mass(self.mass())
        if told is not None:
            self._is_warned = True
            logger.warning("scorer %r: %s", self.scorer, told)

    def mass(self) -> dict[str, float]:
        """Return the mean `Judged.mass` of the last samples, by output; nothing without any."""
        outputs = self._masses[-1] if self._masses else {}
        return {name: fmean(mass[name] for mass in self._masses) for name in outputs}


@dataclass(frozen=True, slots=True)
class ChatModel:
    """The chat model of a running event loop, to be asked from another thread.

    Attributes
    ----------
    judge : Judge
    loop : asyncio.AbstractEventLoop
    """

    judge: Judge
    loop: asyncio.AbstractEventLoop

    def ask(self, scorer: JudgedScorer, samples: Sequence[Sample]) -> list[Judged]:
        """Return what a scorer gives for samples; waits for it."""

        async def ask_all() -> list[Judged]:
            return await asyncio.gather(*(scorer.ask(sample) for sample in samples))

        return asyncio.run_coroutine_threadsafe(ask_all(), self.loop).result()


def asked_for(judged: Judged) -> Asked:
    """Return what was asked for one sample."""
    return Asked(len(judged.mass), judged.n_tokens)


def little_mass(mass: Mapping[str, float]) -> str | None:
    """Return what to say when too little of the model's replies is yes or no; else None.

    Parameters
    ----------
    mass : mapping of str to float
        Output -> mean of `Judged.mass` over samples.
    """
    few = [f"{name} {100 * share:.1f} %" for name, share in mass.items() if share < _LEAST_MASS]
    if not few:
        return None
    return (
        "the chat model seldom replies with one of the yes_words or no_words (probability: "
        f"{', '.join(few)}), so their log-odds mean little; give the words that it does reply "
        "with, another template or question, or use another chat model"
    )
