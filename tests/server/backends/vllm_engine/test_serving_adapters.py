"""LoRA adapters through the whole server: models by name, each with its own calibration."""

from __future__ import annotations

import json

import httpx

from server import embedded
from server.app import running_app
from server.settings import load_settings
from tests.server.backends.vllm_engine.conftest import ENGINE, QUESTION, collect, until
from tests.server.fakes import Started, lexical_rewards

pytestmark = ENGINE


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
        settings, backend=Started(backend), rewards=lexical_rewards(tmp_path)
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
