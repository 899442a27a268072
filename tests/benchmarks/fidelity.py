"""Is what was asked what is served? On prompts that the calibration has not seen.

    python -m tests.benchmarks.fidelity --pool heldout.npz --out fidelity.json

Part one samples fresh candidates for held-out prompts (kept in --pool, so that a second run is
quick), cuts them into groups of N and takes the mean of Σ w r over all groups: the expected level
of the served answer, for λ of the served dual and for the paper's (pooled, N → ∞) λ at the same N.
Part two draws answers through the HTTP server with the official client and compares their plain
mean with what each answer's report promised and with the level asked for.

Errors are in within-prompt standard deviations. An error counts from the level asked for where the
multiplier is not zero; a value that has more than it was asked for at multiplier zero is met.
Intervals are 95 %, over prompts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import time
from pathlib import Path

import numpy as np
from openai import AsyncOpenAI

from server import embedded, terminal
from server.app import make_backend, make_rewards
from server.calibration import load_calibration
from server.calibrator import calibrate
from server.embedded.corpus import prompts as corpus_prompts
from server.evaluation.measures import cut, mean_over_prompts, served_levels
from server.evaluation.methods import Method, bounds_of, paper_solution
from server.settings import load_settings
from solver import Palette, PilotSet, Solution, Status, solve
from tests.running_server import running_server

CANDIDATES = (4, 8, 16, 32)
SEED = 20261120
HTTP_CANDIDATES = 8

PALETTES = {
    "useful, no less safe": {"helpful": {"quantile": 0.75}, "harmless": "keep"},
    "funny and short": {"humorous": {"quantile": 0.75}, "words": {"gain": -0.3}},
    "HHH-65": {
        "helpful": {"quantile": 0.65},
        "harmless": {"quantile": 0.65},
        "humorous": {"quantile": 0.65},
    },
    "warm, as long as today": {
        "positive": {"gain": 0.6},
        "lexical_diversity": "keep",
        "words": {"between": [None, None]},  # filled in: the base mean, a tenth of σ either way
    },
    "four at 60 %": {
        name: {"quantile": 0.6} for name in ("helpful", "harmless", "humorous", "positive")
    },
    "careful and dry": {
        "harmless": {"gain": 0.5},
        "humorous": {"gain": -0.4},
        "log_likelihood": "keep",
    },
    "five values": {
        "helpful": {"quantile": 0.6},
        "harmless": "keep",
        "humorous": {"quantile": 0.55},
        "positive": {"quantile": 0.6},
        "words": {"gain": 0.1},
    },
}


def palettes(pilot: PilotSet) -> dict[str, Palette]:
    """Return the palettes; upper targets are written in the calibration's own units."""
    at = pilot.values.index("words")
    base, sigma = float(pilot.base[at]), float(pilot.within_std[at])
    found = {}
    for name, targets in PALETTES.items():
        filled = dict(targets)
        for value, target in targets.items():
            i = pilot.values.index(value)
            if isinstance(target, dict) and target.get("gain", 0) < 0:
                limit = float(pilot.base[i] + target["gain"] * pilot.within_std[i])
                filled[value] = {"at_most": limit}
            if isinstance(target, dict) and "between" in target:
                filled[value] = {"between": [base - 0.1 * sigma, base + 0.1 * sigma]}
        found[name] = Palette(filled)
    return found


async def sample_pool(
    path: Path, n_prompts: int, n_candidates: int, *, first: int = 0, seed: int = SEED
) -> None:
    """Write fresh candidates' rewards of held-out prompts, sampled with a seed of their own."""
    settings = load_settings()
    backend, rewards = make_backend(settings), make_rewards(settings)
    await backend.start()
    await rewards.start()
    try:
        with terminal.progress_bar("sampling held-out prompts") as progress:
            pool = await calibrate(
                backend,
                rewards,
                [tuple(one) for one in corpus_prompts("heldout")[first:][:n_prompts]],
                n_candidates=n_candidates,
                sampling=settings.sampling,
                seed=seed,
                prompts_source="held out",
                progress=progress,
            )
    finally:
        await backend.close()
        await rewards.close()
    pool.save(path)


