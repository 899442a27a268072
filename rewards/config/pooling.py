"""The kind ``vllm_pooling``: a reward model in an engine of its own beside the generator."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from rewards.config.inputs import InputConfig
from rewards.config.outputs import ReadsOutputs

# What this kind sets by itself, or what would change what its scores mean.
_OURS = (
    "model", "tokenizer", "revision", "runner", "dtype", "max_model_len", "trust_remote_code",
    "load_format", "host", "port", "uds", "api_key",
)  # fmt: skip


class VllmPoolingConfig(ReadsOutputs):
    """A sequence classifier served by vLLM in a process of its own, for causal ones from 0.6 B.

    Candidates of one prompt share its prefill there.
    """

    kind: Literal["vllm_pooling"]
    model: str = Field(min_length=1, description="Folder (relative to this file) or hub name.")
    revision: str | None = Field(None, description="Hub commit or tag; pin one in production.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 on a GPU, float32 on a CPU."
    )
    input: InputConfig
    max_length: int = Field(
        2048, ge=8, description="Longest input in tokens; at most what the model takes."
    )
    engine_args: dict[str, JsonValue] = Field(
        {},
        description="vLLM's own options, such as `kv-cache-memory-bytes: 2147483648`; on a GPU "
        "that others use, give this one, or `gpu-memory-utilization`.",
    )
    start_timeout_s: float = Field(900.0, gt=0, description="Longest start of the engine.")
    timeout_s: float = Field(60.0, gt=0, description="Longest wait for the scores of one request.")
    max_concurrent: int = Field(16, ge=1, le=256, description="Requests scored at once.")

    @model_validator(mode="after")
    def _gives_logits(self) -> VllmPoolingConfig:
        if any(one.attribute for one in self.reads.values()):
            raise ValueError("vLLM gives logits and no attributes; use kind: sequence_classifier")
        return self

    @field_validator("engine_args")
    @classmethod
    def _not_ours(cls, options: dict[str, JsonValue]) -> dict[str, JsonValue]:
        for name in options:
            if name.replace("-", "_") in _OURS:
                raise ValueError(f"{name} is set by this section's own fields; leave it out here")
        return options
