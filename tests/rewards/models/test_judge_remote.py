"""A judge behind a url: a scripted one on a real socket, and a real server with the small model."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from transformers import AutoModelForCausalLM, AutoTokenizer

from rewards import RewardConfigError, RewardModelError, Sample, ScoringError, load_rewards
from rewards.base import TRIAL
from rewards.checking import check_rewards
from rewards.models import endpoint, judge_remote
from server import embedded
from tests.rewards.models.remote_upstream import (
    SECRET,
    Upstream,
    change,
    samples,
    starting,
    trickle,
    unused_port,
)
from tests.running_server import running_server

KIND, RUDE = "Is it kind?", "Is it rude?"
PUT = "Consider only the last reply. Answer Yes or No. "


def reply_of(top):
    """Return a chat completion of one token with these likeliest ones."""
    entries = [{"token": token, "logprob": logprob} for token, logprob in top.items()]
    first = {**entries[0], "top_logprobs": entries}
    message = {"role": "assistant", "content": entries[0]["token"]}
    return {"choices": [{"index": 0, "message": message, "logprobs": {"content": [first]}}]}


def odds(answer, question):
    return (len(answer) if KIND in question else -len(answer)) / 10


class Judge(Upstream):
    """Its log-odds go by the answer's length; "only" is a yes that has no no beside it."""

    def good(self, body):
        answer, question = (one["content"] for one in body["messages"][-2:])
        yes = odds(answer, question)
        if "only" in answer:
            return reply_of({"Yes": -0.5, " Yes": -0.5, "The": -2.0, "A": -3.0})
        if "blue" in answer:
            return reply_of({"Blue": -0.1, " ": -3.0})
        return reply_of({"Yes": yes - 2.0, "The": -1.0, "No": -2.0, "\n": -5.0})


@pytest.fixture
def serve():
    with starting(Judge) as start:
        yield lambda: start("judge")


@pytest.fixture
def load(tmp_path):
    def make(upstream, extra="", questions=f"{{kind: '{KIND}', rude: '{RUDE}'}}"):
        url = upstream if isinstance(upstream, str) else upstream.url + "/chat/completions"
        path = tmp_path / "rewards.yaml"
        fields = [f"kind: judge, url: '{url}', model: m, questions: {questions}", extra]
        path.write_text(
            f"version: 1\nscorers:\n  far: {{{', '.join(filter(None, fields))}}}\n"
            "  near: {kind: lexical, measure: words}\n"
            "values: {kind: {from: far.kind}, rude: {from: far.rude}, words: {from: near}}\n"
        )
        return load_rewards(path)

    return make


async def test_log_odds_come_back_in_order_and_equal_answers_are_asked_about_once(serve, load):
    upstream = serve()
    answers = ["x" * n for n in (5, 1, 9, 5, 3)]
    async with load(upstream, "max_concurrent: 3") as suite:
        assert not suite.needs_judge
        upstream.seen.clear()
        scores = await suite.score(samples(*answers))
    expected = [[odds(one, KIND), odds(one, RUDE), 1] for one in answers]
    assert_allclose(scores, expected, atol=1e-12)
    assert len(upstream.seen) == 4 * 2
    assert {path for path, _, _ in upstream.seen} == {"/post/chat/completions"}


async def test_what_is_sent(serve, load, tmp_path):
    upstream = serve()
    (tmp_path / "key").write_text("sk-123\n")
    extra = "token_file: key, extra_body: {chat_template_kwargs: {enable_thinking: false}}"
    async with load(upstream, extra) as suite:
        upstream.seen.clear()
        await suite.score(samples("yes"), ["kind"])
    assert all(headers["Authorization"] == "Bearer sk-123" for _, headers, _ in upstream.seen)
    bodies = {body["messages"][-1]["content"]: body for _, _, body in upstream.seen}
    assert bodies[PUT + KIND] == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": PUT + KIND},
        ],
        "max_tokens": 1,
        "temperature": 1,
        "top_p": 1,
        "logprobs": True,
        "top_logprobs": 20,
        "chat_template_kwargs": {"enable_thinking": False},
    }