def served(rewards: np.ndarray, multipliers: np.ndarray, n_candidates: int) -> np.ndarray:
    """Return the mean of Σ w r over the groups of each prompt: (n_prompts, n_values)."""
    groups = cut(rewards, n_candidates)
    weights = Method("", multipliers, np.ones(len(multipliers))).weights(groups)
    return served_levels(weights, groups).mean(axis=1)


def errors_of(
    levels: np.ndarray, palette: Palette, solution: Solution, sigma: np.ndarray
) -> dict[str, tuple[float, float]]:
    """Return value -> (error, half width of its interval), in within-prompt σ.

    `levels` (n_prompts, n_values) are the prompts' own means.
    """
    found = {}
    everything = np.ones((len(levels), 1), dtype=bool)
    means = mean_over_prompts(levels[:, None], everything, np.arange(len(levels)))
    for value in solution.targets:
        i = solution.values.index(value)
        mean, half = means.mean[i], means.half_width()[i]
        low, high = bounds_of(palette, solution, value)
        if solution.multipliers[i] > 0:
            error = mean - low
        elif solution.multipliers[i] < 0:
            error = mean - high
        else:  # more than was asked for is no error where nothing pulls
            error = min(mean - low, 0.0) + max(mean - high, 0.0)
        found[value] = (float(error / sigma[i]), float(half / sigma[i]))
    return found


def expected_levels(pilot: PilotSet, pool: PilotSet) -> list[dict]:
    """Return the rows of part one."""
    rows = []
    for name, palette in palettes(pilot).items():
        for n_candidates in CANDIDATES:
            solution = solve(palette, pilot, n_candidates)
            row = {"palette": name, "candidates": n_candidates, "status": solution.status.value}
            rows.append(row)
            if solution.status is not Status.OPTIMAL:
                row["certificate"] = solution.certificate and solution.certificate.sentence
                continue
            levels = served(pool.rewards, solution.multipliers, n_candidates)
            row["ess"], row["kl"] = solution.ess, solution.kl
            row["served"] = errors_of(levels, palette, solution, pilot.within_std)
            paper = paper_solution(palette, solution, pilot)
            if paper.status is Status.OPTIMAL:
                levels = served(pool.rewards, paper.multipliers, n_candidates)
                row["paper"] = errors_of(levels, palette, solution, pilot.within_std)
    return rows


async def http_levels(
    url: str, pilot: PilotSet, first: int, n_prompts: int, concurrency: int
) -> list[dict]:
    """Return the rows of part two: one answer per palette and prompt, drawn by a real server."""
    conversations = corpus_prompts("heldout")[first : first + n_prompts]
    rows = []
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        for name, palette in palettes(pilot).items():
            solution = solve(palette, pilot, HTTP_CANDIDATES)
            if solution.status is not Status.OPTIMAL:
                continue
            wire = {"targets": dict(palette.targets), "candidates": HTTP_CANDIDATES}
            realised = np.empty((n_prompts, len(pilot.values)))
            waiting = iter(range(n_prompts))

            async def work(wire=wire, realised=realised, waiting=waiting) -> None:
                for index in waiting:
                    answer = await client.chat.completions.create(
                        model=embedded.CHAT_MODEL_NAME,
                        messages=conversations[index],
                        seed=SEED + first + index,
                        extra_body={"palette": wire},
                    )
                    report = answer.model_extra["palette"]
                    if not report["calibration"]["valid"]:
                        raise RuntimeError(report["calibration"]["warnings"])
                    realised[index] = [report["realised"][value] for value in pilot.values]

            started = time.perf_counter()
            await asyncio.gather(*(work() for _ in range(concurrency)))
            rows.append(
                {
                    "palette": name,
                    "candidates": HTTP_CANDIDATES,
                    "answers": n_prompts,
                    "errors": errors_of(realised, palette, solution, pilot.within_std),
                    "seconds": time.perf_counter() - started,
                }
            )
            print_http(rows[-1])
    return rows


