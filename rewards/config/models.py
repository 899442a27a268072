"""Kinds whose model runs in this process."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rewards.config.inputs import InputConfig
from rewards.config.outputs import ReadsOutputs


class SequenceClassifierConfig(ReadsOutputs):
    """A transformers sequence classifier: most reward models, encoders and causal ones alike."""

    kind: Literal["sequence_classifier"]
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
    input: InputConfig
    max_length: int | None = Field(
        None, ge=8, description="Longest input in tokens; default what the model takes, up to 2048."
    )
