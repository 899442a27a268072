"""Values that the served model judges itself, from the rewards file to the palette that was met."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import httpx
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from rewards import Asked, RewardModelError
from server.app import running_aligner, running_app
from server.backends.base import BackendUnavailableError, Candidate, Prompt, ToolCall
from server.calibrator import calibrate
from server.cli import app as command
from server.embedded import CHAT_MODEL, CHAT_MODEL_NAME, PROMPTS
from server.prompts import read_prompts
from server.reporting import judging_report
from server.scoring import sample_of
from server.settings import load_settings
from tests.server.fakes import FakeBackend

REWARDS = """\
version: 1
scorers:
  judge:
    kind: judge
    questions:
      kind: Is the reply kind?
      useful: Would a friend find the reply useful?
  words: {kind: lexical, measure: words}
values:
  kind: {from: judge.kind, unit: log-odds}
  useful: {from: judge.useful, unit: log-odds}
  words: {from: words}
"""
N_PROMPTS = 24


@pytest.fixture(autouse=True)
def _one_thread():
    """Keep torch from waiting for itself on a busy machine: these models are tiny."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def rewards_file(tmp_path):
    path = tmp_path / "rewards.yaml"
    path.write_text(REWARDS)
    return path


def settings_of(tmp_path, rewards_file, **more):
    return load_settings(
        **{
            "model": str(CHAT_MODEL),
            "model_name": CHAT_MODEL_NAME,
            "backend": "hf_local",
            "device": "cpu",
            "torch_threads": 1,
            "rewards": rewards_file,
            "state_dir": tmp_path / "state",
            "calibrate_at_start": False,
            "max_tokens": 12,
            # Far fewer rows than candidates: judging must not need one.
            "max_rows": 3,
            **more,
        }
    )


async def judge_metrics(client):
    """Return the metrics of the judge by name; of its questions, the mean."""
    text = (await client.get("/metrics")).text
    found = {}
    for name, number in re.findall(r"^(palette_judge_\w+){[^}]*} (\S+)$", text, re.MULTILINE):
        found.setdefault(name, []).append(float(number))
    return {name: float(np.mean(numbers)) for name, numbers in found.items()}


async def test_a_judged_palette_is_calibrated_served_and_met(tmp_path, rewards_file):
    settings = settings_of(tmp_path, rewards_file)
    prompts = read_prompts(PROMPTS)[:N_PROMPTS]
    async with running_app(settings) as app:
        aligner = app.state.context.aligner
        aligner.calibration = await calibrate(
            aligner.backend,
            aligner.rewards,
            prompts,
            n_candidates=6,
            sampling=settings.sampling,
            prompts_source="test",
        )
        assert aligner.calibration.pilot.within_std.min() > 0.01
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            target = {"kind": {"gain": 0.5}}
            reports = []
            asked_before = await judge_metrics(client)
            for seed, messages in enumerate(prompts):
                body = {
                    "model": CHAT_MODEL_NAME,
                    "messages": list(messages),
                    "seed": seed,
                    "palette": {"targets": target, "candidates": 6, "report": "full"},
                }
                reply = await client.post("/v1/chat/completions", json=body)
                assert reply.status_code == 200, reply.text
                reports.append(reply.json()["palette"])
            usage = reply.json()["usage"]
            asked_after = await judge_metrics(client)
            del body["palette"]
            plain = (await client.post("/v1/chat/completions", json=body)).json()
            values = (await client.get("/v1/palette/values")).json()["values"]
            texts = [one["text"] for one in reports[0]["candidates_detail"]]
            scored = await client.post(
                "/v1/palette/score", json={"messages": list(prompts[0]), "answers": texts}
            )
    assert [(one["name"], one["unit"]) for one in values[:2]] == [
        ("kind", "log-odds"),
        ("useful", "log-odds"),
    ]
    report = reports[0]
    # What the judge read is told, and is no part of what the answers cost.
    assert all(0 <= one["judging"]["questions"] <= 2 * 6 for one in reports)
    for field in ("questions", "prompt_tokens"):
        told = sum(one["judging"][field] for one in reports)
        assert told > N_PROMPTS
        name = f"palette_judge_{field}_total"
        assert asked_after[name] - asked_before[name] == told
    assert usage["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    assert "palette" not in plain
    assert 0 < asked_after["palette_judge_words_mass"] <= 1
    report = reports[0]
    assert report["status"] == "met"
    assert report["calibration"]["valid"]
    assert report["multipliers"]["kind"] > 0
    level = report["targets"]["kind"]
    assert report["expected"]["kind"]["level"] == pytest.approx(level, abs=1e-4)
    assert level > values[0]["base"]
    # Promised for the traffic it was calibrated on: 4 standard errors, 6e-5 by chance.
    realised = np.array([one["realised"]["kind"] for one in reports])
    stderr = np.hypot(realised.std() / N_PROMPTS**0.5, report["expected"]["kind"]["stderr"])
    assert abs(realised.mean() - level) < 4 * stderr
    # Answers from elsewhere are read in the same words, if not in the tokens that were sampled.
    elsewhere = scored.json()
    assert elsewhere["skipped"] == []
    for name in ("kind", "useful"):
        sampled = [one["rewards"][name] for one in report["candidates_detail"]]
        read = [one[name] for one in elsewhere["rewards"]]
        assert np.corrcoef(sampled, read)[0, 1] > 0.9


async def test_the_calibration_is_of_this_judge(tmp_path, rewards_file):
    async with running_aligner(settings_of(tmp_path, rewards_file)) as aligner:
        before = aligner.rewards.fingerprint
    backend = FakeBackend()
    backend.check_words = lambda words: None
    async with running_aligner(settings_of(tmp_path, rewards_file), backend=backend) as aligner:
        assert aligner.rewards.fingerprint != before


async def test_a_backend_that_cannot_judge_stops_the_start(tmp_path, rewards_file):
    settings = settings_of(tmp_path, rewards_file)
    with pytest.raises(RewardModelError, match=r"'judge'.*this backend cannot be asked"):
        async with running_aligner(settings, backend=FakeBackend()):
            pass


async def test_a_chat_model_that_is_away_is_no_fault_of_the_rewards(tmp_path, rewards_file):
    backend = FakeBackend()
    backend.check_words = lambda words: None

    async def ask(sample, questions, words):
        raise BackendUnavailableError("the engine starts again; retry later")

    backend.ask = ask
    settings = settings_of(tmp_path, rewards_file)
    async with running_app(settings, backend=backend) as app:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"messages": [{"role": "user", "content": "Hi"}], "answers": ["Hello."]}
            reply = await client.post("/v1/palette/score", json=body)
            health = (await client.get("/ready")).json()
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "backend_unavailable"
    assert reply.headers["retry-after"]
    assert "judge" in json.dumps(health)


