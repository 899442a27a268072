"""Better and worse answers: a wrong sign, label or format ends the start, and is named."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest

from rewards import RewardConfigError, RewardModelError, Sample, load_rewards
from rewards.base import Tokens
from rewards.config import SequenceClassifierConfig
from rewards.models.sequence_classifier import SequenceClassifier
from tests.rewards.golden import samples

N_LABELS = 3


@pytest.fixture
def folder(tiny_model, tmp_path):
    return shutil.copytree(tiny_model("bert", n_labels=N_LABELS), tmp_path / "m")


def logits_of(folder, answers, **fields):
    """Return the logits of answers as the file would read them, shape (n, n_labels)."""
    fields = {"input": {"view": "text"}, **fields}
    config = SequenceClassifierConfig(
        kind="sequence_classifier",
        model="m",
        outputs={f"o{index}": {"index": index} for index in range(N_LABELS)},
        **fields,
    )
    scorer = SequenceClassifier("s", [], config, folder)
    scorer.load("cpu")
    shown = [Sample(({"role": "user", "content": "q"},), answer) for answer in answers]
    return scorer.forward(scorer.encode([scorer.render(one) for one in shown]))


def pair_where(folder, is_so):
    """Return the first two answers whose logits are in the wanted relation."""
    answers = [sample.answer for sample in samples(longest=6)]
    rows = logits_of(folder, answers)
    for i, j in itertools.permutations(range(len(answers)), 2):
        if is_so(rows[i], rows[j]):
            return {"prompt": "q", "better": answers[i], "worse": answers[j]}
    raise AssertionError("no such two answers")


async def start(folder, pairs, scorer="output: {index: 0}", value="from: s", more=""):
    path = folder.parent / "rewards.yaml"
    path.write_text(
        "version: 1\n"
        "scorers:\n"
        f"  s: {{kind: sequence_classifier, model: m, input: {{view: text}}, {scorer}}}\n"
        "  count: {kind: lexical, measure: words}\n"
        "  own: {kind: sampler_logprob}\n"
        "values:\n"
        f"  good: {{{value}, check: {json.dumps(pairs)}}}\n{more}"
    )
    async with load_rewards(path, device="cpu") as suite:
        return suite.health()


async def refused(folder, pairs, problem, **options):
    with pytest.raises(RewardConfigError, match=problem) as caught:
        await start(folder, pairs, **options)
    assert caught.value.field == "values.good.check"
    assert caught.value.line == 7
    return str(caught.value)


async def test_pairs_that_come_out_right(folder):
    pair = pair_where(folder, lambda a, b: a[0] > b[0] + 0.5)
    health = await start(folder, [pair])
    assert health["s"]["texts"] == 2


async def test_a_wrong_sign(folder):
    pair = pair_where(folder, lambda a, b: a[0] > b[0] + 0.5)
    told = await refused(
        folder, [pair], r"pair 1: .*sign turned round", scorer="output: {index: 0, sign: -1}"
    )
    assert "label: LABEL0" in told


async def test_a_wrong_label(folder):
    first = pair_where(folder, lambda a, b: a[0] > b[0] + 0.5 and a[1] < b[1] - 0.5)
    second = pair_where(folder, lambda a, b: a[0] > b[0] + 0.5 and a[1] > b[1] + 0.5)
    told = await refused(
        folder, [second, first], r"pair 2: .*output: {label: LABEL0}", scorer="output: {index: 1}"
    )
    assert "sign" not in told, "that would put the other pair wrong"
    assert "LABEL1" not in told


async def test_a_wrong_view(folder, tmp_path):
    answers = [sample.answer for sample in samples(longest=6)]
    alone, asked = logits_of(folder, answers), logits_of(folder, answers, input={"view": "pair"})
    right = [
        {"prompt": "q", "better": answers[i], "worse": answers[j]}
        for i, j in itertools.permutations(range(len(answers)), 2)
        if alone[i, 0] < alone[j, 0] - 0.1 and asked[i, 0] > asked[j, 0] + 0.1
    ]
    assert right
    await refused(folder, right[:2], r"input: {view: pair}")


async def test_an_answer_that_is_cut_off(folder):
    pair = {"prompt": "q", "better": "a" * 20 + " b", "worse": "a" * 20 + " c"}
    await refused(
        folder, [pair], "both are read as one text.*raise max_length",
        scorer="output: {index: 0}, max_length: 12",
    )  # fmt: skip


async def test_nothing_helps(folder):
    pair = pair_where(folder, lambda a, b: a[0] > b[0] + 0.5)
    turned = {"prompt": "q", "better": pair["worse"], "worse": pair["better"]}
    await refused(folder, [pair, turned], "pair 2: .*No other sign, label or view")


async def test_values_of_sums_and_of_counts(folder):
    pair = {"messages": [{"role": "user", "content": "q"}], "better": "a b", "worse": "a b c"}
    await refused(folder, [pair], "pair 1: .*has 2, .*one 3.*sign turned", value="from: count")
    await refused(folder, [pair], "sign turned round", value="mix: {count: 1}")
    await start(folder, [pair], value="mix: {count: -1}")


async def test_what_the_sampler_reports_cannot_be_checked(folder):
    pair = {"prompt": "q", "better": "a", "worse": "b"}
    await refused(folder, [pair], "leave check out", value="from: own")


@pytest.mark.parametrize(
    ("pair", "problem", "field"),
    [
        ({"better": "a", "worse": "b"}, "either prompt or messages", "check.0"),
        ({"prompt": "q", "better": "a", "worse": "a"}, "the same text", "check.0"),
        ({"prompt": "q", "beter": "a", "worse": "b"}, "did you mean 'better'", "check.0.beter"),
        (
            {"messages": [{"rol": "user", "content": "q"}], "better": "a", "worse": "b"},
            "did you mean 'role'",
            "check.0.messages.0.rol",
        ),
    ],
)
async def test_mistakes_in_the_file(pair, problem, field, folder):
    with pytest.raises(RewardConfigError, match=problem) as caught:
        await start(folder, [pair])
    assert caught.value.field == f"values.good.{field}"


# what a model looks for


def test_a_padding_token_that_stands_in_the_text(tiny_model, monkeypatch):
    """A head of its own that searches padding, as some do, is read elsewhere than at the end."""
    config = SequenceClassifierConfig(
        kind="sequence_classifier", model="m", input={"view": "chat"}, output={"index": 0}
    )
    folder = tiny_model("llama")
    sound = SequenceClassifier("s", ["v"], config, folder)
    sound.load("cpu")  # padding is the end token here: the search is led past it

    def keep_padding(self, tokenizer):
        prepare(self, tokenizer)
        self._searches_padding = False

    prepare = SequenceClassifier._prepare_model
    monkeypatch.setattr(SequenceClassifier, "_prepare_model", keep_padding)
    with pytest.raises(RewardModelError, match=r"looks for padding .* give its tokenizer and"):
        SequenceClassifier("s", ["v"], config, folder).load("cpu")


def test_scores_do_not_depend_on_the_padding_token(tiny_model):
    config = SequenceClassifierConfig(
        kind="sequence_classifier", model="m", input={"view": "text"}, output={"index": 0}
    )
    scorer = SequenceClassifier("s", ["v"], config, tiny_model("llama"))
    scorer.load("cpu")
    tokens = Tokens([0, 9, 2], [0, 0, 0])
    before = scorer.forward([tokens])
    scorer._read_with_pad_id(tokens, 9)
    np.testing.assert_array_equal(scorer.forward([tokens]), before)
