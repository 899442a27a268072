"""How the memory of a GPU is split between the engine and the reward models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from server.backends.base import ModelLoadError

_GIB = 2**30
# Weights are not all: activations, and room for the answers of at least a few candidates.
_LEAST_FREE_SHARE = 0.1


def engine_share(
    *,
    total_bytes: int,
    free_bytes: int,
    rewards_bytes: int,
    weights_bytes: int = 0,
    wanted: float | None = None,
) -> float:
    """Return the engine's share of a GPU, vLLM's ``gpu_memory_utilization``, in (0, 1).

    Parameters
    ----------
    total_bytes, free_bytes : int
        Of the GPU, before the engine and the reward models are loaded.
    rewards_bytes : int
        What the reward models on this GPU need: weights, activations and their CUDA context.
    weights_bytes : int
        The generator's weights on this GPU, where known.
    wanted : float, optional
        The operator's share; by default all that the reward models leave.

    Raises
    ------
    ModelLoadError
        When the reward models leave the engine too little, or the operator's share leaves them
        too little; with the quantities and the remedies.
    """
    available = free_bytes - rewards_bytes
    # Downwards, to vLLM's two decimals: rounding must not take memory that is not there.
    most = math.floor(100 * available / total_bytes) / 100
    remedies = (
        "lower rewards_memory_gib if the reward models need less, run them elsewhere "
        "(rewards_device), or give the engine less to hold (a smaller or quantised model, "
        "tensor_parallel_size)"
    )
    budget = (
        f"the GPU has {_gib(total_bytes)} of memory, {_gib(free_bytes)} of it free, and "
        f"{_gib(rewards_bytes)} are kept for the reward models"
    )
    if most <= 0:
        raise ModelLoadError(f"{budget}: nothing is left for the engine; {remedies}")
    share = most if wanted is None else wanted
    if share > most:
        raise ModelLoadError(
            f"{budget}: the engine can have {most:.2f} of the GPU, not the "
            f"gpu_memory_utilization={share} asked for; lower it, or {remedies}"
        )
    needed = weights_bytes * (1 + _LEAST_FREE_SHARE)
    if share * total_bytes < needed:
        raise ModelLoadError(
            f"{budget}: the engine's {_gib(share * total_bytes)} do not hold the model, whose "
            f"weights take {_gib(weights_bytes)} before any answer; {remedies}"
        )
    return share


def split_gpu(
    options: Mapping[str, Any], rewards_bytes: int, weights_bytes: int
) -> dict[str, float]:
    """Return the engine option that leaves the reward models their part of the first GPU.

    Raises
    ------
    ModelLoadError
        See `engine_share`.
    """
    import torch

    free_bytes, total_bytes = torch.cuda.mem_get_info(0)
    n_devices = options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1)
    # A quantised model's files are as small as its weights; one that vLLM quantises itself is not.
    is_shrunk = options.get("quantization") is not None
    share = engine_share(
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        rewards_bytes=rewards_bytes,
        weights_bytes=0 if is_shrunk else weights_bytes // n_devices,
        wanted=options.get("gpu_memory_utilization"),
    )
    return {"gpu_memory_utilization": share}


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / _GIB:.1f} GiB"
