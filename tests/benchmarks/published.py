"""The solver beside the MAP paper's procedure, on the pilot answers its authors published.

    python -m tests.benchmarks.published --data FILE [--palettes 1000] [--json OUT]

FILE is a JSON list of flat reward records, one answer a prompt. Four tables: the paper's HHH
palettes at N = inf and at finite N; what more steps would give the paper's procedure; how far the
multipliers fall short on held-out answers; verdicts and times on random palettes (N = inf, the
pooled dual that the paper solves).
"""

import argparse
import importlib.util
import json
import math
import statistics
import sys
import time
from pathlib import Path

# Sets one BLAS thread before numpy is imported.
from tests.benchmarks.solve import describe, quantiles, table, timed  # isort: skip

import numpy as np

from solver import Palette, PilotSet, Status, min_candidates, solve
from solver.dual import ServedDual
from solver.newton import kkt_residual
from solver.serving import serve
from tests.solver.map_reference import paper_multipliers, paper_multipliers_autograd
from tests.solver.problems import explicit_margin

SIZES = (4, 8, 16, 32, 64)


def random_palette(pool, rng):
    """Some values at pooled quantiles between 0.5 and 0.95, the others kept or free."""
    targets = {}
    for name in pool.values:
        kind = rng.choice(["quantile", "keep", "free"], p=[0.6, 0.25, 0.15])
        if kind == "quantile":
            targets[name] = {"quantile": round(float(rng.uniform(0.5, 0.95)), 3)}
        elif kind == "keep":
            targets[name] = "keep"
    return Palette(targets or {pool.values[0]: "keep"})


def against_the_paper(pool, n_palettes, has_torch):
    """Verdicts of both against an explicit linear programme, and their times side by side.

    Times are of CPU: the two take so differently long that a busy machine would decide the ratio.
    """
    rng = np.random.default_rng(0)
    ours_ms, program_ms, numpy_ms, lp_ms = [], [], [], []
    residuals, theirs, seen = [], [], []
    for _ in range(n_palettes):
        palette = random_palette(pool, rng)
        asked = palette.resolve(pool)
        lower = asked.lower[asked.active]
        samples, unit = pool.rewards[:, asked.active], pool.scale[asked.active]
        _, ms, ours = timed(lambda p=palette: solve(p, pool, math.inf), 3)
        ours_ms.append(ms)
        no_upper = np.full(len(lower), np.inf)
        ms, margin = once(lambda: explicit_margin(samples[None], lower, no_upper, unit))  # noqa: B023
        lp_ms.append(ms)
        ms, (paper, paper_feasible) = once(lambda: paper_multipliers(samples, lower))  # noqa: B023
        numpy_ms.append(ms)
        if has_torch:
            ms, _ = once(lambda: paper_multipliers_autograd(samples, lower))  # noqa: B023
            program_ms.append(ms)
        feasible = margin >= -1e-9
        missed = math.nan
        if feasible and paper_feasible:
            dual = ServedDual(pool.groups(math.inf), asked)
            there = dual(paper * unit)
            missed = float(((lower - dual.origin[asked.active]) / unit - there.levels).max())
            theirs.append(kkt_residual(dual, paper * unit, there))
        if ours.status is Status.OPTIMAL:
            residuals.append(ours.kkt_residual)
        seen.append((feasible, ours.is_achievable, paper_feasible, missed))
    truth, said, paper, missed = (np.array(column) for column in zip(*seen, strict=True))
    found = {
        "palettes": n_palettes,
        "feasible, by the linear programme": int(truth.sum()),
        "ours: verdicts that disagree with it": int((said != truth).sum()),
        "ours: largest KKT residual": max(residuals),
        "ours: median CPU ms": statistics.median(ours_ms),
        "linear programme (HiGHS): median CPU ms": statistics.median(lp_ms),
        "paper: feasible called infeasible": int((truth & ~paper).sum()),
        "paper: infeasible called feasible": int((~truth & paper).sum()),
        "paper: feasible, target missed by over 0.01 sd": int((missed > 0.01).sum()),
        "paper: median KKT residual where feasible": statistics.median(theirs),
        "paper's iteration in plain numpy: median CPU ms": statistics.median(numpy_ms),
        "  ours is faster by, median": ratio(numpy_ms, ours_ms),
    }
    if has_torch:
        found["paper's program (autograd): median CPU ms"] = statistics.median(program_ms)
        found["  ours is faster by, median "] = ratio(program_ms, ours_ms)
    table(
        "Random palettes, pooled dual (N = inf)",
        ["what", ""],
        [[name, number] for name, number in found.items()],
    )
    return found


