"""From what is measured to what is aligned: the transforms of values, fitted on a calibration.

Clients speak in a value's own unit; palettes are solved on what the transforms make of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rewards.transforms import LENGTH, FittedTransform
from server.schemas import PaletteOptions
from solver import PaletteError

# Where a target names levels in the value's own unit.
_LEVELS = ("at_least", "at_most", "between")


@dataclass(frozen=True, slots=True)
class Units:
    """How the values of a suite are made of its columns.

    Attributes
    ----------
    columns, values : tuple of str
        What is measured, and what is aligned.
    fitted : mapping of str to FittedTransform
        By value; the others are aligned as they are measured.
    """

    columns: tuple[str, ...]
    values: tuple[str, ...]
    fitted: Mapping[str, FittedTransform]

    def align(self, measured: np.ndarray) -> np.ndarray:
        """Return aligned rewards, shape (..., n_candidates, n_values).

        Parameters
        ----------
        measured : ndarray, shape (..., n_candidates, n_columns)
            The last axis but one holds candidates of one prompt. NaN stays NaN.
        """
        lengths = None
        if LENGTH in self.columns:
            lengths = np.log1p(measured[..., self.columns.index(LENGTH)])
        found = []
        for name in self.values:
            rewards = measured[..., self.columns.index(name)]
            transform = self.fitted.get(name)
            found.append(rewards if transform is None else transform(rewards, lengths))
        return np.stack(found, axis=-1)

    def of(self, columns: tuple[str, ...]) -> Units:
        """Return the same for a matrix with other columns."""
        return self if columns == self.columns else replace(self, columns=columns)

    def translate(self, options: PaletteOptions) -> PaletteOptions:
        """Return the palette with its levels and floors in aligned units.

        Raises
        ------
        PaletteError
            For a floor on a value whose transform looks at more than the reward.
        """
        targets = {
            name: self._target(name, target) if name in self.fitted else target
            for name, target in options.targets.items()
        }
        floors = {name: self._floor(name, floor) for name, floor in options.floors.items()}
        return options.model_copy(update={"targets": targets, "floors": floors})

    def _target(self, name: str, target: Any) -> Any:
        if not isinstance(target, dict):
            return target
        level = self.fitted[name].level
        return {
            key: _mapped(level, value) if key in _LEVELS else value for key, value in target.items()
        }

    def _floor(self, name: str, floor: float) -> float:
        transform = self.fitted.get(name)
        if transform is None:
            return floor
        if not transform.config.is_pointwise:
            msg = (
                f"{name} is counted from other answers or their length, so a floor says nothing "
                "about one answer: leave the floor out, or the transform of the rewards file"
            )
            raise PaletteError(msg, param=f"floors.{name}")
        return transform.level(floor)


def _mapped(level: Callable[[float], float], value: Any) -> Any:
    """Return one level, or the two of a range; what is neither is for the solver to refuse."""
    if isinstance(value, list | tuple):
        return [_mapped(level, one) for one in value]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return level(float(value)) if is_number else value
