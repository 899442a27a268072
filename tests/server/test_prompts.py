"""Files of prompts: what is read, and the line that is named when something is not."""

from __future__ import annotations

import json

import pytest

from server import embedded
from server.prompts import PromptsError, parse_prompt, read_prompts

USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}
REPLY = {"role": "assistant", "content": "Hello!"}


@pytest.mark.parametrize(
    ("value", "conversation"),
    [
        ("Hi", (USER,)),
        ({"prompt": "Hi"}, (USER,)),
        ({"prompt": "Hi", "id": 7, "category": "x"}, (USER,)),
        ({"messages": [USER]}, (USER,)),
        ({"messages": [SYSTEM, USER, REPLY, USER]}, (SYSTEM, USER, REPLY, USER)),
        ([SYSTEM, USER], (SYSTEM, USER)),
        ([USER | {"name": "Ann"}], (USER,)),
        ({"messages": "Hi"}, (USER,)),
        ({"prompt": [USER]}, (USER,)),
        ({"prompt": "other", "messages": [USER]}, (USER,)),
        ("  Hi ", ({"role": "user", "content": "  Hi "},)),
    ],
)
def test_prompts_as_people_write_them(value, conversation):
    assert parse_prompt(value) == conversation


@pytest.mark.parametrize(
    "value",
    [
        "", "  ", None, 1, True, [], {}, {"text": "Hi"}, {"prompt": ""}, {"messages": []},
        {"messages": None, "prompt": None}, ["Hi"], [1], [{}], [{"role": "user"}],
        [{"content": "Hi"}], [{"role": "robot", "content": "Hi"}], [USER, None],
        [{"role": "user", "content": 1}], [{"role": "user", "content": None}],
        [{"role": ["user"], "content": "Hi"}],
    ],
)  # fmt: skip
def test_what_is_no_prompt(value):
    with pytest.raises(ValueError, match="a prompt is a string"):
        parse_prompt(value)


def test_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('"one"\n\n  \n{"prompt": "two\\u2028lines"}\r\n' + json.dumps([SYSTEM, USER]))
    assert [prompt[-1]["content"] for prompt in read_prompts(path)] == [
        "one",
        "two\u2028lines",
        "Hi",
    ]


def test_line_separators_inside_a_string_end_no_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('"a\u2028b"\n"c\u0085d"\n', encoding="utf-8")
    assert [prompt[0]["content"] for prompt in read_prompts(path)] == ["a\u2028b", "c\u0085d"]


def test_byte_order_mark(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf"one"\n')
    assert [prompt[0]["content"] for prompt in read_prompts(path)] == ["one"]


@pytest.mark.parametrize("line", ["one", "{", '{"prompt": 1}', "null", '"', "[" * 100_000])
def test_bad_line_is_named(tmp_path, line):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'"one"\n\n{line}\n"two"\n')
    with pytest.raises(PromptsError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_file_without_prompts(tmp_path, content):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(PromptsError, match="holds no prompts"):
        read_prompts(path)


def test_file_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes('"où"'.encode("latin-1"))
    for name in ("none.jsonl", ".", "latin.jsonl"):
        with pytest.raises(PromptsError) as caught:
            read_prompts(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_shipped_prompts_are_many_and_different():
    prompts = read_prompts(embedded.PROMPTS)
    assert len(prompts) >= 300
    assert len({json.dumps(prompt) for prompt in prompts}) == len(prompts)
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
