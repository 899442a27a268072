"""Kinds whose model runs in this process."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, StringConstraints, field_validator, model_validator

from rewards.config.inputs import ChatInput, InputConfig
from rewards.config.outputs import ReadsOutputs
from rewards.config.section import Scored, Section
from rewards.templates import parse


class ModelConfig(Scored):
    """A transformers model."""

    model: str = Field(min_length=1, description="Folder (relative to this file) or hub name.")
    revision: str | None = Field(None, description="Hub commit or tag; pin one in production.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    allow_pickle: bool = Field(
        False, description="Accept weights that are no safetensors; loading them can run code."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="auto: bfloat16 on a GPU, float32 on a CPU. bfloat16 is faster on CPUs that "
        "have it (AVX512_BF16, AMX) too, and moves scores by about a percent.",
    )
    max_length: int | None = Field(
        None, ge=8, description="Longest input in tokens; default what the model takes, up to 2048."
    )


class SequenceClassifierConfig(ModelConfig, ReadsOutputs):
    """A transformers sequence classifier: most reward models, encoders and causal ones alike."""

    kind: Literal["sequence_classifier"]
    input: InputConfig

    @model_validator(mode="after")
    def _has_attributes(self) -> SequenceClassifierConfig:
        if not self.trust_remote_code and any(one.attribute for one in self.reads.values()):
            raise ValueError(
                "an attribute is what the model's own code gives; read that, then set "
                "trust_remote_code: true"
            )
        return self


def _is_quoted(token: object) -> object:
    if isinstance(token, bool):
        raise ValueError("YAML reads Yes, No, on and off as true or false; put tokens in quotes")
    return token


# The text of one token, or its number in the vocabulary.
Token = Annotated[
    Annotated[str, StringConstraints(min_length=1)] | Annotated[int, Field(ge=0)],
    BeforeValidator(_is_quoted),
]


class TokenOutputConfig(Section):
    """Which token's logit is the number."""

    token: Token | list[Token] | None = Field(
        None,
        description="Read the logit of this token; of several spellings (Yes, yes), the "
        "log-sum-exp.",
    )
    margin: tuple[Token | list[Token], Token | list[Token]] | None = Field(
        None,
        description="Read the first token's logit minus the second's: their log-odds. Each may be "
        "a list of spellings.",
    )
    sign: Literal[1, -1] = Field(1, description="-1 when a lower number is more of the value.")

    @field_validator("margin", mode="before")
    @classmethod
    def _as_tuple(cls, margin: object) -> object:
        if isinstance(margin, list) and len(margin) != 2:
            raise ValueError("a margin takes two tokens (or lists of them): [wanted, unwanted]")
        return tuple(margin) if isinstance(margin, list) else margin

    @model_validator(mode="after")
    def _reads_one(self) -> TokenOutputConfig:
        if (self.token is None) == (self.margin is None):
            raise ValueError("say which token is read: either token or margin, and not both")
        if any(not tokens for tokens in self.sides):
            raise ValueError("a list of spellings must hold one at least")
        return self

    @property
    def sides(self) -> tuple[list[Token], ...]:
        """The spellings of the token, or of the two of a margin."""
        given = self.margin if self.margin is not None else (self.token,)
        return tuple(
            tokens if isinstance(tokens, list) else [tokens]
            for tokens in given
            if tokens is not None
        )


class CausalLmConfig(ModelConfig):
    """A language model, read at the token behind its input: guards, principle reward models."""

    kind: Literal["causal_lm"]
    input: InputConfig
    prefill: str = Field(
        "",
        description="Of a chat: what stands before the token that is read, behind the template's "
        "own generation prompt.",
    )
    output: TokenOutputConfig

    @model_validator(mode="after")
    def _prefills_chat(self) -> CausalLmConfig:
        if self.prefill and not isinstance(self.input, ChatInput):
            raise ValueError("prefill goes with the view chat; here, write it into the template")
        return self


class LikelihoodConfig(ModelConfig):
    """Log-likelihood of a text under a language model of its own: a full pass, prompt included."""

    kind: Literal["likelihood"]
    input: InputConfig
    tokens: Literal["all", "answer"] = Field(
        "all", description="all: every token but the first is predicted, the prompt's too."
    )
    reduce: Literal["mean", "sum"] = Field("mean", description="mean: per token. sum: per text.")


class EmbeddingConfig(ModelConfig):
    """Cosine of the embeddings of two texts, such as prompt and answer."""

    kind: Literal["embedding"]
    a: str = Field("{prompt}", description="Template of the first text; must not hold {answer}.")
    b: str = Field("{answer}", description="Template of the second text; must hold {answer}.")
    strip: bool = Field(False, description="Take white space off both ends of the answer.")
    pooling: Literal["mean", "cls", "last", "pooler"] = Field(
        description="How token states become one vector: their mean, the first, the last, or the "
        "model's own pooler_output. The model's card says which; another one is wrong unnoticed."
    )

    @field_validator("a", "b")
    @classmethod
    def _has_answer(cls, text: str, info: object) -> str:
        wanted = 1 if getattr(info, "field_name", "") == "b" else 0
        if parse(text).fields.count("answer") != wanted:
            raise ValueError("b must hold {answer} once and a must not hold it")
        return text


class ProcessRewardConfig(ModelConfig):
    """A process reward model: P(good) of each step of the answer, and what becomes of them."""

    kind: Literal["process_reward"]
    input: InputConfig
    split: str = Field("\n\n", min_length=1, description="What stands between steps in answers.")
    separator: str = Field(
        "<extra_0>",
        min_length=1,
        description="What the model was trained to read behind each step; scores are read there.",
    )
    label: str | int | None = Field(
        None, description="Label (or position) of a good step; needless when there is one."
    )
    tokens: tuple[Token, Token] | None = Field(
        None,
        description="For language models instead of token classifiers: the tokens that say good "
        "and bad, such as ['+', '-'].",
    )
    aggregate: Literal["min", "mean", "prod", "last"] = Field(
        "min", description="How the probabilities of the steps become one number."
    )

    @field_validator("tokens", mode="before")
    @classmethod
    def _as_tuple(cls, tokens: object) -> object:
        if isinstance(tokens, list) and len(tokens) != 2:
            raise ValueError("tokens are two: [good, bad]")
        return tuple(tokens) if isinstance(tokens, list) else tokens

    @model_validator(mode="after")
    def _reads_one(self) -> ProcessRewardConfig:
        if self.tokens is not None and self.label is not None:
            raise ValueError("label and tokens exclude each other; keep one of them")
        if isinstance(self.input, ChatInput) and self.input.question is not None:
            raise ValueError("steps are read in the answer; leave question out")
        return self
