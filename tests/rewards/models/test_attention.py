"""Attention by products: the numbers of torch's own, and what goes on to that."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rewards.config import SequenceClassifierConfig
from rewards.models import attention
from rewards.models.attention import attend
from rewards.models.sequence_classifier import SequenceClassifier
from tests.rewards.golden import assert_batches_agree, samples
from tests.rewards.test_sequence_classifier import TEXT, encode_text, one_by_one
from tests.rewards.tiny import CAUSAL, ENCODERS

MODULE = SimpleNamespace(is_causal=False)
BF16 = {"avx512_bf16": True, "amx_bf16": False}


def projections(n_texts=5, n_heads=3, n_tokens=7, size=16, n_shared=1):
    torch.manual_seed(0)
    query = torch.randn(n_texts, n_tokens, n_heads, size)
    key, value = torch.randn(2, n_texts, n_tokens, n_heads // n_shared, size)
    return [3 * query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)]


def masks():
    """Return the masks that models make: none, of padding, of a window, for all texts or each."""
    places = torch.arange(7)
    window = (places[:, None] - places).abs() < 3
    lengths = torch.tensor([7, 3, 5, 1, 7])
    padding = (places < lengths[:, None])[:, None, None, :]
    return {
        "none": None,
        "padding": padding.expand(5, 1, 7, 7),
        "padding, narrow": padding,
        "window": window[None, None],
        "both": padding & window,
        "causal": (places[:, None] >= places)[None, None] & padding,
    }


@pytest.fixture
def count(monkeypatch):
    """Count what goes on to torch's own attention."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return sdpa_attention_forward(*args, **kwargs)

    monkeypatch.setattr(attention, "sdpa_attention_forward", counted)
    return calls


@pytest.fixture
def everywhere(monkeypatch):
    """Have models attend by products on any processor; in float32, where differences show."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: BF16, raising=False)
    monkeypatch.setattr(attention, "_DTYPE", torch.float32)


def load(folder, **fields):
    fields = {"kind": "sequence_classifier", "model": "m", "input": TEXT, **fields}
    scorer = SequenceClassifier("s", ["v"], SequenceClassifierConfig(**fields), folder)
    scorer.load("cpu")
    return scorer


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("scaling", [None, 0.4])
@pytest.mark.parametrize("most_scores", [1 << 20, 2 * 3 * 49, 3 * 49 // 2])
def test_the_numbers_of_torch(mask, scaling, most_scores, count, monkeypatch):
    monkeypatch.setattr(attention, "_MOST_SCORES", most_scores)  # all texts, two at once, or one
    args = (MODULE, *projections(), masks()[mask])
    found, _ = attend(*args, scaling=scaling)
    assert not count
    expected, _ = sdpa_attention_forward(*args, scaling=scaling)
    seen = torch.ones(5, 7, dtype=torch.bool)
    if masks()[mask] is not None:
        seen = masks()[mask].expand(5, 1, 7, 7).any(dim=-1)[:, 0]
    # float32 sums in another order
    torch.testing.assert_close(found[seen], expected[seen], rtol=1e-5, atol=1e-6)
    assert found.isfinite().all()


def test_padding_that_may_look_nowhere_spreads_no_nan():
    nowhere = torch.zeros(5, 1, 7, 7, dtype=torch.bool)
    for dtype in (torch.float32, torch.bfloat16):
        args = [part.to(dtype) * 30 for part in projections()]
        assert attend(MODULE, *args, nowhere)[0].isfinite().all()


@pytest.mark.parametrize(
    ("module", "n_shared", "mask", "others"),
    [
        (SimpleNamespace(is_causal=True), 1, None, {}),
        (SimpleNamespace(is_causal=True), 1, masks()["causal"], {}),
        (MODULE, 1, None, {"is_causal": True}),
        (SimpleNamespace(is_causal=False, num_key_value_groups=3), 3, None, {}),
        (MODULE, 1, torch.linspace(-1, 1, 49).view(1, 1, 7, 7), {}),
        (MODULE, 1, None, {"position_bias": torch.linspace(-1, 1, 49).view(1, 1, 7, 7)}),
    ],
)
def test_what_goes_on_to_torch(module, n_shared, mask, others, count):
    args = (module, *projections(n_shared=n_shared), mask)
    found, _ = attend(*args, scaling=0.3, **others)
    expected, _ = sdpa_attention_forward(*args, scaling=0.3, **others)
    assert len(count) == 1
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_scores_too_many_to_be_written_out_go_on_to_torch(count, monkeypatch):
    monkeypatch.setattr(attention, "_MOST_SCORES", 3 * 49 // 4 - 1)
    attend(MODULE, *projections(), None)
    assert len(count) == 1


def test_a_cap_is_left_to_transformers(monkeypatch):
    """Which refuses it or not, as its version does."""
    told = []
    monkeypatch.setattr(
        attention, "sdpa_attention_forward", lambda *_, **others: told.append(others)
    )
    attend(MODULE, *projections(), None, softcap=30.0)
    assert [others["softcap"] for others in told] == [30.0]


@pytest.mark.parametrize("architecture", ENCODERS + CAUSAL)
def test_models_score_as_transformers_alone(architecture, tiny_model, everywhere):
    folder = tiny_model(architecture)
    scorer = load(folder)
    wanted = samples()
    expected = one_by_one(folder, encode_text, wanted, scorer.max_length)
    assert_batches_agree(scorer, wanted, expected)


@pytest.mark.parametrize(
    ("architecture", "attends"),
    [("bert", True), ("roberta", True), ("distilbert", True), ("deberta-v2", False)],
)
def test_models_that_attend_by_products(architecture, attends, tiny_model, everywhere, monkeypatch):
    calls = []
    monkeypatch.setattr(
        attention, "attend", lambda *args, **kwargs: (calls.append(1), attend(*args, **kwargs))[1]
    )
    scorer = load(tiny_model(architecture))
    calls.clear()
    inputs = scorer.encode([scorer.render(sample) for sample in samples()])
    assert np.isfinite(scorer.forward(inputs)).all()
    assert bool(calls) == attends


@pytest.mark.parametrize(
    ("dtype", "capabilities"),
    [
        ("float32", BF16),
        ("bfloat16", {"avx512_bf16": True, "amx_bf16": True}),
        ("bfloat16", {}),
    ],
)
def test_models_left_alone(dtype, capabilities, tiny_model, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    scorer = load(tiny_model("bert"), dtype=dtype)
    assert scorer._model.config._attn_implementation == "sdpa"


def test_models_that_are_to_attend_otherwise_do(tiny_model, everywhere):
    model = transformers.AutoModel.from_pretrained(tiny_model("bert"), attn_implementation="eager")
    assert not attention.attend_by_products(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_bfloat16_stays_as_near_to_float32(architecture, tiny_model, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: BF16, raising=False)
    folder = tiny_model(architecture)
    exact = load(folder)
    products = load(folder, dtype="bfloat16")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    plain = load(folder, dtype="bfloat16")
    assert products._model.config._attn_implementation != plain._model.config._attn_implementation
    inputs = exact.encode([exact.render(sample) for sample in samples(n=48)])
    wanted = exact.forward(inputs)
    off = [np.sqrt(np.mean((one.forward(inputs) - wanted) ** 2)) for one in (products, plain)]
    assert 0 < off[0] < 2 * off[1]
