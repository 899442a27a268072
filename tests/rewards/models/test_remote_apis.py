"""What each api is sent, and how its answer is read; entries and replies that are wrong."""

from __future__ import annotations

import numpy as np
import pytest

from rewards import RewardConfigError, RewardModelError, ScoringError, load_rewards
from rewards.checking import check_rewards
from tests.rewards.models.remote_upstream import ENTRIES, samples


@pytest.mark.parametrize("api", ENTRIES)
async def test_scores_come_back_in_order(api, serve, load):
    upstream = serve(api)
    answers = ["x" * n for n in (5, 1, 9, 5, 3, 7, 2)]
    async with load(api, upstream.url, "max_batch: 2") as suite:
        n_probes = len(upstream.seen)
        scores = await suite.score(samples(*answers))
        health = suite.health()["far"]
    np.testing.assert_array_equal(scores, [[len(answer), 1] for answer in answers])
    assert len(upstream.seen) - n_probes == 3  # 6 distinct inputs, 2 at a time
    assert (health["state"], health["texts"]) == ("ok", 7)
    assert {path for path, _, _ in upstream.seen} == {"/post"}
    assert all("Authorization" not in headers for _, headers, _ in upstream.seen)


@pytest.mark.parametrize(
    ("api", "entry", "sent"),
    [
        (
            "vllm_classify",
            "input: {view: text, text: 'Q {prompt} A {answer}'}, output: {index: 1}, model: rm",
            {"use_activation": False, "model": "rm", "input": ["Q hello A yes"]},
        ),
        (
            "vllm_classify",
            "input: {view: chat, system: drop}, output: {margin: [1, 0]}, truncate: true",
            {
                "use_activation": False,
                "truncate_prompt_tokens": -1,
                "add_generation_prompt": False,
                "messages": [
                    {"role": "user", "content": "hello"},
                    {"role": "assistant", "content": "yes"},
                ],
            },
        ),
        (
            "vllm_score",
            "input: {view: pair}",
            {"use_activation": False, "text_1": ["hello"], "text_2": ["yes"]},
        ),
        (
            "tei_predict",
            "input: {view: text}, output: {label: good}",
            {"inputs": [["yes"]], "raw_scores": True, "truncate": False},
        ),
        (
            "tei_predict",
            "input: {view: pair}, output: {margin: [good, bad]}, truncate: true, model: noted",
            {"inputs": [["hello", "yes"]], "raw_scores": True, "truncate": True},
        ),
        ("openrlhf", "input: {view: text}", {"query": ["yes"]}),
        (
            "openrlhf",
            "input: {view: pair, a: 'Q {prompt} ', b: 'A {answer}'}",
            {"query": ["Q hello A yes"], "prompts": ["Q hello "]},
        ),
        (
            "webhook",
            "input: {view: chat, system: drop}, output: {index: 1}",
            {"samples": [{"messages": [{"role": "user", "content": "hello"}], "answer": "yes"}]},
        ),
    ],
)
async def test_what_is_sent(api, entry, sent, serve, load):
    upstream = serve(api)
    async with load(api, upstream.url, entry=entry) as suite:
        await suite.score(samples("yes"))
    assert upstream.seen[-1][2] == sent


@pytest.mark.parametrize("reply", [[3, 4.5], [[3], [4.5]], {"rewards": [3, 4.5]}])
async def test_replies_of_a_webhook(reply, serve, load):
    upstream = serve("webhook")
    upstream.script = [(200, {}, reply)] * 2
    async with load("webhook", upstream.url, entry="output: {sign: -1}") as suite:
        scores = await suite.score(samples("one", "two"), ["liked"])
    np.testing.assert_array_equal(scores, [[-3.0], [-4.5]])


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("{margin: [1, 0]}", 3.0),
        ("{margin: [0, 1]}", -3.0),
        ("{index: 1, sign: -1}", -2.0),
        ("{index: 1, activation: softmax}", 1 / (1 + np.exp(-3.0))),
        ("{margin: [1, 0], activation: sigmoid}", 1 / (1 + np.exp(-3.0))),
        ("{margin: [1, 0], activation: log_sigmoid}", -np.log1p(np.exp(-3.0))),
        ("{index: 1, activation: log_odds}", 3.0),
    ],
)
async def test_how_numbers_are_read(output, expected, serve, load):
    upstream = serve("webhook")
    async with load("webhook", upstream.url, entry=f"output: {output}") as suite:
        scores = await suite.score(samples("ab"), ["liked"])
    np.testing.assert_allclose(scores, [[expected]], rtol=1e-12)


