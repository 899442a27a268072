"""One way to score texts, in a process of its own that does so on demand; needs nothing of ours.

    python scoring_engines.py NAME FOLDER DTYPE THREADS

reads lines from standard input, scores the texts of FOLDER once for each, and answers with a line
of JSON: processor seconds of the whole process, wall seconds, scores. `rewards_throughput` runs
several of them by turns, each with the Python that has it.
"""

import asyncio
import json
import os
import sys
import time
from pathlib import Path


def ours(folder, dtype, texts):
    import numpy as np

    from rewards import Sample, load_rewards

    suite = load_rewards(folder / f"{dtype}.yaml", device="cpu", cache_entries=0)
    suite.__enter__()
    requests = np.array_split([Sample((), text) for text in texts], 16)

    async def score():
        return await asyncio.gather(*(suite.score(list(request)) for request in requests))

    return lambda: np.concatenate(asyncio.run(score()))[:, 0].tolist()


def pipeline(folder, dtype, texts):
    import torch
    import transformers

    pipe = transformers.pipeline(
        "text-classification",
        model=str(folder / "model"),
        tokenizer=str(folder / "model"),
        function_to_apply="none",
        device="cpu",
        dtype=getattr(torch, dtype),
    )
    return lambda: [row["score"] for row in pipe(texts, batch_size=32)]


def vllm(folder, dtype, texts):
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, PoolingParams

    engine = LLM(
        str(folder / "model"), runner="pooling", dtype=dtype, kv_cache_memory_bytes=1 << 28
    )
    raw = PoolingParams(use_activation=False)

    def score():
        found = engine.classify(texts, pooling_params=raw, use_tqdm=False)
        return [one.outputs.probs[0] for one in found]

    return score


def infinity(folder, dtype, texts):
    from infinity_emb import AsyncEmbeddingEngine, EngineArgs

    args = EngineArgs(
        model_name_or_path=str(folder / "labels"),  # it classifies by two labels or more
        engine="torch",
        device="cpu",
        dtype=dtype,
        batch_size=32,
        lengths_via_tokenize=True,
        model_warmup=False,
        bettertransformer=False,
    )
    engine = AsyncEmbeddingEngine.from_args(args)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(engine.astart())

    def score():
        loop.run_until_complete(engine.classify(sentences=texts, raw_scores=True))
        return []  # another model's, and probabilities whatever is asked for: times only

    return score


def main():
    name, folder, dtype, threads = sys.argv[1:]
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = threads
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    # Answers have the pipe to themselves, whatever a library prints.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(int(threads))
    texts = json.loads((Path(folder) / "texts.json").read_text())
    score = globals()[name](Path(folder), dtype, texts)
    torch.set_num_threads(int(threads))  # some set it themselves
    score()  # kernels are chosen, pools are filled
    answers.write("ready\n")
    answers.flush()
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        scores = score()
        spent = time.process_time() - cpu, time.perf_counter() - wall
        answers.write(json.dumps([*spent, [float(one) for one in scores]]) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
