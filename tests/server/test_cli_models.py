"""The commands that load a model, on the shipped chat model with rewards that need none.

What signals do is seen in processes; everything else runs in this one, where torch is loaded.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from server import embedded
from server.calibration import load_calibration, system_of
from tests.server.commands import palette

MESSAGES = [{"role": "user", "content": "What can I cook with rice?"}]
PALETTE = json.dumps({"targets": {"words": {"gain": 0.3}}, "candidates": 4})
N_PROMPTS = 16
N_MANY = 100
# Ends before a machine is called hung, long after a loaded one is done.
PATIENCE_S = 240


@pytest.fixture(autouse=True)
def _environment(monkeypatch, _clean_environment, rewards_file):
    monkeypatch.setenv("PALETTE_REWARDS", str(rewards_file))
    monkeypatch.setenv("PALETTE_MAX_TOKENS", "16")
    monkeypatch.setenv("PALETTE_TORCH_THREADS", "1")


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "server", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def ending(process):
    """Give the process; it does not outlive the test."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def address(process):
    """Return the server's address once it has told it, and what else it told until then."""
    said = []
    for line in process.stderr:
        said.append(line)
        found = re.search(r"at (http://127\.0\.0\.1:\d+)", line)
        if found:
            return found[1], said
    raise AssertionError("".join(said))


def chat(url, **fields):
    body = {"model": "palette-mini", "messages": MESSAGES, **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=PATIENCE_S)


# serve, as a process


def test_serve_starts_answers_and_stops():
    with ending(start("serve", "--port", 0, "--no-calibrate")) as process:
        url, said = address(process)
        said += [process.stderr.readline() for _ in range(6)]
        assert httpx.get(f"{url}/ready", timeout=PATIENCE_S).json()["status"] == "ready"
        plain = chat(url, seed=1)
        assert plain.status_code == 200
        answer = plain.json()["choices"][0]["message"]["content"]
        assert answer
        wanted = {"targets": {"words": {"gain": 0.5}}, "scope": "answer", "candidates": 4}
        assert chat(url, seed=1, palette=wanted).json()["palette"]["status"] == "met"
        values = httpx.get(f"{url}/v1/palette/values", timeout=PATIENCE_S).json()["values"]
        process.send_signal(signal.SIGTERM)
        out, rest = process.communicate(timeout=30)
    example = json.loads(re.search(r"-d '(\{.*?\})'\n", "".join(said), re.DOTALL)[1])
    assert list(example["palette"]["targets"]) == [value["name"] for value in values[:2]]
    assert process.returncode == 0
    assert out == ""
    told = "".join(said) + rest
    assert "Traceback" not in told
    # Logs hold no prompts and no answers; the example on the screen is neither.
    assert MESSAGES[0]["content"] not in told
    assert answer not in told


