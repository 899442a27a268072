"""The licence that a model's card states: to be reported, never assumed."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

NOT_STATED = "not stated"
NO_CARD = "not known (its card is not here)"


def licence_of(model: Path | str, revision: str | None = None) -> str:
    """Return the licence by a model's card: `NOT_STATED` there, or `NO_CARD` without ``README.md``.

    Parameters
    ----------
    model : Path or str
        Model folder, or hub name. Of a hub model the card is read where it is in the local cache;
        nothing is fetched.
    revision : str or None
        Commit or tag of a hub model.
    """
    if isinstance(model, Path):
        card: Path | None = model / "README.md"
    else:
        # Only now: it comes with transformers, which a file without models does not need.
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model, "README.md", revision=revision)
        card = Path(found) if isinstance(found, str) else None
    if card is None or not card.is_file():
        return NO_CARD
    text = card.read_text(encoding="utf-8", errors="replace")
    matter = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|\Z)", text, re.S)
    try:
        fields = yaml.safe_load(matter[1]) if matter else None
    except yaml.YAMLError:
        return NOT_STATED
    if not isinstance(fields, dict):
        return NOT_STATED
    licence, name = fields.get("license"), fields.get("license_name")
    names = licence if isinstance(licence, list) else [licence]
    told = ", ".join(str(one) for one in names if one)
    if name and told in ("other", ""):
        told = str(name)
    return told or NOT_STATED
