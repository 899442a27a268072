"""How fast and how true the solver is, beside the MAP paper's own procedure.

    python -m tests.benchmarks.solve [--data FILE] [--json OUT] [--quick]

FILE is a JSON list of flat reward records, one answer a prompt (the published pilot answers);
without it a synthetic pool of the same size is used. Times are medians on one BLAS thread, by the
clock and of CPU: on a busy machine the two differ. Every time stands beside what it bought:
status, steps, residual, agreement with an exact verdict.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path

# Before numpy is imported: threads of a small product cost more than they bring.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from solver import Palette, PilotSet, SolutionCache, Status, min_candidates, repair, solve
from solver.dual import ServedDual
from solver.feasibility import headroom
from solver.serving import serve
from tests.solver.map_reference import paper_multipliers, paper_multipliers_autograd


def synthetic(n_prompts, n_candidates, n_values, seed=0):
    """Correlated rewards with a level of its own for each prompt."""
    rng = np.random.default_rng(seed)
    mix = np.linalg.cholesky(0.8 * np.eye(n_values) + 0.2)
    rewards = rng.normal(size=(n_prompts, n_candidates, n_values)) @ mix.T
    return rewards + rng.normal(size=(n_prompts, 1, n_values))


def timed(call, repeats):
    """Median milliseconds of `call` by the clock and of CPU, and what its last run returned."""
    result = call()
    clock, cpu = [], []
    for _ in range(repeats):
        began, began_cpu = time.perf_counter(), time.process_time()
        result = call()
        clock.append(1e3 * (time.perf_counter() - began))
        cpu.append(1e3 * (time.process_time() - began_cpu))
    return statistics.median(clock), statistics.median(cpu), result


def quantiles(values, q):
    return Palette({name: {"quantile": q} for name in values})


def table(title, header, rows):
    cells = [header, *[[entry if isinstance(entry, str) else f"{entry:.4g}" for entry in row]
                       for row in rows]]  # fmt: skip
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    print(f"\n{title}")
    for k, row in enumerate(cells):
        print("  " + "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ))  # fmt: skip
        if k == 0:
            print("  " + "  ".join("-" * width for width in widths))


def speed(pool, repeats):
    """Cold, warm and cached solves, and how their cost grows with the groups."""
    rows = []

    def add(name, call, count=repeats):
        ms, cpu, found = timed(call, count)
        steps = str(found.iterations)
        rows.append([name, ms, cpu, steps, found.status.value, found.kkt_residual])
        return found

    pilot = PilotSet(synthetic(500, 16, 6), [f"v{i}" for i in range(6)])
    palette, near = quantiles(pilot.values, 0.65), quantiles(pilot.values, 0.66)
    cold = add("cold, 500 x 16 x 6", lambda: solve(palette, pilot))
    add("warm, 500 x 16 x 6", lambda: solve(near, pilot, warm_start=cold))
    cache = SolutionCache()
    cache.solve(palette, pilot)
    count = 2000

    def look_up():
        for _ in range(count):
            found = cache.lookup(palette, pilot, 16)
        return found

    ms, cpu, found = timed(look_up, 5)
    rows.append(["cached", ms / count, cpu / count, "0", found.status.value, found.kkt_residual])
    add("infeasible, 500 x 16 x 6", lambda: solve(quantiles(pilot.values, 0.97), pilot))
    answer = PilotSet(pilot.rewards[:1, :, :2], pilot.values[:2])
    wire = Palette({"v0": {"quantile": 0.65}, "v1": "keep"})
    add("scope answer, 1 x 16 x 2", lambda: solve(wire, answer))
    add(
        f"pool, N = inf, {pool.n_prompts} x {pool.n_values}",
        lambda: solve(quantiles(pool.values, 0.6), pool, math.inf),
    )
    few = max(3, repeats // 5)
    for groups in (2_000, 8_000, 32_000, 128_000):
        big = PilotSet(synthetic(2000, 64, 6), pilot.values)
        big.groups(16, groups=groups)
        add(
            f"cold, {groups} x 16 x 6",
            lambda big=big, groups=groups: solve(palette, big, groups=groups),
            few,
        )
    for method in ("interpolate", "nearest", "greedy"):
        far = quantiles(pilot.values, 0.97)
        ms, cpu, found = timed(lambda m=method, far=far: repair(far, pilot, 16, m), few)
        residual = found.solution.kkt_residual
        rows.append([f"repair, {method}", ms, cpu, "", found.solution.status.value, residual])
    ms, cpu, n = timed(lambda: min_candidates(palette, pilot), few)
    rows.append([f"min_candidates (gives {n})", ms, cpu, "", "", ""])
    header = ["what", "median ms", "CPU ms", "steps", "status", "KKT residual"]
    table("Speed of the solver", header, rows)
    return [dict(zip(header, row, strict=True)) for row in rows]


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


def against_the_paper(pool, n_palettes, n_autograd):
    """The pooled dual, solved by both on the same palettes; verdicts against an exact headroom.

    Times are of CPU: the two take so differently long that a busy machine would decide the ratio.
    """
    rng = np.random.default_rng(0)
    times = {"ours": [], "paper": [], "autograd": []}
    residuals, seen = [], []
    for k in range(n_palettes):
        palette = random_palette(pool, rng)
        constraints = palette.resolve(pool)
        dual = ServedDual(pool.groups(math.inf), constraints)
        feasible = headroom(dual, dual.centre)[1] >= -1e-9
        _, ms, ours = timed(lambda p=palette: solve(p, pool, math.inf), 3)
        times["ours"].append(ms)
        columns = constraints.active
        problem = pool.rewards[:, columns], constraints.lower[columns]
        _, ms, (paper, paper_feasible) = timed(lambda p=problem: paper_multipliers(*p), 1)
        times["paper"].append(ms)
        if k < n_autograd:
            began = time.process_time()
            paper_multipliers_autograd(*problem)
            times["autograd"].append(1e3 * (time.process_time() - began))
        missed = math.nan
        if feasible and paper_feasible:
            reached = serve(dual, paper * pool.scale[columns]).expected[columns]
            missed = float(((constraints.lower[columns] - reached) / pool.scale[columns]).max())
        if ours.status is Status.OPTIMAL:
            residuals.append(ours.kkt_residual)
        seen.append((feasible, ours.is_achievable, paper_feasible, missed))
    truth, ours, paper, missed = (np.array(column) for column in zip(*seen, strict=True))

    def ratio(name):
        # zip stops at the fewer palettes that the slow one was run on
        return statistics.median(p / o for p, o in zip(times[name], times["ours"], strict=False))

    found = {
        "palettes": n_palettes,
        "feasible": int(truth.sum()),
        "ours: wrong verdicts": int((ours != truth).sum()),
        "ours: largest KKT residual": max(residuals),
        "ours: median CPU ms": statistics.median(times["ours"]),
        "paper: feasible called infeasible": int((truth & ~paper).sum()),
        "paper: infeasible called feasible": int((~truth & paper).sum()),
        "paper: feasible missed by over 0.01 sd": int((missed > 0.01).sum()),
        "paper's iteration in plain numpy: median CPU ms": statistics.median(times["paper"]),
        "ours against it, times faster": ratio("paper"),
    }
    if times["autograd"]:
        found["paper's program (autograd): median CPU ms"] = statistics.median(times["autograd"])
        found["ours against it, times faster (program)"] = ratio("autograd")
    table(
        "Against the paper's procedure: pooled dual, random palettes",
        ["what", ""],
        [[name, number] for name, number in found.items()],
    )
    return found


def shortfalls(pool, n_splits):
    """Worst mean shortfall on held-out groups, standard deviations: the paper's λ and ours."""
    rows = []
    for q in (0.55, 0.6, 0.65):
        for n in (4, 8, 16, 32, 64):
            worst = {"paper": [], "served": []}
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
                paper, _ = paper_multipliers(fit.rewards, asked.lower)
                dual = ServedDual(held.groups(n, groups=1000), asked)
                # The halves' means differ by sampling; no method could know by how much.
                shift = held.base - fit.base
                for name, multipliers in (("paper", paper), ("served", served.multipliers)):
                    reached = serve(dual, multipliers * held.scale).expected - shift
                    worst[name].append((asked.lower - reached) / fit.scale)
            optimal = [status is Status.OPTIMAL for status in verdicts]
            paper = float(np.mean(worst["paper"], axis=0).max())
            served = float(np.mean(worst["served"], axis=0).max())
            said = f"{sum(optimal)}/{n_splits}"
            rows.append([f"all at {q:g}, N = {n}", paper, served if any(optimal) else math.nan,
                         said])  # fmt: skip
    header = ["palette", "paper's shortfall", "served shortfall", "said feasible"]
    table(f"Held-out shortfall in standard deviations, mean of {n_splits} splits", header, rows)
    print(
        "  Where a palette is infeasible at this N the solver says so; its shortfall is then that"
    )
    print("  of an iterate nobody would serve.")
    return [dict(zip(header, row, strict=True)) for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="JSON list of flat reward records")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    options = parser.parse_args()
    if options.data:
        pool = PilotSet.load(options.data)
    else:
        flat = synthetic(2312, 1, 6, seed=1)[:, 0]
        pool = PilotSet(flat, [f"v{i}" for i in range(6)], pooled=True)
    n_autograd = 3 if options.quick else 15
    has_torch = importlib.util.find_spec("torch") is not None
    if not has_torch:
        print("torch is absent: the paper's own program is not timed")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"numpy {np.__version__}, {machine}, load {os.getloadavg()[0]:.1f}")
    print(f"pool: {options.data or 'synthetic'}, {pool.n_prompts} samples x {pool.n_values} values")
    found = {
        "machine": machine,
        "numpy": np.__version__,
        "pool": str(options.data or "synthetic"),
        "speed": speed(pool, 10 if options.quick else 50),
        "paper": against_the_paper(
            pool, 30 if options.quick else 120, n_autograd if has_torch else 0
        ),
        "shortfall": shortfalls(pool, 2 if options.quick else 8),
    }
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
