"""A calibration: a pilot set plus what it is valid for, and where calibrations are kept."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from server.backends.base import SamplingSettings
from solver import PilotError, PilotSet

# Above this share of answers cut by `max_tokens`, a longer limit is another base distribution.
TRUNCATED_SHARE_TOLERATED = 0.01
# Calibrations are sampled without these.
_UNCALIBRATED = ("min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


class CalibrationError(Exception):
    """A calibration file that cannot be used; the message says why and what to do."""


class CalibrationMissingError(Exception):
    """A palette needs a calibration and the model has none (yet)."""


class CalibrationInfo(BaseModel):
    """What a pilot set is valid for; kept in the file's metadata.

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
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    model_fingerprint: str
    rewards_fingerprint: str
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    longest_answer_tokens: int
    truncated_share: float
    prompts_source: str
    seed: int
    created: datetime
    palette_version: str


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
    """

    pilot: PilotSet
    info: CalibrationInfo
    version: int = 0
    updated: datetime | None = None
    live_prompts: int = 0
    root: Calibration | None = None

    @property
    def id(self) -> str:
        """Name of this calibration in answers, the same for all its versions."""
        return (self.root or self).pilot.fingerprint[:12]

    def covering(self, n_candidates: int) -> Calibration:
        """Return this version, or the root where live prompts bring too few candidates for N."""
        if self.root is None or n_candidates <= self.pilot.n_candidates:
            return self
        return self.root

    def warnings_for(
        self, model_fingerprint: str, rewards_fingerprint: str, sampling: SamplingSettings
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
        shorter = sampling.max_tokens < min(info.max_tokens, info.longest_answer_tokens)
        longer = (
            sampling.max_tokens > info.max_tokens
            and info.truncated_share > TRUNCATED_SHARE_TOLERATED
        )
        if shorter or longer:
            found.append(
                f"max_tokens={sampling.max_tokens} is not covered: the calibration was sampled "
                f"with max_tokens={info.max_tokens} (longest answer "
                f"{info.longest_answer_tokens} tokens, {info.truncated_share:.1%} cut short)"
            )
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

    def save(self, path: Path) -> None:
        """Write the calibration in one piece: a reader sees the old file or the new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        PilotSet(
            self.pilot.rewards,
            self.pilot.values,
            metadata={"calibration": self.info.model_dump(mode="json")},
            counts=self.pilot.counts,
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


def default_path(state_dir: Path, model: str, model_fingerprint: str, rewards: str) -> Path:
    """Return where the calibration of this model with these rewards is kept.

    The name carries both fingerprints, so that another model or another reward is another file
    and never takes the place of one that took hours to make.
    """
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", model).strip("-") or "model"
    both = hashlib.sha256(f"{model_fingerprint} {rewards}".encode()).hexdigest()[:16]
    return state_dir / "calibrations" / f"{slug}-{both}.npz"


def find_calibration(
    named: Path | None,
    kept: Path,
    shipped: Path,
    *,
    values: tuple[str, ...],
    model_fingerprint: str,
    rewards_fingerprint: str,
) -> Calibration | None:
    """Return the calibration to serve with, or None when this model has none yet.

    Parameters
    ----------
    named : Path or None
        The operator's choice: used whatever it was made with, as long as its values are these
        (answers then carry warnings).
    kept : Path
        Where the calibration of this model and these rewards is kept (`default_path`).
    shipped : Path
        The one that comes with the embedded models: used only by them.

    Raises
    ------
    CalibrationError
        For a file that is there and cannot be used, or a named one that is not there.
    """
    if named is not None or kept.exists():
        calibration = load_calibration(named or kept)
        if calibration.pilot.values != values:
            msg = (
                f"calibration {named or kept} is about the values "
                f"{', '.join(calibration.pilot.values)}; the rewards in use give "
                f"{', '.join(values)}: calibrate again with `palette calibrate`"
            )
            raise CalibrationError(msg)
        return calibration
    if shipped.exists():
        calibration = load_calibration(shipped)
        made_with = (calibration.info.model_fingerprint, calibration.info.rewards_fingerprint)
        if made_with == (model_fingerprint, rewards_fingerprint):
            return calibration
    return None
