from __future__ import annotations

import pytest

from rewards.base import Rendered
from rewards.models.encoding import Encoder
from tests.rewards.tiny import bytelevel, wordpiece


def cut(tokenizer, rendered, max_length, *, chat=False):
    """Return what is left of a rendering, as text with its special tokens."""
    encoder = Encoder(
        tokenizer.backend_tokenizer,
        max_length,
        adds_special_tokens=not chat,
        start_id=tokenizer.bos_token_id,
        empty_id=0,
    )
    (tokens,) = encoder([rendered])
    assert len(tokens) <= max_length
    assert len(tokens.ids) == len(tokens.type_ids)
    return tokenizer.convert_ids_to_tokens(tokens.ids), tokens.type_ids


@pytest.mark.parametrize(
    ("max_length", "left"),
    [
        (20, "[CLS] a b c d [SEP] x y z [SEP]"),
        (9, "[CLS] b c d [SEP] x y z [SEP]"),
        (6, "[CLS] [SEP] x y z [SEP]"),
        (5, "[CLS] [SEP] x y [SEP]"),
        (3, "[CLS] [SEP] [SEP]"),
        (2, "[CLS] [SEP]"),
    ],
)
def test_a_pair_loses_its_prompt_from_the_left_and_then_its_answers_end(max_length, left):
    tokens, type_ids = cut(wordpiece(), Rendered("x y z", 0, 5, first="a b c d"), max_length)
    assert tokens == left.split()
    assert type_ids == sorted(type_ids)


@pytest.mark.parametrize(
    ("max_length", "left"),
    [
        (99, "<s>abcd:xyz</s>"),
        (8, "<s>cd:xyz</s>"),
        (6, "<s>:xyz</s>"),
        (5, "<s>xyz</s>"),
        (4, "<s>xy</s>"),
        (2, "<s></s>"),
    ],
)
def test_a_chat_keeps_its_start_and_its_end(max_length, left):
    rendered = Rendered("<s>abcd:xyz</s>", 8, 11)
    tokens, _ = cut(bytelevel(style="llama"), rendered, max_length, chat=True)
    assert "".join(tokens) == left


def test_what_the_template_writes_behind_the_answer_is_kept():
    tokens, _ = cut(bytelevel(style="gpt2"), Rendered("ab[xyz]", 3, 6), 3)
    assert "".join(tokens) == "xy]"


def test_a_text_without_tokens_becomes_one():
    assert cut(bytelevel(style="gpt2"), Rendered("", 0, 0), 10)[0] == ["<s>"]
