"""How fast texts are scored on a CPU, beside other engines, and what that does to the event loop.

    python -m tests.benchmarks.rewards_throughput [--vllm PYTHON] [--infinity PYTHON] [--json OUT]

Engines: 512 texts of 8 to 256 tokens through a BERT of 4 layers (11 million parameters, random
weights), each engine in a process of its own, by turns, so that a busy machine disturbs all alike.
What counts is processor time with one thread, the least of several runs; wall time stands beside
it. `--vllm` and `--infinity` name Pythons that have these.

Requests: 16 at once of 8 candidates each, three models; beside each request padding its own batch.

Loop: what a task on the event loop that sleeps 1 ms waits beyond that, idle and while texts score.
"""

import argparse
import asyncio
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from rewards import Sample, load_rewards
from tests.benchmarks import scoring_engines
from tests.benchmarks.score import CONFIG, make_model, make_texts, timed

THREE = """\
version: 1
scorers:
  one: {kind: sequence_classifier, model: ./model, dtype: float32, input: {view: text}}
  two: {kind: sequence_classifier, model: ./model2, dtype: float32, input: {view: text}}
  three: {kind: sequence_classifier, model: ./model3, dtype: float32, input: {view: text}}
values: {a: {from: one}, b: {from: two}, c: {from: three}}
"""


class Engine:
    """A process of `scoring_engines`."""

    def __init__(self, python, name, folder, dtype, threads):
        self.label = f"{name}, {dtype}"
        self.best = [float("inf"), float("inf")]
        self.scores = None
        command = [python, scoring_engines.__file__, name, str(folder), dtype, str(threads)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{self.label} does not start: run {' '.join(command)}")

    def run(self):
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        *spent, self.scores = json.loads(self._process.stdout.readline())
        self.best = [min(pair) for pair in zip(self.best, spent, strict=True)]

    def close(self):
        self._process.kill()  # some have threads that never end
        self._process.communicate()


def compare_engines(folder, options):
    """Return rows of label, processor and wall seconds, and the largest gap to our scores."""
    wanted = [
        (sys.executable, "ours", "float32"),
        (sys.executable, "ours", "bfloat16"),
        (sys.executable, "pipeline", "float32"),
        (sys.executable, "pipeline", "bfloat16"),
    ]
    for python, name in ((options.vllm, "vllm"), (options.infinity, "infinity")):
        if python:
            wanted += [(python, name, "float32"), (python, name, "bfloat16")]
    engines = [
        Engine(python, name, folder, dtype, options.threads) for python, name, dtype in wanted
    ]
    try:
        for _ in range(options.repeats):
            for engine in engines:
                engine.run()
    finally:
        for engine in engines:
            engine.close()
    exact = np.array(engines[0].scores)
    return [
        (
            engine.label,
            *engine.best,
            float(np.abs(np.array(engine.scores) - exact).max()) if engine.scores else None,
        )
        for engine in engines
    ]


def compare_requests(folder, texts, repeats):
    """Return processor seconds of the shared queue, and of a padded batch for each request."""
    groups = [texts[start : start + 8] for start in range(0, 128, 8)]
    (folder / "three.yaml").write_text(THREE)
    suite = load_rewards(folder / "three.yaml", device="cpu", cache_entries=0)

    async def score():
        # Candidate by candidate, as a server does.
        samples = [Sample((), text) for group in groups for text in group]
        return await asyncio.gather(*(suite.score([sample]) for sample in samples))

    models = [
        (
            transformers.AutoTokenizer.from_pretrained(folder / name),
            transformers.AutoModelForSequenceClassification.from_pretrained(folder / name).eval(),
        )
        for name in ("model", "model2", "model3")
    ]

    def apart():
        with torch.inference_mode():
            return [
                model(**tokenizer(group, padding=True, return_tensors="pt")).logits.tolist()
                for group in groups
                for tokenizer, model in models
            ]

    times = [[float("inf")] * 2, [float("inf")] * 2]
    with suite:
        for _ in range(repeats):
            for best, function in zip(times, (lambda: asyncio.run(score()), apart), strict=True):
                _, spent = timed(function, 1)
                best[:] = [min(pair) for pair in zip(best, spent, strict=True)]
    return times[0][0], times[1][0]


async def _lag(seconds, work):
    """Return what sleeps of 1 ms took beyond that, in ms, while work goes on."""
    found = []
    task = asyncio.create_task(work())
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        await asyncio.sleep(0.001)
        found.append((time.perf_counter() - started) * 1e3 - 1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return np.percentile(found, [50, 99, 100]).tolist()


def measure_lag(folder, texts, seconds):
    """Return the lag of the event loop, idle and while texts are scored: p50, p99, most, in ms."""
    suite = load_rewards(folder / "float32.yaml", device="cpu", cache_entries=0)

    async def idle():
        await asyncio.sleep(seconds)

    async def score():
        while True:
            await asyncio.gather(*(suite.score([Sample((), text)]) for text in texts[:128]))

    with suite:
        return asyncio.run(_lag(seconds, idle)), asyncio.run(_lag(seconds, score))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", help="a Python that has vLLM")
    parser.add_argument("--infinity", help="a Python that has infinity-emb")
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    texts = make_texts(options.texts)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for other in ("model", "model2", "model3"):
            make_model(folder, other)
        make_model(folder, "labels", n_labels=3)
        for dtype in ("float32", "bfloat16"):
            (folder / f"{dtype}.yaml").write_text(CONFIG.replace("float32", dtype))
        (folder / "texts.json").write_text(json.dumps(texts))
        shared, apart = compare_requests(folder, texts, options.repeats)
        idle, busy = measure_lag(folder, texts, seconds=5.0)
        rows = compare_engines(folder, options)
    machine = platform.processor() or platform.machine()
    print(f"{len(texts)} texts, {machine}, {options.threads} threads, best of {options.repeats}")
    slowest = next(row for row in rows if row[0] == "pipeline, float32")
    for label, cpu, wall, gap in rows:
        agreement = "another model" if gap is None else f"scores within {gap:.0e}"
        print(
            f"{label:>20}: {cpu:6.2f} s processor ({slowest[1] / cpu:4.2f}x the pipeline), "
            f"{wall:6.2f} s wall ({slowest[2] / wall:4.2f}x), {agreement}"
        )
    print(
        f"16 requests, 8 candidates, 3 models: {shared:.2f} s processor, "
        f"{shared / apart:.2f} of the {apart:.2f} s of a padded batch for each request"
    )
    for label, (middle, p99, most) in (("idle", idle), ("while scoring", busy)):
        print(f"event loop late, {label}: p50 {middle:.1f}, p99 {p99:.1f}, most {most:.1f} ms")
    if options.json:
        found = {"engines": rows, "requests": [shared, apart], "lag": {"idle": idle, "busy": busy}}
        options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
