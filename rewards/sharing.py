"""Scorers that read one model in several ways become one scorer: one model in memory, one pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rewards.config import RewardsConfig, SequenceClassifierConfig
from rewards.config_file import split_source


def share_models(config: RewardsConfig, find_model: Callable[[str], Path | str]) -> RewardsConfig:
    """Return the same values from fewer scorers.

    Scorers that differ in ``output`` and ``outputs`` alone are merged. Health and errors then name
    them all, with a plus between: that is what runs, and what fails.

    Parameters
    ----------
    config : RewardsConfig
        Its references are checked.
    find_model : callable
        Returns the folder, or hub name, that a model's name means.
    """
    used = {
        split_source(source, config.scorers)[0]
        for value in config.values.values()
        for source in (*value.weights, *([value.watch] if value.watch is not None else []))
    }
    groups: dict[str, list[str]] = {}
    for name, scorer in config.scorers.items():
        if name in used and isinstance(scorer, SequenceClassifierConfig):
            model = find_model(scorer.model)
            where = model.resolve() if isinstance(model, Path) else model
            rest = scorer.model_dump_json(exclude={"model", "output", "outputs"})
            groups.setdefault(f"{where} {rest}", []).append(name)
    scorers = dict(config.scorers)
    places: dict[tuple[str, str], str] = {}  # (scorer, output) -> its source from now on
    for names in groups.values():
        if len(names) == 1:
            continue
        merged, outputs = "+".join(names), {}
        for name in names:
            scorer = scorers.pop(name)
            assert isinstance(scorer, SequenceClassifierConfig)  # nothing else is grouped
            for output, read in scorer.reads.items():
                outputs[f"{name}:{output}"] = read
                places[name, output] = f"{merged}.{name}:{output}"
        scorers[merged] = scorer.model_copy(update={"outputs": outputs})

    def place(source: str) -> str:
        scorer, output = split_source(source, config.scorers)
        return places.get((scorer, output or config.scorers[scorer].output_names[0]), source)

    values = {
        name: value.model_copy(
            update={
                "source": place(value.source) if value.source is not None else None,
                "mix": value.mix and {place(one): weight for one, weight in value.mix.items()},
                "watch": place(value.watch) if value.watch is not None else None,
            }
        )
        for name, value in config.values.items()
    }
    return config.model_copy(update={"scorers": scorers, "values": values})
