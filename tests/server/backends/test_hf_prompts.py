"""What the transformers backend reads: conversations, raw prompts, and what it refuses."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from server.backends.base import ContextLengthError, PromptError, SamplingSettings
from tests.server.backends.hf_drawing import QUESTION

# Conversations


async def test_conversations_are_rendered_by_the_chat_template(backend, llama_folder):
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    messages = [{"role": "system", "content": "Be brief."}, *QUESTION]
    prompt = await backend.render(messages)
    assert prompt.messages == tuple(messages)
    assert tokenizer.decode(prompt.token_ids) == (
        "<|system|>Be brief.<|end|><|user|>What is the capital of France?<|end|><|assistant|>"
    )


async def test_what_the_template_refuses(backend):
    with pytest.raises(PromptError, match=r"refuses this conversation: unknown role wizard"):
        await backend.render([{"role": "wizard", "content": "hm"}])
    with pytest.raises(PromptError, match="refuses"):
        await backend.render([])


@pytest.mark.parametrize("n_words", [60, 3000])
async def test_a_conversation_without_room_for_an_answer(backend, n_words):
    with pytest.raises(
        ContextLengthError,
        match=r"^This model's maximum context length is 128 tokens\. However, your messages "
        r"resulted in \d{3,5} tokens\. Please reduce the length of the messages\.$",
    ):
        await backend.render([{"role": "user", "content": "zebra " * n_words}])


# Raw prompts


async def test_a_raw_prompt_is_read_without_the_template(backend):
    prompt = await backend.read("The quick brown fox")
    tokenizer = backend._tokenizer
    assert prompt.is_raw
    assert tokenizer.decode(list(prompt.token_ids)) == "The quick brown fox"
    assert prompt.messages == ({"role": "user", "content": "The quick brown fox"},)
    again = await backend.read(prompt.token_ids)
    assert again == prompt
    candidates = [
        one async for one in backend.generate(prompt, 2, SamplingSettings(max_tokens=4), 0)
    ]
    assert len(candidates) == 2


@pytest.mark.parametrize("text", ["", []])
async def test_nothing_to_continue(backend, text):
    with pytest.raises(PromptError, match="not empty"):
        await backend.read(text)


async def test_a_raw_prompt_that_is_too_long(backend):
    with pytest.raises(ContextLengthError, match="your prompt resulted in"):
        await backend.read("fox " * 5000)


async def test_token_ids_have_a_bound(backend):
    assert backend.n_vocab == len(backend._tokenizer)
