"""How candidates are drawn: what one depends on, when it arrives, what leaves with its client."""

from __future__ import annotations

import asyncio

import pytest

from server.backends.base import SamplingSettings
from tests.server.backends.hf_drawing import same
from tests.server.backends.vllm_engine.conftest import (
    ENGINE,
    LONG,
    OTHER,
    PATIENCE_S,
    QUESTION,
    collect,
    never_ending,
    until,
)

pytestmark = ENGINE


async def is_engine_empty(backend):
    """Whether the engine holds memory for no request: only then can its cache be reset."""
    return await backend._supervisor.engine.llm.reset_prefix_cache()


# What a candidate depends on


async def test_the_same_seed_gives_the_same_candidates(backend):
    first = await collect(backend, n=8, seed=3)
    assert same(await collect(backend, n=8, seed=3), first)
    others = await collect(backend, n=8, seed=4)
    assert not {c.text for c in first} & {c.text for c in others}
    assert len({c.text for c in first}) == 8


async def test_candidates_do_not_depend_on_what_else_is_in_flight(backend):
    alone = await collect(backend, n=6, seed=3)
    everything = await asyncio.gather(
        collect(backend, OTHER, n=9, seed=1, max_tokens=50),
        collect(backend, n=6, seed=3),
        collect(backend, n=12, seed=3),
        collect(backend, LONG, n=3, seed=5, temperature=0.5, stop=("e",)),
    )
    assert same(everything[1], alone)
    assert same(everything[2][:6], alone)


async def test_many_seeded_long_prompts_do_not_kill_the_engine(backend):
    restarts = backend.health()["restarts"]
    prompts = [[{"role": "user", "content": f"{i}. {LONG[0]['content']}"}] for i in range(24)]
    answers = await asyncio.gather(
        *[collect(backend, prompt, n=4, seed=1, max_tokens=4) for prompt in prompts]
    )
    assert len(answers) == 24
    assert backend.health() == {**backend.health(), "state": "ok", "restarts": restarts}


# How it is made


async def test_answers_arrive_as_they_finish(backend):
    prompt = await backend.render(QUESTION)
    llm = backend._supervisor.engine.llm
    stream = backend.generate(prompt, 8, SamplingSettings(max_tokens=60), 1)
    n_left = [llm.get_num_unfinished_requests() async for _ in stream]
    assert n_left[0] > 0
    assert n_left == sorted(n_left, reverse=True)
    assert n_left[-1] == 0


async def test_all_candidates_but_the_first_share_the_prefill(backend):
    assert await is_engine_empty(backend)
    before = backend.health()
    prompt = await backend.render(LONG)
    await collect(backend, LONG, n=16)
    after = backend.health()
    # Whole blocks of 32 tokens are shared.
    n_shared = len(prompt.token_ids) // 32 * 32
    assert after["cached_prompt_tokens"] - before["cached_prompt_tokens"] == 15 * n_shared
    assert after["prompt_tokens"] - before["prompt_tokens"] == 16 * len(prompt.token_ids)


@pytest.mark.parametrize("how", ["cancel", "close"])
async def test_who_leaves_takes_the_generation_along(backend, how):
    prompt = await backend.render(QUESTION)
    llm = backend._supervisor.engine.llm
    stream = backend.generate(prompt, 8, never_ending(), 0)
    waiting = asyncio.create_task(anext(stream))
    await until(lambda: llm.get_num_unfinished_requests() == 8)
    assert not await is_engine_empty(backend)
    if how == "cancel":
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    else:
        short = backend.generate(prompt, 8, SamplingSettings(max_tokens=200), 0)
        await anext(short)
        await short.aclose()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await stream.aclose()
    assert llm.get_num_unfinished_requests() == 0
    async with asyncio.timeout(PATIENCE_S):
        while not await is_engine_empty(backend):  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.01)
    assert backend.health()["active_jobs"] == 0