async def test_numbers_for_labels(serve, load):
    upstream = serve("tei_predict")
    entry = "input: {view: pair}, output: {expect: {good: 2, bad: -1}}"
    async with load("tei_predict", upstream.url, entry=entry) as suite:
        scores = await suite.score(samples("ab"), ["liked"])
    good_share = 1 / (1 + np.exp(0.5 - 2))
    np.testing.assert_allclose(scores, [[2 * good_share - (1 - good_share)]], rtol=1e-12)
    with pytest.raises(RewardModelError, match="a number for each label; it gives the labels"):
        await load(
            "tei_predict", upstream.url,
            entry="input: {view: pair}, output: {expect: {good: 2, best: 1}}",
        ).start()  # fmt: skip


async def test_one_request_feeds_several_values(serve, tmp_path):
    upstream = serve("webhook")
    path = tmp_path / "rewards.yaml"
    path.write_text(
        "version: 1\n"
        f"scorers: {{rm: {{kind: remote, api: webhook, url: '{upstream.url}',\n"
        "  outputs: {long: {index: 1}, gap: {margin: [0, 1]}}}}\n"
        "values: {long: {from: rm.long}, gap: {from: rm.gap}}\n"
    )
    async with load_rewards(path) as suite:
        n_trials = len(upstream.seen)
        scores = await suite.score(samples("ab", "abcd"))
    np.testing.assert_array_equal(scores, [[2, -3], [4, -5]])
    assert len(upstream.seen) == n_trials + 1


TEI_UNEQUAL = [[{"label": "good", "score": 1}], [{"label": "bad", "score": 1}]]


@pytest.mark.parametrize(
    ("api", "reply", "problem"),
    [
        ("vllm_classify", {"data": [{"index": 0, "probs": [0, 1]}]}, "of 1 samples for 2"),
        ("vllm_classify", {"data": [{"index": 1, "probs": [0, 1]}] * 2}, "indices"),
        ("vllm_classify", {"data": [{"index": i, "probs": [1]} for i in (0, 1)]}, "1 numbers per"),
        ("vllm_classify", {"data": [{"index": i, "probs": [0, np.nan]} for i in (0, 1)]}, "nan"),
        ("vllm_classify", {"data": [{"index": i, "score": 1} for i in (0, 1)]}, "not that"),
        ("vllm_score", {"data": [{"index": 0, "score": 1}]}, "of 1 samples for 2"),
        ("vllm_score", b'{"data": [{"index": 0, "score": NaN}, {"index": 1, "score": 1}]}', "nan"),
        ("vllm_score", {"data": [{"index": i, "score": None} for i in (0, 1)]}, "not that"),
        ("tei_predict", [[{"label": "good", "score": 1}]], "of 1 samples for 2"),
        ("tei_predict", TEI_UNEQUAL, "same labels"),
        ("tei_predict", [[{"label": "bad", "score": 1}]] * 2, "it gives the labels bad"),
        ("tei_predict", [[], []], "no numbers"),
        ("tei_predict", [[{"label": "good", "score": -np.inf}]] * 2, "gave -inf"),
        ("openrlhf", {"rewards": [1, 2, 3]}, "of 3 samples for 2"),
        ("openrlhf", b'{"rewards": [1, NaN]}', "gave nan"),
        ("openrlhf", {"rewards": [[1, 2], [3, 4]]}, "2 numbers per sample and none is chosen"),
        ("openrlhf", {"scores": [1, 2]}, "not that of openrlhf"),
        ("webhook", {"rewards": [[1, 2], [3]]}, "not equally many"),
        ("webhook", [[1, 2]], "of 1 samples for 2"),
        ("webhook", b"[[1, 2], [1, 1e999]]", "gave inf"),
        ("webhook", [["1", "2"], ["3", "4"]], "not that of webhook"),
        ("webhook", [[True, False], [True, False]], "not that of webhook"),
        ("webhook", b"[" * 5000, "not JSON"),
    ],
)  # fmt: skip
async def test_wrong_replies(api, reply, problem, serve, load):
    upstream = serve(api)
    async with load(api, upstream.url) as suite:
        upstream.script = [(200, {}, reply)]
        with pytest.raises(ScoringError, match=rf"'far' \(feeds liked\).*127.0.0.1.*{problem}"):
            await suite.score(samples("one", "other"))