def test_busy_server_stops_too():
    """It calibrates, and a client waits for an answer that takes its time."""
    command = ["serve", "--port", 0, "--max-tokens", 900, "--max-candidates", 64]
    with ending(start(*command)) as process:
        url, _ = address(process)
        ready = httpx.get(f"{url}/ready", timeout=PATIENCE_S).json()
        assert ready["calibration"]["background"]["state"] == "running"
        body = json.dumps({"model": "palette-mini", "messages": MESSAGES, "n": 64, "stream": True})
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json"
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as client:
            client.sendall(f"{head}\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
            process.send_signal(signal.SIGINT)
            _, rest = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in rest
    left = [path for path in Path(os.environ["PALETTE_STATE_DIR"]).rglob("*") if path.is_file()]
    assert [path.name.partition(".npz")[2] for path in left] == [".partial"]


# serve, where it does not start


def one_line(result, *words):
    lines = result.stderr.splitlines()
    assert result.exit_code == 1, result.stderr
    assert result.stdout == ""
    for word in words:
        assert word in result.stderr
    assert [line.split(": ")[0] for line in lines] == ["Palette", "palette"]


def test_serve_without_a_model(tmp_path):
    one_line(palette("serve", "--model", tmp_path / "nowhere"), str(tmp_path / "nowhere"))


def test_serve_with_a_damaged_model(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for path in embedded.CHAT_MODEL.iterdir():
        data = path.read_bytes()
        is_cut = path.suffix == ".safetensors"
        (model / path.name).write_bytes(data[: len(data) // 2] if is_cut else data)
    one_line(palette("serve", "--model", model), str(model))


def test_serve_with_a_damaged_calibration(tmp_path):
    path = tmp_path / "mine.npz"
    path.write_bytes(b"PK\x03\x04")
    one_line(palette("serve", "--calibration", path), str(path), "palette calibrate")


def test_serve_with_a_palette_of_unknown_values():
    told = palette("serve", "--palette", json.dumps({"targets": {"wrods": "keep"}}))
    one_line(told, "wrods", "words, variety")


def test_serve_with_rewards_that_are_none(tmp_path):
    path = tmp_path / "values.yaml"
    path.write_text("hello")
    told = palette("serve", "--rewards", path)
    assert told.exit_code == 1
    assert str(path) in told.stderr
    assert "Traceback" not in told.stderr


def test_serve_on_a_port_in_use(caplog):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        told = palette("serve", "--no-calibrate", "--port", taken.getsockname()[1])
    assert told.exit_code == 1
    assert "in use" in caplog.text + told.stderr


# calibrate, solve, generate and serve, one after another


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with prompts."""
    folder = tmp_path_factory.mktemp("calibrated")
    lines = embedded.PROMPTS.read_text(encoding="utf-8").splitlines()[: N_PROMPTS + 2]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def calibration(folder):
    """Return the file of a small calibration, made by the command when it is first needed."""
    path = folder / "calibration.npz"
    if not path.exists():
        told = palette(
            "calibrate", "--prompts", folder / "prompts.jsonl", "--candidates", 4,
            "--limit", N_PROMPTS, "--out", path,
        )  # fmt: skip
        assert told.exit_code == 0, told.stderr
        assert told.stdout == ""
        made = load_calibration(path).id
        assert told.stderr == f"calibration {made} written to {path}\n"
    return path


def test_solve_on_the_calibration(calibration):
    told = palette(
        "solve", "--pilot", calibration, "--targets", '{"words": {"gain": 0.3}}',
        "--candidates", 4, "--json",
    )  # fmt: skip
    assert told.exit_code == 0
    found = json.loads(told.stdout)
    assert found["status"] == "optimal"
    assert found["values"] == ["words", "variety", "log_likelihood"]


def test_calibrate_is_reproducible(folder, calibration):
    again = folder / "again.npz"
    told = palette(
        "calibrate", "--prompts", folder / "prompts.jsonl", "--candidates", 4,
        "--limit", N_PROMPTS, "--out", again, "--concurrency", 1,
    )  # fmt: skip
    assert told.exit_code == 0
    targets = '{"words": {"gain": 0.3}}'
    first, second = (
        json.loads(
            palette(
                "solve", "--pilot", path, "--targets", targets, "--candidates", 4, "--json"
            ).stdout
        )
        for path in (calibration, again)
    )
    assert first["multipliers"]["words"] == pytest.approx(second["multipliers"]["words"], rel=1e-3)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_calibrate_stopped_and_continued_loses_nothing(folder, tmp_path, sent):
    """One prompt at a time, so that sums are rounded alike: the bytes are the same."""
    out, whole = tmp_path / "out.npz", folder / "whole.npz"
    command = ["calibrate", "--limit", 48, "--candidates", 4, "--concurrency", 1, "--out"]
    if not whole.exists():
        assert palette(*command, whole).exit_code == 0
    partial = tmp_path / "out.npz.partial"
    with ending(start(*command, out)) as process:
        while process.poll() is None:
            if partial.exists() and partial.read_bytes().count(b"\n") > 3:
                process.send_signal(sent)
                break
            time.sleep(0.002)
        _, err = process.communicate(timeout=PATIENCE_S)
    n_kept = partial.read_bytes().count(b"\n") - 1
    assert 2 < n_kept < 48
    assert not out.exists()
    assert process.returncode == (-signal.SIGKILL if sent == signal.SIGKILL else 130)
    assert "Traceback" not in err
    assert palette(*command, out).exit_code == 0
    assert not partial.exists()
    one, other = load_calibration(out), load_calibration(whole)
    assert one.pilot.rewards.tobytes() == other.pilot.rewards.tobytes()
    assert one.info.systems == other.info.systems
    assert one.info.longest_answer_tokens == other.info.longest_answer_tokens
    assert one.info.chat_template is not None


def test_calibrate_for_a_system_prompt(folder, tmp_path):
    """Requests with that system prompt, and no others, get it."""
    file = tmp_path / "system.txt"
    file.write_text("You are terse.\n")
    common = ["calibrate", "--prompts", folder / "prompts.jsonl", "--candidates", 4]
    assert palette(*common).exit_code == 0
    told = palette(*common, "--system-file", file, "--name", "terse", "--seed", 1)
    assert told.exit_code == 0, told.stderr
    kept = sorted((tmp_path / "state" / "calibrations").glob("*.npz"))
    infos = [load_calibration(path).info for path in kept]
    assert len(kept) == 2
    terse = system_of([{"role": "system", "content": "You are terse."}])
    assert {info.name: terse in info.systems for info in infos} == {None: False, "terse": True}
    assert next(info for info in infos if info.name).systems == {terse: N_PROMPTS + 2}
    wanted = {"targets": {"words": {"gain": 0.1}}, "candidates": 4}
    with ending(start("serve", "--port", 0, "--no-calibrate")) as process:
        url, _ = address(process)
        there = httpx.get(f"{url}/v1/palette/calibrations", timeout=PATIENCE_S).json()
        by_name = {one["name"]: one["id"] for one in there["calibrations"]}
        plain = chat(url, palette=wanted).json()["palette"]["calibration"]
        system = [{"role": "system", "content": "You are terse."}, *MESSAGES]
        for_it = chat(url, messages=system, palette=wanted).json()["palette"]["calibration"]
        named = wanted | {"calibration": "terse"}
        asked = chat(url, palette=named).json()["palette"]["calibration"]
    assert (plain["id"], plain["warnings"]) == (by_name[None], [])
    assert (for_it["id"], for_it["warnings"]) == (by_name["terse"], [])
    assert asked["id"] == by_name["terse"]
    assert "this conversation has none" in asked["warnings"][0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--prompts", "a.jsonl", "--dataset", "b/c"], "two sources"),
        (["--system", "a", "--system-file", "b"], "the same thing"),
        (["--system-file", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--name", "a b"], "--name is"),
        (["--name", "../up"], "--name is"),
    ],
)
def test_calibrate_with_options_that_make_no_sense(options, told):
    found = palette("calibrate", *options)
    assert found.exit_code == 2
    assert told in found.stderr
    assert found.stderr.count("\n") == 1


def test_calibrate_with_too_few_prompts(folder):
    out = folder / "few.npz"
    told = palette("calibrate", "--prompts", folder / "prompts.jsonl", "--limit", 3, "--out", out)
    assert told.exit_code == 1
    assert told.stderr.startswith("palette: only 3 of 3 prompts are usable")
    assert not out.exists()


def records(path):
    """Return what must not depend on interruptions, in order: no times, and no last digits.

    Which prompts are decoded side by side does depend on them, and with it how sums are rounded.
    """
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for record in found:
        report = record.pop("palette")
        record["words"] = report["realised"]["words"]
        record["multiplier"] = report["multipliers"]["words"]
        record["calibration"] = report["calibration"]
    return sorted(found, key=lambda record: record["index"])


def test_generate_stopped_and_continued_loses_nothing(folder, calibration):
    whole, out, prompts = folder / "whole.jsonl", folder / "out.jsonl", folder / "many.jsonl"
    # So many that a fast machine is not done before the signal arrives.
    lines = embedded.PROMPTS.read_text(encoding="utf-8").splitlines()[:N_MANY]
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = ["generate", prompts, "--palette", PALETTE]
    command += ["--calibration", calibration, "--concurrency", 2, "--out"]
    assert palette(*command, whole).exit_code == 0
    assert len(records(whole)) == N_MANY
    with ending(start(*command, out)) as process:
        while process.poll() is None:
            if out.exists() and out.read_bytes().count(b"\n") > 1:
                process.send_signal(signal.SIGINT)
                break
            time.sleep(0.002)
        _, err = process.communicate(timeout=PATIENCE_S)
    n_kept = out.read_bytes().count(b"\n")
    assert 1 < n_kept < N_MANY
    assert process.returncode == 130
    assert err == "palette: stopped; what was written is whole, run the same command to continue\n"
    assert palette(*command, out).exit_code == 0
    assert records(out) == records(whole)


def test_generate_infeasible(folder, calibration):
    told = palette(
        "generate", folder / "prompts.jsonl", "--out", folder / "none.jsonl", "--palette",
        '{"targets": {"words": {"at_least": 500}}, "candidates": 4}', "--calibration", calibration,
    )  # fmt: skip
    assert told.exit_code == 3
    assert told.stderr.startswith("palette: no choice among")
    assert told.stderr.count("\n") == 1


def test_generate_into_another_file_is_refused(folder, calibration):
    out = folder / "letter.txt"
    out.write_text("Dear Sir")
    told = palette("generate", folder / "prompts.jsonl", "--out", out)
    assert told.exit_code == 2
    assert out.read_text() == "Dear Sir"


def test_generate_says_how_many_could_not_be_answered(folder):
    prompts = folder / "long.jsonl"
    prompts.write_text(json.dumps("word " * 5000) + '\n"Hi"\n')
    out = folder / "long.out.jsonl"
    for _ in range(2):
        told = palette("generate", prompts, "--out", out)
        assert told.exit_code == 1
        assert told.stderr.startswith("palette: 1 prompts could not be answered")
    assert len(out.read_text().splitlines()) == 2


# the shipped rewards


def test_score_with_the_shipped_rewards(monkeypatch, tmp_path):
    monkeypatch.delenv("PALETTE_REWARDS")
    path = tmp_path / "answers.jsonl"
    record = {"messages": MESSAGES, "answer": "Fry it with egg, peas and a little soy sauce."}
    path.write_text(json.dumps(record) + "\n")
    told = palette("score", path)
    assert told.exit_code == 0, told.stderr
    rewards = json.loads(told.stdout)["rewards"]
    assert set(rewards) == {*embedded.VALUES, "words", "lexical_diversity"}
    assert rewards["words"] == 10
