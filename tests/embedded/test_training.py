from __future__ import annotations

import json

import pytest
import torch

from server.embedded import __main__ as program
from server.embedded import train_chat, train_rewards


@pytest.fixture(autouse=True)
def fixed_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(program.THREADS)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(before)


def train_chat_model(folder, seed):
    plan = train_chat.ChatPlan(steps=3, second_steps=2, batch=4, warmup=1, tokenizer_texts=200)
    train_chat.train(plan, seed, folder, say=lambda line: None)


def train_reward_model(folder, seed):
    plan = train_rewards.RewardPlan(steps=3, batch=4, warmup=1, tokenizer_texts=200)
    train_rewards.train("helpful", plan, seed, folder, say=lambda line: None)


@pytest.mark.parametrize("train", [train_chat_model, train_reward_model])
def test_the_same_seed_gives_the_same_weights(tmp_path, train):
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        train(tmp_path / name, seed)
    one, two, other = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "other")
    )
    assert one == two
    assert one != other


def test_prompts_are_written_as_jsonl(tmp_path, capsys):
    program.main(["prompts", "--split", "heldout", "--limit", "5"])
    printed = capsys.readouterr().out
    program.main(["prompts", "--limit", "5", "--out", str(tmp_path / "prompts.jsonl")])
    assert (tmp_path / "prompts.jsonl").read_text(encoding="utf-8") == printed
    lines = [json.loads(line) for line in printed.splitlines()]
    assert len(lines) == 5
    assert all(line["messages"][0]["role"] == "user" for line in lines)
