"""What vLLM's tests of its own OpenAI server ask of it, asked of ours in our words.

They are chat, completion, models, keys, prompt validation and basics of its
`tests/entrypoints/openai`. Its own fields (guided decoding, `prompt_logprobs`, `return_token_ids`,
`continuous_usage_stats`, ...) are refused here by name; differences in what both have are tests
too: unknown roles and fields of messages, echo with log-probabilities, and answers longer than
the context, which are cut here.
"""

from __future__ import annotations

import httpx
import openai
import pytest

from server import embedded
from tests.clients.servers import KEY

MODEL = embedded.CHAT_MODEL_NAME
QUESTION = [{"role": "user", "content": "How do I keep my houseplants alive?"}]
PROMPT = "My houseplants"
GREEDY = {"model": MODEL, "temperature": 0}


@pytest.fixture
def chat(real):
    def chat(**fields):
        return real.chat.completions.create(**{**GREEDY, "messages": QUESTION, **fields})

    return chat


@pytest.fixture
def complete(real):
    def complete(**fields):
        return real.completions.create(**{**GREEDY, "prompt": PROMPT, **fields})

    return complete


# chats


def test_one_turn_after_another(chat):
    asked = {"max_completion_tokens": 5, "logprobs": True, "top_logprobs": 5}
    answer = chat(**asked)
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == 5 + answer.usage.prompt_tokens
    assert choice.message.role == "assistant"
    turns = [
        *QUESTION,
        {"role": "assistant", "content": choice.message.content},
        {"role": "user", "content": "And then?"},
    ]
    longer = chat(messages=turns, **asked)
    assert longer.choices[0].message.content
    assert longer.usage.prompt_tokens > answer.usage.prompt_tokens


@pytest.mark.parametrize("fields", [{}, {"logprobs": False}])
def test_no_logprobs(chat, fields):
    assert chat(**fields, max_tokens=5).choices[0].logprobs is None


@pytest.mark.parametrize("top", [None, 0, 1, 5, 20])
def test_as_many_logprobs_as_asked(chat, top):
    fields = {} if top is None else {"top_logprobs": top}
    entries = chat(logprobs=True, max_tokens=5, **fields).choices[0].logprobs.content
    assert len(entries) == 5
    for entry in entries:
        assert len(entry.top_logprobs) == (top or 0)
        assert entry.logprob <= 0
        assert bytes(entry.bytes).decode() == entry.token
        likeliest = [other.logprob for other in entry.top_logprobs]
        assert likeliest == sorted(likeliest, reverse=True)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_too_many_logprobs_and_on_it_goes(chat, stream):
    with pytest.raises(openai.BadRequestError):
        chat(logprobs=True, top_logprobs=21, stream=stream)
    assert chat(max_tokens=5).choices


def test_chunks_of_a_chat(chat):
    asked = {"max_tokens": 10}
    whole = chat(**asked).choices[0]
    chunks = [chunk.choices[0] for chunk in chat(**asked, stream=True)]
    assert chunks[0].delta.role == "assistant"
    assert not any(chunk.delta.role for chunk in chunks[1:])
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole.message.content
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == whole.finish_reason
    assert not chunks[-1].delta.content


def test_usage_of_a_streamed_chat(chat):
    asked = {"max_tokens": 10, "stream": True}
    assert not any(chunk.usage for chunk in chat(**asked))
    silent = chat(**asked, stream_options={"include_usage": False})
    assert not any(chunk.usage for chunk in silent)
    *chunks, last = chat(**asked, stream_options={"include_usage": True})
    assert not any(chunk.usage for chunk in chunks)
    assert last.choices == []
    usage = last.usage
    assert usage.completion_tokens > 0
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@pytest.mark.parametrize("include_usage", [False, True])
def test_stream_options_are_for_streams(chat, complete, include_usage):
    for ask in (chat, complete):
        with pytest.raises(openai.BadRequestError, match="stream_options"):
            ask(stream=False, stream_options={"include_usage": include_usage})


@pytest.mark.parametrize("n", [2, 3])
def test_choices_of_a_chat(chat, n):
    answer = chat(n=n, max_tokens=5)
    assert [choice.index for choice in answer.choices] == list(range(n))
    assert answer.usage.completion_tokens == 5 * n


def test_content_in_parts(chat):
    parts = [
        {"type": "text", "text": "How do I keep my "},
        {"type": "text", "text": "houseplants?"},
    ]
    whole = [{"role": "user", "content": "How do I keep my houseplants?"}]
    asked = {"max_tokens": 8}
    one = chat(messages=[{"role": "user", "content": parts}], **asked)
    assert (
        one.choices[0].message.content == chat(messages=whole, **asked).choices[0].message.content
    )


def test_seeds(chat):
    texts = [
        chat(seed=seed, max_tokens=12, temperature=1).choices[0].message.content
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert chat(seed=2**63 - 1, max_tokens=2).choices


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "my-role", "content": "hi"}, "messages[0].role"),
        ({"role": "user", "content": "hi", "extra": "0"}, "messages[0].extra"),
    ],
)
def test_unknown_roles_and_fields_are_refused(chat, message, param):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(messages=[message])
    assert caught.value.param == param


@pytest.mark.parametrize(
    "field",
    ["guided_json", "structured_outputs", "prompt_logprobs", "return_token_ids", "ignore_eos",
     "continue_final_message", "add_special_tokens", "min_tokens", "stop_token_ids"],
)  # fmt: skip
def test_its_own_fields_are_refused_by_name(chat, field):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(extra_body={field: True})
    assert (caught.value.code, caught.value.param) == ("unknown_parameter", field)


def test_running_usage_is_refused_by_name(chat):
    options = {"include_usage": True, "continuous_usage_stats": True}
    with pytest.raises(openai.BadRequestError) as caught:
        chat(stream=True, stream_options=options)
    assert caught.value.param == "stream_options.continuous_usage_stats"


