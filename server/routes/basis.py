"""Which calibration a question about palettes is answered on: that of a chat under the same."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rewards import Message
from server.alignment import Aligner
from server.calibration import Calibration, CalibrationMissingError, system_of
from server.routes.context import Context
from server.schemas import Conditions


@dataclass(frozen=True, slots=True)
class Basis:
    """What an answer about palettes stands on.

    Attributes
    ----------
    aligner : Aligner
        Of the model asked about.
    calibration : Calibration
    warnings : list of str
        Why it does not cover what was asked, and what live traffic has shown against it.
    """

    aligner: Aligner
    calibration: Calibration
    warnings: list[str]


def find_basis(context: Context, asked: Conditions, name: str | None = None) -> Basis | None:
    """Return the basis of an answer; None when the model has no calibration.

    Parameters
    ----------
    context : Context
    asked : Conditions
        What they leave open is as in a chat that does.
    name : str, optional
        Name or id of a calibration.

    Raises
    ------
    ModelNotFoundError, UnknownCalibrationError
    """
    aligner = context.aligner_of(asked.model)
    given = {
        field: getattr(asked, field)
        for field in ("temperature", "top_p", "top_k", "max_tokens")
        if getattr(asked, field) is not None
    }
    sampling = replace(context.settings.sampling, **given)
    sampling = replace(sampling, top_k=max(0, sampling.top_k))
    messages = () if asked.system is None else (Message(role="system", content=asked.system),)
    calibration = aligner.shelf.choose(sampling, messages, name)
    if calibration is None:
        return None
    warnings = calibration.warnings_for(
        aligner.backend.fingerprint, aligner.rewards.fingerprint, sampling, system_of(messages)
    )
    return Basis(aligner, calibration, [*warnings, *aligner.doubts(calibration)])


def basis_of(context: Context, asked: Conditions, name: str | None = None) -> Basis:
    """Return what `find_basis` does.

    Raises
    ------
    CalibrationMissingError
        When the model has no calibration.
    ModelNotFoundError, UnknownCalibrationError
    """
    basis = find_basis(context, asked, name)
    if basis is None:
        msg = "the model has no calibration yet: run `palette calibrate`"
        raise CalibrationMissingError(msg)
    return basis
