"""What alignment costs beside the same candidates asked for plainly, on one server.

    python -m tests.benchmarks.overhead [--backend vllm_engine] [--rounds 5]

Both sides ask the same server for 16 candidates of the same prompts with the same seeds, so the
engine makes the same tokens: one with a palette (scored, solved, chosen), the other with
``palette: null`` and ``n: 16``. They take turns, and the ratio is taken pair by pair: one request
at a time (latency), and sixteen at once (throughput).
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

from server import embedded
from server.embedded.corpus import prompts
from tests.running_server import running_server

N = 16
PALETTE = {"targets": {"helpful": {"quantile": 0.7}, "harmless": "keep"}, "candidates": N}
STAGES = ("queue", "solve", "generate", "score", "rest", "total")


async def ask(client, messages, seed, *, is_aligned):
    """Return the seconds of one request, the tokens it spent, and its stages in ms."""
    began = time.perf_counter()
    answer = await client.chat.completions.create(
        model=embedded.CHAT_MODEL_NAME,
        messages=messages,
        seed=seed,
        n=1 if is_aligned else N,
        extra_body={"palette": PALETTE if is_aligned else None},
    )
    spent = time.perf_counter() - began
    stages = answer.model_extra["palette"]["timing_ms"] if is_aligned else {}
    return spent, answer.usage.completion_tokens, stages


async def one_at_a_time(client, messages, seeds):
    """Return paired latencies in seconds, (n, 2): plain and aligned; and the aligned stages."""
    found, stages = [], []
    for k, seed in enumerate(seeds):
        pair, tokens = [0.0, 0.0], [0, 0]
        for is_aligned in (k % 2 == 0, k % 2 == 1):  # whichever comes second finds warm caches
            pair[is_aligned], tokens[is_aligned], told = await ask(
                client, messages[k % len(messages)], seed, is_aligned=is_aligned
            )
            stages += [told] if told else []
        assert tokens[0] == tokens[1], "the two sides did not generate the same tokens"
        found.append(pair)
    return np.array(found), stages


async def all_at_once(client, messages, rounds):
    """Return paired seconds of `N` requests at once, (rounds, 2): plain and aligned."""
    found = []
    for k in range(rounds):
        pair = [0.0, 0.0]
        for is_aligned in (k % 2 == 0, k % 2 == 1):
            began = time.perf_counter()
            await asyncio.gather(
                *(
                    ask(client, messages[i % len(messages)], 1000 * k + i, is_aligned=is_aligned)
                    for i in range(16)
                )
            )
            pair[is_aligned] = time.perf_counter() - began
        found.append(pair)
    return np.array(found)


async def measure(url, rounds):
    messages = prompts("heldout")[:64]
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        await one_at_a_time(client, messages, range(4))  # the first requests load code paths
        single, stages = await one_at_a_time(client, messages, range(100, 100 + 8 * rounds))
        many = await all_at_once(client, messages, rounds)
    for told in stages:
        told["rest"] = told["total"] - sum(told[name] for name in STAGES[:4])
    return {
        "latency_ms": (1e3 * np.median(single, axis=0)).tolist(),
        "latency_ratio": float(np.median(single[:, 1] / single[:, 0])),
        "sixteen_s": np.median(many, axis=0).tolist(),
        "throughput_ratio": float(np.median(many[:, 0] / many[:, 1])),
        "stages_ms": {name: float(np.median([told[name] for told in stages])) for name in STAGES},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with running_server(["--backend", arguments.backend]) as url:
        found = asyncio.run(measure(url, arguments.rounds))
    plain, aligned = found["latency_ms"]
    print(f"{arguments.backend}, N = {N}, the same tokens on both sides")
    print(f"  one client: plain {plain:.0f} ms, aligned {aligned:.0f} ms, "
          f"paired ratio {found['latency_ratio']:.3f}")  # fmt: skip
    plain, aligned = found["sixteen_s"]
    print(f"  sixteen at once: plain {plain:.2f} s, aligned {aligned:.2f} s, "
          f"throughput ratio {found['throughput_ratio']:.3f}")  # fmt: skip
    print("  aligned, one client, median ms: "
          + ", ".join(f"{name} {ms:.1f}" for name, ms in found["stages_ms"].items()))  # fmt: skip
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
