"""How fast texts are scored, beside the transformers pipeline on the same texts.

    python -m tests.benchmarks.score [--requests 16] [--candidates 16] [--device cpu] [--json OUT]

A BERT of 11 million parameters with random weights reads texts of mixed lengths (log-normal, 8 to
256 tokens, mean about 127). Requests arrive together, as under load. On a CPU the number that
counts is processor time with one thread, which a busy machine disturbs least; wall time stands
beside it. Every time stands beside what it bought: agreement of the scores, batches, padding.
"""

import argparse
import asyncio
import json
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from rewards import Sample, load_rewards
from tests.rewards.tiny import wordpiece

CONFIG = """\
version: 1
scorers: {m: {kind: sequence_classifier, model: ./model, dtype: float32, input: {view: text}}}
values: {v: {from: m}}
"""


def make_model(folder, name="model", n_labels=1):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=8000,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        num_labels=n_labels,
        pad_token_id=0,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder / name)
    wordpiece().save_pretrained(folder / name)
    (folder / "rewards.yaml").write_text(CONFIG)


def make_texts(n_texts):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.7, 0.7, n_texts), 8, 256).astype(int)
    return [" ".join(rng.choice(list("abcdefghij"), n - 2)) for n in lengths]


def timed(function, repeats):
    """Return the result and the least processor and wall seconds."""
    best = [float("inf"), float("inf")]
    for _ in range(repeats):
        cpu, wall = time.process_time(), time.perf_counter()
        result = function()
        spent = time.process_time() - cpu, time.perf_counter() - wall
        best = [min(pair) for pair in zip(best, spent, strict=True)]
    return result, best


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    texts = make_texts(options.requests * options.candidates)
    requests = np.array_split([Sample((), text) for text in texts], options.requests)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder)
        suite = load_rewards(folder / "rewards.yaml", device=options.device, cache_entries=0)

        async def score():
            return np.concatenate(await asyncio.gather(*(suite.score(list(r)) for r in requests)))

        with suite:
            scores, times = timed(lambda: asyncio.run(score())[:, 0], options.repeats)
            health = suite.health()["m"]
        note = (
            f"{health['batches'] // options.repeats} batches, {health['padded_share']:.0%} padding"
        )
        rows.append(("rewards", *times, 0.0, note))
        pipe = transformers.pipeline(
            "text-classification",
            model=str(folder / "model"),
            tokenizer=str(folder / "model"),
            function_to_apply="none",
            device=options.device,
        )
        for batch_size in (1, 16, 32):
            found, times = timed(lambda n=batch_size: pipe(texts, batch_size=n), options.repeats)
            gap = np.abs(np.array([row["score"] for row in found]) - scores).max()
            rows.append((f"pipeline, {batch_size} a batch", *times, float(gap), ""))
    print(f"{len(texts)} texts, {platform.processor() or platform.machine()}, {options.device}")
    for label, cpu, wall, gap, note in rows:
        print(
            f"{label:>24}: {cpu:7.2f} s processor ({cpu / rows[0][1]:4.2f}x), {wall:7.2f} s wall, "
            f"scores within {gap:.0e}  {note}"
        )
    if options.json:
        names = ("label", "cpu_s", "wall_s", "max_gap", "note")
        options.json.write_text(json.dumps([dict(zip(names, r, strict=True)) for r in rows]))


if __name__ == "__main__":
    main()
