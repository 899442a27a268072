"""What must hold of the code as a whole: ours, light to import, packaged to the last file."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("rewards", "server", "solver")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCES = [
    path
    for name in PACKAGES
    for path in sorted((ROOT / name).rglob("*.py"))
    if "__pycache__" not in path.parts
]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def python(code):
    """Run code in a process that has imported nothing yet; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_are_ours(name):
    found = Path(importlib.import_module(name).__file__).resolve()
    assert found == ROOT / name / "__init__.py"


def test_there_are_sources():
    assert len(SOURCES) > 50


# imports


@pytest.mark.parametrize(
    ("module", "banned"),
    [
        ("solver", ("torch", "transformers", "vllm", "pydantic", "fastapi", "typer", "yaml")),
        ("rewards", ("torch", "transformers", "vllm", "fastapi", "uvicorn", "typer")),
        ("server", ("torch", "transformers", "vllm", "fastapi", "uvicorn", "typer")),
        ("server.cli", ("torch", "transformers", "vllm", "fastapi", "uvicorn", "scipy.optimize")),
        ("server.jobs", ("torch", "transformers", "vllm", "uvicorn")),
        ("server.app", ("torch", "transformers", "vllm")),
    ],
)
def test_importing_loads_nothing_heavy(module, banned):
    loaded = python(f"import {module}, sys; print(*sys.modules)").split()
    assert not set(banned) & set(loaded)


def test_engine_workers_may_import_the_start_again():
    """vLLM's processes import ``__main__`` anew: that must not start a second server."""
    assert python("import server.__main__; print('quiet')") == "quiet"


@pytest.mark.parametrize("name", ["rewards", "solver"])
def test_public_names_are_sorted_and_true(name):
    module = importlib.import_module(name)
    assert list(module.__all__) == sorted(module.__all__)
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        assert getattr(module, public).__doc__ or isinstance(getattr(module, public), type)
    ours = {
        key for key, value in vars(module).items()
        if not key.startswith("_") and getattr(value, "__module__", "").split(".")[0] == name
    }  # fmt: skip
    assert ours == set(module.__all__)


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports(path):
    found = list(imports(TREES[path]))
    assert not [name for name in found if name.startswith(".")], "absolute imports only"
    tops = {name.split(".")[0] for name in found}
    assert not tops & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    package = path.relative_to(ROOT).parts[0]
    assert not tops & {"tests"}
    if package != "server":
        assert not tops & ({*PACKAGES} - {package}), "imports point one way"
    if package == "solver":
        assert not tops & {"asyncio", "torch", "pydantic", "fastapi"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_print(path):
    calls = [node.func for node in ast.walk(TREES[path]) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]


def test_only_the_settings_read_the_environment():
    readers = set()
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                readers.add(str(path.relative_to(ROOT)))
    # vLLM takes some switches of its own process from the environment only.
    assert readers <= {
        "server/settings.py",
        "server/backends/vllm_process.py",
        "server/backends/vllm_executor.py",
        "rewards/models/vllm_child.py",
    }


# packaging


def test_every_package_is_listed():
    listed = PROJECT["tool"]["setuptools"]["packages"]
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES
        if path.name == "__init__.py"
    }  # fmt: skip
    assert listed == sorted(listed)
    assert set(listed) == folders


def test_every_folder_with_code_is_a_package():
    assert all((path.parent / "__init__.py").exists() for path in SOURCES)


def test_every_package_is_typed():
    assert all((ROOT / name / "py.typed").exists() for name in PACKAGES)


def test_every_data_file_is_packaged():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    packaged = set()
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        folder = ROOT.joinpath(*package.split("."))
        for pattern in [*patterns.get("*", []), *patterns.get(package, [])]:
            packaged |= {path for path in folder.glob(pattern) if path.is_file()}
    data = {
        path
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert data - packaged == set()
    assert ROOT / "server/embedded/rewards.yaml" in packaged


def test_licence_and_readme_are_packaged():
    assert (ROOT / PROJECT["project"]["readme"]).exists()
    assert all((ROOT / name).exists() for name in PROJECT["project"]["license-files"])


def test_command_is_there():
    module, name = PROJECT["project"]["scripts"]["palette"].split(":")
    assert callable(getattr(importlib.import_module(module), name))
