"""Requests to the transformers backend at once, leaving, failing, and when it starts and closes."""

from __future__ import annotations

import asyncio
import functools
import threading

import pytest
import torch
from transformers import LlamaForCausalLM

from server.backends.base import BackendError, BackendUnavailableError, SamplingSettings
from server.backends.hf_local import HfLocalBackend
from tests.server.backends.hf_drawing import OTHER, QUESTION, HeldForward, collect, same, until

# Several requests


async def test_a_short_request_overtakes_a_long_one(backend, monkeypatch):
    held = HeldForward(monkeypatch)
    ended = []

    async def ask(name, max_tokens):
        candidates = await collect(backend, n=2, max_tokens=max_tokens)
        ended.append((name, max(c.n_tokens for c in candidates)))

    async with asyncio.TaskGroup() as group:
        group.create_task(ask("long", 90))
        await held.began(1)
        group.create_task(ask("short", 3))
        await until(lambda: backend.health()["waiting"] == 1)
        held.permits.release(1000)
    assert [name for name, _ in ended] == ["short", "long"]
    assert ended[1][1] > 20


async def test_requests_take_turns(backend, monkeypatch):
    held = HeldForward(monkeypatch)
    first = asyncio.create_task(collect(backend, n=2, max_tokens=4))
    await held.began(1)
    second = asyncio.create_task(collect(backend, n=3, max_tokens=4))
    await until(lambda: backend.health()["waiting"] == 1)
    held.permits.release(1000)
    await asyncio.gather(first, second)
    # The second prompt is read after one step of the first request; from then on they alternate.
    assert held.shapes[2][1] > 1
    assert held.rows == [1, 2, 1, 2, 3, 2, 3, 3]


async def test_the_loop_runs_while_a_forward_pass_does(backend, monkeypatch):
    held = HeldForward(monkeypatch)
    task = asyncio.create_task(collect(backend, n=2, max_tokens=2))
    await held.began(1)
    for _ in range(100):
        await backend.render(OTHER)
        assert backend.health()["state"] == "ok"
        await asyncio.sleep(0)
    assert not task.done()
    held.permits.release(1000)
    await task


async def test_rows_are_bounded_and_the_rest_waits(llama_folder, monkeypatch):
    backend = HfLocalBackend(str(llama_folder), device="cpu", max_rows=4)
    await backend.start()
    held = HeldForward(monkeypatch)
    tasks = [asyncio.create_task(collect(backend, n=3, max_tokens=3)) for _ in range(3)]
    await held.began(1)
    await until(lambda: backend.health()["waiting"] == 2)
    assert backend.health()["active_rows"] == 3
    assert backend.health()["active_jobs"] == 1
    held.permits.release(1000)
    await asyncio.gather(*tasks)
    await backend.close()


# Leaving


@pytest.mark.parametrize("how", ["cancel", "close"])
async def test_a_request_that_leaves_is_decoded_no_further(backend, monkeypatch, how):
    held = HeldForward(monkeypatch)
    prompt = await backend.render(QUESTION)
    stream = backend.generate(prompt, 8, SamplingSettings(max_tokens=90), 1)
    held.permits.release(4)
    waiting = asyncio.create_task(anext(stream))
    await held.began(5)  # reading, 3 steps, and a step that is held
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    if how == "close":
        await stream.aclose()
    steps = backend.health()["decode_steps"]
    held.permits.release(1000)
    await until(lambda: backend.health()["active_jobs"] == 0)
    # The step that was held ends, and none follows.
    assert backend.health()["decode_steps"] == steps + 1
    assert len(held.rows) == 5


async def test_a_consumer_that_has_enough(backend):
    prompt = await backend.render(QUESTION)
    async for _ in backend.generate(prompt, 32, SamplingSettings(max_tokens=90), 1):
        break
    await until(lambda: backend.health()["active_jobs"] == 0)
    steps = backend.health()["decode_steps"]
    await collect(backend, n=1, max_tokens=1)
    assert backend.health()["decode_steps"] == steps + 1


async def test_a_request_that_leaves_while_it_waits_never_runs(llama_folder, monkeypatch):
    backend = HfLocalBackend(str(llama_folder), device="cpu", max_rows=2)
    await backend.start()
    held = HeldForward(monkeypatch)
    first = asyncio.create_task(collect(backend, n=2, max_tokens=3))
    await held.began(1)
    second = asyncio.create_task(collect(backend, OTHER, n=2, max_tokens=3))
    await until(lambda: backend.health()["waiting"] == 1)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    held.permits.release(1000)
    await first
    await until(lambda: backend.health()["waiting"] == 0)
    await backend.close()
    assert held.n_prompts == 1


