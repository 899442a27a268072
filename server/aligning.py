"""Calibrations and palettes in the units that are aligned, as a suite's transforms say."""

from __future__ import annotations

from dataclasses import replace

from rewards import RewardError, RewardSuite
from rewards.transforms import LENGTH, fit_all
from server.calibration import Calibration, CalibrationError, CalibrationMissingError
from server.schemas import PaletteOptions
from server.units import Units
from solver import PilotSet


def in_units(calibration: Calibration, suite: RewardSuite) -> Calibration:
    """Return a calibration with its rewards aligned as the suite says.

    Raises
    ------
    CalibrationError
        When the calibration lacks a column, or a transform cannot be fitted on it.
    """
    content = calibration.measured or calibration.pilot
    if content.values == suite.names and not suite.transforms:
        return calibration
    needed = [*suite.names]
    needed += [LENGTH] if any(one.length_control for one in suite.transforms.values()) else []
    lacking = [name for name in needed if name not in content.values]
    if lacking:
        msg = f"it has no {lacking[0]}: calibrate again with `palette calibrate`"
        raise CalibrationError(msg)
    try:
        fitted = fit_all(suite.transforms, content.rewards, content.values)
    except RewardError as error:
        raise CalibrationError(str(error)) from error
    units = Units(content.values, suite.names, fitted)
    pilot = PilotSet(units.align(content.rewards), suite.names, counts=content.counts)
    return replace(calibration, pilot=pilot, measured=content, own_units=units)


def translated(
    options: PaletteOptions, calibration: Calibration | None, suite: RewardSuite
) -> PaletteOptions:
    """Return a palette in the units that are aligned.

    Raises
    ------
    PaletteError
        As `Units.translate`.
    CalibrationMissingError
        When a value it names has a transform and there is no calibration to fit it on.
    """
    if not suite.transforms:
        return options
    if calibration is not None and calibration.units is not None:
        return calibration.units.translate(options)
    for name in (*options.targets, *options.floors):
        if name in suite.transforms:
            msg = (
                f"{name} has a transform, which needs a calibration, and the model has none yet: "
                "run `palette calibrate`, or leave this value out"
            )
            raise CalibrationMissingError(msg)
    return options