def is_met(error: float, half: float) -> bool:
    return abs(error) <= max(half, 0.05)


def worst(errors: dict[str, tuple[float, float]]) -> tuple[str, float, float]:
    name = max(errors, key=lambda value: abs(errors[value][0]))
    return name, *errors[name]


def print_expected(rows: list[dict]) -> None:
    print("| palette | N | ESS | served λ: largest error | its 95 % interval | paper's λ |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        if "served" not in row:
            print(f"| {row['palette']} | {row['candidates']} | {row['status']} | | | |")
            continue
        name, error, half = worst(row["served"])
        paper = "infeasible" if "paper" not in row else f"{worst(row['paper'])[1]:+.3f}"
        print(
            f"| {row['palette']} | {row['candidates']} | {row['ess']:.1f} | "
            f"{error:+.3f} ({name}) | ±{half:.3f} | {paper} |"
        )


def print_http(row: dict) -> None:
    told = ", ".join(f"{v} {e:+.3f} ± {h:.3f}" for v, (e, h) in row["errors"].items())
    print(f"HTTP {row['palette']}, N={row['candidates']}, {row['answers']} answers: {told}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pool", type=Path, required=True, help="kept between runs")
    parser.add_argument("--out", type=Path, help="JSON with every figure")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--pool-candidates", type=int, default=64)
    parser.add_argument("--pool-first", type=int, default=0, help="held-out prompts passed over")
    parser.add_argument("--pool-seed", type=int, default=SEED)
    parser.add_argument("--http-prompts", type=int, default=0)
    parser.add_argument("--http-first", type=int, default=0, help="held-out prompts passed over")
    parser.add_argument("--concurrency", type=int, default=8)
    arguments = parser.parse_args()
    logging.getLogger("httpx").setLevel(logging.WARNING)

    pilot = load_calibration(embedded.CALIBRATION).pilot
    if not arguments.pool.exists():
        asyncio.run(
            sample_pool(
                arguments.pool,
                arguments.prompts,
                arguments.pool_candidates,
                first=arguments.pool_first,
                seed=arguments.pool_seed,
            )
        )
    pool = PilotSet.load(arguments.pool)
    rows = expected_levels(pilot, pool)
    print(f"{pool.n_prompts} held-out prompts x {pool.n_candidates} fresh candidates\n")
    print_expected(rows)
    checked = [pair for row in rows for pair in row.get("served", {}).values()]
    missed = sum(not is_met(*pair) for pair in checked)
    widest = max(half for _, half in checked)
    # At multiplier zero only a shortfall is an error: such levels say little: they are kept apart.
    slack = sum(error == 0 for error, _ in checked)
    inside = sum(error != 0 and abs(error) <= half for error, half in checked)
    print(f"\n{len(checked)} levels, {missed} off by more than their interval and 0.05 σ")
    print(f"{slack} met at multiplier zero; {inside} of the others inside their own interval")
    print(f"widest interval ±{widest:.3f} σ")
    paper = [abs(pair[0]) for row in rows for pair in row.get("paper", {}).values()]
    print(f"largest error: served {max(abs(e) for e, _ in checked):.3f}, paper {max(paper):.3f} σ")
    http = []
    if arguments.http_prompts:
        with running_server(PALETTE_REFRESH="off") as url:  # the calibration as it is
            http = asyncio.run(
                http_levels(
                    url, pilot, arguments.http_first, arguments.http_prompts, arguments.concurrency
                )
            )
    if arguments.out:
        arguments.out.write_text(json.dumps({"expected": rows, "http": http}, indent=1))


if __name__ == "__main__":
    main()
