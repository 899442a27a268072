"""README.md is the manual: what it shows is there, compiles, and runs."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.core import TyperGroup as Group
from typer.main import get_command

from rewards import load_rewards
from server import embedded
from server.cli import app
from server.openai_requests import ChatCompletionRequest
from server.prompts import read_prompts
from server.routes import (
    calibrations,
    chat,
    completions,
    health,
    live,
    metrics,
    models,
    palette,
    profiles,
    replay,
    tradeoffs,
)
from server.schemas import PaletteOptions
from server.settings import PREFIX, Settings
from solver import Palette

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[^>]*) -->\n+)?^```(?P<kind>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def blocks(kind, mark=None):
    found = [match for match in FENCE.finditer(README) if match["kind"] == kind]
    return [
        pytest.param(match["code"], id=f"line {README.count(chr(10), 0, match.start('code')) + 1}")
        for match in found
        if mark is None or match["mark"] == mark
    ]


# commands


@pytest.mark.parametrize("mark", ["serve command", "test command"])
def test_marked_command(mark):
    found = [param.values[0] for param in blocks("bash", mark)]
    assert len(found) == 1
    assert README.count(f"<!-- {mark} -->") == 1
    subprocess.run(["bash", "-n"], input=found[0], text=True, check=True)
    assert found[0].count("\n") == 1
    assert "docker/requirements.lock" in found[0]


def test_the_marked_commands_do_what_they_say():
    (serve,) = (param.values[0] for param in blocks("bash", "serve command"))
    (test,) = (param.values[0] for param in blocks("bash", "test command"))
    assert serve.rstrip().endswith("palette serve")
    assert "pytest" in test
    assert '".[test]"' in test


@pytest.mark.parametrize("code", blocks("bash"))
def test_bash_block_is_bash(code):
    subprocess.run(["bash", "-n"], input=code, text=True, check=True)


def commands():
    """Return every call of ``palette`` in the README, in blocks and in running text, as words."""
    texts = [param.values[0].replace("\\\n", " ") for param in blocks("bash")]
    texts += re.findall(r"`(palette [^`]+)`", README)
    found = []
    for text in texts:
        words = shlex.split(text, comments=True)
        starts = [i for i, word in enumerate(words) if re.fullmatch(r"(.*/)?palette", word)]
        for at in starts:
            ends = (i for i in range(at + 1, len(words)) if words[i] in ("&&", "||", "|", ";", "&"))
            call = words[at + 1 : next(ends, len(words))]
            found.append(pytest.param(call, id=" ".join(["palette", *call[:3]])))
    return found


@pytest.mark.parametrize("words", commands())
def test_commands_and_options_exist(words):
    command = get_command(app)
    for word in words:
        if not isinstance(command, Group):
            break
        assert word in command.commands
        command = command.commands[word]
    options = {
        name
        for parameter in command.params
        for name in [*parameter.opts, *parameter.secondary_opts]
    }
    assert {word.split("=")[0] for word in words if word.startswith("--")} <= options | {"--help"}


def test_every_command_is_shown():
    shown = {param.values[0][0] for param in commands()}
    assert shown >= set(get_command(app).commands)


# code


@pytest.mark.parametrize("code", blocks("python"))
def test_python_block_compiles(code):
    compile(code, "README.md", "exec")


@pytest.mark.parametrize("code", blocks("python", "run"))
def test_python_block_runs(code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("code", blocks("json"))
def test_json_block_is_json(code):
    json.loads(code)


@pytest.mark.parametrize("code", blocks("bash"))
def test_request_of_a_curl_is_a_request(code):
    for body in re.findall(r"-d '(\{.*?\})'", code, re.DOTALL):
        ChatCompletionRequest.model_validate_json(body)


@pytest.mark.parametrize("code", blocks("yaml"))
def test_yaml_block_is_a_rewards_file(code, tmp_path):
    path = tmp_path / "rewards.yaml"
    path.write_text(code, encoding="utf-8")
    assert len(load_rewards(path).names) == len(yaml.safe_load(code)["values"])


def test_every_target_in_the_table_is_one():
    told = README.split("| written |")[1].split("\n\n")[0]
    cells = [line.split("|")[1] for line in told.splitlines()[2:]]
    targets = [json.loads(code) for cell in cells for code in re.findall(r"`([^`]+)`", cell)]
    assert len(targets) >= 8
    for target in targets:
        Palette({"value": target})


def test_every_field_of_the_palette_is_explained():
    told = README.split("| field |")[1].split("\n\n")[0]
    cells = " ".join(line.split("|")[1] for line in told.splitlines()[2:])
    assert {*re.findall(r"`(\w+)`", cells), "targets"} == set(PaletteOptions.model_fields)


def test_routes_are_there():
    told = README.split("| route |")[1].split("\n\n")[0]
    listed = {path.split("[")[0] for path in re.findall(r"(/[\w/]+)", told)}
    served = {"/docs"}
    for module in (
        chat, completions, health, live, metrics, models, palette, profiles, replay,
        calibrations, tradeoffs,
    ):  # fmt: skip
        served |= {route.path.split("/{")[0] for route in module.router.routes}
    assert served <= listed


def test_files_of_the_tree_are_there():
    tree = README.split("### The tree")[1].split("```")[1]
    folder = ROOT
    for line in tree.strip().splitlines():
        if not line.startswith(" "):
            folder = ROOT / line.split()[0]
            assert folder.is_dir(), line
        for name in re.findall(r"(?:^  |;  )([\w.]+(?:/|\.py))", line):
            assert (folder / name).exists(), line


def test_number_of_general_prompts():
    assert f"{len(read_prompts(embedded.PROMPTS))} general prompts" in README.replace("\n", " ")


def test_links_to_files_lead_somewhere():
    targets = set(re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README))
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_links_inside_lead_somewhere():
    headings = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors


# settings


def rows():
    """Return the settings table: variable -> (default, meaning)."""
    found = re.findall(rf"^\| `({PREFIX}\w+)` \| (.*?) \| (.*) \|$", README, re.MULTILINE)
    return {name: (default.strip("`"), meaning) for name, default, meaning in found}


def test_table_has_every_setting_and_no_other():
    assert list(rows()) == [f"{PREFIX}{name.upper()}" for name in Settings.model_fields]


def test_variables_in_the_text_are_settings():
    assert set(re.findall(rf"\b{PREFIX}[A-Z_]+\b", README)) <= set(rows())


@pytest.mark.parametrize("name", Settings.model_fields)
def test_table_says_what_the_code_says(name):
    field = Settings.model_fields[name]
    told, meaning = rows()[f"{PREFIX}{name.upper()}"]
    assert meaning == field.description
    default = field.default
    if isinstance(default, bool):
        assert told == str(default).lower()
    elif default is None:
        assert told == "none"
    elif isinstance(default, int | float | str) and not Path(str(default)).is_absolute():
        assert told == str(default)


# changelog


def test_newest_changelog_entry_is_the_version():
    newest = re.search(r"^## \[?([^\s\]]+)\]?", CHANGELOG, re.MULTILINE)
    assert newest[1] == PROJECT["version"]


def test_changelog_is_newest_first():
    entries = re.findall(
        r"^## \[?(\d+)\.(\d+)\.(\d+)\]? - (\d{4}-\d{2}-\d{2})$", CHANGELOG, re.MULTILINE
    )
    versions = [tuple(map(int, entry[:3])) for entry in entries]
    assert len(entries) == len(re.findall(r"^## ", CHANGELOG, re.MULTILINE))
    assert versions == sorted(versions, reverse=True)
    assert [entry[3] for entry in entries] == sorted((entry[3] for entry in entries), reverse=True)
