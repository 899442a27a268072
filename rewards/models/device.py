"""Which device scores, and how much of it a batch may use."""

from __future__ import annotations

import torch

from rewards.batch import BatchLimits
from rewards.errors import RewardError

# CPU: a batch only pays while its activations stay in the cache. Measured on 11 M parameters, one
# thread: 512 to 2048 padded tokens are equally fast, 16384 is 31 % slower. Beginning a forward pass
# costs as much as 17 (110 M parameters) to 44 tokens (1 M): nearly nothing, so hardly any padding.
CPU_LIMITS = BatchLimits(max_tokens=2048, max_padding=32)
# GPU: large enough to fill it with an encoder of 100 M parameters, small enough that a batch (tens
# of ms) neither makes the next request wait nor starves a sampler on the same device. Beginning a
# pass, 5 to 15 ms of kernel launches, is worth thousands of tokens. Reasoned, not yet measured.
GPU_LIMITS = BatchLimits(max_tokens=32768, max_padding=4096)


def resolve_device(device: str) -> str:
    """Return the torch device that a setting means.

    Parameters
    ----------
    device : str
        ``auto`` is the first GPU, or the CPU without one.

    Raises
    ------
    RewardError
        When torch does not know the device or cannot use it here.
    """
    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        raise RewardError(
            f"the reward device {device!r} cannot be used: {error}. Use auto, cpu or cuda:N"
        ) from error
    return device


def default_limits(device: str) -> BatchLimits:
    """Return the size of a batch that suits a device."""
    return CPU_LIMITS if torch.device(device).type == "cpu" else GPU_LIMITS


def resolve_dtype(dtype: str, device: str) -> torch.dtype:
    """Return the dtype that ``auto``, ``float32``, ``bfloat16`` or ``float16`` means there."""
    if dtype == "auto":
        return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    return {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }[dtype]


def set_threads(n_threads: int) -> None:
    """Set the threads of one forward pass on the CPU, for the whole process."""
    torch.set_num_threads(n_threads)
