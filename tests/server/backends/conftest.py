"""Tiny random models with a tokenizer and a chat template, made once a session; their backend."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from server.backends import openai_remote, openai_transport
from server.backends.hf_local import HfLocalBackend
from server.backends.hf_text import Detokenizer

# Checks in there, too, tell the values when they fail.
pytest.register_assert_rewrite("tests.server.backends.hf_drawing")

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Answer the question in one short sentence, please.",
    "What is the capital of France? The capital of France is Paris.",
    "Grüße aus Köln, naïve café, 日本語のテキスト, 🙂🙃.",
]
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
MAX_CONTEXT = 128


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    fast.chat_template = TEMPLATE
    return fast


def save(folder: Path, family: str = "llama") -> Path:
    """Write a model with random weights, sharp enough that its tokens differ in probability."""
    tokenizer = make_tokenizer()
    common = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": MAX_CONTEXT,
        "initializer_range": 0.3,
    }
    torch.manual_seed(9)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common, **sizes, bos_token_id=None))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**common, **sizes, tie_word_embeddings=True))
    elif family == "gemma3":
        # A window shorter than the prompts of the tests, so that it is felt.
        window = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
        sizes["initializer_range"] = 0.08  # its embeddings are tied and scaled: 0.3 is one-hot
        model = Gemma3ForCausalLM(Gemma3TextConfig(**common, **sizes, **window))
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                **common,
                n_embd=64,
                n_layer=2,
                n_head=4,
                n_positions=MAX_CONTEXT,
                bos_token_id=0,
                initializer_range=0.3,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Keep torch from waiting for itself on a busy machine: these models are tiny."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
async def backend(llama_folder):
    backend = HfLocalBackend(str(llama_folder), device="cpu")
    await backend.start()
    yield backend
    await backend.close()


@pytest.fixture
def show_ids(monkeypatch):
    """Make token strings ids, so that answers can be fed to the model again."""
    monkeypatch.setattr(Detokenizer, "token", lambda self, token_id: str(token_id))


@pytest.fixture
def _quick_pauses(monkeypatch):
    """Let the backend in front of another server try again, and look after it, at once."""
    monkeypatch.setattr(openai_transport, "_FIRST_DELAY_S", 0.001)
    monkeypatch.setattr(openai_remote, "_FIRST_CHECK_S", 0.005)
