"""Measurements of the embedded models on prompts that none of them has seen in training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from server.embedded import VALUES
from server.embedded.corpus import Prompt, compose, draw_levels, sentences, split_prompts
from server.embedded.train_rewards import encode

MEASURED = (*VALUES, "words")
SENTENCE_END = re.compile(r"(?<=[.!?]) ")


@dataclass(frozen=True)
class Sample:
    """One answer of the chat model to a held-out prompt."""

    prompt: Prompt
    text: str
    finished: bool


@dataclass(frozen=True)
class Quality:
    """What was measured.

    Attributes
    ----------
    rank_accuracy
        Share of held-out pairs that a reward model puts in the right order.
    finished
        Share of samples that the chat model ended by itself.
    clean
        Share of samples in which every sentence is, to the letter, one that an answer to this
        question may hold.
    off_topic
        Share of sampled sentences that are whole but belong to another topic.
    garbled
        Share of sampled sentences that the corpus does not hold at all.
    within
        Mean over prompts of the standard deviation of a prompt's samples.
    between
        Standard deviation over prompts of a prompt's mean, less what chance alone causes.
    correlation
        Correlation of the values over samples, each less the mean of its prompt.
    """

    rank_accuracy: dict[str, float]
    finished: float
    clean: float
    off_topic: float
    garbled: float
    quantiles: dict[str, list[float]]
    within: dict[str, float]
    between: dict[str, float]
    between_raw: dict[str, float]
    correlation: dict[str, dict[str, float]]
    examples: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """Return the measurements as plain data."""
        return asdict(self)


class RewardModel:
    """A reward model read from its folder."""

    def __init__(self, folder: Path, value: str) -> None:
        self.value = value
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    @torch.inference_mode()
    def score(self, questions: Sequence[str], answers: Sequence[str]) -> NDArray[np.float64]:
        """Score answers to questions."""
        scores = []
        for start in range(0, len(answers), 128):
            asked, told = questions[start : start + 128], answers[start : start + 128]
            batch = encode(self.tokenizer, self.value, list(asked), list(told))
            logits = self.model(**batch).logits
            scores.append(logits[:, 0].double().numpy())
        return np.concatenate(scores)


@torch.inference_mode()
def sample(folder: Path, prompts: Sequence[Prompt], count: int, seed: int) -> list[Sample]:
    """Let the chat model answer each prompt `count` times at temperature one."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(seed)
    samples = []
    size = max(1, 128 // count)
    for start in range(0, len(prompts), size):
        group = prompts[start : start + size]
        asked = tokenizer.apply_chat_template(
            [[{"role": "user", "content": prompt.text}] for prompt in group],
            tokenize=False,
            add_generation_prompt=True,
        )
        batch = tokenizer(asked, padding=True, add_special_tokens=False, return_tensors="pt")
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            num_return_sequences=count,
            do_sample=True,
            top_k=0,
            max_new_tokens=200,
        )
        answers = output[:, batch["input_ids"].shape[1] :]
        for index, answer in enumerate(answers):
            text = tokenizer.decode(answer, skip_special_tokens=True)
            finished = bool((answer == tokenizer.eos_token_id).any())
            samples.append(Sample(group[index // count], text, finished))
    return samples


def rank_accuracy(reward: RewardModel, pairs: int, seed: int) -> float:
    """Share of held-out pairs put in the right order.

    The two answers of a pair reply to one held-out prompt and differ in the level of the
    reward model's value; all other values are drawn for each answer on its own.
    """
    rng = Random(seed)
    pool = split_prompts("heldout")
    questions: list[str] = []
    lower: list[str] = []
    higher: list[str] = []
    while len(questions) < pairs:
        prompt = rng.choice(pool)
        two = [compose(rng, prompt.topic, draw_levels(rng)) for _ in range(2)]
        two.sort(key=lambda answer: answer.levels[reward.value])
        if two[0].levels[reward.value] < two[1].levels[reward.value]:
            questions.append(prompt.text)
            lower.append(two[0].text)
            higher.append(two[1].text)
    return float(np.mean(reward.score(questions, higher) > reward.score(questions, lower)))


def wording(samples: Sequence[Sample]) -> tuple[float, float, float]:
    """Shares of clean samples, of off-topic sentences and of garbled sentences."""
    everywhere = frozenset().union(*(sentences(s.prompt.topic) for s in samples))
    clean = total = strange = garbled = 0
    for item in samples:
        allowed = sentences(item.prompt.topic)
        wrong = [s for s in SENTENCE_END.split(item.text) if s not in allowed]
        clean += not wrong
        total += len(SENTENCE_END.split(item.text))
        strange += sum(s in everywhere for s in wrong)
        garbled += sum(s not in everywhere for s in wrong)
    return clean / len(samples), strange / total, garbled / total


def measure(folder: Path, prompts: int, count: int, pairs: int, seed: int) -> Quality:
    """Measure the chat model and the reward models in a folder."""
    rewards = {value: RewardModel(folder / value, value) for value in VALUES}
    pool = Random(seed).sample(split_prompts("heldout"), prompts)
    samples = sample(folder / "chat", pool, count, seed)
    asked, told = [s.prompt.text for s in samples], [s.text for s in samples]
    scores = {value: reward.score(asked, told) for value, reward in rewards.items()}
    scores["words"] = np.array([float(len(text.split())) for text in told])
    table = {name: scores[name].reshape(prompts, count) for name in MEASURED}
    within = {name: float(rows.std(axis=1, ddof=1).mean()) for name, rows in table.items()}
    raw = {name: float(rows.mean(axis=1).std(ddof=1)) for name, rows in table.items()}
    chance = {name: float(rows.var(axis=1, ddof=1).mean()) / count for name, rows in table.items()}
    centred = np.stack(
        [(rows - rows.mean(axis=1, keepdims=True)).ravel() for rows in table.values()]
    )
    matrix = np.corrcoef(centred)
    clean, off_topic, garbled = wording(samples)
    shown = range(0, len(samples), max(1, len(samples) // 40))
    return Quality(
        rank_accuracy={v: rank_accuracy(r, pairs, seed) for v, r in rewards.items()},
        finished=float(np.mean([s.finished for s in samples])),
        clean=clean,
        off_topic=off_topic,
        garbled=garbled,
        quantiles={
            name: [float(q) for q in np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])]
            for name, values in scores.items()
        },
        within=within,
        between={n: float(np.sqrt(max(0.0, raw[n] ** 2 - chance[n]))) for n in MEASURED},
        between_raw=raw,
        correlation={
            a: {b: float(matrix[i, j]) for j, b in enumerate(MEASURED)}
            for i, a in enumerate(MEASURED)
        },
        examples=[
            {
                "prompt": asked[i],
                "answer": told[i],
                "scores": {v: round(float(scores[v][i]), 2) for v in VALUES},
            }
            for i in shown
        ],
    )
