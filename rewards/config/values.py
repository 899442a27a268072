"""What clients align, and the file as a whole."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rewards.config.judge import JudgeConfig
from rewards.config.models import SequenceClassifierConfig
from rewards.config.outside import PythonConfig, RemoteConfig
from rewards.config.section import Name, Section
from rewards.config.text import LexicalConfig, SamplerLogprobConfig, VaderConfig
from rewards.config.verifiable import VerifiableConfig

ScorerConfig = Annotated[
    SequenceClassifierConfig
    | LexicalConfig
    | SamplerLogprobConfig
    | RemoteConfig
    | PythonConfig
    | VaderConfig
    | JudgeConfig
    | VerifiableConfig,
    Field(discriminator="kind"),
]


class ValueConfig(Section):
    """What a client may align."""

    source: str | None = Field(
        None,
        alias="from",
        description="The scorer that measures it; `scorer.output` of one that has several outputs.",
    )
    mix: dict[str, float] | None = Field(
        None,
        min_length=1,
        description="Instead of `from`: several of those, with the weights of their sum.",
    )
    watch: str | None = Field(
        None,
        description="A held-out scorer (or scorer.output) of the same value. It is reported and "
        "never optimised: when it falls while the value rises, the reward is being gamed.",
    )
    description: str = Field("", description="What a higher number means; shown to clients.")
    unit: str = Field("score", description="Unit of the numbers; shown to clients.")

    @model_validator(mode="after")
    def _is_measured(self) -> ValueConfig:
        if (self.source is None) == (self.mix is None):
            raise ValueError("say what measures it: either from or mix, and not both")
        for source, weight in (self.mix or {}).items():
            if not math.isfinite(weight) or weight == 0:
                raise ValueError(f"the weight of {source} is {weight}; it must be finite, not 0")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Its sources, as ``scorer`` or ``scorer.output``, with their weights."""
        return {self.source: 1.0} if self.source is not None else dict(self.mix or {})


class RewardsConfig(Section):
    """A rewards file."""

    version: Literal[1]
    scorers: dict[Name, ScorerConfig] = Field(min_length=1)
    values: dict[Name, ValueConfig] = Field(min_length=1)
