"""One real engine for all tests of this folder, on a CPU, with the embedded chat model."""

from __future__ import annotations

import asyncio
import gc
import json
import multiprocessing
import os
from contextlib import suppress
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from safetensors.torch import save_file

from server import embedded
from server.backends.base import BackendUnavailableError, SamplingSettings
from server.backends.hf_local import HfLocalBackend
from server.backends.vllm_engine import VllmEngineBackend
from tests.engines import needs_engine

MODEL = str(embedded.CHAT_MODEL)
QUESTION = [{"role": "user", "content": "How do I keep my houseplants alive?"}]
OTHER = [{"role": "user", "content": "Tell me a joke about cooking, and then explain it to me."}]
LONG = [{"role": "user", "content": "Please tell me how to cook rice. " * 100}]
RANK = 4
PATIENCE_S = 120  # only a hang takes that long

ENGINE = [
    *needs_engine,
    # One engine for the folder, and one loop for the life of the engine.
    pytest.mark.asyncio(loop_scope="package"),
    # Of vLLM's imports, and of torch's as vLLM uses it.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    # vLLM leaves its ZeroMQ contexts to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="package")
def _garbage():
    """Collect what engines leave behind here, where vLLM's warnings are let pass."""
    yield
    for _ in range(3):
        gc.collect()


@pytest.fixture(scope="package")
def adapter_folder(tmp_path_factory):
    """Write a LoRA adapter strong enough to be heard."""
    folder = tmp_path_factory.mktemp("adapters") / "loud"
    folder.mkdir()
    config = json.loads((embedded.CHAT_MODEL / "config.json").read_text())
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, n_out in (
            ("q_proj", config["num_attention_heads"] * config["head_dim"]),
            ("v_proj", config["num_key_value_heads"] * config["head_dim"]),
        ):
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            shapes = {"A": (RANK, config["hidden_size"]), "B": (n_out, RANK)}
            for part, shape in shapes.items():
                tensors[f"{key}.lora_{part}.weight"] = torch.randn(shape, generator=generator) * 0.2
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "r": RANK,
                "lora_alpha": 2 * RANK,
                "target_modules": ["q_proj", "v_proj"],
                "task_type": "CAUSAL_LM",
                "bias": "none",
            }
        )
    )
    return folder


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def backend(_garbage, adapter_folder):
    # A model this small would fill its answers with white space where JSON lets it.
    options = {
        "--kv-cache-memory-bytes": 2**28,
        "structured-outputs-config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    backend = VllmEngineBackend(
        MODEL, n_threads=1, engine_args=options, lora={"loud": str(adapter_folder)}
    )
    await backend.start()
    yield backend
    pids = backend.health()["pids"]
    stream = backend.generate(await backend.render(QUESTION), 4, never_ending(), 0)
    waiting = asyncio.create_task(anext(stream))
    await until(lambda: backend._supervisor.engine.llm.get_num_unfinished_requests() == 4)
    await backend.close()
    with pytest.raises(BackendUnavailableError, match="was stopped"):
        await waiting
    assert backend.health()["state"] == "stopped"
    assert pids
    assert not any(is_alive(pid) for pid in pids)


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def local():
    backend = HfLocalBackend(MODEL, device="cpu", max_rows=512)
    await backend.start()
    yield backend
    await backend.close()


def is_alive(pid):
    multiprocessing.active_children()  # reaps those that have ended
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


async def until(condition):
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - another process changes it, without an event
            await asyncio.sleep(0.01)


async def collect(backend, messages=QUESTION, n=4, seed=0, top_logprobs=0, **sampling):
    """Return the candidates in order of their index."""
    prompt = await backend.render(messages)
    settings = SamplingSettings(**{"max_tokens": 24, **sampling})
    stream = backend.generate(prompt, n, settings, seed, top_logprobs=top_logprobs)
    async with asyncio.timeout(PATIENCE_S):
        candidates = [candidate async for candidate in stream]
    assert sorted(c.index for c in candidates) == list(range(n))
    return sorted(candidates, key=lambda c: c.index)


def never_ending(n_tokens=900):
    """Return settings of answers that go on until they are long."""
    return SamplingSettings(max_tokens=n_tokens, logit_bias=((2, -100.0),))
