from __future__ import annotations

import pytest

from rewards import Sample
from rewards.templates import parse

SAMPLE = Sample(
    (
        {"role": "system", "content": "Be {brief}."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
    ),
    "2 {prompt}",
    reasoning="One and one.",
)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{answer}", "2 {prompt}"),
        ("{prompt}", "Two?"),
        ("{system}", "Be {brief}."),
        ("{conversation}", "System: Be {brief}.\n\nUser: One?\n\nAssistant: 1\n\nUser: Two?"),
        ("\n\nHuman: {prompt} \n\nAssistant:", "\n\nHuman: Two? \n\nAssistant:"),
        ("{{{prompt}}}", "{Two?}"),
        ("<{reasoning}> {answer}", "<One and one.> 2 {prompt}"),
    ],
)
def test_texts(template, text):
    assert parse(template).render(SAMPLE)[0] == text


def test_where_the_answer_stands():
    text, start, end = parse("Q: {prompt} A: {answer} END").render(SAMPLE)
    assert text == "Q: Two? A: 2 {prompt} END"
    assert text[start:end] == SAMPLE.answer


def test_a_conversation_without_the_role_is_empty():
    assert parse("<{system}{prompt}>").render(Sample((), "x"))[0] == "<>"


@pytest.mark.parametrize("template", ["{reply}", "{}", "{answer!r}", "{answer:>9}", "{0}", "{a"])
def test_templates_that_mean_nothing(template):
    with pytest.raises(ValueError, match=r"placeholder|brace"):
        parse(template)
