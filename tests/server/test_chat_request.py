"""The full chat request: what reaches the backend, what the rewards read, what comes back."""

from __future__ import annotations

import json

import pytest

from rewards import Message
from server.backends.base import Candidate, Prompt, TokenLogprob, ToolCall
from server.scoring import plain, sample_of
from tests.server.conftest import run_fake
from tests.server.fakes import THOUGHT, FakeBackend

SHORT = {"targets": {"words": {"at_most": 8.0}}, "candidates": 16}
TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Find a word.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    },
}
OTHER_TOOL = {"type": "function", "function": {"name": "count", "strict": True}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "find", "arguments": '{"a": 1}'}}
DIALOGUE = [
    {"role": "developer", "content": "Be short."},
    {"role": "user", "name": "ann",
     "content": [{"type": "text", "text": "Find "}, {"type": "text", "text": "it."}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
    {"role": "tool", "content": "found", "tool_call_id": "call_1"},
    {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    {"role": "user", "content": "Go on."},
]  # fmt: skip


async def asked(running, **body):
    """Send a request; return what the backend was asked for."""
    reply = await running.chat(**body)
    assert reply.status_code == 200, reply.text
    return running.backend.asked[-1]


# What reaches the backend


async def test_messages_of_every_kind(able):
    prompt, _, _ = await asked(able, messages=DIALOGUE)
    assert prompt.messages == (
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Find it.", "name": "ann"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "found", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Go on."},
    )


async def test_sampling_settings(able):
    _, sampling, _ = await asked(
        able, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, presence_penalty=1, stop="x",
        frequency_penalty=-1, repetition_penalty=1.2, logit_bias={"9": -5, "3": 1.5}, max_tokens=9,
    )  # fmt: skip
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.2)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, -1)
    assert sampling.logit_bias == ((3, 1.5), (9, -5))
    assert (sampling.max_tokens, sampling.stop) == (9, ("x",))


async def test_newer_name_of_the_limit(able):
    _, sampling, _ = await asked(able, max_completion_tokens=9)
    assert sampling.max_tokens == 9
    reply = await able.chat(max_completion_tokens=9, max_tokens=9)
    assert reply.json()["error"]["param"] == "max_completion_tokens"


async def test_all_tokens_in_vllms_words(able):
    _, sampling, _ = await asked(able, top_k=-1)
    assert sampling.top_k == 0


async def test_tools(able):
    named = {"type": "function", "function": {"name": "count"}}
    prompt, _, _ = await asked(
        able, tools=[TOOL, OTHER_TOOL], tool_choice=named, parallel_tool_calls=False
    )
    assert [json.loads(one) for one in prompt.tools.definitions] == [TOOL, OTHER_TOOL]
    assert (prompt.tools.choice, prompt.tools.is_parallel) == ("count", False)


async def test_nulls_inside_a_tools_parameters_are_kept(able):
    parameters = {"type": "object", "properties": {"a": {"default": None}}}
    tool = {"type": "function", "function": {"name": "find", "parameters": parameters}}
    prompt, _, _ = await asked(able, tools=[tool])
    assert json.loads(prompt.tools.definitions[0]) == tool


@pytest.mark.parametrize(
    ("wanted", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": [1, None]}}},
            {"enum": [1, None]},
        ),
    ],
)
async def test_response_format_holds_every_candidate(able, wanted, schema):
    _, sampling, _ = await asked(able, response_format=wanted, palette=SHORT)
    found = sampling.json_schema
    assert (json.loads(found) if found is not None else None) == schema


