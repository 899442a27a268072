"""What ships with Palette: tiny models, their calibration, prompts, and the scripts that made them.

Everything here goes through the code that any other model goes through. Importing this package
loads nothing; ``python -m server.embedded`` makes the models anew.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
MODELS = FOLDER / "models"
CHAT_MODEL = MODELS / "chat"
CHAT_MODEL_NAME = "palette-mini"
REWARDS = FOLDER / "rewards.yaml"
CALIBRATION = FOLDER / "calibration.npz"
#: General prompts for calibrating any chat model.
PROMPTS = FOLDER / "prompts.jsonl"
