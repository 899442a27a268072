"""Do promised intervals hold what is realised? Random palettes on held-out prompts.

    python -m tests.benchmarks.coverage --pool heldout.npz [other.npz ...] --out coverage.json

Makes random palettes that are feasible at each N, solves them on the calibration that ships, and
serves them on fresh candidates of held-out prompts (the pool of `tests.benchmarks.fidelity`). A
level is covered when the realised mean lies within the promise's own error and that of the held-out
prompts, both variances together, at 95 %. Levels of one pool are correlated, and so are palettes on
one calibration: the figure of one pool has no binomial error. Several pools have a table each, and
one together, and are tested on each other without the calibration. The same is therefore done on
random parts, solved on one and tested on the other:

calibration      halves of the calibration's own prompts: nothing but sampling differs
held-out         halves of the held-out prompts: the same
across           a random half of the calibration, tested on a random half of the held-out prompts
split anew       all prompts together, split at random into as many as the calibration has and as
                 many as are held out: how far the figure above moves by the luck of the split

Beside each level its gain over the base model is tested too, promised and realised, each against
the base level of its own prompts: what is left when prompts of another kind shift both alike.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np

from server import embedded
from server.calibration import load_calibration
from server.evaluation.comparing import base_levels
from server.evaluation.measures import Mean, cut, mean_over_prompts, served_levels
from server.evaluation.methods import Method, bounds_of, paper_solution
from solver import Palette, PilotSet, Solution, Status, solve

CANDIDATES = (4, 8, 16, 32)
SEED = 20261121


def random_palette(rng: np.random.Generator, pilot: PilotSet) -> Palette:
    """Return one to five values with targets of every kind that resolves to a level."""
    n_values = int(rng.integers(1, 6))
    targets = {}
    for name in rng.choice(pilot.values, size=n_values, replace=False).tolist():
        i = pilot.values.index(name)
        base, sigma = float(pilot.base[i]), float(pilot.within_std[i])
        size = float(rng.uniform(0.05, 0.8)) / math.sqrt(n_values)
        targets[name] = [
            {"quantile": 0.5 + 0.3 * size},
            {"quantile": 0.5 + 0.2 * size, "of": "traffic"},
            {"gain": size},
            {"at_least": base + size * sigma},
            {"at_most": base - size * sigma},
            {"between": [base + (size - 0.1) * sigma, base + size * sigma]},
            "keep",
        ][int(rng.integers(7))]
    return Palette(targets)


def feasible(
    pilot: PilotSet, n_candidates: int, wanted: int, seed: int
) -> list[tuple[Palette, Solution]]:
    """Return the first random palettes that can be met on a pilot set, with their solutions."""
    rng = np.random.default_rng(seed)
    found = []
    while len(found) < wanted:
        palette = random_palette(rng, pilot)
        solution = solve(palette, pilot, n_candidates)
        if solution.status is Status.OPTIMAL:
            found.append((palette, solution))
    return found


def means_of(n: int, multipliers: np.ndarray, rewards: np.ndarray) -> tuple[Mean, Mean]:
    """Return the mean level of every value, and its gain over the base level of its prompts."""
    groups = cut(rewards, n)
    weights = Method("", multipliers, np.ones(len(multipliers))).weights(groups)
    rows = served_levels(weights, groups)
    everything = np.ones(rows.shape[:2], dtype=bool), np.arange(len(rows))
    base = rewards.mean(axis=1)[:, None]
    return mean_over_prompts(rows, *everything), mean_over_prompts(rows - base, *everything)


def rows_of(pilot: PilotSet, pool: np.ndarray, n_palettes: int, seed: int, with_paper: bool):
    """Return one row per palette, N and value named."""
    rows = []
    for n_candidates in CANDIDATES:
        for k, (palette, solution) in enumerate(feasible(pilot, n_candidates, n_palettes, seed)):
            found, gain = means_of(n_candidates, solution.multipliers, pool)
            _, promised_gain = means_of(n_candidates, solution.multipliers, pilot.rewards)
            half = found.half_width(solution.stderr)
            gain_half = gain.half_width(promised_gain.stderr)
            alone = found.half_width()
            paper = None
            if with_paper:
                other = paper_solution(palette, solution, pilot)
                if other.status is Status.OPTIMAL:
                    paper = means_of(n_candidates, other.multipliers, pool)[0].mean
            for value in solution.targets:
                i = pilot.values.index(value)
                promised, sigma = solution.expected[i], pilot.scale[i]
                low, high = bounds_of(palette, solution, value)
                row = {
                    "candidates": n_candidates,
                    "palette": k,
                    "value": value,
                    "binds": bool(solution.multipliers[i]),
                    "promised_minus_asked": float(min(promised - low, high - promised) / sigma),
                    "error": float((found.mean[i] - promised) / sigma),
                    "half": float(half[i] / sigma),
                    "gain_error": float((gain.mean[i] - promised_gain.mean[i]) / sigma),
                    "gain_half": float(gain_half[i] / sigma),
                    "half_without_calibration": float(alone[i] / sigma),
                    "paper": None if paper is None else float((paper[i] - promised) / sigma),
                }
                row["covered"] = abs(row["error"]) <= row["half"]
                rows.append(row)
    return rows


def share(rows: list[dict], half: str = "half", error: str = "error") -> float:
    return float(np.mean([abs(row[error]) <= row[half] for row in rows]))


def halves(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    order = rng.permutation(n)
    return order[: n // 2], order[n // 2 :]


def split(kind: str, pilot: PilotSet, pool: PilotSet, rng: np.random.Generator):
    """Return a pilot set to solve on and rewards to test on, drawn at random."""
    if kind == "split anew":
        n_candidates = min(pilot.n_candidates, pool.n_candidates)
        both = [one.rewards[:, :n_candidates] for one in (pilot, pool)]
        mixed = rng.permutation(np.concatenate(both))
        return PilotSet(mixed[: pilot.n_prompts], pilot.values), mixed[pilot.n_prompts :]
    source = pool if kind == "held-out" else pilot
    first, second = halves(rng, source.n_prompts)
    tested = source.rewards[second]
    if kind == "across":
        tested = pool.rewards[halves(rng, pool.n_prompts)[0]]
    return PilotSet(source.rewards[first], source.values), tested


def print_table(rows: list[dict]) -> None:
    print(
        "| N | levels | covered | median half width, σ | largest error, σ | within 0.05 σ or "
        "interval | without calibration's error | gains covered | paper's λ: median, largest "
        "error, σ |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for n in CANDIDATES:
        some = [row for row in rows if row["candidates"] == n]
        paper = [abs(row["paper"]) for row in some if row["paper"] is not None and row["binds"]]
        worst = max(some, key=lambda row: abs(row["error"]))
        lenient = np.mean([row["covered"] or abs(row["error"]) <= 0.05 for row in some])
        print(
            f"| {n} | {len(some)} | {share(some):.1%} | {np.median([r['half'] for r in some]):.3f} "
            f"| {worst['error']:+.3f} ({worst['value']}) | {lenient:.1%} "
            f"| {share(some, 'half_without_calibration'):.1%} "
            f"| {share(some, 'gain_half', 'gain_error'):.1%} "
            f"| {np.median(paper):.3f}, {max(paper):.3f} |"
        )


def print_values(rows: list[dict], base: dict) -> None:
    print("\n| value | levels | covered | gains covered | mean error, σ | base model's shift, σ |")
    print("|---|---|---|---|---|---|")
    for value, shift in base.items():
        some = [row for row in rows if row["value"] == value]
        print(
            f"| {value} | {len(some)} | {share(some):.1%} "
            f"| {share(some, 'gain_half', 'gain_error'):.1%} "
            f"| {np.mean([row['error'] for row in some]):+.4f} "
            f"| {shift['shift_sigma']:+.4f} ± {shift['half_width_sigma']:.4f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--pool", type=Path, nargs="+", required=True, help="made by the fidelity benchmark"
    )
    parser.add_argument("--out", type=Path, help="JSON with every level")
    parser.add_argument("--palettes", type=int, default=100, help="feasible ones for each N")
    parser.add_argument("--halvings", type=int, default=20)
    parser.add_argument("--halving-palettes", type=int, default=25)
    arguments = parser.parse_args()

    pilot = load_calibration(embedded.CALIBRATION).pilot
    pools = [PilotSet.load(path) for path in arguments.pool]
    if len(pools) > 1:
        n_candidates = min(pool.n_candidates for pool in pools)
        together = np.concatenate([pool.rewards[:, :n_candidates] for pool in pools])
        pools.append(PilotSet(together, pilot.values))
    print(
        f"calibration {pilot.n_prompts} x {pilot.n_candidates}; {arguments.palettes} random "
        "feasible palettes for each N"
    )
    tables = []
    for pool in pools:
        print(f"\nheld-out {pool.n_prompts} x {pool.n_candidates}\n")
        rows = rows_of(pilot, pool.rewards, arguments.palettes, SEED, with_paper=True)
        print_table(rows)
        print(
            f"\nall {len(rows)} levels: {share(rows):.1%} covered; gains: "
            f"{share(rows, 'gain_half', 'gain_error'):.1%}"
        )
        base = base_levels(pilot, pool.rewards, np.arange(pool.n_prompts))
        print_values(rows, base)
        tables.append({"prompts": pool.n_prompts, "levels": rows, "base": base})

    if len(pools) > 1:
        print("\nwithout the calibration: solved on one pool, tested on the other pools")
        for k, pool in enumerate(pools[:-1]):
            others = [one.rewards for i, one in enumerate(pools[:-1]) if i != k]
            least = min(one.shape[1] for one in others)
            tested = np.concatenate([one[:, :least] for one in others])
            some = rows_of(pool, tested, arguments.halving_palettes, SEED, with_paper=False)
            print(f"{arguments.pool[k].name}: {share(some):.1%} of {len(some)} levels")

    found = {}
    seen = share(rows)
    for kind in ("calibration", "held-out", "across", "split anew"):
        rng = np.random.default_rng([SEED, len(kind)])
        shares = {n: [] for n in CANDIDATES}
        gains = []
        for k in range(arguments.halvings):
            half, tested = split(kind, pilot, pool, rng)
            some = rows_of(half, tested, arguments.halving_palettes, SEED + 1 + k, with_paper=False)
            gains.append(share(some, "gain_half", "gain_error"))
            for n in CANDIDATES:
                shares[n].append(share([row for row in some if row["candidates"] == n]))
        found[kind] = {"levels": shares, "gains": gains}
        told = ", ".join(
            f"N={n} {np.mean(s):.1%} ± {1.96 * np.std(s, ddof=1) / math.sqrt(len(s)):.1%}"
            for n, s in shares.items()
        )
        whole = np.mean(list(shares.values()), axis=0)
        print(
            f"\n{kind}, {arguments.halvings} halvings x {arguments.halving_palettes} palettes: "
            f"{told}; all {whole.mean():.1%} ± "
            f"{1.96 * whole.std(ddof=1) / math.sqrt(len(whole)):.1%}; gains {np.mean(gains):.1%}; "
            f"one alone: standard deviation {whole.std(ddof=1):.1%}, {whole.min():.1%} to "
            f"{whole.max():.1%}",
            flush=True,
        )
        if kind == "split anew":
            print(f"{np.mean(whole <= seen):.0%} of these splits cover at most {seen:.1%}")
    if arguments.out:
        arguments.out.write_text(json.dumps({"pools": tables, "halvings": found}, indent=1))


if __name__ == "__main__":
    main()
