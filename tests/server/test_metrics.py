"""What is counted is what happened, under labels that no client can multiply."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.backends.base import BackendError
from tests.server.conftest import chat_body, run_fake
from tests.server.fakes import FakeBackend
from tests.server.test_disconnect import connect, leave, listening
from tests.server.waiting import until

SHORT = {"targets": {"words": {"at_most": 8.0}}, "candidates": 4}
CHAT = "/v1/chat/completions"


async def scrape(running):
    """Return (name, labels) -> value, as Prometheus reads it."""
    reply = await running.client.get("/metrics")
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
    }


def value(found, name, **labels):
    return found.get((name, frozenset(labels.items())), 0)


async def test_requests_by_route_and_status(running):
    await running.chat()
    await running.chat(stream=True)
    await running.chat(n=0)
    await running.client.get("/v1/models/fake")
    found = await scrape(running)
    name = "palette_http_requests_total"
    assert value(found, name, method="POST", route=CHAT, status="200") == 2
    assert value(found, name, method="POST", route=CHAT, status="400") == 1
    assert value(found, name, method="GET", route="/v1/models/{name:path}", status="200") == 1
    assert value(found, "palette_http_request_seconds_count", route=CHAT) == 3
    assert value(found, "palette_errors_total", code="invalid_value") == 1


async def test_tokens_candidates_and_stages(running):
    usages = [
        (await running.chat(palette=SHORT, n=2, seed=seed)).json()["usage"] for seed in range(3)
    ]
    bare = (await running.chat()).json()["usage"]
    found = await scrape(running)
    spent = sum(usage["completion_tokens"] for usage in [*usages, bare])
    rejected = sum(
        usage["completion_tokens_details"]["rejected_prediction_tokens"] for usage in usages
    )
    name = "palette_tokens_total"
    assert value(found, name, kind="generated") == spent
    assert value(found, name, kind="served") == spent - rejected
    assert value(found, name, kind="prompt") == sum(u["prompt_tokens"] for u in [*usages, bare])
    assert value(found, "palette_candidates_total", kind="generated") == 13
    assert value(found, "palette_candidates_total", kind="served") == 7
    for stage, count in (("queue", 4), ("generate", 4), ("total", 4), ("solve", 3), ("score", 3)):
        assert value(found, "palette_stage_seconds_count", stage=stage) == count
    total = value(found, "palette_stage_seconds_sum", stage="total")
    assert 0 < value(found, "palette_stage_seconds_sum", stage="generate") < total


async def test_palettes_ess_and_kl(running):
    reports = [
        (await running.chat(palette=SHORT, seed=seed)).json()["palette"] for seed in range(5)
    ]
    await running.chat(palette=SHORT | {"report": "none"})
    await running.chat()
    far = {"targets": {"words": {"at_most": 0.5}}, "candidates": 4}
    assert (await running.chat(palette=far)).status_code == 422
    await running.chat(palette=far | {"on_infeasible": "repair"})
    await running.chat(palette=far | {"on_infeasible": "best_effort"})
    found = await scrape(running)
    name = "palette_palettes_total"
    assert value(found, name, status="met") == 6
    assert value(found, name, status="none") == 1
    assert value(found, name, status="repaired") == 1
    assert value(found, name, status="best_effort") == 1
    assert value(found, "palette_errors_total", code="palette_infeasible") == 1
    assert value(found, "palette_ess_count") == value(found, "palette_kl_nats_count") == 8
    assert value(found, "palette_ess_sum") >= sum(report["ess"] for report in reports)


async def test_solves_by_origin_and_verdict(running):
    far = {"targets": {"words": {"at_most": 0.5}}, "candidates": 4}
    for palette in (SHORT, SHORT, SHORT | {"targets": {"words": {"at_most": 7.5}}}, far):
        await running.chat(palette=palette)
    found = await scrape(running)
    name = "palette_solves_total"
    assert value(found, name, origin="cold", verdict="optimal") == 1
    assert value(found, name, origin="cached", verdict="optimal") == 1
    assert value(found, name, origin="warm", verdict="optimal") == 1
    assert sum(v for (n, labels), v in found.items() if n == name) == 4
    assert [dict(labels) for n, labels in found if n == name][-1]["verdict"] == "infeasible"


async def test_what_runs_and_waits(tmp_path, settings):
    backend = FakeBackend(hold=True)
    small = settings.model_copy(update={"max_running": 2, "max_queue": 1})
    async with run_fake(tmp_path, small, backend) as running:
        waiting = [asyncio.create_task(running.chat()) for _ in range(3)]
        await until(lambda: running.context.aligner.admission.n_waiting == 1)
        assert (await running.chat()).status_code == 429
        found = await scrape(running)
        assert value(found, "palette_requests_running") == 2
        assert value(found, "palette_requests_waiting") == 1
        assert value(found, "palette_http_requests_in_progress") == 4  # and the scrape itself
        assert value(found, "palette_errors_total", code="queue_full") == 1
        backend.released.set()
        await asyncio.gather(*waiting)
        found = await scrape(running)
        assert value(found, "palette_requests_running") == 0
        assert value(found, "palette_http_requests_in_progress") == 1


async def test_states(running):
    found = await scrape(running)
    assert value(found, "palette_engine_state", state="ok") == 1
    assert value(found, "palette_engine_state", state="stopped") == 0
    assert value(found, "palette_calibrated") == 1
    assert value(found, "palette_draining") == 0
    assert value(found, "palette_reward_up", scorer="words") == 1
    await running.chat(palette=SHORT)
    before, found = found, await scrape(running)
    name = "palette_reward_texts_total"
    assert value(found, name, scorer="words") - value(before, name, scorer="words") == 4
    await running.backend.close()
    running.context.drain.begin(30)
    found = await scrape(running)
    assert value(found, "palette_engine_state", state="ok") == 0
    assert value(found, "palette_engine_state", state="stopped") == 1
    assert value(found, "palette_draining") == 1


async def test_errors_inside_a_stream_are_counted(running):
    running.backend.failure = BackendError("broke")
    await running.chat(stream=True)
    found = await scrape(running)
    assert value(found, "palette_errors_total", code="generation_failed") == 1


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_clients_that_leave_are_told_apart(tmp_path, settings, stream):
    backend = FakeBackend(hold=True)
    async with listening(tmp_path, settings, backend) as (running, port):
        _, writer = await connect(port, chat_body(stream=stream))
        await until(lambda: backend.n_started == 1)
        await leave(writer)
        await until(lambda: running.context.drain.n_running == 0)
        found = await scrape(running)
    name = "palette_http_requests_total"
    assert value(found, name, method="POST", route=CHAT, status="499") == 1
    assert value(found, name, method="POST", route=CHAT, status="200") == 0


async def test_clients_cannot_add_labels(running):
    first = await scrape(running)
    labels = {}
    for turn in range(2):
        for i in range(50 * turn, 50 * (turn + 1)):
            for path in (f"/x{i}", f"/v1/models/x{i}", f"/v1/x{i}/y"):
                await running.client.request(f"M{i}", path)
                await running.client.get(path, headers={"x-request-id": f"id{i}"})
            body = chat_body(model=f"m{i}", user=f"u{i}", metadata={f"k{i}": "v"})
            await running.client.post(CHAT, json=body)
            await running.chat(palette={"targets": {f"v{i}": "keep"}})
        labels[turn] = set(await scrape(running))
    assert labels[0] == labels[1]
    assert labels[0] > set(first)


async def test_apps_count_apart(tmp_path, settings, running):
    folder = tmp_path / "other"
    folder.mkdir()
    async with run_fake(folder, settings) as other:
        await other.chat()
        counted = [
            value(await scrape(one), "palette_candidates_total", kind="served")
            for one in (running, other)
        ]
    assert counted == [0, 1]


@pytest.mark.parametrize("accept", ["*/*", "application/openmetrics-text; version=x", "text/html"])
async def test_one_format_whatever_is_asked(running, accept):
    reply = await running.client.get("/metrics", headers={"accept": accept})
    assert reply.status_code == 200
