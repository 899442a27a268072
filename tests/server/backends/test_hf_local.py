from __future__ import annotations

import asyncio
import functools
import threading

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from server.backends.base import (
    BackendError,
    BackendUnavailableError,
    ContextLengthError,
    PromptError,
    SamplingSettings,
)
from server.backends.hf_local import HfLocalBackend
from server.backends.hf_text import Detokenizer
from tests.server.backends.conftest import MAX_CONTEXT, save
from tests.server.backends.test_hf_sampling import check_frequencies, expected_probabilities

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
OTHER = [{"role": "user", "content": "Grüße aus Köln, naïve café: how are the dog and the fox?"}]
PATIENCE_S = 60  # only a hang takes that long


@pytest.fixture
async def backend(llama_folder):
    backend = HfLocalBackend(str(llama_folder), device="cpu")
    await backend.start()
    yield backend
    await backend.close()


@pytest.fixture
def show_ids(monkeypatch):
    """Make token strings ids, so that answers can be fed to the model again."""
    monkeypatch.setattr(Detokenizer, "token", lambda self, token_id: str(token_id))


class HeldForward:
    """A model whose every forward pass waits for a permit."""

    def __init__(self, monkeypatch):
        self.permits = threading.Semaphore(0)
        self.shapes = []  # (rows, tokens) of every pass that began
        original = LlamaForCausalLM.forward

        @functools.wraps(original)
        def forward(model, input_ids, **options):
            self.shapes.append(tuple(input_ids.shape))
            if not self.permits.acquire(timeout=PATIENCE_S):
                raise TimeoutError
            return original(model, input_ids, **options)

        monkeypatch.setattr(LlamaForCausalLM, "forward", forward)

    @property
    def rows(self):
        return [n_rows for n_rows, _ in self.shapes]

    @property
    def n_prompts(self):
        return sum(n_tokens > 1 for _, n_tokens in self.shapes)

    async def began(self, n_passes):
        await until(lambda: len(self.shapes) >= n_passes)


async def until(condition):
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - a thread changes it, without an event
            await asyncio.sleep(0.001)


async def collect(backend, messages=QUESTION, n=4, seed=0, top_logprobs=0, **sampling):
    """Return the candidates in order of their index."""
    prompt = await backend.render(messages)
    settings = SamplingSettings(**{"max_tokens": 24, **sampling})
    stream = backend.generate(prompt, n, settings, seed, top_logprobs=top_logprobs)
    async with asyncio.timeout(PATIENCE_S):
        candidates = [candidate async for candidate in stream]
    assert sorted(c.index for c in candidates) == list(range(n))
    return sorted(candidates, key=lambda c: c.index)


def ids_of(candidate):
    return [int(token.token) for token in candidate.tokens]


