"""How the process shares its cores between threads: set once, before models are loaded."""

from __future__ import annotations

import os
import sys

from server.settings import Settings

# Python lets a thread run this long before another may; at the default of 5 ms the event loop
# waits that long behind every thread that computes.
SWITCH_INTERVAL_S = 5e-4


def n_torch_threads(settings: Settings) -> int:
    """Return the CPU threads of a torch operation: half the cores, unless the settings say."""
    return settings.torch_threads or max(1, (os.cpu_count() or 1) // 2)


def share_cores(settings: Settings) -> None:
    """Set the threads of torch's operations and how often Python's threads take turns."""
    import torch  # slow to import, and not needed for every command

    torch.set_num_threads(n_torch_threads(settings))
    sys.setswitchinterval(SWITCH_INTERVAL_S)
