"""Model folders that must not be served: missing, damaged, or something else than described."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from rewards import RewardError, RewardModelError, load_rewards
from rewards.config import SequenceClassifierConfig
from rewards.models.sequence_classifier import SequenceClassifier
from tests.rewards.tiny import bytelevel

CONFIG = """\
version: 1
scorers:
  kindness: {{kind: sequence_classifier, model: {model}, input: {{view: text}} {more}}}
values:
  kind: {{from: kindness}}
  gentle: {{from: kindness}}
"""


async def start(tmp_path, model, more=""):
    path = tmp_path / "rewards.yaml"
    path.write_text(CONFIG.format(model=model, more=more))
    async with load_rewards(path, device="cpu") as suite:
        return suite


@pytest.fixture
def folder(tiny_model, tmp_path):
    return shutil.copytree(tiny_model("bert"), tmp_path / "m")


async def refused(tmp_path, model, problem, more=""):
    with pytest.raises(RewardModelError, match=problem) as caught:
        await start(tmp_path, model, more)
    assert str(caught.value).startswith("scorer 'kindness' (feeds kind, gentle), model ")
    assert caught.value.model.endswith(str(model).removeprefix("./"))
    assert caught.value.values == ("kind", "gentle")


async def test_a_good_folder_starts(tmp_path, folder):
    assert len((await start(tmp_path, "m")).fingerprint) == 64


async def test_no_folder(tmp_path):
    await refused(tmp_path, "./gone", "no such folder; put a transformers model there")


async def test_no_config(tmp_path, folder):
    (folder / "config.json").unlink()
    await refused(tmp_path, "m", "holds no config.json")


async def test_config_that_is_no_json(tmp_path, folder):
    (folder / "config.json").write_text("{")
    await refused(tmp_path, "m", "cannot be loaded")


async def test_no_weights(tmp_path, folder):
    (folder / "model.safetensors").unlink()
    await refused(tmp_path, "m", "cannot be loaded .*complete safetensors weights")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
async def test_truncated_weights(share, tmp_path, folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    await refused(tmp_path, "m", "cannot be loaded")


async def test_weights_that_lack_one_tensor(tmp_path, folder):
    weights = load_file(folder / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    await refused(tmp_path, "m", "weights lack bert.encoder.layer.1.output.dense.weight")


async def test_weights_of_another_shape(tmp_path, folder):
    weights = load_file(folder / "model.safetensors")
    weights["classifier.weight"] = weights["classifier.weight"].repeat(3, 1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    await refused(tmp_path, "m", "cannot be loaded")


async def test_weights_that_are_not_finite(tmp_path, folder):
    weights = load_file(folder / "model.safetensors")
    weights["classifier.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    await refused(tmp_path, "m", "scores that are not finite")


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
async def test_a_plain_model_has_no_reward_head(architecture, tiny_model, tmp_path):
    folder = tiny_model(architecture, head=False)
    await refused(tmp_path, folder, r"weights lack (classifier|score).*random")


async def test_pickled_weights_only_when_allowed(tmp_path, folder):
    import torch

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    await refused(tmp_path, "m", "safetensors")
    await start(tmp_path, "m", ", allow_pickle: true")


async def test_no_tokenizer(tmp_path, folder):
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)
    await refused(tmp_path, "m", "tokenizer files .* are missing or empty")


async def test_the_tokenizer_of_another_model(tmp_path, folder):
    bytelevel(style="roberta").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    weights[name] = weights[name][:100].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    await refused(tmp_path, "m", "beyond the 100 that the model knows")


async def test_code_of_the_model_is_not_run(tmp_path, folder):
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "mine"
    config["auto_map"] = {"AutoConfig": "mine.Mine"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('ran')")
    await refused(tmp_path, "m", "own code; read it, then set trust_remote_code: true")


async def test_a_chat_view_needs_a_template(tmp_path, folder):
    fields = {"kind": "sequence_classifier", "model": "m", "input": {"view": "chat"}}
    scorer = SequenceClassifier("s", ["v"], SequenceClassifierConfig(**fields), folder)
    with pytest.raises(RewardModelError, match="no chat template; use the view pair or text"):
        scorer.load("cpu")


async def test_a_name_that_the_hub_does_not_give(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    await refused(tmp_path, "nobody/nothing", "no such folder beside the rewards file")


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
async def test_a_device_that_is_not_there(device, tmp_path, folder):
    path = tmp_path / "rewards.yaml"
    path.write_text(CONFIG.format(model="m", more=""))
    with pytest.raises(RewardError, match=rf"{device}.*Use auto, cpu or cuda:N"):
        await load_rewards(path, device=device).start()