def test_score_asks_the_chat_model(tmp_path, rewards_file, monkeypatch):
    monkeypatch.setenv("PALETTE_TORCH_THREADS", "1")
    answers = tmp_path / "answers.jsonl"
    records = [
        {"prompt": "How do I cook rice?", "answer": answer}
        for answer in ("Rinse it first, then let it simmer.", "That is a stupid question.")
    ]
    answers.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    options = ["--rewards", str(rewards_file), "--model", str(CHAT_MODEL), "--device", "cpu"]
    told = CliRunner().invoke(command, ["score", str(answers), *options])
    assert told.exit_code == 0, told.stderr
    first, second = (json.loads(line)["rewards"] for line in told.stdout.splitlines())
    assert set(first) == {"kind", "useful", "words"}
    assert first["kind"] != second["kind"]


@pytest.mark.parametrize(
    ("n_questions", "n_tokens", "told"), [(0, 0, 0), (2, 90, 90), (2, 0, None)]
)
def test_tokens_that_nobody_tells_are_null(n_questions, n_tokens, told):
    report = judging_report(Asked(n_questions, n_tokens))
    assert (report.questions, report.prompt_tokens) == (n_questions, told)


PROMPT = Prompt(({"role": "user", "content": "Hi"},), (1, 2))
CANDIDATE = Candidate(0, "Hello.", (), 3, "stop", token_ids=(3, 4))


@pytest.mark.parametrize(
    ("prompt", "candidate", "ids"),
    [
        ({}, {}, ((1, 2), (3, 4))),
        ({}, {"text": "", "token_ids": ()}, ((1, 2), ())),
        # What was not sampled as it stands is read anew, as its text.
        ({}, {"reasoning": "They greet."}, (None, None)),
        ({}, {"tool_calls": (ToolCall("wave", "{}"),)}, (None, None)),
        ({"is_raw": True}, {}, (None, None)),
        # Only the upstream knows the tokens.
        ({"token_ids": ()}, {}, (None, None)),
        ({}, {"token_ids": ()}, (None, None)),
    ],
)
def test_tokens_are_given_where_they_are_the_conversation_and_the_answer(prompt, candidate, ids):
    sample = sample_of(replace(PROMPT, **prompt), replace(CANDIDATE, **candidate))
    assert (sample.prompt_ids, sample.answer_ids) == ids
