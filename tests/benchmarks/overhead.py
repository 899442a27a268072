"""What alignment costs beside the same candidates asked for plainly, on one server.

    python -m tests.benchmarks.overhead [--backend vllm_engine] [--cases embedded,lexical,larger]

Both sides ask the same server for 16 candidates of the same prompts with the same seeds, so the
engine makes the same tokens: one with a palette (scored, solved, chosen), the other with
``palette: null`` and ``n: 16``. They take turns, and the ratio is taken pair by pair: one request
at a time (latency), and sixteen clients at once, each with one request after another (throughput).

Three cases: ``embedded``, the server as it comes; ``lexical``, its model with values that cost
nothing to compute, which leaves the cost of serving them; ``larger``, a language model of 43 M
random weights in place of the embedded one of 3.4 M, with the embedded rewards.

Processor time is the kernel's account of the engine's process and of the server's, a request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
from openai import AsyncOpenAI

from server import embedded
from server.embedded.corpus import prompts
from tests.running_server import running_server

N = 16
CLIENTS = 16
LARGER_TOKENS = 64  # random weights seldom end an answer
STAGES = ("queue", "solve", "generate", "score", "rest", "total")
TARGETS = {
    "embedded": {"helpful": {"quantile": 0.7}, "harmless": "keep"},
    # Without a calibration, multipliers are given.
    "lexical": {"words": {"multiplier": 0.02}, "lexical_diversity": {"multiplier": 1.0}},
    "larger": {"helpful": {"multiplier": 1.0}, "harmless": {"multiplier": 0.5}},
}
LEXICAL = """\
version: 1
scorers:
  words: {kind: lexical, measure: words}
  lexical_diversity: {kind: lexical, measure: lexical_diversity}
values:
  words: {from: words, unit: words}
  lexical_diversity: {from: lexical_diversity, unit: ratio}
"""


class Asker:
    """Requests to one server, of one case."""

    def __init__(self, url, case):
        self.url = url
        self._client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self._palette = {"targets": TARGETS[case], "candidates": N}
        self._max_tokens = LARGER_TOKENS if case == "larger" else None
        self._messages = prompts("heldout")[:64]
        self._model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        self.engine_pids = httpx.get(f"{url}/ready").json()["backend"].get("pids", [])

    async def ask(self, seed, *, is_aligned):
        """Return the seconds of one request, the tokens it spent, and its stages in ms."""
        began = time.perf_counter()
        answer = await self._client.chat.completions.create(
            model=self._model,
            messages=self._messages[seed % len(self._messages)],
            seed=seed,
            n=1 if is_aligned else N,
            max_completion_tokens=self._max_tokens,
            extra_body={"palette": self._palette if is_aligned else None},
        )
        spent = time.perf_counter() - began
        stages = answer.model_extra["palette"]["timing_ms"] if is_aligned else {}
        return spent, answer.usage.completion_tokens, stages

    def candidate_seconds(self):
        return httpx.get(f"{self.url}/ready").json()["backend"].get("candidate_seconds", {})

    def processor_seconds(self):
        """Return the time spent so far by the engine and by the server."""
        found = np.zeros(2)
        for pid in descendants(os.getpid()):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            is_server = pid not in self.engine_pids
            found[int(is_server)] += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return found


def descendants(pid):
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield int(child)
            yield from descendants(int(child))


async def one_at_a_time(asker, seeds):
    """Return paired latencies in seconds, (n, 2): plain and aligned; and the aligned stages."""
    found, stages = [], []
    for k, seed in enumerate(seeds):
        pair, tokens = [0.0, 0.0], [0, 0]
        for is_aligned in (k % 2 == 0, k % 2 == 1):  # whichever comes second finds warm caches
            pair[is_aligned], tokens[is_aligned], told = await asker.ask(
                seed, is_aligned=is_aligned
            )
            stages += [told] if told else []
        assert tokens[0] == tokens[1], "the two sides did not generate the same tokens"
        found.append(pair)
    return np.array(found), stages


async def all_at_once(asker, rounds, n_each):
    """Return paired seconds of `CLIENTS` clients with `n_each` requests each, and what they took.

    Shapes (rounds, 2) and, of the processor, (rounds, 2, 2): plain and aligned, engine and server.
    """
    seconds, processor = np.zeros((rounds, 2)), np.zeros((rounds, 2, 2))

    async def client(first, is_aligned):
        for k in range(n_each):
            await asker.ask(first + k * CLIENTS, is_aligned=is_aligned)

    for k in range(rounds):
        for is_aligned in (k % 2 == 0, k % 2 == 1):
            began, before = time.perf_counter(), asker.processor_seconds()
            starts = range(10_000 * (k + 1), 10_000 * (k + 1) + CLIENTS)
            await asyncio.gather(*(client(first, is_aligned) for first in starts))
            seconds[k, int(is_aligned)] = time.perf_counter() - began
            processor[k, int(is_aligned)] = asker.processor_seconds() - before
    return seconds, processor / (CLIENTS * n_each)


async def measure(asker, rounds, n_each):
    await one_at_a_time(asker, range(4))  # the first requests load code paths
    single, stages = await one_at_a_time(asker, range(100, 100 + 8 * rounds))
    many, processor = await all_at_once(asker, rounds, n_each)
    for told in stages:
        told["rest"] = told["total"] - sum(told[name] for name in STAGES[:4])
    return {
        "latency_ms": (1e3 * np.median(single, axis=0)).tolist(),
        "latency_ratio": float(np.median(single[:, 1] / single[:, 0])),
        "sixteen_s": np.median(many, axis=0).tolist(),
        "throughput_ratio": float(np.median(many[:, 0] / many[:, 1])),
        "processor_ms": (1e3 * np.median(processor, axis=0)).tolist(),
        "stages_ms": {name: float(np.median([told[name] for told in stages])) for name in STAGES},
    }


async def engine_stages(asker):
    """Return the mean ms a candidate spends waiting, in prefill and in decoding; one client."""
    await one_at_a_time(asker, range(4))
    before, n = asker.candidate_seconds(), 12
    for seed in range(500, 500 + n):
        await asker.ask(seed, is_aligned=True)
    after = asker.candidate_seconds()
    return {name: 1e3 * (after[name] - before[name]) / (n * N) for name in after}


def larger_model(folder):
    """Write a language model of 43 M random weights with the embedded tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(embedded.CHAT_MODEL)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=8,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def options_of(case, folder):
    if case == "lexical":
        (folder / "lexical.yaml").write_text(LEXICAL)
        return ["--rewards", str(folder / "lexical.yaml"), "--no-calibrate"]
    if case == "larger":
        larger_model(folder / "larger")
        return ["--model", str(folder / "larger"), "--no-calibrate"]
    return []


