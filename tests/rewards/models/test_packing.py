"""Packed linear layers: the numbers of the plain ones, and what is left alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers.activations import GELUActivation
from transformers.pytorch_utils import Conv1D

from rewards.config import SequenceClassifierConfig
from rewards.models import packing, transformer
from rewards.models.packing import PackedLinear, can_pack, pack
from rewards.models.sequence_classifier import SequenceClassifier
from tests.rewards.test_sequence_classifier import samples

pytestmark = pytest.mark.skipif(not can_pack("cpu"), reason="this processor has nothing to pack")


def load(folder, **fields):
    fields = {"kind": "sequence_classifier", "model": "m", "input": {"view": "text"}, **fields}
    scorer = SequenceClassifier("s", ["v"], SequenceClassifierConfig(**fields), folder)
    scorer.load("cpu")
    return scorer


def packed_layers(scorer):
    return [layer for layer in scorer._model.modules() if isinstance(layer, PackedLinear)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (3, 5, 48), (2, 3, 4, 48)])
def test_the_numbers_of_a_plain_layer(dtype, bias, shape):
    torch.manual_seed(0)
    layer = nn.Linear(48, 64, bias=bias).to(dtype)
    inputs = torch.randn(shape).to(dtype)
    with torch.inference_mode():
        plain = layer(inputs).float()
        packed = PackedLinear(layer.weight, layer.bias)(inputs).float()
    torch.testing.assert_close(
        packed,
        plain,
        **(
            {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        ),
    )
    strided = inputs.flatten(0, -2)[::2] if len(shape) > 1 else inputs
    with torch.inference_mode():
        torch.testing.assert_close(
            PackedLinear(layer.weight, layer.bias)(strided), layer(strided), rtol=2e-2, atol=2e-2
        )


def test_what_is_left_alone():
    class Quantised(nn.Linear):
        pass

    model = nn.Module()
    model.plain = nn.Linear(8, 64)
    model.conv = Conv1D(64, 8)
    model.head = nn.Linear(8, 2)
    model.kind = Quantised(8, 64)
    model.hooked = nn.Linear(8, 64)
    model.hooked.register_forward_pre_hook(lambda _, args: args)
    model.half = nn.Linear(8, 64).half()
    model.tied, model.other = nn.Linear(8, 64), nn.Linear(8, 64)
    model.other.weight = model.tied.weight
    assert pack(model) == 2
    inputs = torch.ones(3, 8)
    assert isinstance(model.plain, PackedLinear)
    assert model.plain(inputs).shape == model.conv(inputs).shape == (3, 64)
    assert not any(
        isinstance(layer, PackedLinear)
        for layer in (model.head, model.kind, model.hooked, model.half, model.tied, model.other)
    )


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_are_packed_and_score_the_same(architecture, dtype, tiny_model, monkeypatch):
    scorer = load(tiny_model(architecture), dtype=dtype)
    assert packed_layers(scorer)
    monkeypatch.setattr(transformer, "can_pack", lambda device: False)
    plain = load(tiny_model(architecture), dtype=dtype)
    assert not packed_layers(plain)
    inputs = scorer.encode([scorer.render(sample) for sample in samples()])
    found, expected = scorer.forward(inputs), plain.forward(inputs)
    assert np.ptp(expected) > 0.1
    rtol = 1e-5 if dtype == "float32" else 5e-2
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_of_a_layer_and_a_gelu_takes_both_at_once(dtype):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Sequential(nn.Linear(48, 64), GELUActivation())]).to(dtype)
    inputs = (3 * torch.randn(9, 48)).to(dtype)
    with torch.inference_mode():
        plain = model[0](inputs).float()
        assert pack(model) == 1
        packed = model[0](inputs).float()
    assert type(model[0][1]) is nn.Identity
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(packed, plain, rtol=tolerance, atol=tolerance)


def test_other_blocks_keep_their_gelu():
    hooked = GELUActivation()
    hooked.register_forward_hook(lambda *_: None)
    blocks = [
        [GELUActivation(), nn.Linear(8, 64)],
        [nn.Linear(8, 64), GELUActivation(), nn.LayerNorm(64)],
        [nn.Linear(8, 64), GELUActivation(use_gelu_python=True)],
        [nn.Linear(8, 64), nn.GELU(approximate="tanh")],
        [nn.Linear(8, 64), hooked],
        [nn.Linear(8, 2), GELUActivation()],
    ]
    model = nn.ModuleList(nn.Sequential(*block) for block in blocks)
    inputs = torch.linspace(-3, 3, 24).view(3, 8)
    with torch.inference_mode():
        plain = [block(inputs) for block in model]
        pack(model)
        packed = [block(inputs) for block in model]
    torch.testing.assert_close(packed, plain, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, nn.Identity) for module in model.modules())


@pytest.mark.parametrize(
    "architecture", ["bert", "electra", "roberta", "xlm-roberta", "deberta-v2"]
)
def test_encoders_take_their_gelu_with_the_layer_before_it(architecture, tiny_model):
    scorer = load(tiny_model(architecture))
    assert sum(layer.has_gelu for layer in packed_layers(scorer)) == 2


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_a_model_that_packing_would_spoil_stays_plain(fault, tiny_model, monkeypatch, caplog):
    def spoilt(self, inputs):
        if fault == "raises":
            raise AttributeError("no such thing")
        return nn.functional.linear(inputs, torch.ones(self.weight.shape))

    monkeypatch.setattr(packing.PackedLinear, "forward", spoilt)
    scorer = load(tiny_model("bert"))
    assert "packed weights give other scores" in caplog.text
    assert not packed_layers(scorer)
    assert np.isfinite(scorer.forward(scorer.encode([scorer.render(s) for s in samples()]))).all()
