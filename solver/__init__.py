"""Palettes of human values, solved: which candidate to serve so that every value gets its level.

>>> from solver import Palette, PilotSet, solve
>>> pilot = PilotSet.load("calibration.npz")  # doctest: +SKIP
>>> palette = Palette({"harmless": {"quantile": 0.8}, "helpful": "keep"})
>>> solution = solve(palette, pilot, candidates=16)  # doctest: +SKIP
"""

from solver.cache import SolutionCache
from solver.errors import PaletteError, PilotError, SolverError, UnknownValueError
from solver.palette import Palette
from solver.pilot import PilotSet
from solver.planning import min_candidates
from solver.repairs import Repair, repair
from solver.solution import Solution, Status
from solver.solving import solve

__all__ = [
    "Palette",
    "PaletteError",
    "PilotError",
    "PilotSet",
    "Repair",
    "Solution",
    "SolutionCache",
    "SolverError",
    "Status",
    "UnknownValueError",
    "min_candidates",
    "repair",
    "solve",
]
