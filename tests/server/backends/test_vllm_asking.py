"""Questions about answers on vLLM: the books in any environment, the engine where there is one."""

from __future__ import annotations

import asyncio
import gc

import numpy as np
import pytest
import pytest_asyncio
import torch
from numpy.testing import assert_allclose
from transformers import AutoModelForCausalLM

from rewards import Sample
from server import embedded
from server.backends.base import BackendUnavailableError, SamplingSettings
from server.backends.hf_local import HfLocalBackend
from server.backends.vllm_engine import VllmEngineBackend
from server.backends.vllm_turns import TwoKinds
from server.scoring import sample_of
from tests.engines import needs_engine

MODEL = str(embedded.CHAT_MODEL)
QUESTION = [
    {"role": "user", "content": "How do I keep my houseplants alive? " * 6},
    {"role": "assistant", "content": "Water them, and give them light. " * 4},
    {"role": "user", "content": "Tell me more, please."},
]
WORDS = (("Yes", " Yes", "yes"), ("No", " No", "no"))
ASKED = [f"Consider only the last reply. Is it {word}?" for word in ("kind", "honest", "short")]
PATIENCE_S = 120  # only a hang takes that long


class Runs:
    """Requests of two kinds that end when told to."""

    def __init__(self):
        self.kinds = TwoKinds()
        self.running = []
        self.ends = {}

    def start(self, name):
        self.ends[name] = asyncio.Event()
        return asyncio.create_task(self._run(name))

    async def _run(self, name):
        async with self.kinds.run(name.split("-")[0]):
            self.running.append(name)
            try:
                await self.ends[name].wait()
            finally:
                self.running.remove(name)


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


async def test_two_kinds_never_run_together():
    runs = Runs()
    tasks = {
        name: runs.start(name)
        for name in ("top-1", "top-2", "asked-1", "asked-2", "top-3", "plain-1", "asked-3")
    }
    seen = []
    for name in ("top-1", "top-2", "asked-1", "asked-2", "top-3", "asked-3", "plain-1"):
        await settle()
        seen.append(" ".join(sorted(runs.running)))
        runs.ends[name].set()
    await asyncio.gather(*tasks.values())
    assert seen == [
        "plain-1 top-1 top-2",
        "plain-1 top-2",
        "asked-1 asked-2 plain-1",
        "asked-2 plain-1",
        "plain-1 top-3",
        "asked-3 plain-1",
        "plain-1",
    ]


@pytest.mark.parametrize("cancelled", ["top-1", "asked-1", "asked-2", "top-2"])
async def test_a_cancelled_request_holds_nobody_up(cancelled):
    runs = Runs()
    tasks = {name: runs.start(name) for name in ("top-1", "asked-1", "asked-2", "top-2")}
    await settle()
    tasks[cancelled].cancel()
    for end in runs.ends.values():  # before the cancelled one can tidy up
        end.set()
    found = await asyncio.gather(*tasks.values(), return_exceptions=True)
    assert [isinstance(one, asyncio.CancelledError) for one in found] == [
        name == cancelled for name in tasks
    ]
    last = [runs.start("asked-9"), runs.start("top-9")]
    await settle()
    assert runs.running == ["asked-9"]
    for end in runs.ends.values():
        end.set()
    await asyncio.gather(*last)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def backend():
    options = {"--kv-cache-memory-bytes": 2**28}
    backend = VllmEngineBackend(MODEL, n_threads=1, max_rows=4, engine_args=options)
    await backend.start()
    yield backend
    await backend.close()
    for _ in range(3):
        gc.collect()


