"""Adapters are models of their own: their names, their answers, their calibrations; one queue."""

from __future__ import annotations

import asyncio
import json

import pytest

from server import embedded
from server.backends.choice import make_backend
from server.calibration import load_calibration
from server.settings import SettingsError, load_settings
from tests.server.conftest import chat_body, run_fake
from tests.server.fakes import FakeBackend
from tests.server.waiting import until

SHORT = {"targets": {"words": {"at_most": 8}}, "candidates": 4}
FEATURES = frozenset({"top_k", "logprobs", "raw_prompts"})


class Adapted(FakeBackend):
    """A fake model with two adapters, which answer otherwise than it does."""

    def __init__(self, **options):
        super().__init__(features=FEATURES, **options)
        self.made = [Adapter(name, number) for number, name in enumerate(("loud", "team/shy"), 1)]

    @property
    def adapters(self):
        return tuple(self.made)


class Adapter(FakeBackend):
    def __init__(self, name, number):
        super().__init__(features=FEATURES)
        self.model_id, self.fingerprint, self.number = name, str(number) * 64, number

    def generate(self, prompt, n_candidates, sampling, seed, **options):
        return super().generate(prompt, n_candidates, sampling, seed + self.number, **options)


@pytest.fixture
async def adapted(tmp_path, settings):
    async with run_fake(tmp_path, settings, Adapted()) as found:
        yield found


async def ask(running, model, **body):
    return await running.client.post(
        "/v1/chat/completions", json=chat_body(**body) | {"model": model}
    )


async def test_models_are_listed_with_their_parent(adapted):
    listed = (await adapted.client.get("/v1/models")).json()["data"]
    told = [(model["id"], model.get("parent")) for model in listed]
    assert told == [("fake", None), ("loud", "fake"), ("team/shy", "fake")]
    for model in listed:
        assert (await adapted.client.get(f"/v1/models/{model['id']}")).json() == model
    unknown = await adapted.client.get("/v1/models/nobody")
    assert unknown.status_code == 404
    assert "`loud`" in unknown.json()["error"]["message"]


@pytest.mark.parametrize("name", ["fake", "loud", "team/shy"])
async def test_a_model_answers_by_its_name(adapted, name):
    backends = {"fake": adapted.backend, **{one.model_id: one for one in adapted.backend.made}}
    answer = await ask(adapted, name, seed=7)
    assert answer.status_code == 200
    assert answer.json()["model"] == name
    assert answer.json()["system_fingerprint"] == f"fp_{backends[name].fingerprint[:12]}"
    text = await adapted.client.post(
        "/v1/completions", json={"model": name, "prompt": "Once", "seed": 7}
    )
    assert text.json()["model"] == name
    assert {which: len(one.asked) for which, one in backends.items()} == {
        which: 2 * (which == name) for which in backends
    }


async def test_answers_differ_between_models(adapted):
    answers = [(await ask(adapted, name, seed=7)).json() for name in ("fake", "loud", "team/shy")]
    assert len({one["choices"][0]["message"]["content"] for one in answers}) == 3


async def test_each_has_its_own_calibration(adapted):
    assert (await ask(adapted, "fake", palette=SHORT)).status_code == 200
    refused = await ask(adapted, "loud", palette=SHORT)
    assert refused.json()["error"]["code"] == "calibration_missing"
    by_itself = SHORT | {"scope": "answer", "on_infeasible": "best_effort"}
    assert (await ask(adapted, "loud", palette=by_itself)).status_code == 200


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("values", None),
        ("interference", None),
        ("solve", {"palette": SHORT}),
        ("frontier", {"values": ["words", "variety"]}),
        ("spread", {"palettes": 2}),
        ("negotiate", {"parties": [{"name": "one", "targets": SHORT["targets"]}]}),
    ],
)
async def test_palette_routes_take_a_model(adapted, route, body):
    context = adapted.context
    loud = context.aligners["loud"]
    loud.calibration = await asyncio.to_thread(other_calibration, context.aligner.calibration)

    async def told(**model):
        url = f"/v1/palette/{route}"
        if body is None:
            found = await adapted.client.get(url, params=model)
        else:
            found = await adapted.client.post(url, json=body | model)
        return found

    def id_of(answer):
        found = answer.json()["calibration"]
        return found["id"] if route == "values" else found

    assert id_of(await told()) == context.aligner.calibration.id
    assert id_of(await told(model="fake")) == context.aligner.calibration.id
    assert id_of(await told(model="loud")) == loud.calibration.id != context.aligner.calibration.id
    assert (await told(model="nobody")).status_code == 404


