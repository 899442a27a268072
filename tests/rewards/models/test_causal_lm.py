"""A token's logit behind the input, against transformers' own full logits of one text at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from pydantic import ValidationError

from rewards import RewardModelError, Sample
from rewards.config import CausalLmConfig
from rewards.models.causal_lm import CausalLm
from tests.rewards.golden import assert_batches_agree, samples
from tests.rewards.tiny import CAUSAL

TEXT = {"view": "text", "text": "{prompt}\n{answer}\nGood?"}
CHAT = {"view": "chat", "question": "Is the answer good?"}
MARGIN = {"margin": [["Y", "y"], "N"]}
# Writes a header for the answer to come, as real templates do, where it is asked for.
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] | trim }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}{{ ending | default('') }}"
)


@pytest.fixture
def model(tiny_model, tmp_path):
    """Return a function that gives the folder of a tiny language model with a chat template."""

    def get(architecture):
        folder = tiny_model(architecture, auto="AutoModelForCausalLM")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        if "add_generation_prompt" not in (tokenizer.chat_template or ""):
            tokenizer.chat_template = TEMPLATE
            tokenizer.save_pretrained(folder)
        return folder

    return get


def load(folder, **fields):
    fields = {"kind": "causal_lm", "model": "m", "input": TEXT, "output": MARGIN, **fields}
    scorer = CausalLm("s", ["good"], CausalLmConfig(**fields), folder)
    scorer.load("cpu")
    return scorer


def logits_of(folder, ids):
    """Return transformers' logits of the token behind these, one text at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        return np.array([model(input_ids=torch.tensor([one])).logits[0, -1].numpy() for one in ids])


def token(folder, text):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    (found,) = tokenizer.encode(text, add_special_tokens=False)
    return found


def margin_of(folder, logits):
    yes = np.logaddexp(logits[:, token(folder, "Y")], logits[:, token(folder, "y")])
    return yes - logits[:, token(folder, "N")]


@pytest.mark.parametrize("architecture", CAUSAL)
def test_text_scores_through_truncation(architecture, model):
    folder = model(architecture)
    scorer = load(folder, max_length=48)
    wanted = samples(longest=12)
    ids = [tokens.ids for tokens in scorer.encode([scorer.render(one) for one in wanted])]
    assert {len(one) for one in ids} > {48}, "some are cut"
    end = transformers.AutoTokenizer.from_pretrained(folder).encode(
        "\nGood?", add_special_tokens=False
    )
    assert all(one[-len(end) :] == end for one in ids), "what is asked is never cut"
    # Logits of random weights reach 30; they are read as differences.
    assert_batches_agree(scorer, wanted, margin_of(folder, logits_of(folder, ids)), 1e-4)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2"])
def test_chat_scores_behind_question_and_prefill(architecture, model):
    folder = model(architecture)
    scorer = load(folder, input=CHAT, prefill="Safety: ")
    wanted = samples(longest=3, n=60)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [
        tokenizer.apply_chat_template(
            [
                *one.messages,
                {"role": "assistant", "content": one.answer},
                {"role": "user", "content": "Is the answer good?"},
            ],
            tokenize=False,
            add_generation_prompt=True,
        )
        + "Safety: "
        for one in wanted
    ]
    assert [scorer.render(one).text for one in wanted] == texts
    assert all(text.endswith("<s>assistant\nSafety: ") for text in texts)
    fits = [one for one, text in zip(wanted, texts, strict=True) if len(text) <= 160]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts if len(text) <= 160]
    assert len(fits) > 6
    assert_batches_agree(scorer, fits, margin_of(folder, logits_of(folder, ids)), 1e-4)


def test_a_cap_on_logits_holds_for_those_that_are_read(model):
    folder = model("gemma2")
    scorer = load(folder, output={"token": "Y"})
    cap = scorer._model.config.final_logit_softcapping
    assert cap == 30.0
    scorer._model.get_output_embeddings().weight.mul_(1000)
    scores = scorer.forward(scorer.encode([scorer.render(one) for one in samples(n=4)]))
    assert np.all(np.abs(scores) <= cap)
    assert np.any(np.abs(scores) > 29)


@pytest.mark.parametrize(
    ("output", "read"),
    [
        ({"token": "Y"}, lambda x, folder: x[token(folder, "Y")]),
        ({"token": 0}, lambda x, folder: x[0]),
        ({"token": "Y", "sign": -1}, lambda x, folder: -x[token(folder, "Y")]),
        ({"token": ["Y", "y", "Y"]}, lambda x, folder: np.logaddexp(
            x[token(folder, "Y")], x[token(folder, "y")])),
    ],
)  # fmt: skip
def test_readings(output, read, model):
    folder = model("llama")
    scorer = load(folder, output=output)
    inputs = scorer.encode([scorer.render(one) for one in samples(n=3)])
    expected = [read(row, folder) for row in logits_of(folder, [one.ids for one in inputs])]
    np.testing.assert_allclose(scorer.forward(inputs), expected, rtol=1e-4)


def test_only_the_rows_that_are_read_are_kept(model):
    scorer = load(model("qwen2"))
    assert scorer._model.get_output_embeddings().out_features == 3


def test_half_precision_scores_stay_fine_grained(model):
    folder = model("qwen2")
    output = {"token": "Y"}
    exact, half = load(folder, output=output), load(folder, output=output, dtype="bfloat16")
    inputs = exact.encode([exact.render(one) for one in samples()])
    scores = half.forward(inputs)
    assert np.corrcoef(scores, exact.forward(inputs))[0, 1] > 0.95
    coarse = torch.tensor(scores).to(torch.bfloat16).double().numpy()
    assert (scores != coarse).mean() > 0.8


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ({"token": "Yes"}, r"'Yes' is not one token .* but 3 \(\['Y', 'e', 's'\]\); name one"),
        ({"token": 300}, "token 300 is beyond the 300"),
        ({"margin": ["Y", ["N", "Y"]]}, "both sides of the margin hold the token Y"),
    ],
)
def test_tokens_that_cannot_be_read(output, problem, model):
    with pytest.raises(RewardModelError, match=problem):
        load(model("llama"), output=output)


def test_an_encoder_is_refused(tiny_model):
    with pytest.raises(RewardModelError, match=r"lack .* so its scores would be random"):
        load(tiny_model("llama", head=False))


def test_a_template_that_leaves_the_answer_out(model, tmp_path):
    import shutil

    folder = shutil.copytree(model("llama"), tmp_path / "m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    with pytest.raises(RewardModelError, match="does not write the answer"):
        load(folder, input={"view": "chat"})


def test_options_reach_the_template(model):
    scorer = load(
        model("llama"), input={"view": "chat", "template_options": {"ending": "<think></think>"}}
    )
    sample = Sample(({"role": "user", "content": "hi"},), "hello")
    assert scorer.render(sample).text == (
        "<s>user\nhi</s><s>assistant\nhello</s><s>assistant\n<think></think>"
    )


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"output": {}}, "either token or margin"),
        ({"output": {"token": "a", "margin": ["a", "b"]}}, "either token or margin"),
        ({"output": {"margin": ["a"]}}, "a margin takes two tokens"),
        ({"output": {"margin": [True, False]}}, "put tokens in quotes"),
        ({"output": {"token": []}}, "must hold one at least"),
        ({"prefill": "a"}, "prefill goes with the view chat"),
    ],
)
def test_mistakes_in_the_file(fields, problem):
    fields = {"kind": "causal_lm", "model": "m", "input": TEXT, "output": MARGIN, **fields}
    with pytest.raises(ValidationError, match=problem):
        CausalLmConfig(**fields)
