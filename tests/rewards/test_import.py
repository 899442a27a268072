from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import rewards

HEAVY = ("torch", "transformers", "tokenizers", "safetensors", "server", "solver", "fastapi")


def loaded_after(code):
    script = f"import sys\n{code}\nprint(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(rewards.__file__).parent.parent,
    )
    return done.stdout.split()


def test_importing_loads_nothing_heavy():
    assert loaded_after("import rewards") == []


def test_a_suite_without_models_loads_nothing_heavy(tmp_path):
    path = tmp_path / "rewards.yaml"
    path.write_text(
        "version: 1\nscorers: {w: {kind: lexical, measure: words}}\nvalues: {words: {from: w}}\n"
    )
    code = f"""
from pathlib import Path
from rewards import Sample, load_rewards
with load_rewards(Path({str(path)!r})) as suite:
    assert suite.score_sync([Sample((), "one two")]).tolist() == [[2.0]]
"""
    assert loaded_after(code) == []


def test_all_is_sorted_and_true():
    assert rewards.__all__ == sorted(rewards.__all__)
    assert all(hasattr(rewards, name) for name in rewards.__all__)
