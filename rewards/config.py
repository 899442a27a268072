"""The schema of a rewards file; each field's description is its documentation.

Two sections: ``scorers`` say what is computed, ``values`` what a client may align. Adding a kind
means a class here, its case in `registry.py`, and a file in ``models/``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from rewards.templates import parse

# Names are shown in clients, metric labels and command lines: letters, digits and _ - . only.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,63}$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TextInput(_Section):
    """One text."""

    view: Literal["text"]
    text: str = Field("{answer}", description="Template; must hold {answer}.")

    @field_validator("text")
    @classmethod
    def _has_answer(cls, text: str) -> str:
        if parse(text).fields.count("answer") != 1:
            raise ValueError("the text must hold {answer} once, for the answer is what is scored")
        return text


class PairInput(_Section):
    """Two texts, joined by the tokenizer's own pair encoding."""

    view: Literal["pair"]
    a: str = Field("{prompt}", description="Template of the first text; shortened first.")
    b: str = Field("{answer}", description="Template of the second text; must hold {answer}.")

    @field_validator("a", "b")
    @classmethod
    def _has_answer(cls, text: str, info: object) -> str:
        wanted = 1 if getattr(info, "field_name", "") == "b" else 0
        if parse(text).fields.count("answer") != wanted:
            raise ValueError("of a pair, b must hold {answer} once and a must not hold it")
        return text


class ChatInput(_Section):
    """The whole dialogue with the answer, in the reward model's own chat template."""

    view: Literal["chat"]
    system: Literal["keep", "drop"] = Field(
        "keep", description="drop: for models that were trained without system messages."
    )


InputConfig = Annotated[TextInput | PairInput | ChatInput, Field(discriminator="view")]


class OutputConfig(_Section):
    """How the model's logits become one number. Raw logits unless said otherwise."""

    label: str | None = Field(None, description="Read the logit of this label (config.id2label).")
    index: int | None = Field(None, ge=0, description="Read the logit at this position.")
    margin: tuple[str | int, str | int] | None = Field(
        None, description="Read the first label's (or position's) logit minus the second's."
    )
    activation: Literal["none", "sigmoid", "softmax", "log_sigmoid"] = Field(
        "none",
        description="softmax: probabilities of all labels, before reading; the others after.",
    )
    sign: Literal[1, -1] = Field(1, description="-1 when a lower number is more of the value.")

    @field_validator("margin", mode="before")
    @classmethod
    def _as_tuple(cls, margin: object) -> object:
        if isinstance(margin, list) and len(margin) != 2:
            raise ValueError("a margin takes two labels (or positions): [wanted, unwanted]")
        return tuple(margin) if isinstance(margin, list) else margin

    @model_validator(mode="after")
    def _reads_one(self) -> OutputConfig:
        chosen = [name for name in ("label", "index", "margin") if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude each other; keep one of them")
        return self


class SequenceClassifierConfig(_Section):
    """A transformers sequence classifier: most reward models, encoders and causal ones alike."""

    kind: Literal["sequence_classifier"]
    model: str = Field(min_length=1, description="Folder (relative to this file) or hub name.")
    revision: str | None = Field(None, description="Hub commit or tag; pin one in production.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    allow_pickle: bool = Field(
        False, description="Accept weights that are no safetensors; loading them can run code."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 on a GPU, float32 on a CPU."
    )
    input: InputConfig
    output: OutputConfig = OutputConfig()
    max_length: int | None = Field(
        None, ge=8, description="Longest input in tokens; default what the model takes, up to 2048."
    )


class LexicalConfig(_Section):
    """A count over the words of the answer."""

    kind: Literal["lexical"]
    measure: Literal["words", "lexical_diversity"]


class SamplerLogprobConfig(_Section):
    """Log-likelihood of the answer under the model that wrote it, as the sampler reports it."""

    kind: Literal["sampler_logprob"]
    reduce: Literal["mean", "sum"] = Field("mean", description="mean: per token. sum: per answer.")


ScorerConfig = Annotated[
    SequenceClassifierConfig | LexicalConfig | SamplerLogprobConfig, Field(discriminator="kind")
]


class ValueConfig(_Section):
    """What a client may align."""

    scorer: str = Field(alias="from", description="Name of the scorer that measures it.")
    description: str = Field("", description="What a higher number means; shown to clients.")
    unit: str = Field("score", description="Unit of the numbers; shown to clients.")


class RewardsConfig(_Section):
    """A rewards file."""

    version: Literal[1]
    scorers: dict[Name, ScorerConfig] = Field(min_length=1)
    values: dict[Name, ValueConfig] = Field(min_length=1)