async def test_the_fingerprint(serve, load):
    upstream, other = serve("webhook"), serve("webhook")
    prints = []
    for url, extra in (
        (upstream.url, ""),
        (upstream.url, "timeout_s: 5, retries: 1, max_batch: 3, max_concurrent: 2"),
        (upstream.url, "model: b"),
        (upstream.url, "input: {view: chat, system: drop}"),
        (other.url, ""),
    ):
        async with load("webhook", url, extra) as suite:
            prints.append(suite.fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4


@pytest.mark.parametrize(
    ("api", "url", "entry", "problem"),
    [
        ("webhook", "ftp://h/x", None, "must be http"),
        ("webhook", "http:///x", None, "must be http"),
        ("webhook", "http://h:99999/x", None, "must be http"),
        ("webhook", "http://me:pw@h/x", None, "see token_file"),
        ("webhook", "http://me@h/x", None, "see token_file"),
        ("webhook", "http://h:80/", None, "lacks its path"),
        ("vllm_score", "http://h/x", "input: {view: text}", "needs an input with the view pair"),
        ("vllm_classify", "http://h/x", "output: {index: 0}", "view text or chat"),
        ("tei_predict", "http://h/x", "input: {view: text}, output: {index: 0}", "label or margin"),
        ("webhook", "http://h/x", "output: {label: good}", "index or margin"),
        ("webhook", "http://h/x", "output: {margin: [a, b]}", "takes two positions"),
        ("webhook", "http://h/x", "output: {margin: [0, -1]}", "count from 0"),
        ("webhook", "http://h/x", "truncate: true", "leave truncate out"),
        ("vllm_score", "http://h/x", "input: {view: pair}, output: {index: 0}", "gives one number"),
        ("webhook", "http://h/x", "outputs: {a: {index: 0}, b: {label: x}}", "index or margin"),
        ("webhook", "http://h/x", "output: {attribute: score}", "cannot be read by attribute"),
        ("webhook", "http://h/x", "output: {expect: {a: 1, b: 2}}", "cannot be read by expect"),
        ("webhook", "http://h/x", "input: {view: chat, question: a}", "models in this process"),
    ],
)  # fmt: skip
def test_wrong_entries(api, url, entry, problem, load):
    with pytest.raises(RewardConfigError, match=rf"yaml:3: .*{problem}"):
        load(api, url, entry=entry)


@pytest.mark.parametrize(("low", "high", "warns"), [(0.0, 1.0, True), (-3.0, 4.0, False)])
def test_numbers_that_look_squeezed(low, high, warns, serve, tmp_path):
    upstream = serve("webhook")

    def reply(_, body):
        numbers = np.linspace(low, high, len(body["samples"])).tolist()
        return 200, {}, {"rewards": numbers}

    upstream.script = [reply] * 100
    path = tmp_path / "rewards.yaml"
    path.write_text(
        "version: 1\n"
        f"scorers: {{rm: {{kind: remote, api: webhook, url: '{upstream.url}'}}}}\n"
        "values: {good: {from: rm}}\n"
    )
    report = check_rewards(path)
    assert report.is_sound
    (scorer,) = report.scorers
    assert [("sigmoid or softmax" in warning) for warning in scorer.warnings] == [True] * warns
