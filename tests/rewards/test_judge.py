"""Judged values, with a judge that can be held."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from rewards import (
    Judgement,
    RewardConfigError,
    RewardError,
    RewardModelError,
    Sample,
    ScoringError,
)
from rewards.registry import load_rewards

FILE = """\
version: 1
scorers:
  judge:
    kind: judge
    questions: {kind: "Is the reply kind?", honest: "Is it {honest}?"}
  words: {kind: lexical, measure: words}
values:
  kind: {from: judge.kind, unit: log-odds}
  honest: {from: judge.honest, unit: log-odds}
  words: {from: words}
"""


class FakeJudge:
    """Says yes to a question by the lengths of answer and question; waits until the gate is open.

    An answer that holds "raise", "refuse" or "nan" gets just that. `less`, in nats, is what yes and
    no lack of all probability, question by question.
    """

    fingerprint = "the judge"

    def __init__(self, *, is_held=False):
        self.gate = asyncio.Event()
        if not is_held:
            self.gate.set()
        self.asked = []
        self.n_cancelled = 0
        self.refusal = None
        self.less = np.zeros((2, 1))

    def check_words(self, words):
        assert [len(set(one)) for one in words] == [3, 3]
        if self.refusal:
            raise ValueError(self.refusal)

    async def ask(self, sample, questions, words):
        self.asked.append((sample, tuple(questions), tuple(words)))
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.n_cancelled += 1
            raise
        if "raise" in sample.answer:
            raise RuntimeError("engine on fire")
        if "refuse" in sample.answer:
            raise ValueError("no template")
        bad = np.nan if "nan" in sample.answer else 0
        found = np.array([[len(sample.answer) + bad, len(question)] for question in questions])
        n_tokens = sum(len(sample.answer) + len(question) for question in questions)
        # The likelier set has all the probability, but for what is told.
        return Judgement(found - found.max(axis=1, keepdims=True) - self.less, n_tokens)


def sample(answer, **ids):
    return Sample(({"role": "user", "content": "hello"},), answer, **ids)


def suite_of(tmp_path, judge, text=FILE):
    path = tmp_path / "rewards.yaml"
    path.write_text(text)
    suite = load_rewards(path)
    suite.use_judge(judge)
    return suite


ASKED = (
    "Consider only the last reply. Answer Yes or No. Is the reply kind?",
    "Consider only the last reply. Answer Yes or No. Is it {honest}?",
)


async def test_the_reward_is_the_log_odds_of_each_question(tmp_path):
    judge = FakeJudge()
    async with suite_of(tmp_path, judge) as suite:
        scores = await suite.score([sample("one two"), sample("three")])
        assert suite.text_only_names == suite.names
        assert suite.health()["judge"]["texts"] == 2
        found = await suite.score([sample("four")], ["words"])
    assert scores.tolist() == [
        [7 - len(ASKED[0]), 7 - len(ASKED[1]), 2],
        [5 - len(ASKED[0]), 5 - len(ASKED[1]), 1],
    ]
    assert found.tolist() == [[1]]
    assert [one[1:] for one in judge.asked] == [  # nothing was asked for words alone
        (ASKED, (("Yes", " Yes", "yes"), ("No", " No", "no")))
    ] * 2


async def test_equal_samples_are_asked_about_once(tmp_path):
    judge = FakeJudge(is_held=True)
    async with suite_of(tmp_path, judge) as suite:
        tasks = [asyncio.create_task(suite.score([sample("same")] * 3)) for _ in range(4)]
        await until(lambda: judge.asked and suite.health()["judge"]["duplicates"] == 11)
        judge.gate.set()
        for scores in await asyncio.gather(*tasks):
            assert scores[:, 0].tolist() == [4 - len(ASKED[0])] * 3
        await suite.score([sample("same")])
        assert len(judge.asked) == 1
        health = suite.health()["judge"]
        assert (health["texts"], health["duplicates"]) == (1, 12)
        # The same text in other tokens is read differently.
        await suite.score([sample("same", prompt_ids=(1,), answer_ids=(2, 3))])
        await suite.score([sample("same", prompt_ids=(1,), answer_ids=(4,))])
        assert len(judge.asked) == 3


def tokens(*answers):
    """Return what `FakeJudge` counts for both questions about each of these."""
    return sum(2 * len(answer) + sum(map(len, ASKED)) for answer in answers)


async def test_what_was_asked_is_told_to_who_made_it_necessary(tmp_path):
    judge = FakeJudge(is_held=True)
    async with suite_of(tmp_path, judge) as suite:
        assert suite.judging() == {}
        first = asyncio.create_task(suite.attempt([sample("one"), sample("one")], ()))
        await until(lambda: len(judge.asked) == 1)
        second = asyncio.create_task(suite.attempt([sample("one"), sample("three")], ()))
        await until(lambda: len(judge.asked) == 2)
        judge.gate.set()
        asked = (await first).asked
        assert (asked.n_questions, asked.n_tokens) == (2, tokens("one"))
        asked = (await second).asked
        assert (asked.n_questions, asked.n_tokens) == (2, tokens("three"))
        for samples, names in (([sample("one")], None), ([sample("four")], ["words"])):
            asked = (await suite.attempt(samples, (), names)).asked
            assert (asked.n_questions, asked.n_tokens) == (0, 0)
        (judging,) = suite.judging().values()
        assert judging.scorer == "judge"
        assert judging.asked.n_questions == 4
        assert judging.asked.n_tokens == tokens("one", "three")


async def test_the_mass_is_that_of_yes_and_no_together(tmp_path):
    judge = FakeJudge()

    async def ask(sample, questions, words):
        return Judgement(np.log([[0.4, 0.3], [0.1, 0.01]]), 7)

    judge.ask = ask
    async with suite_of(tmp_path, judge) as suite:
        scores = await suite.score([sample("one")], ["kind", "honest"])
        assert scores == pytest.approx(np.log([[0.4 / 0.3, 10]]))
        mass = suite.judging()["judge"].mass()
        assert mass == pytest.approx({"kind": 0.7, "honest": 0.11})


async def test_a_failure_counts_for_nobody(tmp_path):
    async with suite_of(tmp_path, FakeJudge()) as suite:
        attempt = await suite.attempt([sample("raise")], suite.names)
        assert attempt.asked.n_questions == 0
        assert suite.judging() == {}


@pytest.mark.parametrize("less", [[0.0, 0.6], [0.7, 0.8], [0.0, 0.8], [9.0, 0.0]])
async def test_replies_that_are_neither_yes_nor_no_are_told_once(tmp_path, less, caplog):
    """Below one half, which is 0.69 nats less than all."""
    judge = FakeJudge()
    judge.less = np.array(less)[:, None]
    names = [name for name, one in zip(("kind", "honest"), less, strict=True) if one > 0.69]
    async with suite_of(tmp_path, judge) as suite:
        await suite.score([sample(f"{i:04}") for i in range(99)])
        assert not caplog.records
        for start in (99, 199):
            await suite.score([sample(f"{i:04}") for i in range(start, start + 100)])
            told = [record.getMessage() for record in caplog.records]
            assert len(told) == bool(names)
        mass = suite.judging()["judge"].mass()
    assert mass == pytest.approx(
        dict(zip(("kind", "honest"), np.exp(-np.array(less)), strict=True))
    )
    for message in told:
        assert "'judge'" in message
        assert "yes_words" in message
        assert ("kind" in message, "honest" in message) == ("kind" in names, "honest" in names)
        assert "hello" not in message


async def test_the_mass_is_that_of_the_last_hundred_samples(tmp_path, caplog):
    judge = FakeJudge()
    async with suite_of(tmp_path, judge) as suite:
        await suite.score([sample(f"{i:04}") for i in range(150)])
        assert suite.judging()["judge"].mass() == pytest.approx({"kind": 1, "honest": 1})
        judge.less = np.full((2, 1), np.log(4))
        await suite.score([sample(f"{i:04}") for i in range(150, 190)])
        wanted = 0.6 + 0.4 / 4
        assert suite.judging()["judge"].mass() == pytest.approx({"kind": wanted, "honest": wanted})
        assert not caplog.records


async def test_cancelling_stops_what_nobody_else_waits_for(tmp_path):
    judge = FakeJudge(is_held=True)
    async with suite_of(tmp_path, judge) as suite:
        both = asyncio.create_task(suite.score([sample("alone"), sample("shared")]))
        await until(lambda: len(judge.asked) == 2)
        other = asyncio.create_task(suite.score([sample("shared")]))
        await until(lambda: suite.health()["judge"]["duplicates"] == 1)
        both.cancel()
        with pytest.raises(asyncio.CancelledError):
            await both
        await until(lambda: judge.n_cancelled)
        assert judge.n_cancelled == 1
        judge.gate.set()
        assert (await other)[0, 0] == 6 - len(ASKED[0])
        assert len(judge.asked) == 2
        assert suite.health()["judge"]["state"] == "ok"


async def test_a_failure_is_that_requests_alone(tmp_path):
    judge = FakeJudge(is_held=True)
    async with suite_of(tmp_path, judge) as suite:
        bad = asyncio.create_task(suite.score([sample("raise"), sample("fine")]))
        good = asyncio.create_task(suite.score([sample("good")]))
        await until(lambda: len(judge.asked) == 3)
        judge.gate.set()
        with pytest.raises(ScoringError, match=r"'judge'.*honest.*engine on fire") as caught:
            await bad
        assert caught.value.scorer == "judge"
        assert (await good).shape == (1, 3)
        for answer, state in (("raise", "failing"), ("refuse", "failing"), ("fine", "ok")):
            if state == "ok":
                await suite.score([sample("ok again")])
            else:
                with pytest.raises(ScoringError):
                    await suite.score([sample(answer)])
            assert suite.health()["judge"]["state"] == state
        with pytest.raises(ScoringError, match="cannot be judged: no template"):
            await suite.score([sample("refuse")])
        assert suite.health()["judge"]["state"] == "ok"  # a sample's fault is not the scorer's
        with pytest.raises(ScoringError, match="gave nan, which is no score"):
            await suite.score([sample("nan")])


async def test_closing_fails_who_waits(tmp_path):
    judge = FakeJudge(is_held=True)
    suite = suite_of(tmp_path, judge)
    await suite.start()
    waiting = asyncio.create_task(suite.score([sample("long")]))
    await until(lambda: judge.asked)
    await suite.close()
    with pytest.raises(RewardError, match="closed while"):
        await waiting


async def test_the_fingerprint_is_that_of_question_words_and_model(tmp_path):
    async def fingerprint(text=FILE, model="the judge"):
        judge = FakeJudge()
        judge.fingerprint = model
        async with suite_of(tmp_path, judge, text) as suite:
            return suite.fingerprint

    words = "questions: {kind: x}\n    yes_words: [Ja, ja, JA]\n    no_words: [Nein, nein, NEIN]"
    one = FILE.replace("  honest: {from: judge.honest, unit: log-odds}\n", "")
    different = [
        FILE,
        FILE.replace("reply kind?", "reply friendly?"),
        FILE.replace("    questions", "    template: 'Say. {question}'\n    questions"),
        one,
        one.replace('questions: {kind: "Is the reply kind?", honest: "Is it {honest}?"}', words),
    ]
    found = [await fingerprint(text) for text in different]
    found.append(await fingerprint(model="another"))
    assert len(set(found)) == len(found)
    assert await fingerprint() == found[0]


async def test_without_a_chat_model_the_start_says_what_to_do(tmp_path):
    path = tmp_path / "rewards.yaml"
    path.write_text(FILE)
    suite = load_rewards(path)
    assert suite.needs_judge
    with pytest.raises(RewardModelError, match=r"'judge' \(feeds kind, honest\).*no chat model.*"):
        await suite.start()
    with pytest.raises(RewardError, match="started already"):
        suite.use_judge(FakeJudge())


async def test_words_that_the_model_cannot_tell_apart_stop_the_start(tmp_path):
    judge = FakeJudge()
    judge.refusal = "Yes and No begin with the same token"
    with pytest.raises(RewardModelError, match=r"'judge'.*the same token"):
        await suite_of(tmp_path, judge).start()


@pytest.mark.parametrize(
    ("scorer", "problem"),
    [
        ("{kind: judge}", r"either question or questions"),
        ("{kind: judge, question: a, questions: {a: b}}", r"either question or questions"),
        ("{kind: judge, questions: {a: ' '}}", r"questions: the question a is blank"),
        ("{kind: judge, question: ''}", r"question: .*at least 1 character"),
        ("{kind: judge, question: a, template: Hello}", r"template: .*\{question\} once"),
        ("{kind: judge, question: a, template: '{question} {answer}'}", r"template: .*no other"),
        ("{kind: judge, question: a, template: '{question!r}'}", r"template: .*no other"),
        ("{kind: judge, question: a, template: '{question} {'}", r"template: .*brace twice"),
        ("{kind: judge, question: a, yes_words: [Yes]}", r"yes_words: .*put the words in quotes"),
        ("{kind: judge, question: a, yes_words: []}", r"yes_words: .*at least one word"),
        ("{kind: judge, question: a, yes_words: ['Yes', ' ']}", r"yes_words: .*blank"),
        ("{kind: judge, question: a, yes_words: ['no']}", r"'no' is both a yes and a no"),
        ("{kind: judge, question: a, yes: ['no']}", r"quotes"),
        ("{kind: judge, question: a, word: ['no']}", r"word: unknown field; did you mean"),
    ],
)
def test_bad_files_are_refused(tmp_path, scorer, problem):
    path = tmp_path / "rewards.yaml"
    path.write_text(f"version: 1\nscorers:\n  j: {scorer}\nvalues:\n  v: {{from: j}}\n")
    with pytest.raises(RewardConfigError, match=problem) as caught:
        load_rewards(path)
    assert caught.value.line == 3


def test_outside_of_asyncio(tmp_path):
    judge = FakeJudge()
    with suite_of(tmp_path, judge, FILE) as suite:
        for answer in ("a", "bb"):
            assert suite.score_sync([sample(answer)])[0, 0] == len(answer) - len(ASKED[0])


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - tasks of this loop change it
            await asyncio.sleep(0)
