"""A calibration: a pilot set plus what it is valid for, and where calibrations are kept."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rewards import Message
from server.backends.base import SamplingSettings
from server.units import Units
from solver import PilotError, PilotSet
from solver.pilot_files import sync_folder

# Above this share of answers cut by `max_tokens`, a longer limit is another base distribution.
TRUNCATED_SHARE_TOLERATED = 0.01
# Calibrations are sampled without these.
_UNCALIBRATED = ("min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
# What `system_of` says of a conversation without a system prompt.
NO_SYSTEM = "none"


class CalibrationError(Exception):
    """A calibration file that cannot be used; the message says why and what to do."""


class CalibrationMissingError(Exception):
    """A palette needs a calibration and the model has none (yet)."""


def system_of(messages: Sequence[Message]) -> str:
    """Return what tells system prompts apart: 16 hex digits of a hash, or ``none``."""
    texts = [message["content"] for message in messages if message["role"] == "system"]
    if not texts:
        return NO_SYSTEM
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


class CalibrationInfo(BaseModel):
    """What a pilot set is valid for; kept in the file's metadata.

    Fields with a default are missing in files that were written before there were such.

    Attributes
    ----------
    model_fingerprint : str
        `Backend.fingerprint`: weights, tokenizer and chat template.
    rewards_fingerprint : str
        `RewardSuite.fingerprint`: configuration and models of the values.
    temperature, top_p, top_k, max_tokens
        Sampling settings of the candidates.
    longest_answer_tokens : int
        A larger ``max_tokens`` draws from the same distribution when nothing was cut.
    truncated_share : float
        Share of candidates that ``max_tokens`` cut short.
    name : str or None
        By which a request can ask for it, beside its id.
    revision, chat_template : str or None
        Commit of a hub model, and a hash of the chat template (hex), where the backend knows them.
    systems : dict or None
        Prompts by their system prompt (`system_of`); None where that was not written down.
    prompts_hash : str or None
        Of all prompts that were given (hex); `n_given` of them, used or not.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str
    model_fingerprint: str
    rewards_fingerprint: str
    temperature: float
    top_p: float
    top_k: int
    max_tokens: Annotated[int, Field(ge=1)]
    longest_answer_tokens: int
    truncated_share: float
    prompts_source: str
    seed: int
    created: datetime
    palette_version: str
    name: str | None = None
    revision: str | None = None
    chat_template: str | None = None
    systems: Annotated[dict[str, Annotated[int, Field(ge=1)]], Field(min_length=1)] | None = None
    prompts_hash: str | None = None
    n_given: int | None = None


