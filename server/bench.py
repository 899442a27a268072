"""Where the time of an aligned request goes on this machine: this server's stages, no HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from server import embedded, terminal
from server.alignment import Aligner
from server.alignment_stages import AlignmentRequest, Served
from server.app import running_aligner
from server.batch import seed_of
from server.calibrator import Progress
from server.prompts import Conversation, read_prompts
from server.schemas import PaletteOptions
from server.settings import Settings
from server.threads import share_cores
from server.version import VERSION

Json = dict[str, Any]

STAGES = ("queue", "generate", "score", "solve", "total")
_PERCENTILES = {"p50": 50, "p95": 95, "max": 100}


async def bench_settings(
    settings: Settings,
    palette: PaletteOptions,
    *,
    n_candidates: int,
    n_clients: int,
    n_requests: int,
    seed: int,
) -> Json:
    """Return the timings of a server with these settings, on the shipped general prompts.

    Raises
    ------
    PaletteError, InfeasiblePaletteError, CalibrationMissingError, BackendError, RewardError,
    QueueFullError
        As a request would.
    """
    share_cores(settings)
    prompts = read_prompts(embedded.PROMPTS)
    seen: list[Served] = []
    async with running_aligner(settings, observers=[seen.append]) as aligner:
        with terminal.progress_bar("measuring") as progress:
            found = await measure(
                aligner, prompts, palette, seen, settings,
                n_candidates=n_candidates, n_clients=n_clients, n_requests=n_requests, seed=seed,
                progress=progress,
            )  # fmt: skip
        head = {"palette_version": VERSION, "model": aligner.backend.model_id}
    return head | found


async def measure(
    aligner: Aligner,
    prompts: Sequence[Conversation],
    palette: PaletteOptions,
    seen: list[Served],
    settings: Settings,
    *,
    n_candidates: int,
    n_clients: int,
    n_requests: int,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> Json:
    """Return percentiles of each stage and rates, aligned and plain requests side by side.

    Plain requests ask for N answers and no palette: the same prompts, seeds and tokens without
    scoring, solving and choosing. Both kinds take turns, a round of all clients each, so that a
    machine that slows down slows both. The first round of each warms up and does not count.

    Parameters
    ----------
    aligner : Aligner
    prompts : sequence of conversations
        Taken in turn.
    palette : PaletteOptions
        Its own ``candidates`` give way to `n_candidates`.
    seen : list of Served
        Where the aligner's observer puts what was answered.
    settings : Settings
    n_candidates, n_clients, n_requests, seed : int
        Requests are of each of the two kinds.
    progress : callable
        Gets (requests done, requests in all).
    """
    options = palette.model_copy(update={"candidates": n_candidates})
    kinds: dict[str, PaletteOptions | None] = {"aligned": options, "plain": None}
    found: dict[str, list[Served]] = {kind: [] for kind in kinds}
    seconds = dict.fromkeys(kinds, 0.0)
    n_rounds = -(-n_requests // n_clients)
    n_done, n_all = 0, 2 * (n_rounds + 1) * n_clients

    async def ask(kind: str, k: int) -> None:
        nonlocal n_done
        request = AlignmentRequest(
            messages=prompts[k % len(prompts)],
            sampling=settings.sampling,
            n_choices=n_candidates if kind == "plain" else 1,
            seed=seed_of(seed, k),
            palette=kinds[kind],
        )
        await aligner.run(await aligner.plan(request))
        n_done += 1
        progress(n_done, n_all)

    for number in range(n_rounds + 1):
        for kind in kinds:
            seen.clear()
            began = time.perf_counter()
            try:
                async with asyncio.TaskGroup() as group:
                    for client in range(n_clients):
                        group.create_task(ask(kind, number * n_clients + client))
            except ExceptionGroup as failures:
                raise failures.exceptions[0] from None
            if number:
                seconds[kind] += time.perf_counter() - began
                # Without texts: what was measured does not need them.
                found[kind] += [replace(one, candidates=(), rewards=None) for one in seen]
    figures = {kind: _figures(found[kind], seconds[kind]) for kind in kinds}
    aligned, plain = figures["aligned"], figures["plain"]
    return {
        "candidates": n_candidates,
        "clients": n_clients,
        "requests": n_rounds * n_clients,
        "palette": options.model_dump(mode="json", exclude_defaults=True),
        **figures,
        "latency_ratio": aligned["total"]["p50"] / plain["total"]["p50"],
        "throughput_ratio": aligned["tokens_per_s"] / plain["tokens_per_s"],
    }


def print_bench(found: Json) -> None:
    """Print the timings as a table."""
    columns = ("ms", *(f"aligned {name}" for name in _PERCENTILES), "plain p50")
    rows = []
    aligned, plain = found["aligned"], found["plain"]
    for stage in STAGES:
        numbers = [aligned[stage][name] for name in _PERCENTILES] + [plain[stage]["p50"]]
        rows.append((stage, *(f"{number:.1f}" for number in numbers)))
    out = terminal.results
    out.print(
        f"{found['model']}: {found['requests']} requests of {found['candidates']} candidates, "
        f"clients at once: {found['clients']}, without HTTP\n",
        soft_wrap=True, markup=False,
    )  # fmt: skip
    terminal.print_table(columns, rows)
    out.print(
        f"\n{aligned['requests_per_s']:.2f} requests/s, {aligned['tokens_per_s']:.0f} sampled "
        f"tokens/s; beside plain requests for the same tokens: latency "
        f"{found['latency_ratio']:.2f} x, throughput {found['throughput_ratio']:.2f} x",
        soft_wrap=True, markup=False,
    )  # fmt: skip
    out.print(
        "Candidates are scored while others are generated: `score` is what comes after the last.",
        soft_wrap=True,
    )


def _figures(served: Sequence[Served], seconds: float) -> Json:
    found: Json = {}
    for stage in STAGES:
        times = [getattr(one.timing, stage) for one in served]
        found[stage] = {name: float(np.percentile(times, at)) for name, at in _PERCENTILES.items()}
    tokens = sum(one.spent_tokens for one in served)
    return found | {
        "requests_per_s": len(served) / seconds,
        "tokens_per_s": tokens / seconds,
        "tokens_per_request": tokens / len(served),
    }
