"""A reward model in a vLLM engine of its own, on the real engine."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from rewards import RewardConfigError, RewardModelError, ScoringError, load_rewards
from tests.engines import needs_engine
from tests.rewards.fakes import sample

CONFIG = """\
version: 1
scorers:
  engine:
    kind: vllm_pooling
    model: m
    input: {view: chat}
    max_length: 100
    engine_args: {max-num-seqs: 8}
    outputs:
      first: {label: LABEL0}
      gap: {margin: [1, 0], sign: -1}
  local:
    kind: sequence_classifier
    model: m
    input: {view: chat}
    max_length: 100
    outputs:
      first: {label: LABEL0}
      gap: {margin: [1, 0], sign: -1}
values:
  a: {from: engine.first}
  b: {from: engine.gap}
  c: {from: local.first}
  d: {from: local.gap}
"""
SAMPLES = [sample(text) for text in ("a", "b c d", "hello there " * 3, "long text " * 40, "")]


@pytest.fixture
def folder(tiny_model, tmp_path):
    # vLLM's kernels for CPUs want heads of 32 or more.
    (tmp_path / "m").symlink_to(tiny_model("qwen2", n_labels=2, hidden_size=64))
    (tmp_path / "rewards.yaml").write_text(CONFIG)
    return tmp_path


def children(pid):
    """Return the processes below this one."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *children(int(child))]
    return found


def is_alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1][:3]
    except OSError:
        return False


class TestEngine:
    pytestmark = needs_engine

    async def test_same_scores_as_transformers_then_death_and_recovery(self, folder):
        before = set(children(os.getpid()))
        async with load_rewards(folder / "rewards.yaml", device="cpu") as suite:
            scores = await suite.score(SAMPLES)
            # float32 sums in another order; the scores are of order 1
            np.testing.assert_allclose(scores[:, :2], scores[:, 2:], rtol=1e-4, atol=1e-4)
            assert np.ptp(scores[:, 0]) > 0.1
            together = await asyncio.gather(*(suite.score([one]) for one in SAMPLES))
            np.testing.assert_allclose(np.concatenate(together), scores, rtol=1e-4, atol=1e-4)

            engine = [pid for pid in children(os.getpid()) if pid not in before]
            assert engine
            for pid in engine:
                os.kill(pid, signal.SIGKILL)
            with pytest.raises(ScoringError, match=r"scorer 'engine' .*(broke|has ended)"):
                await suite.score(SAMPLES[:1])
            # Others are served meanwhile.
            np.testing.assert_array_equal(await suite.score(SAMPLES, ["c", "d"]), scores[:, 2:])
            for _ in range(600):
                try:
                    again = await suite.score(SAMPLES)
                    break
                except ScoringError:
                    await asyncio.sleep(0.5)
            np.testing.assert_allclose(again, scores, rtol=1e-4, atol=1e-4)
            engine = [pid for pid in children(os.getpid()) if pid not in before]
        assert not [pid for pid in engine if is_alive(pid)]

    def test_it_ends_with_its_server(self, folder):
        script = textwrap.dedent("""
            import sys, time
            from pathlib import Path
            from rewards import load_rewards
            if __name__ == "__main__":
                with load_rewards(Path(sys.argv[1]), device="cpu"):
                    print("up", flush=True)
                    time.sleep(600)
        """)
        (folder / "script.py").write_text(script)
        process = subprocess.Popen(
            [sys.executable, str(folder / "script.py"), str(folder / "rewards.yaml")],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        )
        assert process.stdout.readline() == b"up\n"
        engine = children(process.pid)
        assert engine
        process.kill()
        process.wait()
        process.stdout.close()
        for pid in engine:
            wait_for_end(pid)

    def test_what_vllm_refuses(self, folder):
        path = folder / "rewards.yaml"
        path.write_text(CONFIG.replace("max-num-seqs: 8", "no-such-option: 8"))
        with pytest.raises(RewardModelError, match=r"vLLM cannot start: .*no-such-option"):
            load_rewards(path, device="cpu").__enter__()


def wait_for_end(pid):
    for _ in range(400):
        if not is_alive(pid):
            return
        signal.sigtimedwait([signal.SIGUSR2], 0.1)
    raise AssertionError(f"process {pid} is still there")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_it_says_what_to_install(folder):
    with pytest.raises(RewardModelError, match=r"vLLM is not installed; install it with pip"):
        load_rewards(folder / "rewards.yaml", device="cpu").__enter__()


def test_options_that_have_a_field(folder):
    path = folder / "rewards.yaml"
    path.write_text(CONFIG.replace("max-num-seqs: 8", "max-model-len: 8"))
    with pytest.raises(RewardConfigError, match=r"engine_args: max-model-len is set by this"):
        load_rewards(path, device="cpu")


def test_attributes_are_not_what_vllm_gives(folder):
    path = folder / "rewards.yaml"
    path.write_text(CONFIG.replace("first: {label: LABEL0}", "first: {attribute: score}", 1))
    with pytest.raises(RewardConfigError, match="vLLM gives logits and no attributes"):
        load_rewards(path, device="cpu")
