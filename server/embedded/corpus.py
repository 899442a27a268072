"""The conversations that the embedded models learn from.

An answer is put together from whole sentences.  How warm, how funny, how useful and how careful
it is are drawn independently of each other and of the question, so that every combination
occurs for every prompt; a reward model can then not take a short cut through another value, and
answers to one prompt differ as much as answers to different prompts.

Everything is a pure function of a seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Literal

import yaml

from server.embedded import VALUES

Split = Literal["train", "calibration", "heldout"]
Message = dict[str, str]

# How often each level of a value is drawn: the middle more often than the ends, so that
# scores make one hill and not two spikes.
LEVELS: dict[str, dict[int, float]] = {
    "helpful": {0: 0.16, 1: 0.20, 2: 0.28, 3: 0.23, 4: 0.13},
    "harmless": {-2: 0.15, -1: 0.22, 0: 0.26, 1: 0.22, 2: 0.15},
    "humorous": {0: 0.30, 1: 0.28, 2: 0.26, 3: 0.16},
    "positive": {-2: 0.15, -1: 0.22, 0: 0.26, 1: 0.22, 2: 0.15},
}

# Prompts per topic in each split (a topic of weight 4 gets four times as many).
PER_TOPIC: dict[Split, int] = {"calibration": 24, "heldout": 14, "train": 100}

PROMPT_SEED = 20


@dataclass(frozen=True)
class Topic:
    """One subject of conversation with the sentences that belong to it alone."""

    doing: str
    thing: str
    ask: tuple[str, ...]
    tips: tuple[str, ...]
    care: tuple[str, ...]
    risk: tuple[str, ...]
    fun: tuple[str, ...]
    do: str = ""
    asks_only: bool = False
    contexts: str = "contexts"
    subjects: tuple[str, ...] = ("",)
    weight: int = 1

    def fill(self, sentence: str) -> str:
        """Put the topic's words into the slots of a sentence."""
        text = sentence.replace("{doing}", self.doing).replace("{thing}", self.thing)
        return text.replace("{do}", self.do)


@dataclass(frozen=True)
class Prompt:
    """A user message and the topic that it asks about."""

    text: str
    topic: Topic


@dataclass(frozen=True)
class Answer:
    """An assistant message, the level of each value in it, and its exact scores."""

    text: str
    levels: dict[str, int]
    scores: dict[str, float]


@cache
def topics() -> tuple[Topic, ...]:
    """Read all topics."""
    folder = Path(__file__).parent / "topics"
    entries = [
        entry
        for path in sorted(folder.glob("*.yaml"))
        for entry in yaml.safe_load(path.read_text(encoding="utf-8"))
    ]
    return tuple(_topic(entry) for entry in entries)


def _topic(entry: dict[str, Any]) -> Topic:
    fields: dict[str, Any] = {
        name: tuple(field) if isinstance(field, list) else field for name, field in entry.items()
    }
    return Topic(**fields)


@cache
def phrases() -> dict[str, Any]:
    """Read the sentences that fit every topic."""
    text = (Path(__file__).parent / "phrases.yaml").read_text(encoding="utf-8")
    read: dict[str, Any] = yaml.safe_load(text)
    return read


@cache
def split_prompts(split: Split) -> tuple[Prompt, ...]:
    """All prompts of one split, in mixed order; no text appears in two splits."""
    chosen: dict[Split, list[Prompt]] = {name: [] for name in PER_TOPIC}
    for number, topic in enumerate(topics()):
        rng = Random(PROMPT_SEED * 1000 + number)
        every = sorted(set(_questions(topic)))
        rng.shuffle(every)
        for name, count in PER_TOPIC.items():
            part, every = every[: count * topic.weight], every[count * topic.weight :]
            chosen[name] += [Prompt(text, topic) for text in part]
    Random(PROMPT_SEED).shuffle(chosen[split])
    return tuple(chosen[split])


def prompts(split: Split) -> list[list[Message]]:
    """Return the prompts of one split as chat messages."""
    return [[{"role": "user", "content": prompt.text}] for prompt in split_prompts(split)]


def _questions(topic: Topic) -> Iterator[str]:
    """Every way to ask about a topic: a question, alone or with something about the asker."""
    shared = [] if topic.asks_only else phrases()["questions"]
    for question in [*topic.ask, *shared]:
        for subject in topic.subjects:
            text = topic.fill(question).replace("{subject}", subject)
            yield text
            for context in phrases()[topic.contexts]:
                yield f"{text} {context}"
                if topic.contexts == "contexts":
                    yield f"{context} {text}"


def conversation(rng: Random, prompt: Prompt, pool: tuple[Prompt, ...]) -> list[Message]:
    """Messages that end with a user message: mostly one, some with a history or a system text.

    Parameters
    ----------
    rng
        The source of chance.
    prompt
        The question to end with.
    pool
        Prompts to take an earlier turn from: those of the same split.
    """
    messages: list[Message] = []
    if rng.random() < 0.1:
        messages.append({"role": "system", "content": rng.choice(phrases()["systems"])})
    text = prompt.text
    if rng.random() < 0.1:
        earlier = rng.choice(pool)
        messages.append({"role": "user", "content": earlier.text})
        messages.append({"role": "assistant", "content": compose(rng, earlier.topic).text})
        text = f"{rng.choice(phrases()['follow_ups'])} {text}"
    return [*messages, {"role": "user", "content": text}]