def test_a_backend_without_tools_says_so(chat):
    tool = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
    for fields, param in [
        ({"tools": [tool]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "x"}}},
         "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ]:  # fmt: skip
        with pytest.raises(openai.BadRequestError) as caught:
            chat(**fields)
        assert caught.value.param == param


# completions


def test_one_completion(complete):
    answer = complete(max_tokens=5)
    (choice,) = answer.choices
    assert answer.id.startswith("cmpl-")
    assert choice.text
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == 5 + answer.usage.prompt_tokens
    assert choice.logprobs is None


def test_token_ids_as_a_prompt(complete):
    answer = complete(prompt=[5, 6, 7, 8], max_tokens=5)
    assert answer.usage.prompt_tokens == 4
    assert answer.choices[0].text


@pytest.mark.parametrize("top", [0, 1, 5])
def test_logprobs_of_a_completion(complete, top):
    found = complete(max_tokens=5, logprobs=top).choices[0]
    assert len(found.logprobs.tokens) == len(found.logprobs.token_logprobs) == 5
    assert "".join(found.logprobs.tokens) == found.text
    assert found.logprobs.text_offset[0] == 0
    for alternatives in found.logprobs.top_logprobs or []:
        assert top <= len(alternatives) <= top + 1
    assert (found.logprobs.top_logprobs is None) == (top == 0)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_too_many_logprobs_of_a_completion(complete, stream):
    with pytest.raises(openai.BadRequestError):
        complete(logprobs=21, stream=stream)
    assert complete(max_tokens=5).choices[0].text


def test_chunks_of_a_completion(complete):
    asked = {"max_tokens": 10}
    whole = complete(**asked).choices[0]
    chunks = [chunk.choices[0] for chunk in complete(**asked, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_several_choices_in_one_stream(complete):
    asked = {"n": 3, "max_tokens": 5, "seed": 4, "temperature": 1}
    found = {index: ["", None] for index in range(3)}
    for chunk in complete(**asked, stream=True):
        (choice,) = chunk.choices
        text, end = found[choice.index]
        assert end is None
        found[choice.index] = [text + choice.text, choice.finish_reason]
    choices = complete(**asked).choices
    assert found == {choice.index: [choice.text, choice.finish_reason] for choice in choices}


def test_usage_of_a_streamed_completion(complete):
    asked = {"max_tokens": 5, "stream": True}
    assert not any(chunk.usage for chunk in complete(**asked))
    *chunks, last = complete(**asked, stream_options={"include_usage": True})
    assert not any(chunk.usage for chunk in chunks)
    assert last.choices == []
    assert last.usage.completion_tokens == 5


def test_several_prompts(complete):
    asked = {"max_tokens": 5}
    both = complete(prompt=[PROMPT, "The rain"], n=2, **asked)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    for first, prompt in ((0, PROMPT), (2, "The rain")):
        alone = complete(prompt=prompt, **asked).choices[0].text
        assert [both.choices[first].text, both.choices[first + 1].text] == [alone] * 2
    texts = [""] * 2
    for chunk in complete(prompt=[PROMPT] * 2, **asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts[0] == texts[1]


@pytest.mark.parametrize("token", [300, 5])
def test_biases(complete, token):
    asked = {"max_tokens": 5, "logprobs": 1}
    forced = complete(**asked, logit_bias={str(token): 100}).choices[0].logprobs.tokens
    assert len(set(forced)) == 1
    free = complete(**asked, logit_bias={str(token): -100}).choices[0].logprobs.tokens
    assert forced[0] not in free


def test_echo(complete):
    answer = complete(echo=True, max_tokens=5).choices[0].text
    assert answer == PROMPT + complete(max_tokens=5).choices[0].text
    chunks = complete(echo=True, max_tokens=5, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer
    with pytest.raises(openai.BadRequestError, match="echo"):
        complete(echo=True, logprobs=1)


@pytest.mark.parametrize("prompt", ["", [], [[]], [10**9], [-1], None])
def test_prompts_that_are_none(complete, prompt):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(prompt=prompt)
    assert caught.value.param.startswith("prompt")


def test_stop_strings(complete):
    whole = complete(max_tokens=20).choices[0].text
    word = whole.split()[3]
    cut = complete(max_tokens=20, stop=[word]).choices[0]
    assert cut.finish_reason == "stop"
    assert cut.text == whole[: whole.index(word)]


# models, keys, basics


def test_another_model(real):
    for ask in (real.chat.completions, real.completions):
        fields = {"messages": QUESTION} if ask is real.chat.completions else {"prompt": PROMPT}
        with pytest.raises(openai.NotFoundError) as caught:
            ask.create(model="gpt-9", **fields)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        real.models.retrieve("gpt-9")


def test_what_a_model_card_says(real):
    (card,) = real.models.list()
    assert (card.id, card.object) == (MODEL, "model")
    assert card.model_extra["max_model_len"] > 0


@pytest.mark.parametrize("key", [None, "sk-wrong"])
def test_keys(real_url, key):
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    assert httpx.get(f"{real_url}/models", headers=headers).status_code == 401
    assert httpx.get(real_url.replace("/v1", "/health")).status_code == 200


def test_another_kind_of_body(real_url):
    """vLLM says 415; that a form is no JSON is told here as 400, in the same envelope."""
    reply = httpx.post(
        f"{real_url}/chat/completions",
        data={"model": MODEL},
        headers={"authorization": f"Bearer {KEY}"},
    )
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_an_answer_longer_than_the_context_is_cut(chat):
    """vLLM refuses such a limit."""
    assert chat(max_tokens=10**6, temperature=1).choices[0].message.content
