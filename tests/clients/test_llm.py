"""The `llm` command line on our server, as its manual says: a file names the model and the key.

It has no way to send a palette: the operator's default is what it gets. Its log keeps the report
of answers that were not streamed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("llm", reason="llm is not installed")

import yaml

from server import embedded
from tests.clients.servers import FAR, KEY, MODEL, SHORT
from tests.server.fakes import WORDS


@pytest.fixture
def home(tmp_path):
    (tmp_path / "keys.json").write_text(json.dumps({"palette": KEY}))
    return tmp_path


def llm(home, base_url, *words, model=MODEL, key=None):
    """Run `llm`; return what it printed and what it complained of."""
    about = {
        "model_id": "ours", "model_name": model, "api_base": base_url, "api_key_name": "palette",
        "supports_schema": True, "supports_tools": True,
    }  # fmt: skip
    (home / "extra-openai-models.yaml").write_text(yaml.safe_dump([about]))
    command = Path(sys.executable).with_name("llm")
    found = str(command) if command.exists() else shutil.which("llm")
    done = subprocess.run(
        [found, *words, *(["--key", key] if key else [])],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "LLM_USER_PATH": str(home)},
    )
    return done


def test_a_model(home, real_url):
    asked = ["-m", "ours", "How do I keep my houseplants alive?", "-o", "seed", "5"]
    name = embedded.CHAT_MODEL_NAME
    streamed, again = (llm(home, real_url, *asked, model=name) for _ in range(2))
    whole = llm(home, real_url, *asked, "--no-stream", model=name)
    assert streamed.returncode == 0, streamed.stderr
    assert len(streamed.stdout.split()) > 3
    assert streamed.stdout == again.stdout == whole.stdout


def test_the_operators_palette_is_served_and_logged(home, serve):
    served = serve(default_palette=SHORT)
    done = llm(home, served.base_url, "-m", "ours", "hi", "--no-stream", "--usage")
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= set(WORDS)
    assert "rejected_prediction_tokens" in done.stderr
    logged = llm(home, served.base_url, "logs", "--json", "-n", "1")
    (entry,) = json.loads(logged.stdout)
    assert entry["response_json"]["palette"]["status"] == "met"


def test_a_conversation_goes_on(home, able):
    assert llm(home, able.base_url, "-m", "ours", "hi", "-s", "Be brief.").returncode == 0
    assert llm(home, able.base_url, "-c", "and then?").returncode == 0
    asked = able.inside(lambda: able.backend.asked[-1][0])
    roles = [message["role"] for message in asked.messages]
    assert roles == ["system", "user", "assistant", "user"]


def test_a_schema(home, able):
    schema = {"type": "object", "properties": {"word": {"type": "string"}}}
    done = llm(home, able.base_url, "-m", "ours", "hello", "--schema", json.dumps(schema))
    assert json.loads(done.stdout) == {"word": "hello"}


def test_a_tool(home, able):
    code = "def double(number: int) -> int:\n    return 2 * number\n"
    done = llm(home, able.base_url, "-m", "ours", "Double 21.", "--functions", code, "--td")
    assert done.returncode == 0, done.stderr
    assert "42" in done.stderr
    assert set(done.stdout.split()) <= set(WORDS)


@pytest.mark.parametrize("words", [[], ["--no-stream"]], ids=["stream", "plain"])
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"key": "sk-wrong"}, "key sent is not valid"),
        ({"model": "gpt-9"}, "does not exist here"),
    ],
    ids=["401", "404"],
)
def test_errors_are_told_in_words(home, able, words, fields, says):
    done = llm(home, able.base_url, "-m", "ours", "hi", *words, **fields)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [[], ["--no-stream"]], ids=["stream", "plain"])
def test_a_palette_out_of_reach(home, serve, words):
    done = llm(home, serve(default_palette=FAR).base_url, "-m", "ours", "hi", *words)
    assert done.returncode == 1
    assert "no choice among 4 candidates" in done.stderr
