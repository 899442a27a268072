"""A rewards file on trial: loads every scorer, tests it, and tells what it is and how fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from rewards.base import (
    BatchedScorer,
    DirectScorer,
    Facts,
    FloatArray,
    JudgedScorer,
    Message,
    Sample,
    Scorer,
    as_rows,
)
from rewards.columns import Column
from rewards.config import (
    ModelConfig,
    RemoteConfig,
    RewardsConfig,
    ScorerConfig,
    VllmPoolingConfig,
)
from rewards.config_file import read_config, split_source
from rewards.errors import RewardError
from rewards.hub import cache_where_no_hub
from rewards.judging import ChatModel, little_mass
from rewards.licences import licence_of
from rewards.pairs import Pair, find_problem, make_pair, samples_of, unscorable
from rewards.registry import build_scorer, columns_of, find_model, is_of_hub

# How long a scorer is timed, in seconds, one batch at least.
_TIMED_S = 2.0
_BATCH = 8
_SENTENCE = "The capital of France is Paris, known for its museums, its bridges and its bread. "


@dataclass(frozen=True, slots=True)
class ScorerReport:
    """What was found of one scorer.

    Attributes
    ----------
    name, kind : str
    values : tuple of str
        Values that it feeds or watches.
    model : str or None
        Folder, hub name or address; None for kinds without one.
    licence : str or None
        As the model's card states it; None for kinds without a model here.
    n_parameters, n_bytes : int or None
    max_length : int or None
        Longest input, tokens.
    texts_per_s, ms_per_1k_tokens : float or None
        Speed on texts of 1 to 12 sentences, in batches of 8, on this device.
    passed : tuple of str
        Tests that it passed.
    problem : str or None
        Why it cannot serve.
    warnings : tuple of str
    """

    name: str
    kind: str
    values: tuple[str, ...]
    model: str | None = None
    licence: str | None = None
    n_parameters: int | None = None
    n_bytes: int | None = None
    max_length: int | None = None
    texts_per_s: float | None = None
    ms_per_1k_tokens: float | None = None
    passed: tuple[str, ...] = ()
    problem: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ValueReport:
    """What was found of one value.

    Attributes
    ----------
    name : str
    n_pairs : int
        Better and worse answers that the file has for it.
    problem : str or None
        What is wrong with them.
    is_tested : bool
        Whether they were scored.
    """

    name: str
    n_pairs: int
    problem: str | None = None
    is_tested: bool = True


@dataclass(frozen=True, slots=True)
class Report:
    """What was found of a rewards file."""

    file: str
    device: str
    scorers: tuple[ScorerReport, ...]
    values: tuple[ValueReport, ...]

    @property
    def is_sound(self) -> bool:
        """Whether a server would start with it."""
        problems = [scorer.problem for scorer in self.scorers if scorer.values]
        return not any([*problems, *(value.problem for value in self.values)])

    def as_json(self) -> dict[str, object]:
        """Return all of it as JSON."""
        return {"sound": self.is_sound, **asdict(self)}


def check_rewards(
    path: Path,
    *,
    device: str = "auto",
    tell: Callable[[str], None] = lambda name: None,
    chat: ChatModel | None = None,
) -> Report:
    """Return what is found when each scorer of a file is loaded and tried on its own.

    Parameters
    ----------
    path : Path
    device : str
        As for `load_rewards`.
    tell : callable
        Called with the name of each scorer before it is loaded.
    chat : ChatModel, optional
        Asked by judged scorers, which are not tested without it. Its loop runs in another thread.

    Raises
    ------
    RewardConfigError
        When the file cannot be read or is wrong.
    RewardError
        When the device cannot be used.
    """
    config, _ = read_config(path)
    columns = columns_of(config)
    device = _device(config, device)
    scorers: dict[str, Scorer] = {}
    reports = []
    needs_hub = any(is_of_hub(entry, path.parent) for entry in config.scorers.values())
    try:
        with cache_where_no_hub(is_needed=needs_hub):
            for name, entry in config.scorers.items():
                tell(name)
                fed = _fed(name, config)
                report, scorer = _check_scorer(name, fed, entry, path.parent, device, chat)
                reports.append(report)
                if scorer is not None:
                    scorers[name] = scorer
        pairs = {name: list(map(make_pair, value.check)) for name, value in config.values.items()}
        values = tuple(_check_value(one, pairs[one.name], scorers, chat) for one in columns)
    finally:
        for scorer in scorers.values():
            scorer.close()
    return Report(str(path), device, tuple(reports), values)


def _fed(scorer: str, config: RewardsConfig) -> list[str]:
    """Return the values that a scorer feeds or watches."""
    sources = {
        name: (*value.weights, *([value.watch] if value.watch is not None else []))
        for name, value in config.values.items()
    }
    return [
        name
        for name, given in sources.items()
        if any(split_source(one, config.scorers)[0] == scorer for one in given)
    ]


def _device(config: RewardsConfig, device: str) -> str:
    if not any(isinstance(entry, ModelConfig) for entry in config.scorers.values()):
        return "cpu"
    from rewards.models.device import resolve_device  # imports torch

    return resolve_device(device)


def _check_scorer(
    name: str,
    fed: Sequence[str],
    entry: ScorerConfig,
    folder: Path,
    device: str,
    chat: ChatModel | None,
) -> tuple[ScorerReport, Scorer | None]:
    """Return what is found of a scorer, and the scorer when it serves."""
    model = licence = None
    if isinstance(entry, ModelConfig | VllmPoolingConfig):
        model = entry.model
        licence = licence_of(find_model(model, folder), entry.revision)
    base = ScorerReport(name, entry.kind, tuple(fed), model, licence)
    try:
        scorer = build_scorer(name, fed, entry, folder)
        if isinstance(scorer, JudgedScorer) and chat is not None:
            return _check_judged(base, scorer, chat), scorer
        if not isinstance(scorer, DirectScorer | BatchedScorer):
            told = "it asks the chat model: name that by --model to test it"
            return replace(base, warnings=(told,)), None
        try:
            scorer.load(device)
            speed, scores = _time(scorer)
        except BaseException:
            scorer.close()
            raise
    except Exception as error:  # noqa: BLE001 - whatever fails here would keep the server from starting
        told = str(error) if isinstance(error, RewardError) else f"{type(error).__name__}: {error}"
        return replace(base, problem=told), None
    facts = scorer.facts() or Facts(model=base.model or "")
    is_batched = isinstance(scorer, BatchedScorer)
    problem = None if np.isfinite(scores).all() else "it gave scores that are not finite"
    report = replace(
        base,
        model=facts.model or None,
        n_parameters=facts.n_parameters,
        n_bytes=facts.n_bytes,
        max_length=scorer.max_length if isinstance(scorer, BatchedScorer) else None,
        texts_per_s=speed[0],
        ms_per_1k_tokens=speed[1],
        passed=(*(("weights", "vocabulary", "padding") if is_batched else ()), "finite"),
        problem=problem,
        warnings=_warnings(entry, fed, scores),
    )
    return report, scorer


def _check_judged(base: ScorerReport, scorer: JudgedScorer, chat: ChatModel) -> ScorerReport:
    scorer.judge = chat.judge
    scorer.load("cpu")  # nothing of its own: the chat model is loaded
    start = time.perf_counter()
    judged = chat.ask(scorer, [_sample(row) for row in range(_BATCH)])
    spent = time.perf_counter() - start
    is_finite = all(np.isfinite(one.scores).all() for one in judged)
    mass = {name: np.mean([one.mass[name] for one in judged]).item() for name in scorer.outputs}
    told = little_mass(mass)
    return replace(
        base,
        texts_per_s=_BATCH / max(spent, 1e-9),
        passed=("words", "finite") if is_finite else ("words",),
        problem=None if is_finite else "it gave scores that are not finite",
        warnings=() if told is None else (told,),
    )


def _warnings(entry: ScorerConfig, fed: Sequence[str], scores: FloatArray) -> tuple[str, ...]:
    found = []
    if not fed:
        found.append("it feeds no value, so a server does not load it")
    if isinstance(entry, RemoteConfig):
        for column, (name, output) in zip(scores.T, entry.reads.items(), strict=True):
            is_raw = output.activation == "none" and output.expect is None
            if is_raw and output.margin is None and np.all((column >= 0) & (column <= 1)):
                found.append(
                    f"all its numbers ({name}) lie in [0, 1]: the server may put rewards through a "
                    "sigmoid or softmax, and levels are then not those of logits; have it give raw "
                    "numbers, or turn them into log-odds"
                )
    return tuple(found)


def _check_value(
    column: Column,
    pairs: Sequence[Pair],
    scorers: Mapping[str, Scorer],
    chat: ChatModel | None,
) -> ValueReport:
    if not pairs or any(name not in scorers for name in column.scorers):
        return ValueReport(column.name, len(pairs), is_tested=False)
    problem = unscorable(column, scorers)
    if problem is None:
        samples = samples_of(pairs)
        try:
            scores = {name: _score(scorers[name], samples, chat) for name in column.scorers}
            problem = find_problem(column, scorers, pairs, column.read(scores, scorers))
        except Exception as error:  # noqa: BLE001 - reported as what it is
            problem = f"its pairs cannot be scored: {type(error).__name__}: {error}"
    return ValueReport(column.name, len(pairs), problem)


def _score(scorer: Scorer, samples: Sequence[Sample], chat: ChatModel | None) -> FloatArray:
    if isinstance(scorer, JudgedScorer):
        assert chat is not None  # tested with it
        return np.stack([one.scores for one in chat.ask(scorer, samples)])
    return score_alone(scorer, samples)


def score_alone(scorer: Scorer, samples: Sequence[Sample]) -> FloatArray:
    """Return the outputs, shape (n_samples, n_outputs), each text in a batch of its own."""
    n_outputs = len(scorer.outputs)
    if isinstance(scorer, DirectScorer):
        return as_rows(scorer.score(samples), len(samples), n_outputs)
    assert isinstance(scorer, BatchedScorer)
    inputs = scorer.encode([scorer.render(sample) for sample in samples])
    rows = [as_rows(scorer.forward([tokens]), 1, n_outputs) for tokens in inputs]
    return np.concatenate(rows)


def _time(scorer: Scorer) -> tuple[tuple[float, float | None], FloatArray]:
    """Return texts per second and milliseconds per 1,000 tokens, and the scores."""
    scores: list[FloatArray] = []
    n_texts, n_tokens, spent = 0, 0, 0.0
    while not scores or (spent < _TIMED_S and n_texts < 64):
        batch = [_sample(n_texts + row) for row in range(_BATCH)]
        start = time.perf_counter()
        if isinstance(scorer, BatchedScorer):
            inputs = scorer.encode([scorer.render(sample) for sample in batch])
            given = scorer.forward(inputs)
            n_tokens += sum(len(tokens) for tokens in inputs)
        else:
            assert isinstance(scorer, DirectScorer)
            given = scorer.score(batch)
        spent += time.perf_counter() - start
        n_texts += len(batch)
        scores.append(as_rows(given, len(batch), len(scorer.outputs)))
    per_1k = 1e6 * spent / n_tokens if n_tokens else None
    return (n_texts / max(spent, 1e-9), per_1k), np.concatenate(scores)


def _sample(number: int) -> Sample:
    """Return one of many texts, each of another length and no two the same."""
    question = Message(role="user", content=f"Tell me {number + 1} things about Paris.")
    answer = f"{number + 1}. " + _SENTENCE * (1 + 5 * number % 12)
    return Sample((question,), answer, (-1.0,) * 8)