# What is refused


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"min_p": 0.1}, "min_p"),
        ({"presence_penalty": 0.1}, "presence_penalty"),
        ({"frequency_penalty": 0.1}, "frequency_penalty"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"logit_bias": {"1": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [TOOL]}, "tools"),
        ({"messages": DIALOGUE}, "messages"),
        ({"logprobs": True}, "logprobs"),
        ({"top_k": 5}, "top_k"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_backend_cannot_do_is_refused(tmp_path, settings, body, param, stream):
    backend = FakeBackend()
    async with run_fake(tmp_path, settings, backend) as running:
        backend.features = frozenset()  # after the start, for a value reads log-probabilities
        reply = await running.chat(stream=stream, **body)
        assert reply.status_code == 400
        error = reply.json()["error"]
        assert error["param"] == param
        assert "backend" in error["message"]
        assert backend.n_started == 0
        neutral = {
            "min_p": 0, "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1,
            "logit_bias": {}, "response_format": {"type": "text"}, "logprobs": False, "top_k": 0,
        }  # fmt: skip
        assert (await running.chat(**neutral)).status_code == 200


@pytest.mark.parametrize(
    ("message", "param", "says"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
         "content", "text only"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
         "content", "text only"),
        ({"role": "user", "content": [{"type": "file", "file": {}}]}, "content", "text only"),
        ({"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}, "content",
         "assistant"),
        ({"role": "user", "content": None}, "content", "required"),
        ({"role": "tool", "content": "x"}, "tool_call_id", "required"),
        ({"role": "user", "content": "x", "tool_call_id": "1"}, "tool_call_id", "tool messages"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "tool_calls", "assistant"),
        ({"role": "assistant"}, None, "content"),
        ({"role": "assistant", "content": "x", "audio": {"id": "1"}}, "audio", ""),
        ({"role": "assistant", "content": "x", "function_call": {}}, "function_call", ""),
        ({"role": "function", "content": "x", "name": "find"}, "role", "tool"),
        ({"role": "user", "content": "x", "colour": "red"}, "colour", "leave it out"),
    ],
)  # fmt: skip
async def test_messages_that_are_refused(able, message, param, says):
    reply = await able.chat(messages=[message])
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == (f"messages[0].{param}" if param else "messages[0]")
    assert says in error["message"]


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ({"type": "function", "function": {"name": "other"}}, "not among the tools: find"),
        ({"type": "custom", "custom": {"name": "find"}}, "function"),
    ],
)
async def test_choices_of_tools_that_are_refused(able, choice, says):
    error = (await able.chat(tools=[TOOL], tool_choice=choice)).json()["error"]
    assert error["param"].startswith("tool_choice")
    assert says in error["message"]


async def test_a_tool_whose_name_is_a_choice(able):
    tool = {"type": "function", "function": {"name": "none"}}
    choice = {"type": "function", "function": {"name": "none"}}
    assert (await able.chat(tools=[tool], tool_choice=choice)).status_code == 400


# What comes back


