"""What a server that speaks OpenAI's protocol is asked for candidates, and what is read of them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from server.backends.base import PromptError, SamplingSettings, Tools, UpstreamError
from tests.server.backends.fake_upstream import FakeUpstream
from tests.server.backends.upstream_backend import HELLO, connected, draw

pytestmark = pytest.mark.usefixtures("_quick_pauses")


async def test_one_request_for_all_where_the_upstream_has_n():
    upstream = FakeUpstream()
    async with connected(upstream) as backend:
        assert backend.model_id == "up/model"
        assert backend.max_context == 256
        assert {"top_k", "min_p", "logprobs", "tools"} <= backend.features
        found = await draw(backend, 8)
    (body,) = upstream.bodies
    assert body["n"] == 8
    assert body["stream"]
    assert [one.index for one in found] == list(range(8))
    for one in found:
        text, tokens = upstream.answer(body["seed"] + one.index)
        assert one.text == text
        assert [token.token for token in one.tokens] == tokens  # without the end token
        assert [token.logprob for token in one.tokens] == [
            -0.5 * (i + 1) for i in range(len(tokens))
        ]
        assert one.n_tokens == len(tokens) + 1
        assert one.finish_reason == "stop"
    assert [one.n_prompt_tokens for one in found if one.n_prompt_tokens] == [11]


@pytest.mark.parametrize(
    "habit",
    [
        {"refused": {"n"}},
        {"refused": {"stream_options"}},
        {"ignores_n": True},
        {"copies": True},
        {"streams_logprobs": False},
    ],
    ids=["n refused", "stream refused", "n ignored", "n gives copies", "no logprobs in streams"],
)
async def test_parallel_requests_where_it_does_not(habit):
    upstream = FakeUpstream(owned_by="someone", **habit)
    async with connected(upstream) as backend:
        found = await draw(backend, 8)
    assert len(upstream.bodies) == 8
    assert all("n" not in body and "stream" not in body for body in upstream.bodies)
    seeds = sorted(body["seed"] for body in upstream.bodies)
    assert seeds == list(range(seeds[0], seeds[0] + 8))
    assert [one.text for one in found] == [upstream.answer(seeds[0] + i)[0] for i in range(8)]
    assert all(one.n_prompt_tokens == 11 for one in found)
    assert all(one.n_tokens == len(one.tokens) + 1 for one in found)


async def test_candidates_are_the_same_by_n_in_groups_and_in_parallel():
    upstream = FakeUpstream()
    drawn = []
    for size in ("auto", 3, 1):
        async with connected(upstream, n_per_request=size) as backend:
            drawn.append([(one.text, one.tokens) for one in await draw(backend, 8, seed=5)])
            assert len(upstream.bodies) == {"auto": 1, 3: 3, 1: 8}[size]
    assert drawn[0] == drawn[1] == drawn[2]


async def test_seeds_next_to_each_other_share_no_candidate():
    upstream = FakeUpstream()
    async with connected(upstream) as backend:
        for seed in (0, 1, 2, 2**63 - 1):
            await draw(backend, 16, seed=seed)
    seeds = np.array([body["seed"] for body in upstream.bodies])
    assert (np.abs(np.diff(np.sort(seeds))) >= 16).all()
    assert seeds.min() >= 0
    assert seeds.max() < 2**31 - 1024


async def test_an_upstream_without_seeds():
    upstream = FakeUpstream(refused={"seed"})
    async with connected(upstream) as backend:
        assert len(await draw(backend, 4)) == 4
    assert all("seed" not in body for body in upstream.bodies)


async def test_the_newer_name_of_max_tokens():
    upstream = FakeUpstream(refused={"max_tokens"})
    async with connected(upstream) as backend:
        await draw(backend, 2, sampling=SamplingSettings(max_tokens=9))
    assert upstream.bodies[0]["max_completion_tokens"] == 9
    assert "max_tokens" not in upstream.bodies[0]


async def test_a_request_with_too_many_answers_is_asked_in_smaller_ones():
    upstream = FakeUpstream(largest_n=5)
    async with connected(upstream) as backend:
        found = await draw(backend, 16)
        assert len(found) == 16
        assert len({one.index for one in found}) == 16
        upstream.bodies.clear()
        await draw(backend, 16)
        assert all(body.get("n", 1) <= 5 for body in upstream.bodies)  # remembered
        assert len(upstream.bodies) <= 6


async def test_every_field_goes_by_its_name_there():
    upstream = FakeUpstream()
    sampling = SamplingSettings(
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        max_tokens=7,
        stop=("a", "b"),
        min_p=0.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        repetition_penalty=1.1,
        logit_bias=((5, -100.0),),
        json_schema='{"type": "object", "required": ["a"]}',
    )
    async with connected(upstream, extra_body={"chat_template_kwargs": {"a": 1}}) as backend:
        await draw(backend, 2, sampling=sampling, top_logprobs=3)
    (body,) = upstream.bodies
    body.pop("seed")
    assert body == {
        "model": "up/model",
        "messages": [{"role": "user", "content": "Tell me more."}],
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "max_tokens": 7,
        "stop": ["a", "b"],
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "logit_bias": {"5": -100.0},
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "answer",
                "schema": {"type": "object", "required": ["a"]},
                "strict": True,
            },
        },
        "chat_template_kwargs": {"a": 1},
        "logprobs": True,
        "top_logprobs": 3,
        "n": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@pytest.mark.parametrize(
    ("owned_by", "sent"),
    [
        ("vllm", {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}),
        ("llamacpp", {"top_k": -1, "min_p": 0.0}),
        ("palette", {"top_k": 0}),
        ("openai", {}),
    ],
)
async def test_neutral_values_are_sent_where_the_server_has_other_defaults(owned_by, sent):
    upstream = FakeUpstream(owned_by=owned_by)
    async with connected(upstream) as backend:
        await draw(backend, 1)
    names = ("top_k", "min_p", "repetition_penalty")
    assert {name: upstream.bodies[0][name] for name in names if name in upstream.bodies[0]} == sent


async def test_a_penalty_that_the_upstream_does_not_know_is_refused():
    async with connected(FakeUpstream(owned_by="openai")) as backend:
        assert "top_k" not in backend.features
        with pytest.raises(PromptError, match="repetition_penalty"):
            await draw(backend, sampling=SamplingSettings(repetition_penalty=1.2))


async def test_tools_and_reasoning():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    upstream = FakeUpstream()
    definition = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    tools = Tools((json.dumps(definition),), choice="f", is_parallel=False)
    async with connected(upstream) as backend:
        upstream.message = {"content": None, "tool_calls": [call], "reasoning_content": "Hm."}
        upstream.finish = lambda seed: "tool_calls"
        (one, _) = await draw(backend, 2, tools=tools)
    assert (one.text, one.reasoning, one.finish_reason) == ("", "Hm.", "tool_calls")
    assert [(call.name, call.arguments) for call in one.tool_calls] == [("f", '{"a": 1}')]
    (body,) = upstream.bodies
    assert body["tools"] == [definition]
    assert body["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert body["parallel_tool_calls"] is False
    assert "stream" not in body


async def test_strict_tools_where_the_upstream_does_not_hold_them():
    strict = json.dumps({"type": "function", "function": {"name": "f", "strict": True}})
    async with connected(FakeUpstream()) as backend:
        with pytest.raises(PromptError, match="strict"):
            await backend.render(HELLO, Tools((strict,)))
        await backend.render(HELLO, Tools((strict,), choice="required"))
    async with connected(FakeUpstream(owned_by="openai")) as backend:
        await backend.render(HELLO, Tools((strict,)))


async def test_a_stop_string_is_no_end_token():
    """vLLM names the string that ended an answer: its last token is then one of the answer's."""
    upstream = FakeUpstream(message={"content": "a"})
    original = upstream._choice

    def choice(body, index):
        made = original(body, index)
        if made["logprobs"]:
            made["logprobs"]["content"][-1]["token"] = " b"
        return {**made, "stop_reason": " b"}

    upstream._choice = choice
    async with connected(upstream, n_per_request=1) as backend:
        (one,) = await draw(backend, 1)
    assert one.tokens[-1].token == " b"


async def test_answers_of_a_server_that_leaves_the_end_token_out():
    upstream = FakeUpstream(owned_by="openai", tells_end_token=False)
    for size in ("auto", 1):
        async with connected(upstream, n_per_request=size) as backend:
            for one in await draw(backend, 6):
                assert "".join(token.token for token in one.tokens) == one.text
                assert one.n_tokens == len(one.tokens) + 1


async def test_what_was_spent_adds_up_without_logprobs():
    upstream = FakeUpstream(has_logprobs=False)
    async with connected(upstream) as backend:
        assert "logprobs" not in backend.features
        found = await draw(backend, 6)
    (body,) = upstream.bodies
    assert "logprobs" not in body
    assert all(one.tokens == () for one in found)
    spent = sum(len(upstream.answer(body["seed"] + i)[1]) + 1 for i in range(6))
    assert sum(one.n_tokens for one in found) == spent


async def test_logprobs_that_go_missing_are_an_error_not_a_score():
    upstream = FakeUpstream()
    async with connected(upstream) as backend:
        upstream.has_logprobs = False
        with pytest.raises(UpstreamError, match="log-probabilities"):
            await draw(backend)
