"""Tools and thinking. The embedded model knows neither: what it is shown is replaced."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest

from server.backends.base import Candidate, ModelLoadError, PromptError, SamplingSettings, Tools
from server.backends.vllm_tools import AnswerReader
from tests.server.backends.vllm_engine.conftest import ENGINE, QUESTION

pytestmark = ENGINE


def weather(**more):
    function = {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
        **more,
    }
    return json.dumps({"type": "function", "function": function})


CLOCK = json.dumps({"type": "function", "function": {"name": "clock"}})


@pytest.mark.parametrize(
    ("choice", "is_parallel"), [("required", True), ("required", False), ("weather", False)]
)
async def test_every_candidate_calls_what_it_must(backend, choice, is_parallel):
    tools = Tools((weather(),), choice, is_parallel)
    prompt = replace(await backend.render(QUESTION), tools=tools)
    stream = backend.generate(prompt, 8, SamplingSettings(max_tokens=100), 0)
    candidates = [c async for c in stream]
    finished = [c for c in candidates if c.finish_reason == "tool_calls"]
    # A list may go on until the token limit: this model does not know when to end one.
    assert is_parallel or len(finished) == 8
    for c in finished:
        assert c.text == ""
        assert {call.name for call in c.tool_calls} == {"weather"}
        assert all(json.loads(call.arguments)["city"] for call in c.tool_calls)
        assert is_parallel or len(c.tool_calls) == 1


async def test_tools_that_cannot_be_shown_or_read_are_refused(backend):
    for tools, message in (
        (Tools((weather(),)), "setting tool_call_parser"),
        (Tools((weather(),), "required"), "chat template shows it no tools"),
        (Tools((weather(),), "clock"), "'clock', which is not among the tools"),
    ):
        with pytest.raises(PromptError, match=message):
            await backend.render(QUESTION, tools)
    assert (await backend.render(QUESTION, Tools((weather(),), "none"))).token_ids
    prompt = replace(await backend.render(QUESTION), tools=Tools((weather(),), "weather"))
    with pytest.raises(PromptError, match="cannot be a tool call and a JSON object"):
        await anext(backend.generate(prompt, 1, SamplingSettings(json_schema="{}"), 0))


def answer(text, finish_reason="stop"):
    return Candidate(0, text, (), 9, finish_reason)


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "is_parallel", "expected"),
    [
        ("No need.", True, ("No need.", (), "stop")),
        (f"Let me see.{CALL}", True, ("Let me see.", ("weather",), "tool_calls")),
        (CALL + CALL.replace("weather", "clock"), True, ("", ("weather", "clock"), "tool_calls")),
        (CALL + CALL.replace("weather", "clock"), False, ("", ("weather",), "tool_calls")),
    ],
)
async def test_calls_are_read_out_of_answers(backend, text, is_parallel, expected):
    reader = AnswerReader(backend._words.text.tokenizer, "hermes", None)
    tools = Tools((weather(), CLOCK), "auto", is_parallel)
    reader.check(tools)
    found = reader.read(answer(text), text, tools)
    assert (found.text, tuple(c.name for c in found.tool_calls), found.finish_reason) == expected
    assert all(json.loads(call.arguments) == {"city": "Rome"} for call in found.tool_calls)
    with pytest.raises(PromptError, match="strict"):
        reader.check(Tools((weather(strict=True),)))


async def test_calls_that_the_model_chooses_come_out_of_the_engine(backend, monkeypatch):
    # A schema makes this model write what others write by themselves; the parser does not know.
    schema = _call_schema("weather", {"city": {"enum": ["Paris", "Rome"]}})
    tokenizer = copy.deepcopy(backend._words.text.tokenizer)
    tokenizer.add_tokens(["<|python_tag|>"])  # the parser wants to know it; calls may go without
    words = replace(backend._words, reader=AnswerReader(tokenizer, "llama3_json", None))
    monkeypatch.setattr(backend, "_words", words)
    tools = Tools((weather(), CLOCK), "auto")
    prompt = replace(await backend.render(QUESTION), tools=tools)
    settings = SamplingSettings(max_tokens=100, json_schema=json.dumps(schema))
    found = [c async for c in backend.generate(prompt, 8, settings, 0)]
    assert len(found) == 8
    for c in found:
        assert (c.text, c.finish_reason) == ("", "tool_calls")
        assert [call.name for call in c.tool_calls] == ["weather"]
        assert json.loads(c.tool_calls[0].arguments)["city"] in ("Paris", "Rome")
    assert len({c.tool_calls for c in found}) > 1
    # Without tools it is an answer like any other.
    bare = [c async for c in backend.generate(replace(prompt, tools=None), 2, settings, 0)]
    assert all(json.loads(c.text)["name"] == "weather" and not c.tool_calls for c in bare)


def _call_schema(name, properties):
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {"name": {"enum": [name]}, "parameters": parameters},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


async def test_parsers_that_are_not_there_are_told(backend):
    with pytest.raises(ModelLoadError, match="'nonsense' not found"):
        AnswerReader(backend._words.text.tokenizer, "nonsense", None)
    # Its marks are no tokens of the embedded model.
    with pytest.raises(ModelLoadError, match="deepseek_r1"):
        AnswerReader(backend._words.text.tokenizer, None, "deepseek_r1")


async def test_thinking_is_no_part_of_the_answer(backend):
    tokenizer = copy.deepcopy(backend._words.text.tokenizer)
    tokenizer.add_tokens(["<think>", "</think>"])
    reader = AnswerReader(tokenizer, "hermes", "deepseek_r1")
    assert reader.needs_special_tokens(None)
    thought = f"<think>Rain or sun?</think>It depends.{CALL}"
    found = reader.read(answer(thought), thought, Tools((weather(),)))
    assert (found.reasoning, found.text) == ("Rain or sun?", "It depends.")
    assert [call.name for call in found.tool_calls] == ["weather"]
    found = reader.read(answer("<think>Rain", "length"), "<think>Rain", None)
    assert (found.reasoning, found.text, found.finish_reason) == ("Rain", "", "length")
