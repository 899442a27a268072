"""Which device scores, and in which number format."""

from __future__ import annotations

import torch

from rewards.errors import RewardError


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