async def test_a_no_beyond_the_likeliest_is_as_likely_as_the_least_of_them(serve, load):
    async with load(serve()) as suite:
        scores = await suite.score(samples("only"), ["kind"])
    assert_allclose(scores, [[math.log(2 * math.exp(-0.5)) + 3.0]])


async def test_an_answer_without_yes_or_no_fails_its_own_request_alone(serve, load):
    upstream = serve()
    async with load(upstream) as suite:
        others = asyncio.gather(*(suite.score(samples("x" * n)) for n in range(1, 9)))
        with pytest.raises(ScoringError, match=r"'far'.*none of the 2 likeliest beginnings.*'Yes'"):
            await suite.score(samples("blue"))
        assert_allclose(np.concatenate(await others)[:, 0], np.arange(1, 9) / 10)


async def test_questions_overlap_up_to_the_bound(serve, load):
    upstream = serve()
    inside, most, lock = 0, 0, threading.Lock()
    together = threading.Barrier(3, timeout=20)

    def count(_, body):
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        together.wait()  # broken unless three are here at once
        with lock:
            inside -= 1
        return 200, {}, upstream.good(body)

    async with load(upstream, "max_concurrent: 3, timeout_s: 60") as suite:
        upstream.script = [count] * 12
        # Candidates are scored one by one, as they finish.
        found = await asyncio.gather(*(suite.score(samples("x" * n)) for n in range(1, 7)))
    assert_allclose(np.concatenate(found)[:, 0], np.arange(1, 7) / 10)
    assert most == 3


async def test_a_questions_time_begins_with_its_turn(serve, load, monkeypatch):
    """Six questions of 8 s each, one after the other, and 10 s for each."""
    upstream, now = serve(), [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])

    def last(_, body):
        now[0] += 8.0
        return 200, {}, upstream.good(body)

    async with load(upstream, "max_concurrent: 1, timeout_s: 10") as suite:
        monkeypatch.setattr(endpoint, "time", clock)
        monkeypatch.setattr(judge_remote, "time", clock)
        upstream.script = [last] * 6
        scores = await suite.score(samples("a", "bb", "ccc"), ["kind"])
    assert_allclose(scores, [[0.1], [0.2], [0.3]])
    assert now == [48.0]


NO_TOP = {"choices": [{"logprobs": {"content": [{"token": "Yes", "logprob": -1.0}]}}]}
ECHO = f"<html>{SECRET}</html>".encode()


