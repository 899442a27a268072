"""Candidates of the transformers backend: their distribution, what they depend on, their end."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from transformers import AutoModelForCausalLM

from server.backends.base import SamplingSettings
from server.backends.hf_local import HfLocalBackend
from tests.server.backends.conftest import MAX_CONTEXT, save
from tests.server.backends.hf_drawing import OTHER, QUESTION, HeldForward, collect, ids_of, same
from tests.server.backends.test_hf_sampling import check_frequencies, expected_probabilities


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


# Biases and penalties


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