async def test_calls_under_a_palette(able):
    palette = SHORT | {"report": "full"}
    body = (await able.chat(tools=[TOOL], tool_choice="required", palette=palette, seed=2)).json()
    choice = body["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] is None
    assert all(call["function"]["name"] == "find" for call in message["tool_calls"])
    assert all(
        "word" in json.loads(call["function"]["arguments"]) for call in message["tool_calls"]
    )
    assert len({call["id"] for call in message["tool_calls"]}) == len(message["tool_calls"])
    # What was scored is in the report: a line for each call.
    told = [one["text"] for one in body["palette"]["candidates_detail"] if one["chosen"]]
    assert told == [
        "\n".join(
            f"find({call['function']['arguments']})" for call in message["tool_calls"]
        )
    ]  # fmt: skip
    assert not body["palette"]["calibration"]["valid"]
    assert any("tools" in one for one in body["palette"]["calibration"]["warnings"])


async def test_text_has_no_tool_calls_field(able):
    message = (await able.chat()).json()["choices"][0]["message"]
    assert set(message) == {"role", "content", "refusal"}


async def test_an_answer_can_be_sent_back(able):
    able.backend.thinks = True
    answer = (await able.chat(tools=[TOOL], tool_choice="required")).json()["choices"][0]["message"]
    result = {"role": "tool", "content": "yes", "tool_call_id": answer["tool_calls"][0]["id"]}
    question = {"role": "user", "content": "Find it."}
    prompt, _, _ = await asked(able, tools=[TOOL], messages=[question, answer, result])
    sent = prompt.messages[1]
    assert sent["tool_calls"] == answer["tool_calls"]
    assert sent["reasoning_content"] == THOUGHT


async def test_thoughts_are_told_and_not_scored(tmp_path, settings):
    async with run_fake(tmp_path, settings, FakeBackend()) as running:
        silent = (await running.chat(palette=SHORT, seed=1)).json()
        running.backend.thinks = True
        aloud = (await running.chat(palette=SHORT, seed=1)).json()
    assert aloud["palette"]["realised"] == silent["palette"]["realised"]
    message = aloud["choices"][0]["message"]
    assert message["reasoning_content"] == THOUGHT
    assert message["content"] == silent["choices"][0]["message"]["content"]
    # How many tokens were thought is not known: nothing is said, instead of 0.
    assert "reasoning_tokens" not in aloud["usage"]["completion_tokens_details"]
    assert silent["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


async def test_json_under_a_palette(able):
    wanted = {"type": "json_object"}
    body = (await able.chat(response_format=wanted, palette=SHORT | {"report": "full"})).json()
    for one in body["palette"]["candidates_detail"]:
        assert set(json.loads(one["text"])) == {"words"}


async def test_service_tier_is_told_when_asked_for(able):
    assert (await able.chat(service_tier="auto")).json()["service_tier"] == "default"
    assert "service_tier" not in (await able.chat()).json()


async def test_many_turns_and_a_long_one(able):
    turns = [
        {"role": role, "content": f"Turn {i}."}
        for i in range(100)
        for role in ("user", "assistant")
    ]
    prompt, _, _ = await asked(able, messages=[*turns, {"role": "user", "content": "a " * 100}])
    assert len(prompt.messages) == 201
    reply = await able.chat(messages=[*turns, {"role": "user", "content": "a " * 400}])
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


# What the rewards read


def test_tool_use_in_words():
    second = CALL | {"id": "call_2", "function": {"name": "count", "arguments": "{}"}}
    messages = (
        Message(role="system", content="Be short."),
        Message(role="user", content="Find it.", name="ann"),
        Message(role="assistant", content="I look.", tool_calls=[CALL, second]),
        Message(role="tool", content="3", tool_call_id="call_2"),
        Message(role="tool", content="here", tool_call_id="call_1"),
        Message(role="assistant", content="Here.", reasoning_content="Easy."),
        Message(role="user", content="Thanks."),
    )
    found = 'Find it.\nI look.\nfind({"a": 1})\ncount({})\ncount -> 3\nfind -> here'
    assert plain(messages) == (
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": found},
        {"role": "assistant", "content": "Here."},
        {"role": "user", "content": "Thanks."},
    )
    assert messages[1]["content"] == "Find it."


def test_tool_use_before_anybody_asked():
    messages = (
        Message(role="assistant", content="", tool_calls=[CALL]),
        Message(role="tool", content="x", tool_call_id="unknown"),
    )
    assert plain(messages) == ({"role": "user", "content": 'find({"a": 1})\ntool -> x'},)


@pytest.mark.parametrize(
    ("text", "calls", "read"),
    [
        ("A word.", (), "A word."),
        ("", (), ""),
        ("", (ToolCall("find", '{"a": 1}'),), 'find({"a": 1})'),
        ("I look.", (ToolCall("f", "{}"), ToolCall("g", "{}")), "I look.\nf({})\ng({})"),
    ],
)
def test_answers_in_words(text, calls, read):
    tokens = (TokenLogprob("x", -1.5),)
    candidate = Candidate(0, text, tokens, 1, "stop", tool_calls=calls, reasoning="Hm.")
    sample = sample_of(Prompt((Message(role="user", content="?"),), (1,)), candidate)
    assert sample.reasoning == "Hm."  # beside the answer, not in it
    assert sample.answer == read
    assert sample.token_logprobs == (-1.5,)
