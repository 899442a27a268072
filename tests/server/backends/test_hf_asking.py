"""Questions about answers on the transformers backend, against the model's own forward pass."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from transformers import AutoModelForCausalLM

from rewards import Sample
from server.backends import hf_asking
from server.backends.asking import Asker, common_prefix
from server.backends.base import BackendUnavailableError, SamplingSettings
from server.backends.hf_local import HfLocalBackend
from server.scoring import sample_of
from tests.server.backends.conftest import MAX_CONTEXT, make_tokenizer, save
from tests.server.backends.hf_drawing import QUESTION, HeldForward, until

WORDS = (("Yes", " Yes", "yes"), ("No", " No", "no"))
ASKED = ["Is it kind?", "Is it kind, and is it short?", "Please?"]


@pytest.fixture(params=["llama", "qwen3", "gemma3", "gpt2"])
def folder(request, tmp_path):
    return save(tmp_path / request.param, request.param)


@pytest.fixture
async def backend(folder):
    backend = HfLocalBackend(str(folder), device="cpu")
    await backend.start()
    yield backend
    await backend.close()


@pytest.fixture
async def llama(llama_folder):
    backend = HfLocalBackend(str(llama_folder), device="cpu", max_rows=2)
    await backend.start()
    yield backend
    await backend.close()


async def samples_of(backend, n=4, **sampling):
    prompt = await backend.render(QUESTION)
    stream = backend.generate(prompt, n, SamplingSettings(**{"max_tokens": 9, **sampling}), 0)
    return prompt, [sample_of(prompt, candidate) async for candidate in stream]


@torch.inference_mode()
def expected(folder, prompt_ids, groups):
    """Return what the model's own pass over all these tokens gives."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    logprobs = model(torch.tensor([prompt_ids])).logits[0, -1].log_softmax(dim=-1)
    return [logprobs[ids].logsumexp(dim=-1).item() for ids in groups]


def closing(question):
    """Return what `conftest.TEMPLATE` writes behind an answer."""
    return f"<|end|><|user|>{question}<|end|><|assistant|>"


async def test_answers_are_those_of_the_whole_sequence_at_once(backend, folder):
    backend.check_words(WORDS)
    prompt, samples = await samples_of(backend)
    tokenizer = make_tokenizer()
    groups = [[tokenizer(text)["input_ids"][0] for text in texts] for texts in ("Yy", "Nn")]
    found = await asyncio.gather(*(backend.ask(sample, ASKED, WORDS) for sample in samples))
    for sample, judged in zip(samples, found, strict=True):
        n_tokens = 0
        assert sample.prompt_ids == prompt.token_ids
        for question, answer in zip(ASKED, judged.logprobs, strict=True):
            # The very tokens that were read and written, then the template's.
            ids = [
                *sample.prompt_ids,
                *sample.answer_ids,
                *tokenizer(closing(question))["input_ids"],
            ]
            wanted = expected(folder, ids, groups)
            assert_allclose(answer, wanted, atol=1e-4)
            n_tokens += len(ids)
        assert judged.n_tokens == n_tokens
    assert np.ptp([one.logprobs[:, 0] - one.logprobs[:, 1] for one in found]) > 0.1


async def test_one_question_alone_gives_the_same(backend):
    _, (sample, *_) = await samples_of(backend)
    together = await backend.ask(sample, ASKED, WORDS)
    for question, answer in zip(ASKED, together.logprobs, strict=True):
        alone = await backend.ask(sample, [question], WORDS)
        assert_allclose(alone.logprobs, [answer], atol=1e-4)


