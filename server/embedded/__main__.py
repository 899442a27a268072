"""``python -m server.embedded``: make the embedded models, or print prompts of the corpus."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.embedded import MODELS, VALUES, corpus

# Set once: the order of a sum depends on the number of threads, and so do the weights.
THREADS = 2

NAMES = ("chat", *VALUES)


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    top = argparse.ArgumentParser(prog="python -m server.embedded", description=__doc__)
    top.add_argument("--out", type=Path, default=MODELS, help="folder for the models")
    top.add_argument("--seed", type=int, default=0)
    top.add_argument("--quick", action="store_true", help="minutes instead of an hour, for tests")
    top.add_argument(
        "--only",
        nargs="*",
        choices=NAMES,
        default=NAMES,
        help="train only these (with no name: only measure again)",
    )
    commands = top.add_subparsers(dest="command")
    prompts = commands.add_parser("prompts", help="write prompts as JSONL")
    prompts.add_argument("--split", choices=tuple(corpus.PER_TOPIC), default="heldout")
    prompts.add_argument("--limit", type=int, default=None)
    prompts.add_argument("--out", dest="file", type=Path, default=None)
    return top


def write_prompts(split: corpus.Split, limit: int | None, file: Path | None) -> None:
    """Write the prompts of a split, one conversation a line."""
    lines = [
        json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
        for messages in corpus.prompts(split)[:limit]
    ]
    if file is None:
        sys.stdout.writelines(lines)
    else:
        file.write_text("".join(lines), encoding="utf-8")


def make(folder: Path, only: Sequence[str], seed: int, quick: bool) -> None:
    """Train the chosen models; when all are there, measure them and write the cards."""
    import torch

    from server.embedded import cards, quality, train_chat, train_rewards

    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    chat_plan, reward_plan = train_chat.ChatPlan(), train_rewards.RewardPlan()
    if quick:
        chat_plan = train_chat.ChatPlan(
            steps=60, second_steps=20, batch=16, warmup=10, tokenizer_texts=2000
        )
        reward_plan = train_rewards.RewardPlan(steps=60, batch=32, warmup=10, tokenizer_texts=2000)
    record = folder / "quality.json"
    report: dict[str, Any] = {"training": {}}
    if record.exists():
        report = json.loads(record.read_text(encoding="utf-8"))
    for name in only:
        if name == "chat":
            facts = train_chat.train(chat_plan, seed, folder / name)
        else:
            facts = train_rewards.train(name, reward_plan, seed, folder / name)
        report["training"][name] = facts
        _save(record, report)
    if any(not (folder / name / "config.json").exists() for name in NAMES):
        return
    prompts, count, pairs = (8, 4, 100) if quick else (128, 16, 2000)
    report["size"] = {
        "prompts": prompts,
        "count": count,
        "samples": prompts * count,
        "pairs": pairs,
        "seed": seed,
        "topics": len(corpus.topics()),
    }
    report["quality"] = quality.measure(folder, prompts, count, pairs, seed).as_json()
    _save(record, report)
    cards.write(folder, report)


def _save(record: Path, report: dict[str, Any]) -> None:
    record.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    chosen = parser().parse_args(arguments)
    if chosen.command == "prompts":
        write_prompts(chosen.split, chosen.limit, chosen.file)
    else:
        make(chosen.out, chosen.only, chosen.seed, chosen.quick)


if __name__ == "__main__":
    main()