def other_calibration(calibration):
    pilot = calibration.pilot
    rewards = pilot.rewards[: len(pilot.rewards) // 2]
    return type(calibration)(type(pilot)(rewards, pilot.values), calibration.info)


async def test_the_server_calibrates_all_of_them(tmp_path, settings, monkeypatch):
    path = tmp_path / "general.jsonl"
    path.write_text("".join(json.dumps(f"Question {i}") + "\n" for i in range(20)))
    monkeypatch.setattr(embedded, "PROMPTS", path)
    ours = settings.model_copy(update={"calibrate_at_start": True, "calibration_candidates": 8})
    backend = Adapted(hold=True)
    async with run_fake(tmp_path, ours, backend, is_calibrated=False) as running:
        await until(lambda: backend.n_started > 0)
        # One after the other.
        assert [one.n_started for one in backend.made] == [0, 0]
        backend.released.set()
        progress = running.context.progress
        await until(lambda: progress["team/shy"].state == "done")
        told = (await running.client.get("/ready")).json()
        ids = [told["calibration"]["id"]]
        ids += [told["adapter_calibrations"][name]["id"] for name in ("loud", "team/shy")]
        assert len(set(ids)) == 3
        for aligner, kept in zip(running.context.aligners.values(), ids, strict=True):
            (held,) = aligner.shelf.held
            assert load_calibration(held.path).id == kept
            report = (await ask(running, aligner.backend.model_id, palette=SHORT)).json()
            assert report["palette"]["calibration"]["id"] == kept
            assert report["palette"]["calibration"]["valid"]
    # The next start finds them.
    async with run_fake(tmp_path, ours, Adapted(), is_calibrated=False) as running:
        assert [one.calibration.id for one in running.context.aligners.values()] == ids
        assert running.backend.n_started == 0


async def test_the_named_calibration_is_the_models_alone(adapted, tmp_path, settings):
    file = tmp_path / "named.npz"
    adapted.context.aligner.calibration.save(file)
    ours = settings.model_copy(update={"calibration": file})
    async with run_fake(tmp_path, ours, Adapted(), is_calibrated=False) as running:
        found = {name: one.calibration for name, one in running.context.aligners.items()}
    assert found["fake"] is not None
    assert found["loud"] is None


async def test_one_queue_for_all_models(tmp_path, settings):
    small = settings.model_copy(update={"max_running": 1, "max_queue": 1})
    async with run_fake(tmp_path, small, Adapted(hold=True)) as running:
        first = asyncio.create_task(ask(running, "fake"))
        await until(lambda: running.backend.n_started == 1)
        second = asyncio.create_task(ask(running, "loud"))
        await until(lambda: running.context.aligner.admission.n_waiting == 1)
        assert (await ask(running, "team/shy")).status_code == 429
        running.backend.released.set()
        assert [(await one).status_code for one in (first, second)] == [200, 200]


def test_adapters_need_vllm_and_names_of_their_own():
    with pytest.raises(SettingsError, match=r"\(loud\) need vLLM, and the backend is hf_local"):
        make_backend(load_settings(backend="hf_local", lora={"loud": "/x"}))
    with pytest.raises(SettingsError, match="m is the name of the model and of a LoRA adapter"):
        make_backend(load_settings(backend="vllm_engine", model_name="m", lora={"m": "/x"}))
