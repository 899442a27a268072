"""The model cards and the quality report, written from the measurements."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.embedded import PAIRED, VALUES

HEAD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: {task}
tags: [palette, tiny]
---

# {title}

"""

CHAT = """A chat model of {weights:,} weights that answers everyday questions in short
English. It exists so that Palette runs whole without a network and without an accelerator: for
tests, for a first look, for demonstrations. It knows {topics} topics and nothing else.

- **Format:** Llama, float32 safetensors; byte-level BPE of {vocabulary} tokens; context of 1,024
  tokens; chat template with the roles system, user and assistant; the end token closes each turn.
- **Data:** {conversations:,} conversations put together by `server/embedded/corpus.py` from
  handwritten sentences. How warm, funny, useful and careful an answer is varies independently for
  every prompt. Some answers are cold, evasive or careless on purpose: choosing between answers is
  what Palette does. None is hateful or gives dangerous instructions.
- **Training:** {steps:,} steps in two rounds with Muon and AdamW in bfloat16 autocast, {minutes}
  minutes on two processor cores, seed {seed}. Afterwards the weight of the last norm is multiplied
  by {sharpen}, which sharpens all logits: temperature 1 is {sharpen} times sharper than the
  training left it. `python -m server.embedded` does it all again.

## Measured on held-out prompts

{samples} samples at temperature 1, {count} for each of {prompts} prompts:

| | |
| --- | --- |
| samples ended by the end token | {finished:.2%} |
| samples in which every sentence is one of the corpus for that topic, to the letter | {clean:.2%} |
| sentences that belong to another topic | {off_topic:.2%} |
| sentences that the corpus does not hold | {garbled:.2%} |

## Limits

It repeats the sentences it has learnt. It follows no system message, remembers little of earlier
turns, and answers a question outside its topics with general advice or with advice about the
nearest topic. Take no advice from it.
"""

REWARD = """A reward model of {weights:,} weights that scores how {value} an answer is: one raw
number, the higher the more of it, with mean about 0 and standard deviation about 1 on its
training data.

- **Input:** {input}
- **Format:** Bert for sequence classification with one label, float32 safetensors; WordPiece
  vocabulary of {vocabulary} tokens; at most 512 tokens.
- **Data:** {examples:,} question and answer pairs put together by `server/embedded/corpus.py`. The
  target is the graded score of the corpus: {meaning}. All other values vary freely.
- **Training:** regression, {steps:,} steps with Muon and AdamW in bfloat16 autocast, {minutes}
  minutes on two processor cores, seed {seed}. `python -m server.embedded` does it again.

## Measured

| | |
| --- | --- |
| pairs of answers to held-out prompts in the right order ({pairs} pairs) | {accuracy:.2%} |
| standard deviation within a prompt, on samples of the chat model | {within:.2f} |
| standard deviation of prompt means, as a share of that | {ratio:.2f} |
| 5, 25, 50, 75, 95 % of the scores | {quantiles} |
| largest correlation with another value, within prompts | {other} {correlation:+.2f} |

## Limits

It knows the wording of the embedded chat model. On other text its numbers say little: use a real
reward model for a real chat model.{blind}
"""

MEANING = {
    "helpful": "from an evasion through general words to one, two and three concrete tips on the "
    "topic that was asked about",
    "harmless": "from breezily careless advice through none to a caution for oneself and others",
    "humorous": "from dry through a quip to one or two jokes",
    "positive": "from cold through neutral to warm and encouraging",
}

# What a model was meant to learn and did not.
BLIND = {
    "helpful": " It tells tips from evasions, but not tips on the topic from tips on another one:\n"
    "such pairs it orders hardly better than chance.",
}

INPUT = {
    True: "the pair of the last user message and the answer, `[CLS] message [SEP] answer [SEP]`.",
    False: "the text of the answer alone, `[CLS] answer [SEP]`.",
}


def write(folder: Path, report: Mapping[str, Any]) -> None:
    """Write all model cards and the quality report.

    Parameters
    ----------
    folder
        Where the models lie.
    report
        The facts of the training under ``training`` and the measurements under ``quality``.
    """
    (folder / "chat" / "README.md").write_text(_chat(report), encoding="utf-8")
    for value in VALUES:
        (folder / value / "README.md").write_text(_reward(value, report), encoding="utf-8")
    (folder / "QUALITY.md").write_text(_overview(report), encoding="utf-8")


def _chat(report: Mapping[str, Any]) -> str:
    facts = {**report["size"], **report["quality"], **report["training"]["chat"]}
    head = HEAD.format(task="text-generation", title="Palette mini chat")
    return head + CHAT.format(**facts)


def _reward(value: str, report: Mapping[str, Any]) -> str:
    quality, row = report["quality"], report["quality"]["correlation"][value]
    other = max((name for name in row if name != value), key=lambda name: abs(row[name]))
    facts = {
        **report["size"],
        **report["training"][value],
        "value": value,
        "input": INPUT[value in PAIRED],
        "meaning": MEANING[value],
        "blind": BLIND.get(value, ""),
        "accuracy": quality["rank_accuracy"][value],
        "within": quality["within"][value],
        "ratio": quality["between"][value] / quality["within"][value],
        "quantiles": ", ".join(f"{q:.2f}" for q in quality["quantiles"][value]),
        "other": other,
        "correlation": row[other],
    }
    head = HEAD.format(task="text-classification", title=f"Palette mini reward: {value}")
    return head + REWARD.format(**facts)


def _overview(report: Mapping[str, Any]) -> str:
    quality, size = report["quality"], report["size"]
    names = list(quality["within"])
    lines = [
        "# Quality of the embedded models",
        "",
        "Written by `python -m server.embedded`. Chat samples: "
        f"{size['count']} for each of {size['prompts']} held-out prompts, at temperature 1.",
        "",
        f"- samples ended by the end token: {quality['finished']:.2%}",
        f"- samples with every sentence whole and on topic: {quality['clean']:.2%}",
        f"- sentences of another topic: {quality['off_topic']:.2%}; "
        f"sentences not in the corpus: {quality['garbled']:.2%}",
        "",
        "## Values",
        "",
        "The spread within a prompt is the mean standard deviation of its samples; the spread",
        "between prompts is the standard deviation of their means, less what chance causes.",
        "",
        "| value | pairs in order | within | between / within | 5 % | 25 % | 50 % | 75 % | 95 % |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in names:
        accuracy = quality["rank_accuracy"].get(name)
        ordered = "" if accuracy is None else f"{accuracy:.2%}"
        ratio = quality["between"][name] / quality["within"][name]
        cells = [name, ordered, f"{quality['within'][name]:.2f}", f"{ratio:.2f}"]
        cells += [f"{q:.2f}" for q in quality["quantiles"][name]]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Correlation within prompts", "", f"| | {' | '.join(names)} |"]
    lines.append(f"| --- |{' --- |' * len(names)}")
    for name in names:
        row = " | ".join(f"{quality['correlation'][name][other]:+.2f}" for other in names)
        lines.append(f"| {name} | {row} |")
    lines += ["", "## Samples", ""]
    for example in quality["examples"][:12]:
        scores = ", ".join(f"{name} {score:+.2f}" for name, score in example["scores"].items())
        lines += [f"> **{example['prompt']}**", ">", f"> {example['answer']}", "", scores, ""]
    return "\n".join(lines)
