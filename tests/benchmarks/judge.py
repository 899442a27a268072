"""What judged values cost beside the generation of the answers that they judge, on vLLM.

    python -m tests.benchmarks.judge [--model larger] [--answer-tokens 120 256 400] [--caches on]

Two models: the embedded one, as it answers (few tokens, fewer than the questions have); and a
larger Llama with random weights, made on the spot, with prompts of 150 tokens and answers as long
as you say. Of each: 64 candidates generated alone; generated, and judged by five questions as they
finish; and the same on an engine without prefix caching. Seconds of this process and the engine's,
and of the clock, are sums over the rounds; sides take turns. The prompts of the rounds differ in
length by a quarter of a cache block: how much of an answer's last block is read again depends on
where it ends.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rewards import load_rewards
from server import embedded
from server.backends.base import SamplingSettings
from server.backends.vllm_engine import VllmEngineBackend
from server.drawing import Draw
from server.scoring import sample_of

N = 64
QUALITIES = ("kind", "honest", "useful", "short", "funny")
REWARDS = {
    "version": 1,
    "scorers": {
        "judge": {
            "kind": "judge",
            "questions": {one: f"Is the reply {one}?" for one in QUALITIES},
        }
    },
    "values": {one: {"from": f"judge.{one}"} for one in QUALITIES},
}
CPU_TICKS = os.sysconf("SC_CLK_TCK")
# What vLLM shares on a CPU, in tokens; a multiple of four rounds covers all ends of a block evenly.
BLOCK = 32
# The engine's only end token, without which answers are as long as they may be.
END = ((2, -100.0),)


def larger_model(folder: Path) -> Path:
    """Write a Llama of random weights, four layers of 512, with the embedded tokenizer."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        initializer_range=0.05,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(embedded.CHAT_MODEL / name, folder)
    return folder


def cpu_seconds(pids: list[int]) -> float:
    """Return processor seconds of this process and of others, so far."""
    spent = time.process_time()
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        spent += (int(fields[11]) + int(fields[12])) / CPU_TICKS
    return spent


def spent_tokens(backend, suite):
    """Return the tokens of all questions so far, those from the cache, and how many were asked."""
    health = backend.health()
    n_questions = suite.health()["judge"]["texts"] * len(QUALITIES)
    return np.array([health["asked_tokens"], health["cached_asked_tokens"], n_questions])


async def prompt_of(backend, number, n_tokens):
    """Return a prompt that no other one shares its beginning with, of at least so many tokens."""
    text = f"{number} is my number. How do I keep my houseplants alive?"
    while True:
        prompt = await backend.render([{"role": "user", "content": text}])
        if len(prompt.token_ids) >= n_tokens:
            return prompt
        text += " the"  # one token


async def run(backend, suite, prompt, sampling, seed):
    """Return (CPU seconds, wall seconds, mean answer tokens) of one request."""

    async def score(candidate):
        return await suite.score([sample_of(prompt, candidate)])

    pids = backend.health()["pids"]
    cpu, began = cpu_seconds(pids), time.perf_counter()
    drawn = Draw(backend.generate(prompt, N, sampling, seed), score if suite else None, 1)
    await drawn.run()
    wall = time.perf_counter() - began
    n_tokens = float(np.mean([one.n_tokens for one in drawn.finished]))
    return cpu_seconds(pids) - cpu, wall, n_tokens


async def measure(model, rewards_file, *, n_prompt, sampling, rounds, caches):
    """Return what one model costs, with prefix caching or without."""
    options = {"kv_cache_memory_bytes": 2**30, "enable_prefix_caching": caches}
    backend = VllmEngineBackend(str(model), n_threads=1, engine_args=options)
    # No memory of scores: equal answers would be judged once.
    suite = load_rewards(rewards_file, cache_entries=0)
    await backend.start()
    suite.use_judge(backend)
    await suite.start()
    try:
        found = {"alone": [], "judged": []}
        for number in range(-1, rounds):
            if number == 0:  # the round before has warmed the engine up
                before = spent_tokens(backend, suite)
            sides = list(itertools.islice(itertools.cycle(found), number % 2, number % 2 + 2))
            for side in sides:
                # Another prompt each time: nothing is cached that this request did not read.
                length = n_prompt + number * BLOCK // 4
                prompt = await prompt_of(backend, f"{number}{side}", length)
                judges = suite if side == "judged" else None
                spent = await run(backend, judges, prompt, sampling, number + 1)
                if number >= 0:
                    found[side].append(spent)
        asked, cached, n_asked = spent_tokens(backend, suite) - before
    finally:
        await backend.close()
        await suite.close()
    (alone, alone_s, _), (judged, judged_s, n_tokens) = (
        np.sum(found[side], axis=0).tolist() for side in ("alone", "judged")
    )
    return {
        "prompt_tokens": len(prompt.token_ids),
        "answer_tokens": round(n_tokens / rounds, 1),
        "alone_cpu_s": round(alone, 3),
        "judged_cpu_s": round(judged, 3),
        "added_cpu": round(judged / alone - 1, 3),
        "alone_wall_s": round(alone_s, 3),
        "judged_wall_s": round(judged_s, 3),
        "added_wall": round(judged_s / alone_s - 1, 3),
        "asked_tokens_cached": round(cached / asked, 3),
        "new_tokens_a_question": round((asked - cached) / n_asked, 1),
    }


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--model", choices=("embedded", "larger", "both"), default="both")
    parser.add_argument("--answer-tokens", type=int, nargs="+", default=[120])
    parser.add_argument("--caches", choices=("on", "off", "both"), default="both")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    print(json.dumps({"candidates": N, "questions": len(QUALITIES)}), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        rewards_file = Path(folder) / "rewards.yaml"
        rewards_file.write_text(json.dumps(REWARDS))  # JSON is YAML
        cases = [("embedded", embedded.CHAT_MODEL, 0, SamplingSettings(max_tokens=256))]
        larger = larger_model(Path(folder) / "larger")
        for n_answer in options.answer_tokens:
            sampling = SamplingSettings(max_tokens=n_answer, logit_bias=END)
            cases.append(("larger", larger, 150, sampling))
        for (name, model, n_prompt, sampling), side in itertools.product(cases, ("on", "off")):
            if options.model in (name, "both") and options.caches in (side, "both"):
                found = await measure(
                    model,
                    rewards_file,
                    n_prompt=n_prompt,
                    sampling=sampling,
                    rounds=options.rounds,
                    caches=side == "on",
                )
                print(json.dumps({"model": name, "prefix_cache": side, **found}), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