def accuracy(pool, has_torch):
    """What the paper's procedure gains by more steps than its 150, on HHH-60, N = inf."""
    palette = hhh(pool, 0.6)
    asked = palette.resolve(pool)
    dual = ServedDual(pool.groups(math.inf), asked)
    rows = []
    _, ms, ours = timed(lambda: solve(palette, pool, math.inf), 20)
    rows.append(["ours", ours.iterations, ours.kkt_residual, ms, "-"])
    if has_torch:
        paper_multipliers_autograd(pool.rewards, asked.lower, n_steps=2)  # torch's own start
    for n_steps in (150, 300, 600, 1000, 4000):
        ms, (found, _) = once(lambda n=n_steps: paper_multipliers(pool.rewards, asked.lower, n))
        residual = kkt_residual(dual, found * pool.scale, dual(found * pool.scale))
        program = "-"
        if has_torch and n_steps <= 1000:  # its time grows with the square of the steps
            spent, _ = once(
                lambda n=n_steps: paper_multipliers_autograd(pool.rewards, asked.lower, n)
            )
            program = f"{spent:.0f}"
        rows.append(["paper", n_steps, residual, ms, program])
    header = ["procedure", "steps", "KKT residual", "CPU ms (numpy)", "CPU ms (its program)"]
    table("HHH-60 to more accuracy, N = inf", header, rows)
    return [dict(zip(header, row, strict=True)) for row in rows]


def once(call):
    """CPU milliseconds of one call, and what it returned."""
    began = time.process_time()
    result = call()
    return 1e3 * (time.process_time() - began), result


def ratio(theirs, ours):
    return statistics.median(t / o for t, o in zip(theirs, ours, strict=True))


def hhh(pool, q):
    """The paper's HHH palette: the first three values at a quantile of traffic, the others kept."""
    targets = {name: {"quantile": q, "of": "traffic"} for name in pool.values[:3]}
    return Palette(targets | dict.fromkeys(pool.values[3:], "keep"))


def published_palettes(pool):
    """HHH-50 to HHH-80 at each N: verdict, multipliers, expected levels, ESS and KL."""
    rows = []
    for q in (0.5, 0.6, 0.7, 0.8):
        palette = hhh(pool, q)
        smallest = min_candidates(palette, pool)
        for n in (math.inf, *SIZES):
            found = solve(palette, pool, n)
            name = f"HHH-{100 * q:.0f}, N = {n if n < math.inf else 'inf'}"
            served = found.status is Status.OPTIMAL
            rows.append([
                name,
                found.status.value,
                short(found.multipliers) if served else "-",
                short(found.expected[:3]) if served else "-",
                f"{found.ess:.1f}" if served else "-",
                f"{found.kl:.3f}" if served else "-",
                str(smallest),
            ])  # fmt: skip
    header = ["palette", "status", "multipliers", "expected, first three", "ESS", "KL", "least N"]
    table(f"The paper's palettes; values: {', '.join(pool.values)}", header, rows)
    return [dict(zip(header, row, strict=True)) for row in rows]


def short(numbers):
    return " ".join(f"{number:.2f}" for number in numbers)


def shortfalls(pool, n_splits):
    """Worst mean shortfall on held-out answers, standard deviations: the paper's λ and ours.

    λ is solved on one half of the pool and served on groups of the other half. The halves' own
    means differ by sampling, which no method could know: that difference is taken out.
    """
    rows = []
    for q in (0.55, 0.6, 0.65):
        for n in SIZES:
            missed = {"paper": [], "served": []}
            verdicts = []
            for seed in range(n_splits):
                order = np.random.default_rng(seed).permutation(pool.n_prompts)
                fit, held = (
                    PilotSet(pool.rewards[half], pool.values, pooled=True)
                    for half in np.array_split(order, 2)
                )
                palette = quantiles(fit.values, q)
                asked = palette.resolve(fit)
                served = solve(palette, fit, n)
                verdicts.append(served.status)
                chosen = {"paper": paper_multipliers(fit.rewards, asked.lower)[0]}
                if served.status is Status.OPTIMAL:
                    chosen["served"] = served.multipliers
                dual = ServedDual(held.groups(n, groups=1000), asked)
                for name, multipliers in chosen.items():
                    reached = serve(dual, multipliers * held.scale).expected
                    reached -= held.base - fit.base
                    missed[name].append((asked.lower - reached) / fit.scale)
            optimal = sum(status is Status.OPTIMAL for status in verdicts)
            worst = {
                name: f"{np.mean(those, axis=0).max():+.3f}" if those else "-"
                for name, those in missed.items()
            }
            said = f"{optimal}/{n_splits}"
            rows.append([f"all at {q:g}, N = {n}", worst["paper"], worst["served"], said])
    header = ["palette", "paper's shortfall", "served shortfall", "feasible in"]
    table(
        f"Held-out shortfall of the worst value, standard deviations, mean of {n_splits} splits",
        header,
        rows,
    )
    print("  Where a palette is infeasible at this N the solver says so and serves nothing.")
    return [dict(zip(header, row, strict=True)) for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="JSON list of flat reward records")
    parser.add_argument("--palettes", type=int, default=1000, help="random palettes")
    parser.add_argument("--splits", type=int, default=20, help="halvings of the pool")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    pool = PilotSet.load(options.data)
    has_torch = importlib.util.find_spec("torch") is not None
    if not has_torch:
        print("torch is absent: the paper's own program is not timed")
    machine = describe()
    print(machine)
    found = {
        "machine": machine,
        "palettes": published_palettes(pool),
        "accuracy": accuracy(pool, has_torch),
        "shortfall": shortfalls(pool, options.splits),
        "paper": against_the_paper(pool, options.palettes, has_torch),
    }
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
