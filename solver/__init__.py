"""Palettes of human values, solved: which candidate to serve so that every value gets its level.

>>> from solver import Palette, PilotSet, solve
>>> pilot = PilotSet.load("calibration.npz")  # doctest: +SKIP
>>> palette = Palette({"harmless": {"quantile": 0.8}, "helpful": "keep"})
>>> solution = solve(palette, pilot, candidates=16)  # doctest: +SKIP
"""

from solver.cache import SolutionCache
from solver.errors import PaletteError, PilotError, SolverError, UnknownValueError
from solver.frontiers import Frontier, frontier
from solver.interferences import Interference, interference
from solver.negotiation import Agreement, Party, negotiate
from solver.palette import Palette
from solver.pilot import PilotSet
from solver.planning import min_candidates
from solver.repairs import Repair, repair
from solver.sensitivity import Prices, prices
from solver.sequences import Sequential, sequential
from solver.solution import Solution, Status
from solver.solving import solve
from solver.spreads import SpreadPalette, spread

__all__ = [
    "Agreement",
    "Frontier",
    "Interference",
    "Palette",
    "PaletteError",
    "Party",
    "PilotError",
    "PilotSet",
    "Prices",
    "Repair",
    "Sequential",
    "Solution",
    "SolutionCache",
    "SolverError",
    "SpreadPalette",
    "Status",
    "UnknownValueError",
    "frontier",
    "interference",
    "min_candidates",
    "negotiate",
    "prices",
    "repair",
    "sequential",
    "solve",
    "spread",
]
