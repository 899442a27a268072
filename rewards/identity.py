"""What a model folder holds, as a hash: two folders with one hash give one score."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

# All that scores depend on: configuration, tokenizer, chat template, weights, code. Readmes and
# training logs may differ.
_PATTERNS = (
    "config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "*.py",
)
_CHUNK_BYTES = 1 << 20


def hash_folder(folder: Path) -> str:
    """Return the sha256, in hexadecimal, of the files of a model that scores depend on."""
    digest = hashlib.sha256()
    files = {path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()}
    for path in sorted(files, key=lambda file: file.name):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def hash_json(content: Mapping[str, object]) -> str:
    """Return the sha256, in hexadecimal, of JSON content; the order of keys does not matter."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
