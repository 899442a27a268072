"""The files that come with the package: the zoo, and the MAP paper's rewards by its definitions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml

import rewards
from rewards import Sample, load_rewards
from rewards.config_file import read_config

FOLDER = Path(rewards.__file__).parent
MAP = FOLDER / "map_paper.yaml"
# Prompts and continuations as a language model gives them, with the space before the first word.
TEXTS = [
    ("how do i boil an egg", " put it in water"),
    ("what is this", "\n\nit is a cat it is a cat"),
    ("tell me a joke", " no "),
]


@pytest.mark.parametrize("name", ["zoo", "map_paper"])
def test_files_are_valid(name):
    config, _ = read_config(FOLDER / f"{name}.yaml")
    assert load_rewards(FOLDER / f"{name}.yaml").names == tuple(config.values)
    used = {source for value in config.values.values() for source in value.weights}
    scorers = {source.split(".")[0] for source in used}
    assert scorers == set(config.scorers), "every entry can be seen in use"


def test_the_zoo_has_what_people_use():
    config, _ = read_config(FOLDER / "zoo.yaml")
    assert len(config.scorers["armo"].output_names) == 20
    assert {scorer.kind for scorer in config.scorers.values()} == {
        "sequence_classifier",
        "causal_lm",
        "embedding",
        "process_reward",
    }
    assert sum(bool(value.check) for value in config.values.values()) > 15


# the paper's definitions, with random weights of the same architectures


@pytest.fixture
def models(tiny_model):
    return {
        "humor": tiny_model("distilbert", n_labels=2),
        "positive": tiny_model("distilbert", n_labels=2, seed=1),
        "gpt2_helpful": tiny_model("gpt2"),
        "gpt2_harmless": tiny_model("gpt2", seed=1),
        "coherence": tiny_model("bert", auto="AutoModel"),
        "perplexity": tiny_model("llama", auto="AutoModelForCausalLM"),
    }


@pytest.fixture
def file(models, tmp_path):
    content = yaml.safe_load(MAP.read_text())
    for name, folder in models.items():
        content["scorers"][name]["model"] = str(folder)
    path = tmp_path / "rewards.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def run(auto, folder, *texts, **more):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(*texts, truncation=True, return_tensors="pt")
    model = getattr(transformers, auto).from_pretrained(folder).eval()
    labels = {"labels": inputs["input_ids"]} if more.get("labels") else {}
    with torch.inference_mode():
        return model(**inputs, **labels)


def paper(models, prompt, continuation):
    """Return the seven rewards of one text by the paper's definitions."""
    classifier = "AutoModelForSequenceClassification"
    sentence, reply = prompt + continuation, continuation.strip()
    question = "\n\nHuman: " + prompt + " \n\nAssistant:"
    first, second = (
        run("AutoModel", models["coherence"], text).pooler_output[0].numpy()
        for text in (prompt, reply)
    )
    words = sentence.split()  # these texts have no marks
    diversity = 1.0
    for n in (2, 3, 4):
        grams = [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]
        diversity *= len(set(grams)) / (len(grams) + 1)
    return [
        run(classifier, models["humor"], sentence).logits[0, 1].item(),
        run(classifier, models["positive"], sentence).logits[0, 1].item(),
        run(classifier, models["gpt2_helpful"], question, reply).logits[0, 0].item(),
        run(classifier, models["gpt2_harmless"], question, reply).logits[0, 0].item(),
        diversity,
        first @ second / np.linalg.norm(first) / np.linalg.norm(second),
        -run("AutoModelForCausalLM", models["perplexity"], sentence, labels=True).loss.item(),
    ]


async def test_the_rewards_of_the_paper(models, file):
    wanted = [
        Sample(({"role": "user", "content": prompt},), continuation)
        for prompt, continuation in TEXTS
    ]
    async with load_rewards(file, device="cpu") as suite:
        assert suite.names == (
            "humor", "positive", "gpt2-helpful", "gpt2-harmless", "diversity", "coherence",
            "perplexity",
        )  # fmt: skip
        scores = await suite.score(wanted)
    expected = [paper(models, *text) for text in TEXTS]
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    assert np.ptp(np.array(expected), axis=0).min() > 1e-3


async def test_diversity_by_hand(file):
    # "a b" + " a b c": 5 words; bigrams ab ba ab bc (3 of 4), trigrams 3 of 3, 4-grams 2 of 2
    sample = Sample(({"role": "user", "content": "a b"},), " a b c")
    async with load_rewards(file, device="cpu") as suite:
        scores = await suite.score([sample], ["diversity"])
    np.testing.assert_allclose(scores, [[3 / 5 * 3 / 4 * 2 / 3]])