def print_case(case, found):
    plain, aligned = found["latency_ms"]
    print(f"{case}\n  one client: plain {plain:.0f} ms, aligned {aligned:.0f} ms, "
          f"paired ratio {found['latency_ratio']:.3f}")  # fmt: skip
    plain, aligned = found["sixteen_s"]
    print(f"  sixteen clients: plain {plain:.2f} s, aligned {aligned:.2f} s, "
          f"throughput ratio {found['throughput_ratio']:.3f}")  # fmt: skip
    for side, (engine, server) in zip(("plain", "aligned"), found["processor_ms"], strict=True):
        print(f"  processor, a request of sixteen, {side}: "
              f"engine {engine:.0f} ms, server with rewards {server:.0f} ms")  # fmt: skip
    print("  aligned, one client, median ms: "
          + ", ".join(f"{name} {ms:.1f}" for name, ms in found["stages_ms"].items()))  # fmt: skip
    if "candidate_ms" in found:
        told = ", ".join(f"{name} {ms:.1f}" for name, ms in found["candidate_ms"].items())
        print(f"  of that, the mean candidate in the engine, ms: {told}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--each", type=int, default=4, help="requests of each of the 16 clients")
    parser.add_argument("--cases", default="embedded,lexical,larger")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    print(f"{arguments.backend}, N = {N}, the same tokens on both sides")
    results = {}
    for case in arguments.cases.split(","):
        with tempfile.TemporaryDirectory() as name:
            options = ["--backend", arguments.backend, *options_of(case, Path(name))]
            with running_server(options) as url:
                asker = Asker(url, case)
                results[case] = asyncio.run(measure(asker, arguments.rounds, arguments.each))
            if arguments.backend == "vllm_engine":
                # vLLM's own clock is not free: a server of its own has it.
                with running_server([*options, "--no-disable-log-stats"]) as url:
                    results[case]["candidate_ms"] = asyncio.run(engine_stages(Asker(url, case)))
        print_case(case, results[case])
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
