"""The schema of a rewards file; each field's description is its documentation.

Two sections: ``scorers`` say what is computed, ``values`` what a client may align. Adding a kind
means a class here, its case in `registry.py`, and a file in ``models/``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import regex
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
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
    """A measure of the answer's text."""

    kind: Literal["lexical"]
    measure: Literal[
        "characters",
        "sentences",
        "flesch_reading_ease",
        "diversity",
        "repetition",
        "words",
        "lexical_diversity",
    ]


class VaderConfig(_Section):
    """Mood of an English answer in [-1, 1], by the VADER lexicon; needs the extra `sentiment`."""

    kind: Literal["vader"]


class RegexCheckConfig(_Section):
    """1 when a pattern is found in the answer, else 0."""

    kind: Literal["verifiable"]
    check: Literal["regex"]
    pattern: str = Field(min_length=1, description="As Python's `re`, with \\p{...}; (?i) inside.")
    match: Literal["search", "full"] = Field("search", description="full: the whole answer.")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        return _compiled(pattern, groups=())


class JsonSchemaCheckConfig(_Section):
    """1 when the answer is JSON that conforms to a JSON Schema, else 0."""

    kind: Literal["verifiable"]
    check: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema", description="2020-12 unless it says.")
    fence: bool = Field(
        True, description="Where the answer holds one ```json block, read that block alone."
    )

    @field_validator("json_schema")
    @classmethod
    def _is_schema(cls, schema: dict[str, Any]) -> dict[str, Any]:
        # Only now: most files have no schema.
        from rewards.models.verifiable import schema_validator

        schema_validator(schema)
        return schema


class NumberCheckConfig(_Section):
    """1 when the last number of the answer is the expected one, else 0."""

    kind: Literal["verifiable"]
    check: Literal["number"]
    expected: float | None = Field(None, allow_inf_nan=False)
    expected_from: str | None = Field(
        None, description="Pattern for the last user message; its group `expected` is the number."
    )
    tolerance: float = Field(0.0, ge=0, allow_inf_nan=False, description="Largest difference.")

    @field_validator("expected_from")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        return _compiled(pattern, groups=("expected",))

    @model_validator(mode="after")
    def _expects_one(self) -> NumberCheckConfig:
        if (self.expected is None) == (self.expected_from is None):
            raise ValueError("give either expected or expected_from, and not both")
        return self


class WordLimitsConfig(_Section):
    """1 when the answer has from min to max words, both counted in, else 0."""

    kind: Literal["verifiable"]
    check: Literal["words"]
    min: int | None = Field(None, ge=0)
    max: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _limits(self) -> WordLimitsConfig:
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"no answer has {self.min} words or more and {self.max} or less")
        return self


class TermsCheckConfig(_Section):
    """Share of terms that the answer holds (required), or keeps away from (banned), in [0, 1]."""

    kind: Literal["verifiable"]
    check: Literal["required", "banned"]
    terms: list[str] = Field(description="Whole words or phrases; case does not matter.")

    @field_validator("terms")
    @classmethod
    def _are_terms(cls, terms: list[str]) -> list[str]:
        if not terms or not all(term.strip() for term in terms):
            raise ValueError("give at least one term, and none that is blank")
        folded = [" ".join(term.casefold().split()) for term in terms]
        for term in folded:
            if folded.count(term) > 1:
                raise ValueError(f"the term {term!r} stands twice; remove one")
        return terms


VerifiableConfig = Annotated[
    RegexCheckConfig
    | JsonSchemaCheckConfig
    | NumberCheckConfig
    | WordLimitsConfig
    | TermsCheckConfig,
    Field(discriminator="check"),
]


def _compiled(pattern: str, groups: Sequence[str]) -> str:
    """Return the pattern, when it compiles and has these groups."""
    try:
        found = regex.compile(pattern).groupindex
    except regex.error as error:
        raise ValueError(f"no valid pattern: {error}") from None
    for group in groups:
        if group not in found:
            raise ValueError(f"the pattern must name what it takes: (?P<{group}>...)")
    return pattern


class SamplerLogprobConfig(_Section):
    """Log-likelihood of the answer under the model that wrote it, as the sampler reports it."""

    kind: Literal["sampler_logprob"]
    reduce: Literal["mean", "sum"] = Field("mean", description="mean: per token. sum: per answer.")


