"""Whether vLLM draws from the model that the transformers backend draws from."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from safetensors.torch import load_file
from scipy import stats
from transformers import AutoModelForCausalLM

from server.backends.base import SamplingSettings
from server.backends.hf_text import Detokenizer
from server.scoring import sample_of
from tests.server.backends.hf_drawing import same
from tests.server.backends.vllm_engine.conftest import ENGINE, LONG, MODEL, OTHER, QUESTION, collect

pytestmark = ENGINE


def merged(folder):
    """Return the model with the adapter of a folder added to its weights."""
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    tensors = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for key, down in tensors.items():
            if ".lora_A." in key:
                up = tensors[key.replace("lora_A", "lora_B")]
                name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                model.get_submodule(name).weight += 2 * up @ down
    return model


async def test_it_reads_and_is_what_the_transformers_backend_is(backend, local):
    assert backend.fingerprint == local.fingerprint
    assert backend.max_context == local.max_context
    assert backend.n_vocab == local.n_vocab
    for messages in (QUESTION, OTHER, LONG):
        assert await backend.render(messages) == await local.render(messages)
    for text in ("Once upon a time", [5, 6, 7]):
        assert await backend.read(text) == await local.read(text)


async def check_log_probabilities(backend, model, monkeypatch):
    monkeypatch.setattr(Detokenizer, "token", lambda self, token_id: str(token_id))
    settings = {"temperature": 0.7, "top_k": 50, "top_p": 0.95, "min_p": 0.01}
    candidates = await collect(backend, n=6, max_tokens=40, top_logprobs=3, **settings)
    prompt = await backend.render(QUESTION)
    for candidate in candidates:
        ids = [int(token.token) for token in candidate.tokens]
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt.token_ids, *ids]])).logits[0]
        expected = logits.log_softmax(-1)[len(prompt.token_ids) - 1 : -1].numpy()
        logprobs = [token.logprob for token in candidate.tokens]
        # Float32 matrix products of other shapes.
        assert_allclose(logprobs, expected[np.arange(len(ids)), ids], rtol=0, atol=1e-4)
        top = [[logprob for _, logprob in token.top] for token in candidate.tokens]
        assert_allclose(top, -np.sort(-expected, axis=1)[:, :3], rtol=0, atol=1e-4)


async def test_log_probabilities_are_the_models_own(backend, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    await check_log_probabilities(backend, model, monkeypatch)


async def test_an_adapter_is_a_model_of_its_own(backend, adapter_folder, monkeypatch):
    (loud,) = backend.adapters
    await loud.start()
    assert loud.model_id == "loud"
    assert loud.fingerprint != backend.fingerprint
    await check_log_probabilities(loud, merged(adapter_folder), monkeypatch)
    apart = [await collect(loud, n=4), await collect(backend, n=4)]
    assert [c.text for c in apart[0]] != [c.text for c in apart[1]]
    together = await asyncio.gather(collect(loud, n=4), collect(backend, n=4))
    assert same(together[0], apart[0])
    assert same(together[1], apart[1])


async def test_log_probabilities_are_left_out_where_nobody_reads_them(backend):
    prompt = await backend.render(QUESTION)
    settings = SamplingSettings(max_tokens=24)
    stream = backend.generate(prompt, 4, settings, 0, wants_logprobs=False)
    found = sorted([c async for c in stream], key=lambda c: c.index)
    for bare, whole in zip(found, await collect(backend), strict=True):
        assert (bare.text, bare.n_tokens) == (whole.text, whole.n_tokens)
        assert [token.token for token in bare.tokens] == [token.token for token in whole.tokens]
        assert np.isnan([token.logprob for token in bare.tokens]).all()
        assert sample_of(prompt, bare).token_logprobs is None
        assert sample_of(prompt, whole).token_logprobs


def statistics(candidates):
    """Return length, log-likelihood and two lexical measures of each, shape (4, n)."""
    return np.array(
        [
            (
                c.n_tokens,
                sum(token.logprob for token in c.tokens),
                len(c.text.split()),
                sum(map(len, c.text.split())) / max(1, len(c.text.split())),
            )
            for c in candidates
        ]
    ).T


def p_values(left, right):
    """Return a two-sample Kolmogorov-Smirnov p-value for each statistic."""
    pairs = zip(statistics(left), statistics(right), strict=True)
    return np.array([stats.ks_2samp(a, b, method="asymp").pvalue for a, b in pairs])


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_p": 0.9}], ids=str)
async def test_answers_have_the_distribution_of_the_transformers_backend(backend, local, settings):
    n = 400
    theirs = await collect(local, n=n, seed=5, max_tokens=32, **settings)
    ours = await collect(backend, n=n, seed=5, max_tokens=32, **settings)
    # Eight tests in the two cases: a right backend fails one in 10,000 times over all seeds
    # (Bonferroni; with ties the asymptotic p-value is the larger).
    assert p_values(ours, theirs).min() > 1e-4 / 8
    # Sharp enough to see another distribution.
    other = {**settings, "temperature": settings.get("temperature", 1.0) * 0.7}
    wrong = await collect(backend, n=n, seed=5, max_tokens=32, **other)
    assert p_values(wrong, theirs).min() < 1e-4 / 8


async def test_temperature_zero_is_greedy(backend, local):
    expected = await collect(local, n=1, temperature=0.0)
    assert same(await collect(backend, n=3, temperature=0.0), expected * 3)
    assert same(await collect(backend, n=3, top_k=1), expected * 3)
    assert same(await collect(backend, n=3, min_p=1.0), expected * 3)