@pytest.mark.parametrize(
    "fault",
    ["down", "slow", "trickle", "hung", "broken", "html", "no logprobs", "nan", "key", "too long"],
)
async def test_a_judge_fails_and_the_others_still_score(fault, serve, load, monkeypatch):
    monkeypatch.setattr(endpoint, "_pause", lambda _: None)
    upstream = serve()
    monkeypatch.setattr(upstream, "handle_error", lambda *_: None)  # it notices that we left
    script, problem = {
        "down": ([], r"cannot be reached .*\(tries: 3\)"),
        "slow": ([lambda handler, _: handler.server.release.wait(20) and None] * 2, "within 1 s"),
        "trickle": ([trickle] * 2, "within 1 s"),
        "hung": ([], "within 1 s"),
        "broken": ([(503, {}, ECHO)] * 6, r"answered 503 \(tries: 3\)"),
        "html": ([(200, {}, ECHO)] * 2, "not JSON; correct the url"),
        "no logprobs": ([(200, {}, NO_TOP)] * 2, "top_logprobs"),
        "nan": ([(200, {}, reply_of({"Yes": math.nan, "No": -1.0}))] * 2, "gave nan"),
        "key": ([(401, {}, ECHO)] * 2, "answered 401; set token_file"),
        "too long": ([(400, {}, ECHO)] * 2, "answered 400; check model, extra_body"),
    }[fault]
    async with load(upstream, "timeout_s: 60") as suite:
        upstream.script = list(script)
        with monkeypatch.context() as patch:
            if fault == "hung":  # looking up a name has no timeout of its own
                patch.setattr(endpoint.Endpoint, "_send", lambda *_: upstream.release.wait(20))
            if fault == "down":
                url = f"http://127.0.0.1:{unused_port()}/chat/completions"
                patch.setattr(suite._scorers["far"]._endpoint, "url", url)
            if fault in ("slow", "trickle", "hung"):
                change(suite, timeout_s=1)
            failing = asyncio.create_task(suite.score(samples(f"{SECRET} it is")))
            others = [await suite.score(samples("a b " * n), ["words"]) for n in range(1, 5)]
            assert_allclose(np.concatenate(others), [[2], [4], [6], [8]])
            with pytest.raises(ScoringError, match=problem) as caught:
                await failing
        assert caught.value.scorer == "far"
        assert "127.0.0.1" in str(caught.value)
        assert SECRET not in str(caught.value)
        assert caught.value.__suppress_context__
        # A value that may be missing: the request is answered without it.
        upstream.script = [(404, {}, ECHO)] * 2
        change(suite, timeout_s=60)
        found = await suite.attempt(samples("a b"), {"kind", "rude"})
        assert set(found.failures) == {"kind", "rude"}
        assert found.rewards[0, 2] == 2
        upstream.script = []
        assert_allclose(await suite.score(samples("abc"), ["kind"]), [[0.3]])  # and it is back
        upstream.release.set()


async def test_a_judge_is_seen_to_be_down_and_to_be_back(serve, load, monkeypatch):
    monkeypatch.setattr("rewards.trials.FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr("rewards.trials.LONGEST_PAUSE_S", 0.001)
    upstream = serve()

    async def until(condition):
        async with asyncio.timeout(20):
            while not condition(suite.health()["far"]):  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    async with load(upstream, "retries: 0") as suite:
        change(suite, url=f"http://127.0.0.1:{unused_port()}/chat/completions")
        with pytest.raises(ScoringError, match="cannot be reached"):
            await suite.score(samples("one"))
        await until(lambda health: health["persists"])
        change(suite, url=f"{upstream.url}/chat/completions")
        await until(lambda health: health["state"] == "ok" and not health["persists"])


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (NO_TOP, "does not tell the likeliest first tokens"),
        (reply_of({"<think>": -0.1, "\n": -3.0}), "without thinking first"),
        ([], "top_logprobs"),
    ],
)
async def test_a_judge_that_cannot_judge_stops_the_start(reply, problem, serve, load):
    upstream = serve()
    upstream.script = [(200, {}, reply)] * 2
    with pytest.raises(RewardModelError, match=rf"'far'.*model m, .*trial question.*{problem}"):
        await load(upstream).start()


async def test_an_unusable_key_stops_the_start(serve, load, tmp_path):
    (tmp_path / "key").write_text("two keys")
    with pytest.raises(RewardModelError, match="token_file must hold one token"):
        await load(serve(), "token_file: key").start()