engine = [
    *needs_engine,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def on_engine(test):
    for mark in engine:
        test = mark(test)
    return test


async def samples_of(backend, n, top_logprobs=0, **sampling):
    prompt = await backend.render(QUESTION)
    settings = SamplingSettings(**{"max_tokens": 40, "logit_bias": ((2, -100.0),), **sampling})
    stream = backend.generate(prompt, n, settings, 0, top_logprobs=top_logprobs)
    async with asyncio.timeout(PATIENCE_S):
        candidates = [candidate async for candidate in stream]
    candidates.sort(key=lambda one: one.index)
    return candidates, [sample_of(prompt, candidate) for candidate in candidates]


@torch.inference_mode()
def expected(asker, sample):
    """Return what the model's own pass over the same tokens gives."""
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    rows = []
    for ids in asker.prompts(sample, ASKED):
        logprobs = model(torch.tensor([ids])).logits[0, -1].log_softmax(dim=-1)
        rows.append([logprobs[group].logsumexp(dim=-1).item() for group in asker.word_ids(WORDS)])
    return rows


@on_engine
async def test_answers_are_those_of_transformers_and_the_prefix_is_cached(backend):
    backend.check_words(WORDS)
    candidates, samples = await samples_of(backend, 8)
    assert all(len(one.token_ids) == len(one.tokens) == 40 for one in candidates)
    before = backend.health()
    async with asyncio.timeout(PATIENCE_S):
        found = await asyncio.gather(*(backend.ask(one, ASKED, WORDS) for one in samples))
    for sample, answer in zip(samples[:3], found, strict=False):
        assert_allclose(answer.logprobs, expected(backend._words.asker, sample), atol=1e-4)
    odds = [answer.logprobs[:, 0] - answer.logprobs[:, 1] for answer in found]
    assert np.std(odds, axis=0).min() > 0.01
    after = backend.health()
    read = after["asked_tokens"] - before["asked_tokens"]
    assert sum(answer.n_tokens for answer in found) == read
    cached = after["cached_asked_tokens"] - before["cached_asked_tokens"]
    n_prompt = len(samples[0].prompt_ids)
    block = backend._supervisor.engine.llm.vllm_config.cache_config.block_size
    # All whole blocks of prompt and answer, but for the answer's last token, which was not read.
    assert cached >= 8 * len(ASKED) * ((n_prompt + 40 - 1) // block) * block
    assert cached > 0.6 * read
    assert after["prompt_tokens"] == before["prompt_tokens"]


@on_engine
async def test_both_backends_agree(backend):
    _, samples = await samples_of(backend, 3)
    local = HfLocalBackend(MODEL, device="cpu")
    await local.start()
    try:
        elsewhere = Sample(tuple(QUESTION), "Water them.")
        for sample in (*samples, elsewhere):
            theirs = await local.ask(sample, ASKED, WORDS)
            ours = await backend.ask(sample, ASKED, WORDS)
            assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)
            assert ours.n_tokens == theirs.n_tokens
        assert backend.fingerprint == local.fingerprint
    finally:
        await local.close()


@on_engine
async def test_likeliest_tokens_are_told_right_while_questions_are_asked(backend):
    alone, samples = await samples_of(backend, 2, top_logprobs=5)
    drawing = asyncio.create_task(samples_of(backend, 2, top_logprobs=5))
    n_asked = 0
    async with asyncio.timeout(PATIENCE_S):
        while not drawing.done():
            await asyncio.gather(*(backend.ask(one, ASKED, WORDS) for one in samples))
            n_asked += 1
    again, _ = await drawing
    assert n_asked
    for left, right in zip(alone, again, strict=True):
        for a, b in zip(left.tokens, right.tokens, strict=True):
            assert [name for name, _ in a.top] == [name for name, _ in b.top]
            assert_allclose([x for _, x in a.top], [x for _, x in b.top], atol=1e-4)


@on_engine
async def test_questions_are_answered_while_answers_fill_the_engine(backend):
    """More candidates than rows wait; questions about the first ones do not hold them up."""
    prompt = await backend.render(QUESTION)
    settings = SamplingSettings(max_tokens=60, logit_bias=((2, -100.0),))
    asked = []
    async with asyncio.timeout(PATIENCE_S):
        async for candidate in backend.generate(prompt, 20, settings, 1):
            sample = sample_of(prompt, candidate)
            asked.append(asyncio.create_task(backend.ask(sample, ASKED, WORDS)))
        found = await asyncio.gather(*asked)
    assert np.shape([one.logprobs for one in found]) == (20, 3, 2)


@on_engine
async def test_cancelled_questions_leave_the_engine(backend):
    _, samples = await samples_of(backend, 8)
    llm = backend._supervisor.engine.llm
    asked = [asyncio.create_task(backend.ask(one, ASKED, WORDS)) for one in samples]
    async with asyncio.timeout(PATIENCE_S):
        while not llm.get_num_unfinished_requests():  # noqa: ASYNC110 - the engine's own state
            await asyncio.sleep(0)
        for one in asked:
            one.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        while llm.get_num_unfinished_requests():  # noqa: ASYNC110 - the engine's own state
            await asyncio.sleep(0.01)
        assert (await backend.ask(samples[0], ASKED, WORDS)).logprobs.shape == (3, 2)


async def test_a_stopped_engine_says_so():
    backend = VllmEngineBackend(MODEL)
    with pytest.raises(BackendUnavailableError, match="not running"):
        await backend.ask(Sample((), ""), ASKED, WORDS)
