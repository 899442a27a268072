"""What ships with Palette: tiny models, their calibration, prompts, and the scripts that made them.

Everything here goes through the code that any other model goes through. Importing this package
loads nothing; ``python -m server.embedded`` makes the models anew, on two processor cores in
under an hour:

========================  =============================================================
``topics/*.yaml``         what the conversations are about, with handwritten sentences
``phrases.yaml``          what fits every topic: tones of voice, jokes, cautions, questions
``corpus.py``             puts conversations together from both
``train_chat.py``         trains the chat model on them
``train_rewards.py``      trains the reward models on them
``quality.py``            measures the models on prompts that none of them has seen
``cards.py``              writes the measurements into the model cards
========================  =============================================================
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
MODELS = FOLDER / "models"
CHAT_MODEL = MODELS / "chat"
CHAT_MODEL_NAME = "palette-mini"
#: The values that a reward model ships for; its folder in `MODELS` bears the value's name.
VALUES = ("helpful", "harmless", "humorous", "positive")
#: The values whose reward model reads the last user message together with the answer.
PAIRED = frozenset({"helpful", "harmless"})
REWARDS = FOLDER / "rewards.yaml"
CALIBRATION = FOLDER / "calibration.npz"
#: General prompts for calibrating any chat model.
PROMPTS = FOLDER / "prompts.jsonl"