def draw_levels(rng: Random) -> dict[str, int]:
    """Draw a level of every value, each independently of the others."""
    return {
        value: rng.choices(list(LEVELS[value]), list(LEVELS[value].values()))[0] for value in VALUES
    }


def compose(rng: Random, topic: Topic, levels: dict[str, int] | None = None) -> Answer:
    """Put an answer together.

    Parameters
    ----------
    rng
        The source of chance.
    topic
        What the answer is about.
    levels
        The level of each value; drawn when not given.

    Returns
    -------
    Answer
        The score of a value is its level, plus or minus a part of a level for how strong the
        chosen wording is.
    """
    levels = levels or draw_levels(rng)
    first, last, positive = _tone(rng, levels["positive"])
    tips, helpful = _substance(rng, topic, levels["helpful"])
    jokes, humorous = _humour(rng, topic, levels["humorous"])
    cautions, harmless = _caution(rng, topic, levels["harmless"])
    body = tips
    for extra in [*jokes, *cautions]:
        body.insert(rng.randint(0, len(body)), extra)
    sentences = [topic.fill(s) for part in (first, body, last) for s in part]
    scores = {
        "helpful": helpful,
        "harmless": harmless,
        "humorous": humorous,
        "positive": positive,
    }
    return Answer(" ".join(sentences), levels, scores)


def _pick(rng: Random, ordered: list[str], extra: tuple[str, ...] = ()) -> tuple[str, float]:
    """Choose a sentence from an ordered list; how far up it stands is worth a part of a level."""
    if extra and rng.random() < 0.5:
        return rng.choice(extra), 0.0
    index = rng.randrange(len(ordered))
    return ordered[index], 0.8 * (index / (len(ordered) - 1) - 0.5)


def _tone(rng: Random, level: int) -> tuple[list[str], list[str], float]:
    """Draw how an answer opens and how it closes, and how warm that is."""
    lists = phrases()["positive"]
    if level == 0 and rng.random() < 0.5:
        return [], [], 0.0
    opens = rng.random() < 0.5
    sentence, offset = _pick(rng, lists[level]["open" if opens else "close"])
    first, last = ([sentence], []) if opens else ([], [sentence])
    score = level + offset
    if abs(level) == 2 and rng.random() < 0.3:
        weak = level // 2
        other, _ = _pick(rng, lists[weak]["close" if opens else "open"])
        (last if opens else first).append(other)
        score += 0.3 * weak
    return first, last, score


def _substance(rng: Random, topic: Topic, level: int) -> tuple[list[str], float]:
    """Draw what an answer really says, and how useful that is."""
    lists = phrases()["helpful"]
    if level < 2:
        sentence, offset = _pick(rng, lists[level])
        chosen = [sentence]
        if level == 0 and rng.random() < 0.4:
            chosen.append(rng.choice([other for other in lists[0] if other != sentence]))
        return chosen, level + offset
    tips = rng.sample(topic.tips, level - 1)
    # A longer tip tells more.
    score = level + 0.06 * sum(len(tip.split()) - 8 for tip in tips)
    for index in range(1, len(tips)):
        if rng.random() < 0.2:
            tips[index] = f"Also, {tips[index][0].lower()}{tips[index][1:]}"
    if rng.random() < 0.15:
        tips[0] = f"{rng.choice(lists['lead'])} {tips[0]}"
    return tips, score


def _humour(rng: Random, topic: Topic, level: int) -> tuple[list[str], float]:
    """Draw the jokes of an answer, and how funny they are."""
    lists = phrases()["humorous"]
    if level == 0 and rng.random() < 0.8:
        return [], 0.0
    own = (topic.fun[level - 2],) if level >= 2 else ()
    joke, offset = _pick(rng, lists[level], own)
    if level == 3 and rng.random() < 0.3:
        return [joke, rng.choice(lists[1])], level + offset + 0.3
    return [joke], level + offset


def _caution(rng: Random, topic: Topic, level: int) -> tuple[list[str], float]:
    """Draw what an answer says about safety and about others, and how careful that is."""
    if level == 0 and rng.random() < 0.7:
        return [], 0.0
    own = {-2: (topic.risk[1],), -1: (topic.risk[0],), 1: (topic.care[0],), 2: (topic.care[1],)}
    sentence, offset = _pick(rng, phrases()["harmless"][level], own.get(level, ()))
    return [sentence], level + offset


@cache
def sentences(topic: Topic) -> frozenset[str]:
    """Every sentence that an answer about a topic can hold."""
    lists = phrases()
    tones = [s for level in lists["positive"].values() for part in level.values() for s in part]
    common = [
        s
        for value in ("humorous", "helpful", "harmless")
        for part in lists[value].values()
        for s in part
    ]
    later = [f"Also, {tip[0].lower()}{tip[1:]}" for tip in topic.tips]
    own = [*topic.tips, *later, *topic.care, *topic.risk, *topic.fun]
    return frozenset(topic.fill(sentence) for sentence in [*tones, *common, *own])
