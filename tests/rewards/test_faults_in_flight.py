"""What goes wrong with a model's format, or far away, while requests of others are in flight."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
from numpy.testing import assert_allclose
from transformers import AutoTokenizer

from rewards import RewardModelError, ScoringError, load_rewards
from rewards.models import endpoint
from tests.rewards.fakes import HeldScorer, sample, suite_of
from tests.rewards.models.remote_upstream import change, good, starting
from tests.rewards.test_faults import scored, until
from tests.rewards.test_sequence_classifier import encode_text, one_by_one
from tests.rewards.test_suite import entered, queued

FILE = """\
version: 1
scorers:
  rm: {{kind: sequence_classifier, model: '{model}', input: {{view: text, text: '{{answer}}'}}}}
  words: {{kind: lexical, measure: words}}
values:
  liked: {{from: rm}}
  words: {{from: words}}
"""


def file_of(tmp_path, model):
    path = tmp_path / "rewards.yaml"
    path.write_text(FILE.format(model=model))
    return path


def text(n, seed=0):
    """Return n letters, which are as many tokens, the same for the same arguments."""
    letters = np.random.default_rng([n, seed]).choice(list("abcdefghij "), n)
    return "".join(letters)


class Hold:
    """Holds the forward passes of a loaded scorer, and remembers their batches."""

    def __init__(self, scorer):
        self.gate, self.entered = threading.Event(), threading.Semaphore(0)
        self.batches = []
        self._forward, scorer.forward = scorer.forward, self.forward

    def forward(self, batch):
        self.batches.append([len(tokens) for tokens in batch])
        self.entered.release()
        assert self.gate.wait(20), "the test never opened the gate"
        return self._forward(batch)


@pytest.mark.parametrize(
    ("architecture", "pad", "limit"),
    [("gpt2", None, 64), ("llama", "</s>", 160)],
    ids=["no padding token", "padding is the end"],
)
async def test_requests_of_all_lengths_share_batches_whatever_the_tokenizer_says(
    architecture, pad, limit, tiny_model, tmp_path
):
    """Its padding is on the left, and is the end or is not there; some texts are too long."""
    folder = tiny_model(architecture)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.pad_token, tokenizer.padding_side) == (pad, "left")
    texts = [text(n) for n in range(limit - 12, limit + 60, 4)]
    path = file_of(tmp_path, folder)
    async with load_rewards(path, device="cpu", max_batch_tokens=30 * limit) as suite:
        hold = Hold(suite._scorers["rm"])
        first = scored(suite, "first")
        await entered(hold)
        others = [scored(suite, one) for one in texts]
        leaving = scored(suite, text(limit - 5, seed=1))
        await queued(suite, len(texts) + 1)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        hold.gate.set()
        found = np.concatenate(await asyncio.gather(first, *others))
    asked = [sample(one) for one in ("first", *texts)]
    expected = one_by_one(folder, encode_text, asked, limit)
    assert_allclose(found[:, 0], expected, rtol=1e-4, atol=1e-5)
    assert_allclose(found[:, 1], [len(one.answer.split()) for one in asked])
    assert np.std(expected) > 0.01  # so that a wrong place is seen
    assert any(len(set(batch)) > 2 for batch in hold.batches), "nothing was padded"
    assert max(map(max, hold.batches)) == limit, "nothing was too long"


async def test_a_model_without_its_head_is_refused_and_the_others_go_on(tiny_model, tmp_path):
    """It is found at the start of a suite; one that runs beside it answers what it has."""
    folder = tiny_model("bert")
    async with load_rewards(file_of(tmp_path, folder), device="cpu") as running:
        hold = Hold(running._scorers["rm"])
        first = scored(running, "first")
        await entered(hold)
        behind = scored(running, text(20))
        await queued(running, 1)
        headless = load_rewards(file_of(tmp_path, tiny_model("bert", head=False)), device="cpu")
        with pytest.raises(RewardModelError, match=r"'rm'.*weights lack classifier.*random"):
            await headless.start()
        hold.gate.set()
        found = np.concatenate(await asyncio.gather(first, behind))
    asked = [sample("first"), sample(text(20))]
    assert_allclose(found[:, 0], one_by_one(folder, encode_text, asked, 64), rtol=1e-4, atol=1e-5)


async def test_a_wrong_shape_fails_its_batch_alone_while_others_wait_and_run():
    scorer, other = HeldScorer("broken", is_held=True), HeldScorer("other")
    async with suite_of(scorer, other, max_batch_tokens=100) as suite:
        bad = [scored(suite, "shape", "broken")]
        await entered(scorer)
        bad.append(scored(suite, "shape too".ljust(90), "broken"))
        behind = scored(suite, "x" * 80, "broken")  # has no room in the batch of the last
        await queued(suite, 2)
        neighbour = scored(suite, "abc", "other")
        scorer.gate.set()
        for task in bad:
            with pytest.raises(ScoringError, match=r"shape \(1, 2\) came back for 1 inputs"):
                await task
        np.testing.assert_array_equal(await behind, [[80]])
        np.testing.assert_array_equal(await neighbour, [[3]])
        assert suite.health()["other"]["last_error"] is None


@pytest.mark.parametrize("fault", ["down", "slow"])
async def test_a_remote_fails_one_request_while_it_and_others_answer(fault, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "_pause", lambda _: None)
    gate = threading.Event()

    def bad(handler, body):
        if "bad" not in body["samples"][0]["answer"]:
            return 200, {}, good("webhook", body)
        assert gate.wait(20)
        return None  # the connection breaks

    with starting() as start:
        upstream = start("webhook")
        monkeypatch.setattr(upstream, "handle_error", lambda *_: None)  # it notices that we left
        path = tmp_path / "rewards.yaml"
        path.write_text(
            "version: 1\nscorers:\n"
            f"  far: {{kind: remote, api: webhook, url: '{upstream.url}', output: {{index: 1}},\n"
            "    timeout_s: 60}\n"
            "  words: {kind: lexical, measure: words}\n"
            "values: {liked: {from: far}, words: {from: words}}\n"
        )
        async with load_rewards(path) as suite:
            upstream.seen.clear()
            upstream.script = [bad] * 100
            if fault == "slow":
                change(suite, timeout_s=1)
            failing = scored(suite, "bad")
            await until(lambda: upstream.seen or failing.done())
            change(suite, timeout_s=60)
            others = [scored(suite, "x" * n) for n in range(1, 9)]
            found = np.concatenate(await asyncio.gather(*others))
            assert_allclose(found, [[n, 1] for n in range(1, 9)])
            if fault == "down":
                assert not failing.done()
                gate.set()
            problem = "no scores within" if fault == "slow" else r"connection broke .*\(tries: 3\)"
            with pytest.raises(ScoringError, match=problem):
                await failing
            gate.set()
