"""Kinds whose code is not ours: a server behind HTTP, a Python function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from rewards.config.inputs import ChatInput, InputConfig
from rewards.config.outputs import OutputConfig, ReadsOutputs
from rewards.config.section import Scored, checked_url


class RemoteConfig(ReadsOutputs):
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
        parts = checked_url(url)
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
        if isinstance(self.input, ChatInput) and (
            self.input.question is not None or self.input.template_options
        ):
            raise ValueError("question and template_options are for models in this process")
        for output in self.reads.values():
            self._can_read(output, selectors)
        if self.truncate and self.api not in ("vllm_classify", "vllm_score", "tei_predict"):
            raise ValueError(f"{self.api} has no way to ask for truncation; leave truncate out")
        return self

    def _can_read(self, output: OutputConfig, selectors: Sequence[str]) -> None:
        for name in ("label", "index", "margin", "expect", "attribute"):
            if getattr(output, name) is not None and name not in selectors:
                known = f"it takes {' or '.join(selectors)}" if selectors else "it gives one number"
                raise ValueError(f"the output of {self.api} cannot be read by {name}; {known}")
        wanted = str if self.api == "tei_predict" else int
        if any(not isinstance(one, wanted) for one in output.margin or ()):
            kind = "labels" if wanted is str else "positions"
            raise ValueError(f"a margin of {self.api} takes two {kind}")
        if any(isinstance(one, int) and one < 0 for one in output.margin or ()):
            raise ValueError("the positions of a margin count from 0")


# By api: the views that it can be sent, and what chooses among several numbers of one sample.
_REMOTE_APIS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "vllm_classify": (("text", "chat"), ("index", "margin")),
    "vllm_score": (("pair",), ()),
    "tei_predict": (("text", "pair"), ("label", "margin", "expect")),
    "openrlhf": (("text", "pair"), ("index", "margin")),
    "webhook": (("chat",), ("index", "margin")),
}


class PythonConfig(Scored):
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