async def test_an_answer_from_elsewhere_is_rendered(llama, llama_folder):
    tokenizer = make_tokenizer()
    text = "<|user|>Hi<|end|><|assistant|>Oh, it is you." + closing(ASKED[0])
    groups = [[tokenizer(text)["input_ids"][0] for text in texts] for texts in ("Yy", "Nn")]
    sample = Sample(({"role": "user", "content": "Hi"},), "Oh, it is you.")
    found = await llama.ask(sample, ASKED[:1], WORDS)
    wanted = expected(llama_folder, tokenizer(text)["input_ids"], groups)
    assert_allclose(found.logprobs, [wanted], atol=1e-4)
    with pytest.raises(ValueError, match=r"not let a question follow.*\(TemplateError\)$"):
        await llama.ask(Sample(({"role": "wizard", "content": "Hi"},), "No"), ASKED, WORDS)


async def test_what_is_too_long_loses_its_beginning(llama, llama_folder):
    tokenizer = make_tokenizer()
    words = tuple(tokenizer("fox " * 100)["input_ids"][:100])
    sample = Sample((), "", prompt_ids=words, answer_ids=words[::-1])
    ids = [*words, *words[::-1], *tokenizer(closing(ASKED[0]))["input_ids"]]
    groups = [[tokenizer(text)["input_ids"][0] for text in texts] for texts in ("Yy", "Nn")]
    found = await llama.ask(sample, ASKED[:1], WORDS)
    kept = ids[-(MAX_CONTEXT - 1) :]
    assert_allclose(found.logprobs, [expected(llama_folder, kept, groups)], atol=1e-4)
    assert found.n_tokens == len(kept)


async def test_the_prompt_is_read_once_for_all_answers(llama, monkeypatch):
    prompt, samples = await samples_of(llama, n=2)
    await llama.ask(Sample((), "Hi"), ASKED, WORDS)  # compares pieces with the whole
    held = HeldForward(monkeypatch)
    asked = [asyncio.create_task(llama.ask(sample, ASKED, WORDS)) for sample in samples]
    await held.began(1)
    await until(lambda: len(llama._worker._inquiries) == 1)
    held.permits.release(100)
    await asyncio.gather(*asked)
    closings = [make_tokenizer()(closing(question))["input_ids"] for question in ASKED]
    shared = common_prefix(closings)
    longest = max(map(len, closings)) - shared
    assert held.shapes == [
        (1, len(prompt.token_ids)),
        (1, len(samples[0].answer_ids) + shared),
        (len(ASKED), longest),
        (1, len(samples[1].answer_ids) + shared),
        (len(ASKED), longest),
    ]


async def test_a_model_that_cannot_read_in_pieces_reads_at_once(llama, monkeypatch):
    _, samples = await samples_of(llama, n=3)
    pieces = [(await llama.ask(sample, ASKED, WORDS)).logprobs for sample in samples]
    monkeypatch.setattr(hf_asking, "copy_prefix", lambda prefix: None)  # the comparison fails
    held = HeldForward(monkeypatch)
    held.permits.release(100)
    again = HfLocalBackend(llama._model, device="cpu")
    await again.start()
    n_before = len(held.shapes)
    try:
        whole = [(await again.ask(sample, ASKED, WORDS)).logprobs for sample in samples]
    finally:
        await again.close()
    assert [n_rows for n_rows, _ in held.shapes[n_before + 2 :]] == [3, 3, 3]
    assert_allclose(whole, pieces, atol=1e-4)


async def test_questions_need_no_row(llama, monkeypatch):
    """Answers that hold every row cannot keep questions waiting."""
    _, (sample, *_) = await samples_of(llama)
    await llama.ask(sample, ASKED, WORDS)
    held = HeldForward(monkeypatch)
    prompt = await llama.render(QUESTION)
    stream = llama.generate(prompt, 6, SamplingSettings(max_tokens=40, logit_bias=((0, -99.0),)), 0)
    async with aclosing(stream):
        waiting = asyncio.create_task(anext(stream))
        await held.began(1)  # both rows are taken, and four candidates wait
        asked = asyncio.create_task(llama.ask(sample, ASKED, WORDS))
        while not asked.done():
            held.permits.release()
            await asyncio.sleep(0.001)
        assert not waiting.done()
        assert llama.health()["waiting"] == 1
        held.permits.release(1000)
        await waiting


