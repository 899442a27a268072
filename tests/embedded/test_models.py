from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from server.embedded import CHAT_MODEL, MODELS, VALUES
from server.embedded.corpus import split_prompts
from server.embedded.quality import RewardModel, rank_accuracy, sample, wording

MEGABYTE = 1_000_000
CONVERSATION = [
    {"role": "system", "content": "Be concise."},
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Good question."},
    {"role": "user", "content": "How do I bake bread?"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHAT_MODEL)


def folder_size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_sizes_are_small():
    assert (CHAT_MODEL / "model.safetensors").stat().st_size < 15 * MEGABYTE
    rewards = sum((MODELS / value / "model.safetensors").stat().st_size for value in VALUES)
    assert rewards < 15 * MEGABYTE
    assert folder_size(MODELS) < 32 * MEGABYTE


@pytest.mark.parametrize("name", ["chat", *VALUES])
def test_folder_holds_what_a_model_needs_and_nothing_else(name):
    found = {path.name for path in (MODELS / name).iterdir()}
    needed = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert needed | {"README.md"} <= found
    assert found <= needed | {"README.md", "chat_template.jinja", "generation_config.json"}


@pytest.mark.parametrize("name", ["chat", *VALUES])
def test_weights_are_float32_and_finite(name):
    with safe_open(MODELS / name / "model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a dict)
            tensor = file.get_tensor(key)
            assert tensor.dtype == torch.float32
            assert torch.isfinite(tensor).all()


def test_chat_model_is_a_llama_that_other_servers_take():
    config = AutoConfig.from_pretrained(CHAT_MODEL)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.head_dim in (32, 64)
    assert config.max_position_embeddings >= 512
    AutoModelForCausalLM.from_pretrained(CHAT_MODEL)


def test_chat_tokenizer(tokenizer):
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    text = "Änder 3 naïve émojis 🙂 — ok?"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_chat_template(tokenizer):
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|bos|><|system|>Be concise.<|eos|><|user|>Hello!<|eos|>"
        "<|assistant|>Good question.<|eos|><|user|>How do I bake bread?<|eos|><|assistant|>"
    )
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokens.count(tokenizer.bos_token_id) == 1
    assert tokens[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")


def test_generation_config_changes_nothing():
    settings = json.loads((CHAT_MODEL / "generation_config.json").read_text(encoding="utf-8"))
    assert settings["do_sample"] is True
    assert settings.get("temperature", 1.0) == 1.0
    assert not {"top_k", "top_p", "repetition_penalty", "max_length"} & settings.keys()


def test_chat_model_ends_its_answers_and_speaks_clean_sentences():
    prompts = split_prompts("heldout")[:24]
    samples = sample(CHAT_MODEL, prompts, 4, seed=1)
    clean, off_topic, garbled = wording(samples)
    assert all(item.finished for item in samples)
    assert clean > 0.85
    assert off_topic < 0.03
    assert garbled < 0.03


@pytest.mark.parametrize("value", VALUES)
def test_reward_model_ranks_held_out_pairs(value):
    reward = RewardModel(MODELS / value, value)
    assert reward.model.config.architectures == ["BertForSequenceClassification"]
    assert reward.model.config.num_labels == 1
    assert rank_accuracy(reward, 400, seed=7) >= 0.95


@pytest.mark.parametrize("value", VALUES)
def test_reward_does_not_depend_on_the_batch(value):
    reward = RewardModel(MODELS / value, value)
    questions = [prompt.text for prompt in split_prompts("heldout")[:3]]
    answers = ["Good luck.", "Just begin and see how it goes. Enjoy it.", "Fine."]
    alone = [
        reward.score([question], [answer])[0]
        for question, answer in zip(questions, answers, strict=True)
    ]
    np.testing.assert_allclose(reward.score(questions, answers), alone, atol=1e-4)


def test_auto_classes_load_reward_models():
    for value in VALUES:
        AutoModelForSequenceClassification.from_pretrained(MODELS / value)
        pair = AutoTokenizer.from_pretrained(MODELS / value)("Hello", "Fine.")
        assert set(pair["token_type_ids"]) == {0, 1}
