"""All configuration of the server: one frozen `Settings`, read once and handed down.

Environment variables carry the prefix ``PALETTE_``; ``palette serve`` has an option for each field.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import platformdirs
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from pydantic_settings import SettingsError as SourceError

from server import embedded
from server.backends.base import Feature, SamplingSettings
from server.schemas import PaletteOptions

PREFIX = "PALETTE_"


class SettingsError(Exception):
    """Settings that contradict each other or do not exist; the message names the remedy."""


def check_key(key: str) -> str:
    """Return the key, or raise ValueError, which does not show it, when no client could send it."""
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        msg = "an API key is one or more printable ASCII characters without spaces"
        raise ValueError(msg)
    return key


class Settings(BaseSettings):
    """Per-process options. What varies from request to request is in the request instead."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,  # there are keys among it
    )

    # model
    model: str = Field(
        default=str(embedded.CHAT_MODEL),
        description="Local folder or hub name of a causal language model with a chat template.",
    )
    model_name: str | None = Field(
        default=None, description="Name clients use for the model; by default that of `model`."
    )
    revision: str | None = Field(
        default=None, description="Branch, tag or commit of a hub model; pin one in production."
    )
    device: str = Field(
        default="auto", description="Where the model runs: auto, cpu, cuda, cuda:1."
    )
    dtype: str = Field(
        default="auto",
        description="Number format of the weights; auto is the checkpoint's own on a GPU, "
        "float32 on a CPU.",
    )
    max_context: int | None = Field(
        default=None, ge=16, description="Tokens of prompt and answer; by default the model's own."
    )
    trust_remote_code: bool = Field(
        default=False, description="Run Python code that comes with the model. Off: it is code."
    )

    # a model served elsewhere
    upstream_url: str | None = Field(
        default=None,
        description="Address of an OpenAI-compatible server, up to and with `/v1`, that has the "
        "model; instead of `model`. Redirects are not followed.",
    )
    upstream_model: str | None = Field(
        default=None, description="The model's name there; by default the only one it has."
    )
    upstream_api_key: SecretStr | None = Field(
        default=None, description="Sent to `upstream_url` only, and never logged."
    )
    upstream_n: Literal["auto"] | Annotated[int, Field(ge=1, le=128)] = Field(
        default="auto",
        description="Candidates asked for in one request; auto takes all at once where the "
        "upstream has `n`, and parallel requests where not. 1 costs it less for long answers.",
    )
    upstream_features: tuple[Feature, ...] | None = Field(
        default=None,
        description="What the upstream can do (top_k, min_p, penalties, logit_bias, json_schema, "
        "tools, logprobs); by default what servers of its kind can.",
    )
    upstream_min_share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Share of its candidates with which a request is served though others failed; "
        "the answer says so. 1 serves all or none.",
    )
    upstream_max_connections: int = Field(
        default=256, ge=1, description="Requests to the upstream at once; others wait."
    )
    upstream_timeout_s: float = Field(
        default=300.0,
        gt=0,
        description="Seconds of one request to the upstream, to its last byte; keep it below "
        "`request_timeout_s`. What took too long is not tried again.",
    )
    upstream_connect_timeout_s: float = Field(
        default=5.0, gt=0, description="Seconds to connect to the upstream."
    )
    upstream_max_retries: int = Field(
        default=2,
        ge=0,
        le=10,
        description="Further attempts after 429, 5xx or a broken connection, with growing pauses "
        "and the upstream's own Retry-After.",
    )
    upstream_headers: dict[str, SecretStr] = Field(
        default_factory=dict, description="Headers (JSON) sent with every request to the upstream."
    )
    upstream_body: dict[str, Any] = Field(
        default_factory=dict,
        description="Fields (JSON) added to every request to the upstream, such as "
        '`{"chat_template_kwargs": {"enable_thinking": false}}`; for another Palette, '
        '`{"palette": null}`.',
    )

    # what generates
    backend: Literal["auto", "hf_local", "vllm_engine", "openai_remote"] = Field(
        default="auto",
        description="What generates: auto is openai_remote with `upstream_url`, vllm_engine where "
        "vLLM and a GPU are there, else hf_local.",
    )
    engine_args: dict[str, Any] = Field(
        default_factory=dict,
        description="vLLM's own engine options (JSON) by vLLM's names, such as "
        '`{"tensor-parallel-size": 2, "quantization": "fp8", "reasoning_parser": "qwen3"}`.',
    )
    lora: dict[str, str] = Field(
        default_factory=dict,
        description="LoRA adapters (JSON, name to folder) that vLLM serves as models of their own, "
        "each with its own calibration.",
    )
    engine_timeout_s: float = Field(
        default=300.0,
        gt=0,
        description="Seconds in which an engine with requests may give no token at all; then it is "
        "taken for hung, killed and started again. Longer than the longest prompt takes to read.",
    )
    engine_max_restarts: int = Field(
        default=3, ge=0, description="Restarts of a dead engine within an hour; then it stays down."
    )
    rewards_memory_gib: float = Field(
        default=4.0,
        ge=0,
        description="GPU memory kept for the reward models beside vLLM's engine; 0 keeps none.",
    )
    tool_call_parser: str | None = Field(
        default=None, description="vLLM's parser of the model's tool calls, such as hermes."
    )

    # values and calibration
    rewards: Path = Field(
        default=embedded.REWARDS, description="YAML file that names the values and their models."
    )
    rewards_device: str = Field(default="auto", description="Where the reward models run.")
    calibration: Path | None = Field(
        default=None,
        description="Calibration file to prefer to those kept in `state_dir` for this model and "
        "these rewards; each request gets the one that covers it.",
    )
    calibrate_at_start: bool = Field(
        default=True,
        description="Calibrate in the background when the model has no calibration yet.",
    )
    calibration_candidates: int = Field(
        default=32,
        ge=2,
        le=1024,
        description="Candidates per prompt in a calibration: the largest N it can promise for.",
    )
    refresh: Literal["on", "frozen", "off"] = Field(
        default="on",
        description="Whether a calibration follows live traffic: on renews its prompts with those "
        "of requests under a palette (rewards only, no text); frozen keeps it and watches for "
        "drift; off does neither.",
    )
    refresh_half_life: int = Field(
        default=1000,
        ge=50,
        le=10_000,
        description="Live requests after which half of what a calibration stands on is renewed; "
        "about 1.4 times as many prompts are kept.",
    )
    state_dir: Path = Field(
        default_factory=lambda: Path(platformdirs.user_data_dir("palette", appauthor=False)),
        description="Where calibrations, what live traffic made of them, and profiles are kept.",
    )
    record_prompts: Path | None = Field(
        default=None,
        description="File to which the messages of served requests are appended, for `palette "
        "calibrate --prompts`; by default no prompt is written anywhere. Holds at most 64 MiB "
        "with the older ones beside it, readable by its owner only.",
    )

    # what a request gets when it does not say
    default_palette: dict[str, Any] | None = Field(
        default=None,
        description="Palette (JSON) of requests that bring none; a request's `null` means none.",
    )
    floors: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(
        default_factory=dict,
        description="Value name -> lowest reward (JSON) of any answer that is served; no request "
        "and no profile can lower it, and with it requests without a palette are scored too.",
    )
    candidates: int = Field(default=16, ge=1, description="N of a palette that does not say.")
    temperature: float = Field(default=1.0, ge=0, le=2, description="OpenAI's default is 1.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus mass; 1 keeps all.")
    top_k: int = Field(default=0, ge=0, description="Likeliest tokens kept; 0 keeps all.")
    max_tokens: int = Field(
        default=512, ge=1, description="Longest answer, in tokens, of a request that does not say."
    )

    # limits
    max_candidates: int = Field(default=64, ge=1, le=1024, description="Largest N of a request.")
    max_rows: int = Field(
        default=256, ge=1, description="Candidates decoded at once, over all requests."
    )
    max_running: int = Field(
        default=32, ge=1, description="Requests generated at once; others wait in the queue."
    )
    max_queue: int = Field(
        default=256, ge=0, description="Requests that may wait; one more is refused with 429."
    )
    max_body_bytes: int = Field(default=2_000_000, ge=1024, description="Larger bodies get 413.")
    max_batch_tokens: int | None = Field(
        default=None, ge=64, description="Padded tokens per reward batch; by default the device's."
    )
    reward_queue_tokens: int = Field(
        default=2**22,
        ge=1024,
        description="Tokens, estimated, of texts that may wait for the reward models; what comes "
        "on top is refused with 429.",
    )
    reward_timeout_s: float = Field(
        default=120.0,
        gt=0,
        description="Seconds one batch of a reward model may take. Then its requests fail, and its "
        "scorer serves nobody until the batch has ended; the others go on.",
    )
    request_timeout_s: float = Field(
        default=600.0,
        gt=0,
        description="Seconds a request may take as a whole; then it is cancelled with 504.",
    )

    # what is remembered of answers
    replay_entries: int = Field(
        default=1000,
        ge=0,
        description="Answers whose candidates' rewards are kept in memory for "
        "`/v1/palette/replay`, the oldest forgotten first; 0 keeps none.",
    )
    replay_texts: bool = Field(default=False, description="Keep the texts of those candidates too.")

    # who may come in
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        default=(),
        description="Keys, separated by commas, one of which clients must send as `Authorization: "
        "Bearer`; without any, nobody is asked for one.",
    )
    api_key_file: Path | None = Field(
        default=None,
        description="File with more keys, one a line, `#` for comments; read at the start.",
    )
    operator_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        default=(),
        description="Keys, as `api_keys`, that alone may change what is stored (write and delete "
        "profiles); they open everything else too. Without any, every API key may.",
    )
    operator_key_file: Path | None = Field(
        default=None,
        description="File with more such keys, as `api_key_file`.",
    )
    insecure: bool = Field(
        default=False,
        description="Listen on an address that other machines can reach without any API key.",
    )

    # process
    host: str = Field(
        default="127.0.0.1", description="Address to listen on; loopback unless said otherwise."
    )
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 picks one.")
    torch_threads: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads of a torch operation; by default half the cores, for generation "
        "and scoring run at the same time.",
    )
    keepalive_s: float = Field(
        default=5.0, gt=0, description="Seconds between comments that keep a stream open."
    )
    drain_timeout_s: float = Field(
        default=30.0,
        ge=0,
        description="Seconds that running requests get to finish when the server is told to stop.",
    )
    log_level: str = Field(
        default="info",
        pattern="^(critical|error|warning|info|debug)$",
        description="Logs never hold prompts or answers.",
    )

    @field_validator("api_keys", "operator_keys", mode="before")
    @classmethod
    def _split_keys(cls, keys: Any) -> Any:
        """Return the keys of a text with commas between them, or of a JSON list."""
        if isinstance(keys, str):
            if keys.lstrip().startswith("["):
                try:
                    keys = json.loads(keys)
                except ValueError:
                    raise ValueError("no JSON list of keys") from None
            else:
                keys = [key.strip() for key in keys.split(",")]
        return keys

    @field_validator("api_keys", "operator_keys")
    @classmethod
    def _check_keys(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        """Refuse keys that no client can send; an empty variable is one, not an open door."""
        for key in keys:
            check_key(key.get_secret_value())
        return keys

    @field_validator("default_palette")
    @classmethod
    def _check_palette(cls, palette: dict[str, Any] | None) -> dict[str, Any] | None:
        """Refuse what is no palette; which values there are shows when the rewards are loaded."""
        if palette is not None:
            try:
                PaletteOptions.model_validate(palette)
            except ValidationError as error:
                raise ValueError(_describe(error)) from error
        return palette

    @model_validator(mode="after")
    def _check_backend(self) -> Self:
        if self.backend == "openai_remote" and self.upstream_url is None:
            msg = "backend openai_remote needs upstream_url, the address of the server behind it"
            raise ValueError(msg)
        if self.upstream_url is not None and self.backend not in ("auto", "openai_remote"):
            msg = (
                f"upstream_url says that another server generates, and backend={self.backend} that "
                "this one does: leave one of them out"
            )
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        if self.candidates > self.max_candidates:
            msg = (
                f"candidates ({self.candidates}) is above max_candidates ({self.max_candidates}): "
                "lower the first or raise the second"
            )
            raise ValueError(msg)
        return self

    @property
    def sampling(self) -> SamplingSettings:
        """The sampling settings of a request that gives none: what a calibration is made with."""
        return SamplingSettings(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_tokens=self.max_tokens,
        )

    @property
    def served_model_name(self) -> str:
        """Name clients use for the model."""
        if self.model_name:
            return self.model_name
        if self.upstream_url is not None:
            return self.upstream_model or self.upstream_url
        if self.model == str(embedded.CHAT_MODEL):
            return embedded.CHAT_MODEL_NAME
        # Made absolute: "." has no name of its own.
        path = Path(os.path.abspath(self.model))
        return path.name if path.is_dir() else self.model


def load_settings(**overrides: Any) -> Settings:
    """Return the settings: `overrides` (None means not given), then the environment, then defaults.

    Raises
    ------
    SettingsError
        For a ``PALETTE_`` variable that is no setting (pydantic would ignore a misspelt one), and
        for values out of bounds.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)
    if unknown:
        msg = f"unknown environment variable {unknown[0]}; settings are {', '.join(sorted(known))}"
        raise SettingsError(msg)
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return Settings(**given)
    except SourceError as error:  # its message names classes; the cause has the place in the JSON
        field = re.search(r'field "(\w+)"', str(error))
        name = PREFIX + field[1].upper() if field else "a setting"
        msg = f"{name} is no JSON ({error.__cause__}); quote it for the shell: '{{\"a\": 1}}'"
        raise SettingsError(msg) from error
    except ValueError as error:
        raise SettingsError(_describe(error)) from error


_OF_JSON = {"dict_type": "must be a JSON object, quoted for the shell: '{\"a\": 1}'"}


def _describe(error: ValueError) -> str:
    """Return pydantic's findings one after another, each with the setting's name first."""
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(
        f"{'.'.join(str(part) for part in finding['loc']) or 'settings'}: "
        + _OF_JSON.get(finding["type"], finding["msg"].removeprefix("Value error, "))
        for finding in error.errors()
    )