async def test_the_fingerprint_knows_the_judge(serve, load):
    upstream, other = serve(), serve()
    prints = []
    for which, extra in (
        (upstream, ""),
        (upstream, "timeout_s: 5, retries: 1, max_concurrent: 2"),
        (other, ""),
        (upstream, "extra_body: {a: 1}"),
        (upstream, "template: 'Say. {question}'"),
    ):
        async with load(which, extra) as suite:
            prints.append(suite.fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ("url: 'http://h/v1/chat/completions'", "needs model"),
        ("url: 'http://h/v1', model: m", r"url: .*end with /chat/completions"),
        ("url: 'ftp://h/chat/completions', model: m", r"url: .*must be http"),
        ("url: 'http://me:pw@h/chat/completions', model: m", r"url: .*see token_file"),
        ("model: m", "model is of a judge behind a url"),
        ("timeout_s: 3", "timeout_s is of a judge .* leave timeout_s out"),
        (
            "url: 'http://h/chat/completions', model: m, extra_body: {top_logprobs: 5}",
            "extra_body: .*may not have top_logprobs",
        ),
        ("url: 'http://h/chat/completions', model: m, max_concurrent: 0", "max_concurrent: "),
    ],
)
def test_bad_entries_are_refused_with_their_line(tmp_path, fields, problem):
    path = tmp_path / "rewards.yaml"
    path.write_text(
        f"version: 1\nscorers:\n  j: {{kind: judge, question: x, {fields}}}\n"
        "values:\n  v: {from: j}\n"
    )
    with pytest.raises(RewardConfigError, match=problem) as caught:
        load_rewards(path)
    assert caught.value.line == 3


def test_it_is_checked_without_a_server(serve, tmp_path):
    """Pairs included: `palette rewards check` needs no chat model for it."""
    upstream = serve()
    path = tmp_path / "rewards.yaml"
    path.write_text(
        "version: 1\nscorers:\n"
        f"  j: {{kind: judge, url: '{upstream.url}/chat/completions', model: m,\n"
        f"    question: '{RUDE}'}}\n"
        "values:\n  v: {from: j, check: [{prompt: Hi, better: longer, worse: x}]}\n"
    )
    report = check_rewards(path)
    assert report.scorers[0].problem is None
    assert report.scorers[0].model == "m"
    assert "worse" in report.values[0].problem  # it has the wrong sign


QUESTION = "Is the reply about water?"
# What this model begins its replies with, whatever is asked, and nothing likely is a part of.
WORDS = (("Let", "What"), ("You", "Well"))
DIALOGUE = ({"role": "user", "content": "How do I keep a plant alive?"},)


@torch.inference_mode()
def expected(sample):
    """Return the log-odds of the first token after a pass over the whole conversation."""
    tokenizer = AutoTokenizer.from_pretrained(embedded.CHAT_MODEL)
    model = AutoModelForCausalLM.from_pretrained(embedded.CHAT_MODEL).eval()
    answer = {"role": "assistant", "content": sample.answer}
    dialogue = [*sample.messages, answer, {"role": "user", "content": PUT + QUESTION}]
    text = tokenizer.apply_chat_template(dialogue, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    logprobs = model(ids).logits[0, -1].log_softmax(dim=-1)
    first = [[tokenizer.convert_tokens_to_ids(word) for word in group] for group in WORDS]
    yes, no = (logprobs[group].logsumexp(dim=-1).item() for group in first)
    return yes - no


async def test_a_palette_server_judges_as_its_model_does(tmp_path):
    rewards = tmp_path / "rewards.yaml"
    asked = [Sample(DIALOGUE, one) for one in ("Give it water.", "No.", "Talk to it every day!")]
    state = str(tmp_path / "state")
    with running_server(PALETTE_CALIBRATE_AT_START="false", PALETTE_STATE_DIR=state) as url:
        entry = {
            "kind": "judge",
            "url": f"{url}/v1/chat/completions",
            "model": embedded.CHAT_MODEL_NAME,
            "question": QUESTION,
            "yes_words": WORDS[0],
            "no_words": WORDS[1],
        }
        values = {"wet": {"from": "far"}}
        file = {"version": 1, "scorers": {"far": entry}, "values": values}
        rewards.write_text(json.dumps(file))  # JSON is YAML
        async with load_rewards(rewards) as suite:
            scores = await suite.score([*asked, TRIAL])
    assert_allclose(scores[:, 0], [expected(sample) for sample in (*asked, TRIAL)], atol=1e-4)
    assert np.std(scores) > 1e-3