class RemoteConfig(_Section):
    """A reward model behind HTTP. Texts leave this machine: the url is trusted with them."""

    kind: Literal["remote"]
    api: Literal["vllm_classify", "vllm_score", "tei_predict", "openrlhf", "webhook"]
    url: str = Field(description="Where to post, path included: http://127.0.0.1:8001/classify.")
    model: str | None = Field(
        None,
        description="Its name: sent to vLLM, and part of the fingerprint. Change it when another "
        "model comes to stand behind the url, for nothing else tells.",
    )
    token_file: str | None = Field(
        None, description="File (relative to this one) that holds a bearer token."
    )
    input: InputConfig | None = Field(
        None, description="What is sent. A webhook gets the messages and the answer without it."
    )
    output: OutputConfig = OutputConfig()
    truncate: bool = Field(
        False, description="Let vLLM or TEI cut inputs that are too long; otherwise they fail."
    )
    timeout_s: float = Field(
        10.0,
        gt=0,
        le=600,
        description="Longest wait, in seconds, for the scores of one request, retries included.",
    )
    retries: int = Field(
        2, ge=0, le=10, description="Further tries after 429, 5xx or a broken connection."
    )
    max_batch: int = Field(32, ge=1, description="Most samples in one HTTP request.")
    max_concurrent: int = Field(4, ge=1, le=64, description="Most HTTP requests at once.")

    @field_validator("url")
    @classmethod
    def _is_endpoint(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            is_address = bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_address = False
        if not is_address or parts.scheme not in ("http", "https"):
            raise ValueError("the url must be http://host:port/path or https://host/path")
        if parts.username is not None or parts.password is not None or parts.fragment:
            raise ValueError("no user, password or fragment in the url; see token_file")
        if parts.path in ("", "/"):
            raise ValueError(
                "the url lacks its path; vLLM has /classify and /score, TEI /predict, OpenRLHF "
                "/get_reward"
            )
        return url

    @model_validator(mode="after")
    def _fits_api(self) -> RemoteConfig:
        views, selectors = _REMOTE_APIS[self.api]
        view = self.input.view if self.input is not None else "chat"
        if view not in views or (self.input is None and self.api != "webhook"):
            raise ValueError(f"{self.api} needs an input with the view {' or '.join(views)}")
        for name in ("label", "index", "margin"):
            if getattr(self.output, name) is not None and name not in selectors:
                known = f"it takes {' or '.join(selectors)}" if selectors else "it gives one number"
                raise ValueError(f"the output of {self.api} cannot be read by {name}; {known}")
        wanted = str if self.api == "tei_predict" else int
        if any(not isinstance(one, wanted) for one in self.output.margin or ()):
            kind = "labels" if wanted is str else "positions"
            raise ValueError(f"a margin of {self.api} takes two {kind}")
        if any(isinstance(one, int) and one < 0 for one in self.output.margin or ()):
            raise ValueError("the positions of a margin count from 0")
        if self.truncate and self.api not in ("vllm_classify", "vllm_score", "tei_predict"):
            raise ValueError(f"{self.api} has no way to ask for truncation; leave truncate out")
        return self


# By api: the views that it can be sent, and what chooses among several numbers of one sample.
_REMOTE_APIS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "vllm_classify": (("text", "chat"), ("index", "margin")),
    "vllm_score": (("pair",), ()),
    "tei_predict": (("text", "pair"), ("label", "margin")),
    "openrlhf": (("text", "pair"), ("index", "margin")),
    "webhook": (("chat",), ("index", "margin")),
}


class PythonConfig(_Section):
    """Your own scorer: ``function(samples, **options)`` returns one number per sample."""

    kind: Literal["python"]
    entry_point: str = Field(description="module:function, importable by this Python.")
    trust_code: bool = Field(False, description="Run this code in the server, with its rights.")
    options: dict[str, JsonValue] = Field({}, description="Keyword arguments of the function.")
    index: int | None = Field(
        None, ge=0, description="Column to read, where it gives several numbers per sample."
    )
    needs_logprobs: bool = Field(
        False, description="It reads token_logprobs, so it cannot score a text from elsewhere."
    )

    @field_validator("entry_point")
    @classmethod
    def _names_function(cls, entry_point: str) -> str:
        module, _, function = entry_point.partition(":")
        if not all(part.isidentifier() for part in (*module.split("."), function)):
            raise ValueError("an entry point is module:function, like my_rewards.style:score")
        return entry_point

    @model_validator(mode="after")
    def _is_trusted(self) -> PythonConfig:
        if not self.trust_code:
            raise ValueError(
                f"{self.entry_point} runs in the server with all its rights; read it, then set "
                "trust_code: true"
            )
        return self


ScorerConfig = Annotated[
    SequenceClassifierConfig
    | LexicalConfig
    | SamplerLogprobConfig
    | RemoteConfig
    | PythonConfig
    | VaderConfig
    | VerifiableConfig,
    Field(discriminator="kind"),
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