def teacher_forced(folder, prompt_ids, answer_ids):
    """Return the log-probabilities at each place of the answer, shape (n_tokens, n_vocab)."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt_ids, *answer_ids]])).logits[0]
    return logits.log_softmax(-1)[len(prompt_ids) - 1 : -1].numpy()


# What is sampled


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
async def test_log_probabilities_are_the_models_own(tmp_path, family, show_ids):
    backend = HfLocalBackend(str(save(tmp_path / family, family)), device="cpu")
    await backend.start()
    prompt = await backend.render(QUESTION)
    settings = {"temperature": 0.7, "top_k": 50, "top_p": 0.95}
    candidates = await collect(backend, n=6, max_tokens=40, top_logprobs=3, **settings)
    await backend.close()
    assert len({c.text for c in candidates} | {len(c.tokens) for c in candidates}) > 1
    for candidate in candidates:
        ids = ids_of(candidate)
        expected = teacher_forced(tmp_path / family, prompt.token_ids, ids)
        logprobs = [token.logprob for token in candidate.tokens]
        # Float32 matrix products of other shapes.
        assert_allclose(logprobs, expected[np.arange(len(ids)), ids], atol=1e-4)
        top = [[logprob for _, logprob in token.top] for token in candidate.tokens]
        assert_allclose(top, -np.sort(-expected, axis=1)[:, :3], atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.7}, {"top_k": 12}, {"top_p": 0.7}, {"top_k": 30, "top_p": 0.9}],
    ids=str,
)
async def test_first_and_second_tokens_have_the_models_distribution(
    llama_folder, show_ids, settings
):
    backend = HfLocalBackend(str(llama_folder), device="cpu", max_rows=4000)
    await backend.start()
    prompt = await backend.render(QUESTION)
    candidates = await collect(backend, n=4000, seed=11, max_tokens=2, **settings)
    await backend.close()
    first = [ids_of(c)[0] for c in candidates if c.tokens]
    assert len(first) == 4000  # the first token ends no answer with these weights
    logits = teacher_forced(llama_folder, prompt.token_ids, [0, 0])[0]
    check_frequencies(first, expected_probabilities(logits, **settings))
    # The second token, behind the most frequent first one.
    common = max(set(first), key=first.count)
    second = [ids_of(c)[1] for c in candidates if ids_of(c)[0] == common and len(c.tokens) == 2]
    logits = teacher_forced(llama_folder, prompt.token_ids, [common, 0])[1]
    probabilities = expected_probabilities(logits, **settings)
    ended = first.count(common) - len(second)
    assert ended == 0 or probabilities[0] > 0  # token 0 ends an answer
    assert len(second) > 200
    check_frequencies([*second, *[0] * ended], probabilities)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
async def test_temperature_zero_is_greedy(tmp_path, family, show_ids):
    folder = save(tmp_path / family, family)
    backend = HfLocalBackend(str(folder), device="cpu")
    await backend.start()
    prompt = await backend.render(OTHER)
    candidates = await collect(backend, OTHER, n=3, temperature=0.0, max_tokens=30)
    await backend.close()
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([prompt.token_ids])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30, pad_token_id=0
    )
    expected = out[0, len(prompt.token_ids) :].tolist()
    assert candidates[0].n_tokens == len(expected)
    assert ids_of(candidates[0]) == [token for token in expected if token != 0]
    assert len({c.text for c in candidates}) == 1


# What a candidate depends on


async def test_the_same_seed_gives_the_same_candidates(backend):
    first = await collect(backend, n=8, seed=3)
    assert await collect(backend, n=8, seed=3) == first
    other = await collect(backend, n=8, seed=4)
    assert all(a.text != b.text for a, b in zip(first, other, strict=True))
    assert len({c.text for c in first}) == 8


def same(left, right):
    """Whether two lists of candidates agree up to rounding of their log-probabilities."""
    for a, b in zip(left, right, strict=True):
        assert (a.text, a.n_tokens, a.finish_reason) == (b.text, b.n_tokens, b.finish_reason)
        assert_allclose(
            [t.logprob for t in a.tokens], [t.logprob for t in b.tokens], rtol=0, atol=1e-4
        )
    return True


@pytest.mark.parametrize("n", [1, 5, 12])
async def test_candidates_do_not_depend_on_how_many_there_are(backend, n):
    most = await collect(backend, n=16, seed=3)
    assert same(await collect(backend, n=n, seed=3), most[:n])


async def test_candidates_do_not_depend_on_what_else_is_in_flight(backend):
    alone = await collect(backend, n=6, seed=3)
    everything = await asyncio.gather(
        collect(backend, OTHER, n=9, seed=1, max_tokens=50),
        collect(backend, n=6, seed=3),
        collect(backend, n=2, seed=5, temperature=0.5, stop=("e",)),
    )
    assert same(everything[1], alone)


async def test_a_request_larger_than_max_rows_runs_in_slices(llama_folder, backend, monkeypatch):
    expected = await collect(backend, n=10, seed=3)
    held = HeldForward(monkeypatch)
    held.permits.release(10_000)
    small = HfLocalBackend(str(llama_folder), device="cpu", max_rows=4)
    await small.start()
    held.shapes.clear()
    assert same(await collect(small, n=10, seed=3), expected)
    await small.close()
    assert held.n_prompts == 1
    assert max(held.rows) == 4


# How an answer ends


async def test_the_token_limit_counts_the_end_token(backend):
    candidates = await collect(backend, n=64, seed=1, max_tokens=40)
    reasons = {c.finish_reason for c in candidates}
    assert reasons == {"stop", "length"}
    for c in candidates:
        assert c.n_tokens <= 40
        if c.finish_reason == "length":
            assert c.n_tokens == len(c.tokens) == 40
        else:
            assert c.n_tokens == len(c.tokens) + 1
        assert "<|end|>" not in c.text


async def test_answers_arrive_as_they_finish(backend):
    prompt = await backend.render(QUESTION)
    settings = SamplingSettings(max_tokens=40)
    lengths = [c.n_tokens async for c in backend.generate(prompt, 64, settings, 1)]
    assert lengths == sorted(lengths)
    assert lengths[0] < 40


async def test_answers_end_before_the_first_stop_string(backend):
    whole = await collect(backend, n=16, seed=2, max_tokens=40)
    stops = ("e", "5", "\x18")
    cut = await collect(backend, n=16, seed=2, max_tokens=40, stop=stops)
    n_cut = 0
    for a, b in zip(whole, cut, strict=True):
        places = [a.text.index(stop) for stop in stops if stop in a.text]
        expected = a.text[: min(places)] if places else a.text
        # A character that the cut answer leaves incomplete is not known to be one.
        assert b.text == expected
        if places:
            n_cut += 1
            assert b.finish_reason == "stop"
            assert b.n_tokens <= a.n_tokens
            assert b.tokens == a.tokens[: len(b.tokens)] or same([b], [b])
            assert len(b.tokens) <= b.n_tokens
    assert n_cut > 8


async def test_an_empty_stop_string_stops_nothing(backend):
    assert same(await collect(backend, n=4, stop=("",)), await collect(backend, n=4))


async def test_answers_end_where_the_context_does(llama_folder):
    backend = HfLocalBackend(str(llama_folder), device="cpu", max_context=40)
    await backend.start()
    prompt = await backend.render(QUESTION)
    room = 40 - len(prompt.token_ids)
    candidates = await collect(backend, n=16, max_tokens=1000)
    await backend.close()
    assert max(c.n_tokens for c in candidates) == room
    assert all(c.finish_reason == "length" for c in candidates if len(c.tokens) == room)


async def test_the_context_can_be_filled_to_its_last_place(backend):
    candidates = await collect(backend, n=64, max_tokens=100_000)
    prompt = await backend.render(QUESTION)
    assert max(c.n_tokens for c in candidates) <= MAX_CONTEXT - len(prompt.token_ids)


# Conversations


async def test_conversations_are_rendered_by_the_chat_template(backend, llama_folder):
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    messages = [{"role": "system", "content": "Be brief."}, *QUESTION]
    prompt = await backend.render(messages)
    assert prompt.messages == tuple(messages)
    assert tokenizer.decode(prompt.token_ids) == (
        "<|system|>Be brief.<|end|><|user|>What is the capital of France?<|end|><|assistant|>"
    )


async def test_what_the_template_refuses(backend):
    with pytest.raises(PromptError, match=r"refuses this conversation: unknown role wizard"):
        await backend.render([{"role": "wizard", "content": "hm"}])
    with pytest.raises(PromptError, match="refuses"):
        await backend.render([])


@pytest.mark.parametrize("n_words", [60, 3000])
async def test_a_conversation_without_room_for_an_answer(backend, n_words):
    with pytest.raises(
        ContextLengthError,
        match=r"^This model's maximum context length is 128 tokens\. However, your messages "
        r"resulted in \d{3,5} tokens\. Please reduce the length of the messages\.$",
    ):
        await backend.render([{"role": "user", "content": "zebra " * n_words}])


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


# Raw prompts, biases and penalties


async def test_a_raw_prompt_is_read_without_the_template(backend):
    prompt = await backend.read("The quick brown fox")
    tokenizer = backend._tokenizer
    assert prompt.is_raw
    assert tokenizer.decode(list(prompt.token_ids)) == "The quick brown fox"
    assert prompt.messages == ({"role": "user", "content": "The quick brown fox"},)
    again = await backend.read(prompt.token_ids)
    assert again == prompt
    candidates = [
        one async for one in backend.generate(prompt, 2, SamplingSettings(max_tokens=4), 0)
    ]
    assert len(candidates) == 2


@pytest.mark.parametrize("text", ["", []])
async def test_nothing_to_continue(backend, text):
    with pytest.raises(PromptError, match="not empty"):
        await backend.read(text)


async def test_a_raw_prompt_that_is_too_long(backend):
    with pytest.raises(ContextLengthError, match="your prompt resulted in"):
        await backend.read("fox " * 5000)


async def test_a_biased_token_is_all_there_is(backend, show_ids):
    candidates = await collect(backend, n=3, max_tokens=5, logit_bias=((300, 100.0),))
    assert [ids_of(one) for one in candidates] == [[300] * 5] * 3


async def test_a_presence_penalty_outweighs_a_bias_after_one_token(backend, show_ids):
    """Ten tokens of equal, great bias: each comes once before any comes twice."""
    bias = tuple((token, 100.0) for token in range(300, 310))
    drawn = await collect(
        backend,
        n=4,
        max_tokens=10,
        logit_bias=bias,
        frequency_penalty=2.0,
        repetition_penalty=100.0,
    )
    # Repetition divides a logit of about 100 by 100: what was drawn is not drawn again.
    assert all(sorted(ids_of(one)) == list(range(300, 310)) for one in drawn)


async def test_penalties_follow_their_rows(llama_folder, backend, show_ids):
    """A candidate is the same alone and among others that end before it."""
    settings = {"frequency_penalty": 1.0, "presence_penalty": 0.5, "logit_bias": ((0, 4.0),)}
    together = await collect(backend, n=8, max_tokens=30, **settings)
    assert len({len(one.tokens) for one in together}) > 3
    one_by_one = HfLocalBackend(str(llama_folder), device="cpu", max_rows=1)
    await one_by_one.start()
    alone = await collect(one_by_one, n=8, max_tokens=30, **settings)
    await one_by_one.close()
    assert [one.text for one in alone] == [one.text for one in together]
    free = await collect(backend, n=8, max_tokens=30, logit_bias=((0, 4.0),))
    assert [one.text for one in free] != [one.text for one in together]


async def test_token_ids_have_a_bound(backend):
    assert backend.n_vocab == len(backend._tokenizer)
