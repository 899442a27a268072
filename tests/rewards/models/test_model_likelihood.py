"""Log-likelihoods of batches against transformers' own loss of one text at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from rewards import Sample
from rewards.config import LikelihoodConfig
from rewards.models import model_likelihood
from rewards.models.model_likelihood import ModelLikelihood
from tests.rewards.golden import assert_batches_agree, samples
from tests.rewards.tiny import CAUSAL

TEXT = {"view": "text", "text": "{prompt}{answer}"}


@pytest.fixture
def model(tiny_model):
    return lambda architecture: tiny_model(architecture, auto="AutoModelForCausalLM")


def load(folder, **fields):
    fields = {"kind": "likelihood", "model": "m", "input": TEXT, **fields}
    scorer = ModelLikelihood("s", ["likely"], LikelihoodConfig(**fields), folder)
    scorer.load("cpu")
    return scorer


def losses(folder, ids, kept=None):
    """Return minus transformers' loss of each text; of the tokens kept, if given."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for row, one in enumerate(ids):
        inputs = torch.tensor([one])
        labels = inputs.clone()
        if kept is not None:
            labels[:, [at for at in range(len(one)) if at not in kept[row]]] = -100
        with torch.inference_mode():
            found.append(-model(input_ids=inputs, labels=labels).loss.item())
    return np.array(found)


@pytest.mark.parametrize("architecture", CAUSAL)
def test_all_tokens_of_prompt_and_answer(architecture, model):
    """As MAP computes what it calls perplexity: minus the loss of the whole text."""
    folder = model(architecture)
    scorer = load(folder, max_length=60)
    wanted = samples(longest=14)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [tokens.ids for tokens in scorer.encode([scorer.render(one) for one in wanted])]
    for one, got in zip(wanted, ids, strict=True):
        whole = tokenizer.encode(one.messages[-1]["content"] + one.answer)
        assert len(got) == min(60, len(whole))
        if len(whole) <= 60:
            assert got == whole
    assert {len(one) for one in ids} > {60}, "some are cut"
    assert_batches_agree(scorer, wanted, losses(folder, ids), 1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_tokens_of_the_answer_alone(architecture, model):
    folder = model(architecture)
    scorer = load(folder, tokens="answer", max_length=60)
    wanted = samples(longest=14)
    inputs = scorer.encode([scorer.render(one) for one in wanted])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    kept = []
    for one, tokens in zip(wanted, inputs, strict=True):
        answer = tokenizer.encode(one.answer, add_special_tokens=False)
        first = len(tokens) - min(len(answer), 60 if architecture == "gpt2" else 59)
        # One letter is one token here, so the answer's are the last ones.
        assert tokens.ids[first:] == answer[: len(tokens) - first]
        kept.append(set(range(first, len(tokens))))
    expected = losses(folder, [tokens.ids for tokens in inputs], kept)
    assert_batches_agree(scorer, wanted, expected, 1e-4)


def test_what_stands_behind_the_answer_is_not_its_own(model):
    scorer = load(
        model("llama"), tokens="answer", input={"view": "text", "text": "{prompt}{answer} end"}
    )
    sample = Sample(({"role": "user", "content": "ab"},), "cde")
    (tokens,) = scorer.encode([scorer.render(sample)])
    assert tokens.marks == (3, 4, 5)  # behind <s> a b


def test_a_sum_is_the_mean_times_the_tokens(model):
    mean, total = load(model("llama")), load(model("llama"), reduce="sum")
    inputs = mean.encode([mean.render(one) for one in samples(n=6)])
    n_predicted = np.array([len(tokens) - 1 for tokens in inputs])
    np.testing.assert_allclose(total.forward(inputs), mean.forward(inputs) * n_predicted)


def test_large_batches_are_computed_in_parts(model, monkeypatch):
    scorer = load(model("qwen2"))
    inputs = scorer.encode([scorer.render(one) for one in samples()])
    whole = scorer.forward(inputs)
    monkeypatch.setattr(model_likelihood, "_MAX_LOGITS", 100_000)
    np.testing.assert_allclose(scorer.forward(inputs), whole, rtol=1e-5)


def test_nothing_to_predict_is_likely(model):
    scorer = load(model("gpt2"))
    sample = Sample(({"role": "user", "content": ""},), "")
    assert scorer.forward(scorer.encode([scorer.render(sample)])).tolist() == [0.0]
    answer = load(model("llama"), tokens="answer")
    sample = Sample(({"role": "user", "content": "what"},), "")
    assert answer.forward(answer.encode([answer.render(sample)])).tolist() == [0.0]