@dataclass(frozen=True, slots=True)
class Calibration:
    """A pilot set and what it is valid for. Immutable; a new one replaces it whole.

    Attributes
    ----------
    pilot : PilotSet
    info : CalibrationInfo
    version : int
        0 as it was made; live traffic makes further ones (`server.live`).
    updated : datetime or None
        When a further version was made.
    live_prompts : int
        Prompts of the pilot set that live traffic brought.
    root : Calibration or None
        What a further version grew from.
    measured : PilotSet or None
        What the file holds, where `pilot` is made of it by transforms; see `server.units`.
    """

    pilot: PilotSet
    info: CalibrationInfo
    version: int = 0
    updated: datetime | None = None
    live_prompts: int = 0
    root: Calibration | None = None
    measured: PilotSet | None = None
    own_units: Units | None = None

    @property
    def id(self) -> str:
        """Name of this calibration in answers, the same for all its versions."""
        root = self.root or self
        return (root.measured or root.pilot).fingerprint[:12]

    @property
    def units(self) -> Units | None:
        """How its rewards are made of what is measured; None where they are just that."""
        return (self.root or self).own_units

    def covering(self, n_candidates: int) -> Calibration:
        """Return this version, or the root where live prompts bring too few candidates for N."""
        if self.root is None or n_candidates <= self.pilot.n_candidates:
            return self
        return self.root

    def share_of(self, system: str) -> float:
        """Return the share of its prompts that have this system prompt (`system_of`)."""
        systems = self.info.systems
        if systems is None:
            return float(system == NO_SYSTEM)
        return systems.get(system, 0) / sum(systems.values())

    def distance(self, sampling: SamplingSettings, system: str) -> float:
        """Return how far it is from covering a request; 0 where it covers it.

        The sum of |Δ temperature|, |Δ top_p|, |Δ 1/top_k| (0 where every token is kept),
        |Δ ln max_tokens| where the limit is not covered, and 1 for a system prompt that none of
        its prompts has: what changes answers most stands apart the most.
        """
        info = self.info
        length = 0.0
        if not self._covers_length(sampling.max_tokens):
            length = abs(math.log(sampling.max_tokens / info.max_tokens))
        return (
            abs(sampling.temperature - info.temperature)
            + abs(sampling.top_p - info.top_p)
            + abs(_inverse(sampling.top_k) - _inverse(info.top_k))
            + length
            + (self.share_of(system) == 0)
        )

    def warnings_for(
        self,
        model_fingerprint: str,
        rewards_fingerprint: str,
        sampling: SamplingSettings,
        system: str = NO_SYSTEM,
    ) -> list[str]:
        """Return why this calibration does not cover a request; empty when it does."""
        info = self.info
        found = []
        if model_fingerprint != info.model_fingerprint:
            found.append(
                "the calibration was made with other model weights, tokenizer or chat template; "
                "run `palette calibrate` for this model"
            )
        if rewards_fingerprint != info.rewards_fingerprint:
            found.append(
                "the calibration was made with other reward models or settings; "
                "run `palette calibrate` for these rewards"
            )
        for name in ("temperature", "top_p", "top_k"):
            asked, known = getattr(sampling, name), getattr(info, name)
            if asked != known:
                found.append(
                    f"{name}={asked:g} is not covered: the calibration was sampled with "
                    f"{name}={known:g}"
                )
        if not self._covers_length(sampling.max_tokens):
            found.append(
                f"max_tokens={sampling.max_tokens} is not covered: the calibration was sampled "
                f"with max_tokens={info.max_tokens} (longest answer "
                f"{info.longest_answer_tokens} tokens, {info.truncated_share:.1%} cut short)"
            )
        if self.share_of(system) == 0:
            found.append(self._other_system(system))
        neutral = SamplingSettings()
        for name in _UNCALIBRATED:
            asked, known = getattr(sampling, name), getattr(neutral, name)
            if asked != known:
                found.append(
                    f"{name}={asked:g} is not covered: the calibration was sampled with {known:g}"
                )
        if sampling.logit_bias:
            found.append("logit_bias is not covered: the calibration was sampled without it")
        if sampling.json_schema is not None:
            found.append("response_format is not covered: the calibration was sampled as text")
        if sampling.stop:
            found.append("stop strings are not covered: the calibration was sampled without them")
        if sampling.temperature == 0:
            found.append(
                "temperature 0 makes all candidates equal: there is nothing to choose among, "
                "and the palette has no effect"
            )
        return found

    def _covers_length(self, max_tokens: int) -> bool:
        info = self.info
        shorter = max_tokens < min(info.max_tokens, info.longest_answer_tokens)
        longer = max_tokens > info.max_tokens and info.truncated_share > TRUNCATED_SHARE_TOLERATED
        return not (shorter or longer)

    def _other_system(self, system: str) -> str:
        systems = self.info.systems
        if system == NO_SYSTEM:
            return "the calibration was made with system prompts; this conversation has none"
        if systems is None:
            made = "before system prompts were recorded"
        else:
            made = "without one" if set(systems) == {NO_SYSTEM} else "with others"
        return (
            f"this system prompt is not covered: the calibration was made {made}; "
            "`palette calibrate --system-file` makes one for it"
        )

    def save(self, path: Path) -> None:
        """Write the calibration in one piece: a reader sees the old file or the new one.

        When this returns, it is on the disk, and the folders made for it too.
        """
        make_folder(path.parent)
        content = self.measured or self.pilot
        PilotSet(
            content.rewards,
            content.values,
            metadata={"calibration": self.info.model_dump(mode="json")},
            counts=content.counts,
        ).save(path)


def load_calibration(path: Path) -> Calibration:
    """Return the calibration of a file.

    Raises
    ------
    CalibrationError
        When the file is missing, corrupt, or no calibration.
    """
    remedy = f"make one with `palette calibrate --out {path}`, or name another file"
    try:
        pilot = PilotSet.load(path)
    except (PilotError, OSError) as error:
        msg = f"calibration {str(error).rstrip('.')}; {remedy}"  # it begins with the path
        raise CalibrationError(msg) from error
    record: Any = pilot.metadata.get("calibration")
    if record is None:
        msg = f"{path} is a pilot set without a calibration record; {remedy}"
        raise CalibrationError(msg)
    try:
        info = CalibrationInfo.model_validate(record)
    except ValidationError as error:
        msg = f"calibration {path} has a damaged record ({error.error_count()} errors); {remedy}"
        raise CalibrationError(msg) from error
    return Calibration(pilot, info)


def default_path(
    state_dir: Path, model: str, model_fingerprint: str, rewards: str, run: str = ""
) -> Path:
    """Return where a calibration of this model with these rewards is kept.

    The name carries both fingerprints, and `run`, which tells calibrations of one model apart: a
    new one never takes the place of another that took hours to make.
    """
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", model).strip("-") or "model"
    both = hashlib.sha256(f"{model_fingerprint} {rewards}".encode()).hexdigest()[:16]
    return folder_of(state_dir) / f"{'-'.join(filter(None, (slug, both, run)))}.npz"


def folder_of(state_dir: Path) -> Path:
    """Return the folder in which calibrations are kept."""
    return state_dir / "calibrations"


def make_folder(folder: Path) -> None:
    """Make a folder that survives a power cut: the entries of new folders reach the disk too."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in missing:
        sync_folder(one.parent)


def _inverse(top_k: int) -> float:
    return 1 / top_k if top_k else 0.0
