"""Training of the embedded chat model: a small Llama in the Hugging Face format."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from server.embedded.corpus import Topic, compose, conversation, split_prompts
from server.embedded.training import Optimiser, save_tokenizer

CONTEXT = 1024
VOCABULARY = 4096
PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

# Every turn is its role, its text and the end token.
TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

IGNORED = -100

# Among the conversations of the first part of the training, the share of drills.
DRILL_SHARE = 0.7


@dataclass(frozen=True)
class ChatPlan:
    """How long to train, and on how much."""

    steps: int = 3000
    second_steps: int = 3000
    second_rate: float = 0.6
    batch: int = 32
    drill_until: float = 0.45
    matrix_rate: float = 5e-3
    other_rate: float = 3e-3
    warmup: int = 100
    sharpen: float = 1.35
    tokenizer_texts: int = 20_000


def train_tokenizer(plan: ChatPlan, seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on conversations."""
    rng = Random(seed)
    pool = split_prompts("train")
    texts = []
    for _ in range(plan.tokenizer_texts):
        prompt = rng.choice(pool)
        texts += [m["content"] for m in conversation(rng, prompt, pool)]
        texts.append(compose(rng, prompt.topic).text)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        chat_template=TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained model; a head is 64 wide, which every server's kernels support."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model


def drill(rng: Random, topic: Topic) -> str:
    """Put an answer together from the topic's own sentences alone.

    They are most of what there is to learn, and rarer in real answers than the common phrases;
    the first part of the training therefore practises them.
    """
    own = [*topic.tips, *topic.care, *topic.risk, *topic.fun]
    return " ".join(rng.sample(own, 5))


def examples(
    tokenizer: PreTrainedTokenizerFast, rng: Random, drilling: Callable[[], bool]
) -> Iterator[tuple[list[int], int]]:
    """Endless tokenised conversations, each with the place where its last answer begins."""
    pool = split_prompts("train")
    while True:
        share = DRILL_SHARE if drilling() else 0.0
        asked, answers = [], []
        for prompt in rng.choices(pool, k=512):
            if rng.random() < share:
                asked.append([{"role": "user", "content": prompt.text}])
                answers.append(drill(rng, prompt.topic) + EOS)
            else:
                asked.append(conversation(rng, prompt, pool))
                answers.append(compose(rng, prompt.topic).text + EOS)
        opened = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        heads = tokenizer(opened, add_special_tokens=False)["input_ids"]
        tails = tokenizer(answers, add_special_tokens=False)["input_ids"]
        for head, tail in zip(heads, tails, strict=True):
            yield head + tail, len(head)


def batches(
    tokenizer: PreTrainedTokenizerFast, rng: Random, size: int, drilling: Callable[[], bool]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of tokens and labels, of about equal lengths so that little is padded."""
    source = examples(tokenizer, rng, drilling)
    pad = tokenizer.pad_token_id
    while True:
        window = sorted((next(source) for _ in range(size * 16)), key=lambda item: len(item[0]))
        groups = [window[start : start + size] for start in range(0, len(window), size)]
        rng.shuffle(groups)
        for group in groups:
            width = max(len(tokens) for tokens, _ in group)
            rows, labels = [], []
            for tokens, start in group:
                fill = width - len(tokens)
                rows.append(tokens + [pad] * fill)
                labels.append([IGNORED] * start + tokens[start:] + [IGNORED] * fill)
            yield torch.tensor(rows), torch.tensor(labels)


def loss_of(model: LlamaForCausalLM, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the mean loss of the answers' tokens.

    Padding stands on the right, where a causal model does not look, so no mask is needed; and
    only the answers' positions go through the large output layer.
    """
    hidden = model.model(input_ids=tokens).last_hidden_state[:, :-1]
    wanted = labels[:, 1:]
    kept = wanted != IGNORED
    logits = model.lm_head(hidden[kept]).float()
    return functional.cross_entropy(logits, wanted[kept])


def train(
    plan: ChatPlan, seed: int, folder: Path, say: Callable[[str], object] = sys.stderr.write
) -> dict[str, Any]:
    """Train the chat model and save it.

    Returns
    -------
    dict
        What the model card says about the training.
    """
    began = time.monotonic()
    tokenizer = train_tokenizer(plan, seed)
    torch.manual_seed(seed)
    model = build(tokenizer)
    weights = sum(p.numel() for p in model.parameters())
    say(f"chat: {weights:,} weights, {len(tokenizer)} tokens\n")
    model.train()
    _round(model, tokenizer, plan, seed + 1, plan.steps, 1.0, say)
    # The second starts warm again, lower, without drills: what the first one's cooling froze
    # moves once more.
    loss = _round(model, tokenizer, plan, seed + 2, plan.second_steps, plan.second_rate, say)
    # The last norm scales all logits.  A training this short leaves the impossible continuations
    # of a sentence a little too likely; sharper logits take that tail away.
    with torch.no_grad():
        model.model.norm.weight.mul_(plan.sharpen)
    model.eval()
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return {
        "weights": weights,
        "vocabulary": len(tokenizer),
        "steps": plan.steps + plan.second_steps,
        "conversations": (plan.steps + plan.second_steps) * plan.batch,
        "loss": round(loss, 4),
        "sharpen": plan.sharpen,
        "minutes": round((time.monotonic() - began) / 60, 1),
    }


def _round(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    plan: ChatPlan,
    seed: int,
    steps: int,
    rate: float,
    say: Callable[[str], object],
) -> float:
    """Train for so many steps at a share of the plan's rates; only the full rate has drills.

    Returns
    -------
    float
        Running mean of the loss, nats per token.
    """
    began = time.monotonic()
    is_first = rate == 1.0
    optimiser = Optimiser(
        model,
        model.model.layers,
        steps=steps,
        warmup=plan.warmup if is_first else plan.warmup // 2,
        matrix_rate=plan.matrix_rate * rate,
        other_rate=plan.other_rate * rate,
    )
    step, recent = 0, math.nan
    drills = plan.drill_until * steps if is_first else 0.0
    source = batches(tokenizer, Random(seed), plan.batch, lambda: step < drills)
    for step in range(1, steps + 1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, *next(source))
        optimiser.step(loss)
        recent = loss.item() if step == 1 else 0.95 * recent + 0.05 * loss.item()
        if step % 50 == 0 or step == steps:
            minutes = (time.monotonic() - began) / 60
            say(f"chat: step {step}/{steps}, loss {recent:.4f}, {minutes:.1f} min\n")
    return recent