async def test_cancelled_questions_are_not_read(llama, monkeypatch):
    _, (first, second, *_) = await samples_of(llama)
    await llama.ask(first, ASKED, WORDS)  # compares pieces with the whole
    held = HeldForward(monkeypatch)
    asked = asyncio.create_task(llama.ask(first, ASKED, WORDS))
    await held.began(1)
    other = asyncio.create_task(llama.ask(second, ASKED, WORDS))
    await until(lambda: len(llama._worker._inquiries) == 1)
    other.cancel()
    with pytest.raises(asyncio.CancelledError):
        await other
    held.permits.release(100)
    await asked
    await until(lambda: not llama._worker._inquiries)
    await llama.close()  # whatever it still reads, it ends first
    assert held.rows.count(len(ASKED)) == 1


async def test_a_failure_is_told_and_passes(llama, monkeypatch):
    _, (sample, *_) = await samples_of(llama)
    wanted = await llama.ask(sample, ASKED, WORDS)
    with monkeypatch.context() as broken:
        broken.setattr(hf_asking, "common_prefix", lambda prompts: 1 / 0)
        with pytest.raises(Exception, match="ZeroDivisionError"):
            await llama.ask(sample, ASKED, WORDS)
    assert llama.health()["state"] == "failing"
    again = await llama.ask(sample, ASKED, WORDS)
    assert_array_equal(again.logprobs, wanted.logprobs)
    assert llama.health()["state"] == "ok"


async def test_who_waits_at_the_close_is_told(llama, monkeypatch):
    _, (first, second, *_) = await samples_of(llama)
    held = HeldForward(monkeypatch)
    asked = [asyncio.create_task(llama.ask(one, ASKED, WORDS)) for one in (first, second)]
    await held.began(1)
    closing = asyncio.create_task(llama.close())
    await until(lambda: llama._worker._is_closing)
    held.permits.release(100)
    await closing
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(found[1], BackendUnavailableError)
    with pytest.raises(BackendUnavailableError, match="not running"):
        await llama.ask(first, ASKED, WORDS)


async def test_memory_of_the_last_prompt_is_freed(llama, monkeypatch):
    forgotten = []
    original = hf_asking.Reader.forget
    monkeypatch.setattr(
        hf_asking.Reader, "forget", lambda self: (forgotten.append(self.head), original(self))
    )
    prompt, (sample, *_) = await samples_of(llama)
    await llama.ask(sample, ASKED, WORDS)
    await until(lambda: prompt.token_ids in forgotten)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ((("Yes",), ("You",)), "'Yes' and 'You' begin with the same token"),
        (((" ",), ("No",)), "none of the words ' ' begins with a token"),
    ],
)
def test_words_that_cannot_be_told_apart_are_refused(words, problem):
    with pytest.raises(ValueError, match=problem):
        Asker(make_tokenizer(), 100).word_ids(words)


def test_a_template_that_drops_earlier_replies_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "<|user|>{{ messages[-1].content }}<|end|><|assistant|>"
    with pytest.raises(ValueError, match="does not show earlier replies"):
        Asker(tokenizer, 100).word_ids(WORDS)


def test_thinking_is_turned_off_where_the_template_can():
    tokenizer = make_tokenizer()
    tokenizer.chat_template += "{% if enable_thinking is false %}<think></think>{% endif %}"
    asker = Asker(tokenizer, 100)
    sample = Sample((), "", prompt_ids=(5,), answer_ids=(6, 7))
    (ids,) = asker.prompts(sample, ["Kind?"])
    assert ids[:3] == [5, 6, 7]
    assert tokenizer.decode(ids[3:]) == closing("Kind?") + "<think></think>"


@pytest.mark.parametrize(
    ("prompts", "n"),
    [([[1, 2, 3]], 2), ([[1, 2, 3], [1, 2, 4, 5]], 2), ([[1], [1, 2]], 0), ([[1, 2], [3, 2]], 0)],
)
def test_common_prefix(prompts, n):
    assert common_prefix(prompts) == n
