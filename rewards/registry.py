"""From a rewards file to a suite. Importing this loads no model code; starting the suite does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rewards.base import SCORE, Scorer, Value
from rewards.columns import Column, Term
from rewards.config import (
    CausalLmConfig,
    EmbeddingConfig,
    JudgeConfig,
    LexicalConfig,
    LikelihoodConfig,
    ModelConfig,
    ProcessRewardConfig,
    PythonConfig,
    RemoteConfig,
    RewardsConfig,
    SamplerLogprobConfig,
    ScorerConfig,
    SequenceClassifierConfig,
    VaderConfig,
    VllmPoolingConfig,
)
from rewards.config_file import config_error, read_config, split_source
from rewards.pairs import make_pair
from rewards.sharing import share_models
from rewards.suite import QUEUE_TOKENS, TIMEOUT_S, RewardSuite
from rewards.transforms import LENGTH


def load_rewards(
    path: Path,
    *,
    device: str = "auto",
    max_batch_tokens: int | None = None,
    cache_entries: int = 65536,
    torch_threads: int | None = None,
    queue_tokens: int = QUEUE_TOKENS,
    timeout_s: float = TIMEOUT_S,
) -> RewardSuite:
    """Return the suite that a rewards file describes; its models are loaded by ``start``.

    Parameters
    ----------
    path : Path
        YAML file; see `rewards.config` for its fields. Relative model folders start from its own.
    device : str
        ``auto`` (the first GPU, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``.
    max_batch_tokens : int or None
        Bound on a batch, in padded tokens; None suits the device.
    cache_entries : int
        Scores remembered, about 200 bytes each; 0 turns the memory off.
    torch_threads : int or None
        Threads of one forward pass on a CPU, process-wide; None leaves torch's setting alone.
    queue_tokens : int
        Tokens, about, of inputs that may wait for the models; more are refused.
    timeout_s : float
        Longest forward pass, or call of a scorer with threads of its own; then it counts as hung.

    Raises
    ------
    RewardConfigError
        When the file cannot be read or is wrong; the message names line, field and remedy.
    """
    path = Path(path)
    config, lines = read_config(path)
    config = share_models(config, lambda model: find_model(model, path.parent))
    columns = columns_of(config)
    watches = {
        name: Column(f"{name}.watch", _terms(config, {value.watch: 1.0}))
        for name, value in config.values.items()
        if value.watch is not None
    }
    fed: dict[str, list[str]] = {}
    for column in (*columns, *watches.values()):
        for scorer in column.scorers:
            fed.setdefault(scorer, []).append(column.name)

    transforms = {
        name: value.transform
        for name, value in config.values.items()
        if value.transform is not None
    }
    scorers = dict(config.scorers)
    lengths = []
    if any(transform.length_control for transform in transforms.values()):
        # No name of a file begins with a dot.
        scorers[LENGTH] = LexicalConfig(kind="lexical", measure="words")
        fed[LENGTH] = [name for name, one in transforms.items() if one.length_control]
        lengths = [Column(LENGTH, (Term(LENGTH, SCORE),))]

    def build() -> list[Scorer]:
        # Scorers that feed nothing are not built: a model in memory that nobody reads.
        return [
            build_scorer(scorer, values, scorers[scorer], path.parent)
            for scorer, values in fed.items()
        ]

    return RewardSuite(
        values=[
            Value(name, value.description, value.unit) for name, value in config.values.items()
        ],
        columns=[*columns, *watches.values(), *lengths],
        transforms=transforms,
        watches={name: column.name for name, column in watches.items()},
        pairs={
            name: [make_pair(check) for check in value.check]
            for name, value in config.values.items()
            if value.check
        },
        build=build,
        refuse=lambda field, problem: config_error(path, lines, field, problem),
        device=device,
        max_batch_tokens=max_batch_tokens,
        cache_entries=cache_entries,
        torch_threads=torch_threads,
        queue_tokens=queue_tokens,
        timeout_s=timeout_s,
        needs_hub=any(is_of_hub(scorers[scorer], path.parent) for scorer in fed),
        needs_judge=any(
            isinstance(config, JudgeConfig) and config.url is None
            for config in (scorers[scorer] for scorer in fed)
        ),
    )


def columns_of(config: RewardsConfig) -> list[Column]:
    """Return the column of each value."""
    return [Column(name, _terms(config, value.weights)) for name, value in config.values.items()]


def _terms(config: RewardsConfig, weights: Mapping[str, float]) -> tuple[Term, ...]:
    """Return the terms of a column from its sources and their weights."""
    found = []
    for source, weight in weights.items():
        scorer, output = split_source(source, config.scorers)
        found.append(Term(scorer, output or config.scorers[scorer].output_names[0], weight))
    return tuple(found)


def build_scorer(name: str, values: Sequence[str], config: ScorerConfig, folder: Path) -> Scorer:
    """Return the scorer of a configuration, not loaded yet; imports what it needs.

    Parameters
    ----------
    name : str
    values : sequence of str
        Values that it feeds.
    config : ScorerConfig
    folder : Path
        Where relative model folders start.
    """
    if isinstance(config, LexicalConfig):
        from rewards.models.lexical import LexicalScorer

        return LexicalScorer(name, values, config)
    if isinstance(config, SamplerLogprobConfig):
        from rewards.models.likelihood import SamplerLogprobScorer

        return SamplerLogprobScorer(name, values, config)
    if isinstance(config, RemoteConfig):
        from rewards.models.remote import RemoteScorer

        return RemoteScorer(name, values, config, _token_file(config, folder))
    if isinstance(config, PythonConfig):
        from rewards.models.entry_point import EntryPointScorer

        return EntryPointScorer(name, values, config)
    if isinstance(config, VllmPoolingConfig):
        from rewards.models.vllm_pooling import VllmPoolingScorer

        return VllmPoolingScorer(name, values, config, find_model(config.model, folder))
    if isinstance(config, JudgeConfig) and config.url is not None:
        from rewards.models.judge_remote import RemoteJudge

        return RemoteJudge(name, values, config, _token_file(config, folder))
    if isinstance(config, JudgeConfig):
        from rewards.models.judge import JudgeScorer

        return JudgeScorer(name, values, config)
    if isinstance(config, VaderConfig):
        from rewards.models.sentiment import VaderScorer

        return VaderScorer(name, values)
    if isinstance(config, ModelConfig):
        return _build_model(name, values, config, find_model(config.model, folder))
    from rewards.models.verifiable import VerifiableScorer

    return VerifiableScorer(name, values, config)


def _build_model(
    name: str, values: Sequence[str], config: ModelConfig, source: Path | str
) -> Scorer:
    """Return the scorer of a model in this process."""
    if isinstance(config, CausalLmConfig):
        from rewards.models.causal_lm import CausalLm

        return CausalLm(name, values, config, source)
    if isinstance(config, LikelihoodConfig):
        from rewards.models.model_likelihood import ModelLikelihood

        return ModelLikelihood(name, values, config, source)
    if isinstance(config, EmbeddingConfig):
        from rewards.models.embedding import EmbeddingScorer

        return EmbeddingScorer(name, values, config, source)
    if isinstance(config, ProcessRewardConfig):
        from rewards.models.process_reward import ProcessReward

        return ProcessReward(name, values, config, source)
    assert isinstance(config, SequenceClassifierConfig)
    from rewards.models.sequence_classifier import SequenceClassifier

    return SequenceClassifier(name, values, config, source)


def _token_file(config: RemoteConfig | JudgeConfig, folder: Path) -> Path | None:
    return folder / Path(config.token_file).expanduser() if config.token_file else None


def is_of_hub(config: ScorerConfig, folder: Path) -> bool:
    """Whether a scorer's model comes from the hub, or its cache; as `build_scorer`."""
    if not isinstance(config, ModelConfig | VllmPoolingConfig):
        return False
    return isinstance(find_model(config.model, folder), str)


def find_model(model: str, folder: Path) -> Path | str:
    """Return the folder that a model name means, or the name itself when it is one of the hub.

    Whatever is no folder, and could be a hub name, is taken for one: ``owner/name``.
    """
    local = folder / Path(model).expanduser()
    if local.is_dir() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        return local
    return model
