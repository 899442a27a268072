"""A calibration that follows live traffic without a server around it, for the drills."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from server.live.intake import Arrival
from server.live.track import Track
from server.promise import Promise, palette_of
from server.schemas import PaletteOptions
from solver import SolutionCache, Status

N_CANDIDATES = 16
PALETTES = [
    PaletteOptions(targets=targets)
    for targets in (
        {"helpful": {"quantile": 0.7}, "harmless": "keep"},
        {"harmless": {"gain": 0.5}, "positive": {"gain": 0.3}},
        {"humorous": {"quantile": 0.6}, "helpful": {"gain": 0.2}},
    )
]


class Following:
    """A calibration and the live state around it; requests come under each palette in turn."""

    def __init__(self, root, half_life, mode, folder, palettes=PALETTES):
        self.palettes = palettes
        self.cache = SolutionCache()
        self.track = Track(root, mode, half_life, Path(folder) / "none.npz", self.cache)
        self.n_requests = 0

    def promise(self, options):
        pilot, palette = self.track.calibration.pilot, palette_of(options)
        solution, _ = self.cache.solve(palette, pilot, N_CANDIDATES, max_kl=options.max_kl)
        assert solution.status is Status.OPTIMAL
        return Promise("met", palette, N_CANDIDATES, solution.multipliers, solution)

    def serve(self, rewards):
        """Serve one request whose candidates have these rewards."""
        options = self.palettes[self.n_requests % len(self.palettes)]
        self.n_requests += 1
        messages = ({"role": "user", "content": f"prompt {self.n_requests}"},)
        plan = SimpleNamespace(
            prompt=SimpleNamespace(messages=messages, token_ids=()),
            request=SimpleNamespace(palette=options),
        )
        calibration = self.track.calibration
        self.track.take(Arrival(plan, calibration, self.promise(options), rewards), None)
        if self.track.is_due:
            self.track.refresh()
