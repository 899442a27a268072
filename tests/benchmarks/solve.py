"""How fast the solver is, and how its cost grows.

    python -m tests.benchmarks.solve [--data FILE] [--json OUT] [--quick]

FILE is a JSON list of flat reward records, one answer a prompt (the published pilot answers);
without it a synthetic pool of the same size is used. Times are medians on one BLAS thread, by the
clock and of CPU: on a busy machine the two differ. Every time stands beside what it bought:
status, steps, residual. `tests.benchmarks.published` sets the solver beside the paper's procedure.
"""

import argparse
import json
import math
import os
import platform
import resource
import statistics
import sys
import time
from pathlib import Path

# Before numpy is imported: threads of a small product cost more than they bring.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from solver import Palette, PilotSet, SolutionCache, min_candidates, repair, solve


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


def describe():
    """One line: the machine and its load."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return f"numpy {np.__version__}, {machine}, load {os.getloadavg()[0]:.1f}"


def speed(pool, repeats, counts):
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
    sixty = quantiles(pool.values, 0.6)
    add(f"pool, N = inf, {pool.n_prompts} x {pool.n_values}", lambda: solve(sixty, pool, math.inf))
    few = max(3, repeats // 5)
    for groups in counts:
        big = PilotSet(synthetic(2000, 64, 6), pilot.values)
        big.groups(16, groups=groups)
        add(
            f"cold, {groups:,} x 16 x 6",
            lambda big=big, groups=groups: solve(palette, big, groups=groups),
            few if groups < 1_000_000 else 2,
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for method in ("interpolate", "nearest", "greedy"):
        far = quantiles(pilot.values, 0.97)
        ms, cpu, found = timed(lambda m=method, far=far: repair(far, pilot, 16, m), few)
        residual = found.solution.kkt_residual
        rows.append([f"repair, {method}", ms, cpu, "", found.solution.status.value, residual])
    ms, cpu, n = timed(lambda: min_candidates(palette, pilot), few)
    rows.append([f"min_candidates (gives {n})", ms, cpu, "", "", ""])
    header = ["what", "median ms", "CPU ms", "steps", "status", "KKT residual"]
    table("Speed of the solver", header, rows)
    print(f"  peak memory up to {counts[-1]:,} groups: {peak:.0f} MiB")
    return [dict(zip(header, row, strict=True)) for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="JSON list of flat reward records")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, no million groups")
    options = parser.parse_args()
    if options.data:
        pool = PilotSet.load(options.data)
    else:
        flat = synthetic(2312, 1, 6, seed=1)[:, 0]
        pool = PilotSet(flat, [f"v{i}" for i in range(6)], pooled=True)
    machine = describe()
    print(machine)
    print(f"pool: {options.data or 'synthetic'}, {pool.n_prompts} samples x {pool.n_values} values")
    counts = (2_000, 8_000, 32_000, 128_000) + (() if options.quick else (1_000_000,))
    found = {
        "machine": machine,
        "pool": str(options.data or "synthetic"),
        "speed": speed(pool, 10 if options.quick else 50, counts),
    }
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
