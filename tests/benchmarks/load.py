"""Latency of aligned requests and of health checks, for one client and for sixteen at once.

    python -m tests.benchmarks.load

Every request is a different prompt with a palette at N = 16, through a real server with the
embedded models. A process of its own checks the server's health all the while.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import SimpleQueue, get_context
from multiprocessing.synchronize import Event
from pathlib import Path

import httpx
import numpy as np
from openai import AsyncOpenAI

from server import embedded
from server.embedded.corpus import prompts
from tests.running_server import running_server

PALETTE = {"targets": {"helpful": {"quantile": 0.7}, "harmless": "keep"}, "candidates": 16}


def check_health(url: str, stop: Event, found: SimpleQueue) -> None:
    """Ask for /health every 20 ms until told to stop; put the times, in seconds."""
    times = []
    with httpx.Client(base_url=url, timeout=60) as client:
        client.get("/health")  # connects; the client's own start is not the server's time
        while not stop.is_set():
            began = time.perf_counter()
            client.get("/health").raise_for_status()
            times.append(time.perf_counter() - began)
            time.sleep(0.02)
    found.put(times)


@contextmanager
def checking_health(url: str, times: list[float]) -> Iterator[None]:
    """Check health from a process of its own: the clients' loop would add its own delays."""
    spawn = get_context("spawn")
    stop, found = spawn.Event(), spawn.SimpleQueue()
    checker = spawn.Process(target=check_health, args=(url, stop, found))
    checker.start()
    try:
        yield
    finally:
        stop.set()
        times += found.get()
        checker.join()


async def measure(url: str, n_clients: int, n_requests: int) -> dict:
    """Return percentiles in ms of `n_requests` aligned requests by `n_clients`."""
    waiting = iter(prompts("heldout")[:n_requests])
    latencies: list[float] = []
    stages: list[dict] = []
    checks: list[float] = []
    with checking_health(url, checks):
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

            async def work() -> None:
                for messages in waiting:
                    began = time.perf_counter()
                    answer = await client.chat.completions.create(
                        model=embedded.CHAT_MODEL_NAME,
                        messages=messages,
                        extra_body={"palette": PALETTE},
                    )
                    latencies.append(time.perf_counter() - began)
                    stages.append(answer.model_extra["palette"]["timing_ms"])

            began = time.perf_counter()
            await asyncio.gather(*(work() for _ in range(n_clients)))
            elapsed = time.perf_counter() - began
    return {
        "clients": n_clients,
        "requests": len(latencies),
        "per_second": len(latencies) / elapsed,
        "latency_ms": np.percentile(np.array(latencies) * 1e3, (50, 95, 99)).tolist(),
        "health_ms": np.percentile(np.array(checks) * 1e3, (50, 99, 100)).tolist(),
        "stages_ms": {name: float(np.median([one[name] for one in stages])) for name in stages[0]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=160)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    rows = []
    print("| clients | requests/s | latency p50 / p95 / p99 ms | health p50 / p99 / max ms |")
    print("|---|---|---|---|")
    with running_server() as url:
        asyncio.run(measure(url, 1, 4))  # the first requests load code paths
        for n_clients in (1, 4, 16):
            row = asyncio.run(measure(url, n_clients, arguments.requests))
            rows.append(row)
            print(
                f"| {n_clients} | {row['per_second']:.1f} | "
                + " / ".join(f"{x:.0f}" for x in row["latency_ms"])
                + " | "
                + " / ".join(f"{x:.1f}" for x in row["health_ms"])
                + " |"
            )
    for row in rows:
        told = ", ".join(f"{name} {ms:.1f}" for name, ms in row["stages_ms"].items())
        print(f"\n{row['clients']} clients, median stages in ms: {told}")
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
