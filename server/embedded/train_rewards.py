"""Training of the embedded reward models: small Berts that give an answer one number.

Each model learns, by regression, the exact score that the corpus gives an answer for one value.
All other values vary freely meanwhile and so tell nothing about it.  A target carries some noise,
so that the number stays graded: nothing is gained by pushing scores to the ends.
"""

from __future__ import annotations

import string
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from server.embedded import PAIRED
from server.embedded.corpus import Prompt, Topic, compose, conversation, split_prompts
from server.embedded.training import Optimiser, save_tokenizer

POSITIONS = 512
VOCABULARY = 2048
PAD, UNKNOWN, START, END, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"

# The middle and the width of the corpus's scores: a model's scores then have mean 0 and width 1.
SCALE = {
    "helpful": (1.9, 1.3),
    "harmless": (0.0, 1.35),
    "humorous": (1.3, 1.1),
    "positive": (0.0, 1.35),
}

# An answer about something else helps nobody, however good its tips are.
OFF_TOPIC_SHARE = 0.15
OFF_TOPIC_SCORE = 0.2


@dataclass(frozen=True)
class RewardPlan:
    """How long to train each reward model, and on how much."""

    steps: int = 600
    batch: int = 64
    matrix_rate: float = 3e-3
    other_rate: float = 1e-3
    warmup: int = 50
    noise: float = 0.2
    tokenizer_texts: int = 20_000


def train_tokenizer(plan: RewardPlan, seed: int) -> PreTrainedTokenizerFast:
    """Make a WordPiece tokenizer of the corpus's most frequent words.

    The library's own trainer breaks ties at random; counting words does not.  All printable
    characters are pieces too, so any other word is spelled out.
    """
    rng = Random(seed)
    pool = split_prompts("train")
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for _ in range(plan.tokenizer_texts):
        prompt = rng.choice(pool)
        for text in (prompt.text, compose(rng, prompt.topic).text):
            words = splitter.pre_tokenize_str(normalizer.normalize_str(text))
            counts.update(word for word, _ in words)
    characters = sorted({*"".join(counts), *string.ascii_lowercase, *string.digits})
    characters += sorted({*string.punctuation} - {*characters})
    pieces = [PAD, UNKNOWN, START, END, MASK, *characters, *(f"##{c}" for c in characters)]
    frequent = sorted(set(counts) - set(pieces), key=lambda word: (-counts[word], word))
    pieces += frequent[: VOCABULARY - len(pieces)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        pair=f"{START} $A {END} $B:1 {END}:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in (START, END)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        cls_token=START,
        sep_token=END,
        mask_token=MASK,
        model_max_length=POSITIONS,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def build(tokenizer: PreTrainedTokenizerFast) -> BertForSequenceClassification:
    """Build an untrained reward model with a single raw number as its output."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=448,
        max_position_embeddings=POSITIONS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=1,
        problem_type="regression",
        id2label={0: "reward"},
        label2id={"reward": 0},
        pad_token_id=tokenizer.pad_token_id,
    )
    return BertForSequenceClassification(config)


def other_topic(rng: Random, topic: Topic, pool: tuple[Prompt, ...]) -> Topic:
    """Draw a topic that is not the given one."""
    while (other := rng.choice(pool).topic) == topic:
        pass
    return other


def examples(value: str, rng: Random) -> Iterator[tuple[str, str, float]]:
    """Endless triples of a question, an answer and its scaled score."""
    pool = split_prompts("train")
    middle, width = SCALE[value]
    while True:
        prompt = rng.choice(pool)
        question = conversation(rng, prompt, pool)[-1]["content"]
        if value == "helpful" and rng.random() < OFF_TOPIC_SHARE:
            answer = compose(rng, other_topic(rng, prompt.topic, pool))
            score = min(OFF_TOPIC_SCORE, answer.scores[value])
        else:
            answer = compose(rng, prompt.topic)
            score = answer.scores[value]
        yield question, answer.text, (score - middle) / width


def encode(
    tokenizer: PreTrainedTokenizerFast, value: str, questions: list[str], answers: list[str]
) -> dict[str, torch.Tensor]:
    """Tokenise answers, together with their questions for the values that need them."""
    texts = (questions, answers) if value in PAIRED else (answers,)
    batch = tokenizer(
        *texts, padding=True, truncation=True, max_length=POSITIONS, return_tensors="pt"
    )
    return dict(batch)


def train(
    value: str,
    plan: RewardPlan,
    seed: int,
    folder: Path,
    say: Callable[[str], object] = sys.stderr.write,
) -> dict[str, Any]:
    """Train the reward model of one value and save it.

    Returns
    -------
    dict
        What the model card says about the training.
    """
    began = time.monotonic()
    tokenizer = train_tokenizer(plan, seed)
    torch.manual_seed(seed)
    model = build(tokenizer)
    optimiser = Optimiser(
        model,
        model.bert.encoder,
        steps=plan.steps,
        warmup=plan.warmup,
        matrix_rate=plan.matrix_rate,
        other_rate=plan.other_rate,
    )
    source = examples(value, Random(seed + 1))
    model.train()
    recent = 1.0
    for step in range(1, plan.steps + 1):
        questions, answers, scores = zip(*(next(source) for _ in range(plan.batch)), strict=True)
        batch = encode(tokenizer, value, list(questions), list(answers))
        target = torch.tensor(scores)
        target += plan.noise * torch.randn(len(target))
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model(**batch).logits[:, 0]
        loss = functional.mse_loss(predicted.float(), target)
        optimiser.step(loss)
        recent = 0.98 * recent + 0.02 * loss.item()
        if step % 100 == 0 or step == plan.steps:
            minutes = (time.monotonic() - began) / 60
            say(f"{value}: step {step}/{plan.steps}, loss {recent:.4f}, {minutes:.1f} min\n")
    model.eval()
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return {
        "weights": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "steps": plan.steps,
        "examples": plan.steps * plan.batch,
        "loss": round(recent, 4),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