async def test_who_left_the_queue_holds_up_nobody(llama_folder, monkeypatch):
    backend = HfLocalBackend(str(llama_folder), device="cpu", max_rows=4)
    await backend.start()
    held = HeldForward(monkeypatch)
    first = asyncio.create_task(collect(backend, n=3, max_tokens=20))
    await held.began(1)
    too_large_now = asyncio.create_task(collect(backend, n=4))
    await until(lambda: backend.health()["waiting"] == 1)
    fits = asyncio.create_task(collect(backend, n=1, max_tokens=1))
    await until(lambda: backend.health()["waiting"] == 2)
    too_large_now.cancel()
    with pytest.raises(asyncio.CancelledError):
        await too_large_now
    held.permits.release(4)
    await fits
    assert not first.done()
    held.permits.release(1000)
    await first
    await backend.close()


# Failing


def break_forward(monkeypatch, is_broken, error):
    original = LlamaForCausalLM.forward

    @functools.wraps(original)
    def forward(model, input_ids, **options):
        if is_broken(input_ids):
            raise error
        return original(model, input_ids, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("a kernel failed"), "RuntimeError: a kernel failed"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory; fewer candidates"),
    ],
    ids=["error", "memory"],
)
async def test_a_failure_is_one_requests_alone(backend, monkeypatch, error, message):
    expected = await collect(backend, n=2, seed=3)
    break_forward(monkeypatch, lambda ids: len(ids) == 5, error)
    good, bad = await asyncio.gather(
        collect(backend, n=2, seed=3), collect(backend, OTHER, n=5), return_exceptions=True
    )
    assert same(good, expected)
    assert type(bad) is BackendError
    assert message in str(bad)
    assert same(await collect(backend, n=2, seed=3), expected)
    health = backend.health()
    assert health["state"] == "ok"
    assert str(error) in str(health["last_error"])


async def test_a_model_that_works_again_is_found_out_without_a_request(backend, monkeypatch):
    broken = True
    break_forward(monkeypatch, lambda ids: broken, RuntimeError("no device"))
    with pytest.raises(BackendError, match="no device"):
        await collect(backend)
    assert backend.health()["state"] == "failing"
    assert backend.health()["active_jobs"] == 0
    broken = False
    await until(lambda: backend.health()["state"] == "ok")
    assert "no device" in str(backend.health()["last_error"])


async def test_nan_is_an_error(backend, monkeypatch):
    original = LlamaForCausalLM.forward

    @functools.wraps(original)
    def forward(model, input_ids, **options):
        output = original(model, input_ids, **options)
        if len(input_ids) == 3:
            output.logits[1, -1, 7] = torch.nan
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    with pytest.raises(BackendError, match="not numbers"):
        await collect(backend, n=3)
    with pytest.raises(BackendError, match="not numbers"):
        await collect(backend, n=3, temperature=0.0)
    assert len(await collect(backend, n=2)) == 2


# Starting and closing


async def test_closing_ends_what_is_in_flight(llama_folder, monkeypatch):
    backend = HfLocalBackend(str(llama_folder), device="cpu", max_rows=4)
    await backend.start()
    held = HeldForward(monkeypatch)
    tasks = [asyncio.create_task(collect(backend, n=3)) for _ in range(3)]
    await held.began(1)
    await until(lambda: backend.health()["waiting"] == 2)
    closing = asyncio.create_task(backend.close())
    await until(lambda: backend.health()["state"] == "stopped")
    held.permits.release(1000)
    await closing
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(outcome, BackendUnavailableError)
    assert len(held.rows) == 1
    await backend.close()


async def test_before_the_start_and_after_the_end(llama_folder):
    backend = HfLocalBackend(str(llama_folder), device="cpu", model_id="tiny")
    assert backend.model_id == "tiny"
    assert backend.health()["state"] == "stopped"
    with pytest.raises(BackendUnavailableError):
        await backend.render(QUESTION)
    await backend.start()
    prompt = await backend.render(QUESTION)
    with pytest.raises(BackendUnavailableError, match="started before"):
        await backend.start()
    await backend.close()
    with pytest.raises(BackendUnavailableError):
        await backend.render(QUESTION)
    with pytest.raises(BackendUnavailableError):
        await anext(backend.generate(prompt, 1, SamplingSettings(), 0))
    never_started = HfLocalBackend(str(llama_folder))
    assert never_started.model_id == "tiny-llama"
    await never_started.close()


async def test_the_thread_ends_with_the_backend(llama_folder):
    backend = HfLocalBackend(str(llama_folder), device="cpu")
    await backend.start()
    assert "palette-hf-local" in {thread.name for thread in threading.enumerate()}
    await backend.close()
    assert "palette-hf-local" not in {thread.name for thread in threading.enumerate()}


async def test_arguments_without_sense(backend, llama_folder):
    prompt = await backend.render(QUESTION)
    with pytest.raises(ValueError, match="at least 1"):
        await anext(backend.generate(prompt, 0, SamplingSettings(), 0))
    with pytest.raises(ValueError, match="at least 1"):
        await anext(backend.generate(prompt, 1, SamplingSettings(max_tokens=0), 0))
    with pytest.raises(ValueError, match="max_rows"):
        HfLocalBackend(str(llama_folder), max_rows=0)
