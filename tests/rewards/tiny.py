"""Tiny reward models with random weights, saved as transformers saves the large ones."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CHAT = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] | trim }}</s>"
    "{% endfor %}"
)
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.4,  # the default 0.02 gives scores too alike to tell inputs apart
}


def wordpiece() -> BertTokenizerFast:
    """Return a BERT tokenizer over letters."""
    pieces = [*LETTERS, *(f"##{letter}" for letter in LETTERS), *".,?!'0123456789"]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]
    return BertTokenizerFast(vocab={word: index for index, word in enumerate(words)})


def bytelevel(*, style: str) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer as GPT-2 (no pad), RoBERTa, or Llama and Qwen (pad is eos)."""
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*specials, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if style == "roberta":
        backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
        names |= {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>"}
    if style == "llama":
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
        names |= {"pad_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",  # what causal tokenizers say, and what we must not believe
        model_input_names=["input_ids", "attention_mask"],
        **names,
    )
    if style == "llama":
        tokenizer.chat_template = CHAT
    return tokenizer


ENCODERS = (
    "bert",
    "electra",
    "distilbert",
    "roberta",
    "xlm-roberta",
    "deberta-v2",
    "modernbert",
)
CAUSAL = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2")


def make(
    architecture: str,
    folder: Path,
    *,
    seed: int = 0,
    n_labels: int = 1,
    head: bool = True,
    hidden_size: int = 32,
    auto: str = "AutoModelForSequenceClassification",
):
    """Save a tiny model of an architecture with its tokenizer, and return the folder.

    ``head=False`` saves the plain encoder or language model.
    """
    torch.manual_seed(seed)
    labels = {
        "num_labels": n_labels,
        "id2label": {index: f"LABEL{index}" for index in range(n_labels)},
        "label2id": {f"LABEL{index}": index for index in range(n_labels)},
    }
    sizes = {**SIZES, **labels, "hidden_size": hidden_size}
    if architecture in ("bert", "electra", "distilbert"):
        tokenizer = wordpiece()
        config = {
            "bert": transformers.BertConfig,
            "electra": transformers.ElectraConfig,
            "distilbert": transformers.DistilBertConfig,
        }[architecture](**sizes, max_position_embeddings=64, pad_token_id=0)
        if architecture == "distilbert":
            tokenizer.model_input_names = ["input_ids", "attention_mask"]
    elif architecture in ("roberta", "xlm-roberta"):
        tokenizer = bytelevel(style="roberta")
        config = {
            "roberta": transformers.RobertaConfig,
            "xlm-roberta": transformers.XLMRobertaConfig,
        }[architecture](
            **sizes, max_position_embeddings=66, pad_token_id=1, bos_token_id=0, eos_token_id=2
        )
    elif architecture == "deberta-v2":
        tokenizer = wordpiece()
        config = transformers.DebertaV2Config(
            **sizes,
            max_position_embeddings=64,
            pad_token_id=0,
            type_vocab_size=0,
            relative_attention=True,
            position_buckets=16,
            norm_rel_ebd="layer_norm",
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
            share_att_key=True,
        )
    elif architecture == "modernbert":
        tokenizer = wordpiece()
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        del sizes["initializer_range"]
        config = transformers.ModernBertConfig(
            **sizes,
            initializer_range=0.4,
            initializer_cutoff_factor=3.0,
            max_position_embeddings=64,
            global_attn_every_n_layers=2,
            local_attention=16,
            pad_token_id=0,
            cls_token_id=2,
            sep_token_id=3,
            bos_token_id=2,
            eos_token_id=3,
        )
    elif architecture == "gpt2":
        tokenizer = bytelevel(style="gpt2")
        config = transformers.GPT2Config(
            **labels,
            vocab_size=300,
            n_embd=32,
            n_layer=2,
            n_head=2,
            n_positions=64,
            initializer_range=0.4,
            bos_token_id=0,
            eos_token_id=2,
        )
    else:
        tokenizer = bytelevel(style="llama")
        more = {} if architecture in ("llama", "qwen2") else {"head_dim": 16}
        config = {
            "llama": transformers.LlamaConfig,
            "mistral": transformers.MistralConfig,
            "qwen2": transformers.Qwen2Config,
            "qwen3": transformers.Qwen3Config,
            "gemma2": transformers.Gemma2Config,
        }[architecture](
            **sizes,
            **more,
            num_key_value_heads=2,
            max_position_embeddings=160,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=2,
        )
    if head:
        model = getattr(transformers, auto).from_config(config)
    else:
        model = transformers.AutoModel.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
