"""Which requests bring a fair sample of what a calibration is about, and which do not."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, deque
from dataclasses import dataclass
from typing import Literal

import numpy as np

from server.alignment_stages import Plan, Served
from server.calibration import Calibration, system_of
from server.promise import Promise

Reason = Literal["sampling", "prompt", "deadline", "incomplete", "few_candidates", "repeated"]

# Share of the last prompts taken in that may be one and the same.
LARGEST_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request's candidates before any is chosen; `plan` holds its text, which is not kept."""

    plan: Plan
    calibration: Calibration
    promise: Promise | None
    rewards: np.ndarray


def arrival_of(served: Served) -> Arrival | None:
    """Return what an answered request brings; None without rewards or without a calibration."""
    calibration = served.plan.calibration
    if served.rewards is None or calibration is None:
        return None
    return Arrival(served.plan, calibration, served.plan.promise, served.rewards)


def reason_against(
    arrival: Arrival, model_fingerprint: str, rewards_fingerprint: str
) -> Reason | None:
    """Return why a request is no fair sample of what its calibration is about, or None.

    Answers that a deadline or a failing upstream leaves are those that are short or lucky; and a
    request with a deadline that all of its answers met is one whose answers happen to be short.
    """
    plan = arrival.plan
    request, options = plan.request, plan.request.palette
    if arrival.calibration.warnings_for(
        model_fingerprint, rewards_fingerprint, request.sampling, system_of(request.messages)
    ):
        return "sampling"
    if plan.prompt.tools is not None or plan.prompt.is_raw:
        return "prompt"
    if options is not None and options.deadline_ms is not None:
        return "deadline"
    if len(arrival.rewards) != plan.n_candidates or np.isnan(arrival.rewards).any():
        return "incomplete"
    return None


class Repeats:
    """Bounds the share of one identical prompt among those taken in.

    Parameters
    ----------
    window : int
        Prompts taken in among which it is bounded.

    Notes
    -----
    Prompts are told apart by a hash with a key that never leaves the process: what is held here
    cannot be matched with a guessed text afterwards, and is gone with the process.
    """

    def __init__(self, window: int) -> None:
        self._most = max(1, int(window * LARGEST_SHARE))
        self._key = os.urandom(32)
        self._recent: deque[bytes] = deque()
        self._counts: Counter[bytes] = Counter()
        self._window = window

    def admits(self, plan: Plan) -> bool:
        """Return whether the prompt has its share left, and count it if so."""
        prompt = plan.prompt
        text = repr((prompt.messages, prompt.token_ids)).encode("utf-8", "surrogatepass")
        mark = hashlib.blake2b(text, digest_size=16, key=self._key).digest()
        if self._counts[mark] >= self._most:
            return False
        self._counts[mark] += 1
        self._recent.append(mark)
        if len(self._recent) > self._window:
            oldest = self._recent.popleft()
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]
        return True
