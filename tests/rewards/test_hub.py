"""Models of a hub that is away: asked once, in seconds; and nothing that works is given up."""

from __future__ import annotations

import time

import huggingface_hub
import pytest
from huggingface_hub import constants

from rewards import RewardModelError, hub
from rewards.hub import REMEDY, cache_where_no_hub, offline_variables, why_missing
from rewards.models import vllm_child
from rewards.registry import load_rewards


class TransportError(Exception):
    """As the client's library calls it."""


class ConnectError(TransportError):
    pass


class ConnectTimeout(TransportError):
    pass


class ProxyError(TransportError):
    pass


class ReadTimeout(TransportError):
    pass


class RemoteProtocolError(TransportError):
    pass


class FakeHub:
    """Fails in the given ways, one after the other, and the last for good; each takes its time."""

    def __init__(self, *failures, takes_s=0.0):
        self.failures = list(failures)
        self.takes_s = takes_s
        self.asked = []
        self.now = 0.0

    def head(self, url, *, timeout):
        self.asked.append((url, timeout))
        self.now += self.takes_s
        failure = self.failures.pop(0) if len(self.failures) > 1 else self.failures[0]
        if failure is not None:
            raise failure

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def install(monkeypatch):
    def put(fake):
        monkeypatch.setattr(huggingface_hub, "get_session", lambda: fake)
        monkeypatch.setattr(constants, "ENDPOINT", "https://hub")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "time", fake_time(fake))
        return fake

    return put


def fake_time(fake):
    class Time:
        monotonic = staticmethod(lambda: fake.now)
        sleep = staticmethod(fake.sleep)

    return Time


@pytest.mark.parametrize("kind", [ConnectError, ConnectTimeout, ProxyError])
def test_where_nobody_is_the_cache_is_used(install, kind, caplog):
    fake = install(FakeHub(kind("no route")))
    with cache_where_no_hub():
        assert constants.HF_HUB_OFFLINE
        assert constants.is_offline_mode()
        assert offline_variables() == {"HF_HUB_OFFLINE": "1"}
        told = why_missing(FileNotFoundError("whatever"))
        assert (
            told == f"https://hub cannot be reached (no route), and it is not downloaded; {REMEDY}"
        )
        assert why_missing(ValueError("another fault")) is None
    assert why_missing(FileNotFoundError("later")) is None
    assert not constants.HF_HUB_OFFLINE
    assert offline_variables() == {}
    assert fake.now == 3
    assert caplog.messages == [
        "https://hub cannot be reached (no route): only models that are downloaded already are used"
    ]
    for remedy in ("folder", "HTTPS_PROXY", "HF_ENDPOINT", "HF_HUB_OFFLINE=1"):
        assert remedy in REMEDY


@pytest.mark.parametrize("failure", [None, ReadTimeout("slow"), RemoteProtocolError("odd")])
def test_a_hub_that_is_slow_or_odd_is_there(install, failure, caplog):
    fake = install(FakeHub(failure, takes_s=9.0))
    with cache_where_no_hub():
        assert not constants.HF_HUB_OFFLINE
        assert offline_variables() == {}
        assert why_missing(FileNotFoundError()) is None
    assert fake.asked == [("https://hub", constants.HF_HUB_ETAG_TIMEOUT)]
    assert not caplog.records


def test_what_fails_for_a_moment_is_there(install):
    fake = install(FakeHub(ConnectError("reset"), ConnectError("reset"), None))
    with cache_where_no_hub():
        assert not constants.HF_HUB_OFFLINE
    assert len(fake.asked) == 3


def test_who_does_not_answer_in_time_is_not_asked_again(install):
    fake = install(FakeHub(ConnectTimeout(""), takes_s=10.0))
    with cache_where_no_hub():
        assert "(ConnectTimeout)" in why_missing(FileNotFoundError())
    assert fake.now == 10


def test_inside_another_nothing_is_asked(install):
    fake = install(FakeHub(ConnectTimeout("x"), takes_s=10.0))
    with cache_where_no_hub():
        with cache_where_no_hub():
            assert constants.HF_HUB_OFFLINE
        assert constants.HF_HUB_OFFLINE
        assert offline_variables()
        assert why_missing(FileNotFoundError()) is not None
    assert len(fake.asked) == 1


def test_who_is_offline_or_needs_no_hub_asks_nothing(install, monkeypatch):
    fake = install(FakeHub(ConnectError("x")))
    with cache_where_no_hub(is_needed=False):
        assert not constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with cache_where_no_hub():
        pass
    assert constants.HF_HUB_OFFLINE
    assert fake.asked == []


def test_a_failure_inside_puts_all_back(install):
    install(FakeHub(ConnectError("x")))
    with pytest.raises(KeyError), cache_where_no_hub():
        raise KeyError
    assert not constants.HF_HUB_OFFLINE
    assert why_missing(FileNotFoundError()) is None


@pytest.fixture
def closed(monkeypatch):
    """Nobody listens at port 9; who asks again and again is found out by its sleeping."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("the hub was asked again"))


async def test_a_suite_that_needs_the_hub_fails_at_once(tmp_path, closed):
    path = tmp_path / "rewards.yaml"
    path.write_text(
        "version: 1\n"
        "scorers: {a: {kind: sequence_classifier, model: nobody/a, input: {view: text}}}\n"
        "values: {a: {from: a}}\n"
    )
    with pytest.raises(RewardModelError, match=r"127.0.0.1:9 cannot be reached.*HF_ENDPOINT"):
        await load_rewards(path, device="cpu").start()
    assert not constants.HF_HUB_OFFLINE


async def test_a_suite_that_needs_none_asks_nothing(tmp_path, closed, caplog):
    path = tmp_path / "rewards.yaml"
    path.write_text(
        "version: 1\n"
        "scorers:\n"
        "  a: {kind: sequence_classifier, model: nobody/a, input: {view: text}}\n"
        "  words: {kind: lexical, measure: words}\n"
        "values: {words: {from: words}}\n"
    )
    async with load_rewards(path, device="cpu"):
        assert not caplog.records


@pytest.mark.parametrize("is_away", [False, True])
def test_a_process_that_loads_a_model_knows_that_the_hub_is_away(install, monkeypatch, is_away):
    install(FakeHub(ConnectError("x") if is_away else None))
    seen = []

    def popen(command, *, env, **_):
        seen.append(env.get("HF_HUB_OFFLINE"))
        raise OSError("enough")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(vllm_child.importlib.util, "find_spec", lambda name: name == "vllm")
    monkeypatch.setattr(vllm_child.subprocess, "Popen", popen)
    child = vllm_child.VllmChild([], start_timeout_s=1, n_connections=1)
    with cache_where_no_hub(), pytest.raises(OSError, match="enough"):
        child.start()
    child.close()
    assert seen == ["1" if is_away else None]
