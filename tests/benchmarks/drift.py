"""A drill for the watch over promises: how soon it sees a drift, how often it cries wolf.

    python -m tests.benchmarks.drift [--runs N] [--requests N] [--prompts N] [--json OUT] [--quick]

The population is the rewards shipped with the embedded models, prompts x 32 answers; no model runs.
Each run draws a calibration's prompts and every live prompt from it, each with 16 of its answers,
under three palettes in turn. Then the live prompts shift: they are drawn by exp(s z), with z the
standardised mean reward that a prompt has in one value; or every answer's reward in it moves.
Printed are requests from the shift to the first alarm, runs with an alarm without a shift, and the
largest error of a promise, in standard deviations within a prompt, against the level that its
multipliers have in the shifted population, before and after as many requests.

With `--pool FILE` (of `tests.benchmarks.fidelity`) live prompts come from topics that were never
calibrated on instead; see `tests.benchmarks.topics`.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from server import embedded
from server.calibration import load_calibration
from solver import PilotSet
from tests.benchmarks.following import N_CANDIDATES, Following
from tests.benchmarks.topics import topic_drill, topics_of

# Value, tilt of the prompts, move of the rewards in standard deviations within a prompt.
SHIFTS = [
    ("helpful", 1.0, 0.0),
    ("helpful", 2.0, 0.0),
    ("harmless", -2.0, 0.0),
    ("helpful", 0.0, -0.25),
    ("helpful", 0.0, -0.5),
    ("words", 0.0, 1.0),
]


class Population:
    """Prompts that traffic draws from, evenly or by a tilt, and what they answer."""

    def __init__(self, pilot, value=None, tilt=0.0, move=0.0):
        self.rewards = np.array(pilot.rewards)
        self.scale = pilot.scale
        z = np.zeros(len(self.rewards))
        if value is not None:
            column = pilot.values.index(value)
            means = pilot.prompt_means[:, column]
            z = (means - means.mean()) / means.std()
            self.rewards[..., column] += move * pilot.scale[column]
        self.share = np.exp(tilt * z) / np.exp(tilt * z).sum()

    def draw(self, rng, n_candidates):
        prompt = rng.choice(len(self.share), p=self.share)
        return rng.permutation(self.rewards[prompt])[:n_candidates]

    def error(self, promise):
        """Largest miss of a promise in this population, in standard deviations."""
        level = np.zeros(len(self.scale))
        for half in (slice(None, N_CANDIDATES), slice(N_CANDIDATES, 2 * N_CANDIDATES)):
            rewards = self.rewards[:, half]
            logits = rewards @ promise.multipliers
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            level += 0.5 * self.share @ np.einsum("pn,pnm->pm", weights, rewards)
        return float((np.abs(level - promise.solution.expected) / self.scale).max())


class Server(Following):
    """A calibration of its own draw of prompts, and the live state around it."""

    def __init__(self, shipped, before, n_prompts, half_life, mode, rng, folder):
        self.rng = rng
        chosen = rng.choice(len(before.share), n_prompts)
        root = replace(shipped, pilot=PilotSet(before.rewards[chosen], shipped.pilot.values))
        super().__init__(root, half_life, mode, folder)

    def serve_from(self, population, n_requests):
        """Serve requests; return after how many the first alarm came, or None."""
        first = None
        for i in range(n_requests):
            self.serve(population.draw(self.rng, N_CANDIDATES))
            if first is None and self.track.monitor.alarmed:
                first = i + 1
        return first

    def error(self, population):
        return max(population.error(self.promise(options)) for options in self.palettes)


def drill(shipped, options):
    """Return one row for each mode without a shift, and for each shift in each mode."""
    even = Population(shipped.pilot)
    rows = []
    for mode in ("frozen", "on"):
        for value, tilt, move in [(None, 0.0, 0.0), *SHIFTS]:
            shifted = Population(shipped.pilot, value, tilt, move)
            false, found, before, at_shift, after, standing = 0, [], [], [], [], 0
            for run in range(options.runs):
                rng = np.random.default_rng([run, 1])
                with tempfile.TemporaryDirectory() as folder:
                    one = Server(
                        shipped, even, options.prompts, options.half_life, mode, rng, folder
                    )
                    is_false = one.serve_from(even, options.requests) is not None
                    false += is_false
                    before.append(one.error(even))
                    at_shift.append(one.error(shifted))
                    if value is not None:
                        first = one.serve_from(shifted, options.requests)
                        found += [] if is_false or first is None else [first]
                        after.append(one.error(shifted))
                        standing += one.track.monitor.alarmed
            rows.append(
                {
                    "refresh": mode,
                    "shift": shift_name(value, tilt, move),
                    "runs": options.runs,
                    "false alarms": false,
                    "found": len(found) if value is not None else "",
                    "median requests to alarm": float(np.median(found)) if found else "",
                    "error before": float(np.mean(before)),
                    "at the shift": float(np.mean(at_shift)) if value is not None else "",
                    "after": float(np.mean(after)) if after else "",
                    "still drifting": standing if value is not None else "",
                }
            )
            table([rows[-1]], is_headed=len(rows) == 1)
    return rows


def shift_name(value, tilt, move):
    if value is None:
        return "none"
    return f"{value}: prompts by exp({tilt:g} z)" if tilt else f"{value}: answers {move:+g} sd"


def table(rows, *, is_headed):
    widths = [9, 36, 6, 14, 7, 26, 14, 14, 7, 15]
    if is_headed:
        print("  ".join(name.ljust(w) for name, w in zip(rows[0], widths, strict=True)))
    for row in rows:
        cells = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row.values()]
        print("  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--requests", type=int, default=3000, help="before, and after the shift")
    parser.add_argument("--prompts", type=int, default=1000, help="of the calibration")
    parser.add_argument("--half-life", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="2 runs of 600 requests")
    parser.add_argument("--pool", type=Path, help="serve its groups: topics not calibrated on")
    parser.add_argument(
        "--pool-prompts", default="heldout:0", help="its prompts: a split, and the first of them"
    )
    options = parser.parse_args()
    if options.quick:
        options.runs, options.requests = 2, 600
    began = time.perf_counter()
    shipped = load_calibration(embedded.CALIBRATION)
    if options.pool:
        split, first = options.pool_prompts.split(":")
        pool = PilotSet.load(options.pool)
        rows = topic_drill(shipped, pool, topics_of(split, int(first), pool), options)
    else:
        rows = drill(shipped, options)
    print(f"{time.perf_counter() - began:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
