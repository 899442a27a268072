from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from server.backends import hf_loading
from server.backends.base import ModelLoadError
from server.backends.hf_loading import load_model
from server.backends.hf_local import HfLocalBackend
from tests.server.backends.conftest import MAX_CONTEXT, make_tokenizer


@pytest.fixture
def folder(llama_folder, tmp_path):
    return shutil.copytree(llama_folder, tmp_path / "copy")


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_a_loaded_model_knows_itself(llama_folder):
    loaded = load_model(str(llama_folder), device="cpu")
    assert loaded.max_context == MAX_CONTEXT
    assert loaded.device == torch.device("cpu")
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert loaded.model.config._attn_implementation == "sdpa"
    assert loaded.eos_ids == {loaded.tokenizer.eos_token_id}
    assert len(loaded.fingerprint) == 64
    assert load_model(str(llama_folder), device="cpu", dtype="bfloat16").model.dtype == (
        torch.bfloat16
    )
    assert load_model(str(llama_folder), max_context=40).max_context == 40


def test_loading_is_silent(llama_folder, capfd):
    load_model(str(llama_folder), device="cpu")
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_every_end_token_counts(folder):
    edit_json(folder / "generation_config.json", eos_token_id=[5, 9])
    loaded = load_model(str(folder), device="cpu")
    assert loaded.eos_ids == {5, 9, loaded.tokenizer.eos_token_id}


def missing_folder(folder):
    return folder.parent / "nowhere"


def a_file(folder):
    return folder / "config.json"


def no_config(folder):
    (folder / "config.json").unlink()


def damaged_config(folder):
    (folder / "config.json").write_text("{ not json")


def unknown_architecture(folder):
    edit_json(folder / "config.json", model_type="no_such_family", architectures=["NoSuch"])


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def pickled_weights(folder):
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()


def truncated_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def weights_of_zeros(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))


def a_missing_tensor(folder):
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})


def a_tensor_of_another_shape(folder):
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, weights, metadata={"format": "pt"})


def a_missing_shard(folder):
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}})
    )


def a_damaged_index(folder):
    (folder / "model.safetensors.index.json").write_text("[]")


def an_encoder(folder):
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(folder)


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def no_chat_template(folder):
    (folder / "chat_template.jinja").unlink()


def tokenizer_of_another_model(folder):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(50)])
    tokenizer.save_pretrained(folder)


def no_end_token(folder):
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    edit_json(folder / "config.json", eos_token_id=None)
    edit_json(folder / "generation_config.json", eos_token_id=None)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing_folder, "nowhere' does not exist; give the folder"),
        (a_file, "is not a folder; give"),
        (no_config, r"has no config\.json; give"),
        (damaged_config, "cannot read the configuration .* Remedy: "),
        (unknown_architecture, "cannot read the configuration .* Remedy: "),
        (no_weights, r"no \*\.safetensors weights; convert"),
        (pickled_weights, r"only pytorch_model\.bin, whose pickle .* convert"),
        (truncated_weights, "cannot load the weights .* download them again"),
        (weights_of_zeros, "cannot load the weights .* download them again"),
        (a_missing_tensor, r"lack 1 tensors .*down_proj.* give a complete"),
        (a_tensor_of_another_shape, "(cannot load the weights|lack 1 tensors) .*"),
        (a_missing_shard, r"lacks model-2\.safetensors, .* download it again"),
        (a_damaged_index, "is damaged; download it again"),
        (an_encoder, "tensors of a bert causal"),
        (no_tokenizer, r"has no tokenizer; copy tokenizer\.json"),
        (damaged_tokenizer, "cannot load the tokenizer .* copy"),
        (no_chat_template, "no chat template.* instruction-tuned"),
        (tokenizer_of_another_model, "do not belong together: download"),
        (no_end_token, "names no end token.* set eos_token_id"),
    ],
)
def test_what_cannot_be_loaded_says_what_to_do(folder, damage, message):
    target = damage(folder) or folder
    with pytest.raises(ModelLoadError, match=message) as caught:
        load_model(str(target), device="cpu")
    assert str(target) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
        ({"device": "meta:x"}, "device 'meta:x' cannot be used"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown; use"),
        ({"dtype": "tensor"}, "dtype 'tensor' is unknown; use"),
        ({"max_context": MAX_CONTEXT + 1}, r"max_context is 129, outside 2\.\.128"),
        ({"max_context": 1}, r"max_context is 1, outside 2\.\.128"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_the_model(llama_folder, options, message):
    with pytest.raises(ModelLoadError, match=message):
        load_model(str(llama_folder), **{"device": "cpu", **options})


def test_a_model_that_decodes_otherwise_than_it_reads_is_refused(llama_folder, monkeypatch):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def forgetful(self, input_ids, past_key_values=None, logits_to_keep=0, **options):
        return forward(self, input_ids, logits_to_keep=logits_to_keep, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forgetful)
    with pytest.raises(ModelLoadError, match=r"cannot decode several answers .* differs"):
        load_model(str(llama_folder), device="cpu")


def test_fingerprints_tell_models_apart(folder, llama_folder, tmp_path):
    original = load_model(str(llama_folder), device="cpu").fingerprint
    # Where a folder lies is no part of its identity; a note in it neither.
    (folder / "README.md").write_text("a copy")
    assert load_model(str(folder), device="cpu").fingerprint == original

    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with_other_template = load_model(str(folder), device="cpu").fingerprint
    assert with_other_template != original

    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    assert load_model(str(folder), device="cpu").fingerprint not in {original, with_other_template}


def test_large_weights_are_sampled(folder, monkeypatch):
    monkeypatch.setattr(hf_loading, "_HASH_ALL_BYTES", 1)
    monkeypatch.setattr(hf_loading, "_SAMPLE_BYTES", 64)
    weights = folder / "model.safetensors"
    prints = {load_model(str(folder), device="cpu").fingerprint}
    tensors = load_file(weights)
    for name in ("model.norm.weight", "lm_head.weight"):
        save_file(
            {k: v + 0.1 if k == name else v for k, v in tensors.items()},
            weights,
            metadata={"format": "pt"},
        )
        prints.add(load_model(str(folder), device="cpu").fingerprint)
    # The last tensor is reached by the last sample, the large one by one of those in between.
    assert len(prints) == 3


def test_the_hub_is_identified_by_name_and_commit():
    assert hf_loading.fingerprint_of("a/b", None, "c0ffee") != hf_loading.fingerprint_of(
        "a/b", None, "decaf"
    )


async def test_a_backend_that_cannot_load_is_stopped(tmp_path):
    backend = HfLocalBackend(str(tmp_path / "nowhere"))
    with pytest.raises(ModelLoadError, match="does not exist"):
        await backend.start()
    assert backend.health()["state"] == "stopped"
    await backend.close()


def test_a_hub_name_that_is_nobody(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match="cannot read the configuration"):
        load_model("no-such-owner-of-models/no-such-model")
