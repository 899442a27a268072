from __future__ import annotations

import pytest

from server.backends.hf_text import Detokenizer, StopFinder
from tests.server.backends.conftest import SENTENCES, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def detokenizer(tokenizer):
    return Detokenizer(tokenizer)


def push_all(detokenizer, ids, *stop):
    """Return (text or None, tokens read)."""
    finder = StopFinder(detokenizer, stop)
    for n, token in enumerate(ids, 1):
        text = finder.push(token)
        if text is not None:
            return text, n
    return None, len(ids)


@pytest.mark.parametrize("text", [*SENTENCES, " leading space", "trailing space ", "\n\n"])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_stop_string_is_found_wherever_it_lies(tokenizer, detokenizer, text, length):
    ids = tokenizer.encode(text)
    assert detokenizer.text(ids) == text
    for place in range(len(text) - length + 1):
        stop = text[place : place + length]
        found, n_read = push_all(detokenizer, ids, stop)
        assert found == text[: text.index(stop)]
        # No token is read after the one that completes it.
        assert stop in detokenizer.text(ids[:n_read])
        assert stop not in detokenizer.text(ids[: n_read - 1])


def test_characters_of_several_tokens(tokenizer, detokenizer):
    text = "aé日🙂b"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)
    for stop in text:
        assert push_all(detokenizer, ids, stop)[0] == text[: text.index(stop)]


def test_the_first_of_several_stop_strings_wins(tokenizer, detokenizer):
    ids = tokenizer.encode("What is the capital of France?")
    assert push_all(detokenizer, ids, "France", "capital", "the")[0] == "What is "
    assert push_all(detokenizer, ids, "tal of F", "capital of")[0] == "What is the "
    # Two in one token.
    assert " capital" in map(detokenizer.token, ids)
    assert push_all(detokenizer, ids, "ital", "ap")[0] == "What is the c"


def test_without_a_stop_string_nothing_is_found(tokenizer, detokenizer):
    ids = tokenizer.encode("What is the capital of France?")
    assert push_all(detokenizer, ids, "Franz", "zebra") == (None, len(ids))


def test_special_tokens_are_no_text(tokenizer, detokenizer):
    ids = [*tokenizer.encode("cap"), tokenizer.convert_tokens_to_ids("<|user|>")]
    ids += tokenizer.encode("ital")
    assert detokenizer.text(ids) == "capital"
    assert push_all(detokenizer, ids, "pit")[0] == "ca"
    assert push_all(detokenizer, ids, "<|user|>")[0] is None
    assert (
        detokenizer.token(ids[-1] * 0 + tokenizer.convert_tokens_to_ids("<|user|>")) == "<|user|>"
    )


def test_tokens_of_the_text_before_a_stop_string(tokenizer, detokenizer):
    ids = tokenizer.encode("What is the capital of France?")
    finder = StopFinder(detokenizer, ("pital",))
    text = None
    while text is None:
        text = finder.push(ids[len(finder._ids)])
    assert text == "What is the ca"
    kept = ids[: finder.n_tokens_of(text)]
    assert detokenizer.text(kept).startswith(text)
    assert not detokenizer.text(kept[:-1]).startswith(text)
    assert finder.n_tokens_of("") == 0


@pytest.mark.parametrize("text", SENTENCES[:3])
def test_token_strings_join_to_the_text(tokenizer, detokenizer, text):
    assert "".join(map(detokenizer.token, tokenizer.encode(text))) == text


def test_token_strings_keep_their_leading_space():
    # Metaspace decoders drop the space of the first token they are given.
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "a": 1, "▁the": 2, "▁cat": 3, "s": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    detokenizer = Detokenizer(fast)
    assert [detokenizer.token(i) for i in (2, 3, 4)] == [" the", " cat", "s"]
    assert detokenizer.text([2, 3, 4]) == "the cats"
    assert push_all(detokenizer, [2, 3, 4], "e cats")[0] == "th"


def test_part_of_a_character_is_shown_as_such(tokenizer, detokenizer):
    ids = tokenizer.encode("🙃")
    if len(ids) > 1:
        assert "\ufffd" in detokenizer.token(ids[0])
    assert detokenizer.text(ids) == "🙃"
