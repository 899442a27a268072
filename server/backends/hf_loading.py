"""From a folder or hub name to a model that can decode: every way this fails has a remedy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging as transformers_logging

from rewards.hub import cache_where_no_hub, why_missing
from server.backends.base import ModelLoadError
from server.backends.hf_decoding import check_decoding
from server.backends.hf_text import Detokenizer

# Below this, fingerprinting reads every byte of the weights; above it, headers and samples.
_HASH_ALL_BYTES = 1_000_000_000
_SAMPLE_BYTES = 65_536
_N_SAMPLES = 64

# What decides, beside the weights, how a conversation is read and an answer ends.
_IDENTITY_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A causal language model, ready to decode, with its tokenizer.

    Attributes
    ----------
    model, tokenizer : Any
        transformers' objects, which carry no useful static types.
    detokenizer : Detokenizer
    device : torch.device
    eos_ids : frozenset of int
        Every token that ends an answer.
    max_context : int
    n_vocab : int
        Token ids that the model both reads and writes are below this.
    fingerprint : str
        Hex; see `fingerprint_of`.
    commit : str or None
        Of a hub model.
    chat_template : str or None
        Hash of the chat template, in hex.
    """

    model: Any
    tokenizer: Any
    detokenizer: Detokenizer
    device: torch.device
    eos_ids: frozenset[int]
    max_context: int
    n_vocab: int
    fingerprint: str
    commit: str | None = None
    chat_template: str | None = None


def load_model(
    name: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_context: int | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Return the model of a folder or hub name, checked to decode as it reads.

    Raises
    ------
    ModelLoadError
        With what is missing and what to do.
    """
    folder = local_folder(name)
    if folder is not None:
        check_folder(folder)
    target = _device(device)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    with quiet(), cache_where_no_hub(is_needed=folder is None):
        config = attempt(
            f"cannot read the configuration of {name!r}",
            "check the name (a folder with config.json, or a model of the hub that this machine "
            "can reach); a model with code of its own needs trust_remote_code",
            lambda: transformers.AutoConfig.from_pretrained(name, **options),
        )
        # The configuration comes first, so that tokenizer and weights are of the same commit
        # when a branch moves while they download.
        commit = getattr(config, "_commit_hash", None)
        if folder is None and commit is not None:
            options["revision"] = commit
        tokenizer = load_tokenizer(name, options)
        model = _load_weights(name, config, options, _dtype(dtype, target))
    model = model.to(target).eval().requires_grad_(False)
    _check_vocabulary(name, model, tokenizer)
    try:
        check_decoding(model, target)
    except Exception as error:
        raise ModelLoadError(
            f"{name!r} ({config.model_type}) cannot decode several answers from one prompt: "
            f"{_first_line(error)}. Use another model, or the vLLM backend."
        ) from error
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        detokenizer=Detokenizer(tokenizer),
        device=target,
        eos_ids=eos_ids_of(name, model, tokenizer),
        max_context=max_context_of(name, config, tokenizer, max_context),
        n_vocab=min(
            layer.weight.shape[0]
            for layer in (model.get_input_embeddings(), model.get_output_embeddings())
            if layer is not None
        ),
        fingerprint=fingerprint_of(name, folder, commit),
        commit=commit,
        chat_template=template_hash(tokenizer),
    )


def fingerprint_of(name: str, folder: Path | None, commit: str | None) -> str:
    """Return the identity of weights, tokenizer and chat template, in hex.

    A folder's identity is its content (wherever it lies), the hub's is name and commit. Weights of
    a gigabyte or more are not read in full: names, sizes, headers and evenly spaced samples stand
    for them, which tells two fine-tunes of one model apart. Number formats (dtype) are not part.
    """
    digest = hashlib.sha256()
    if folder is None:
        digest.update(f"hub\0{name}\0{commit}".encode())
        return digest.hexdigest()
    code = sorted(path.name for path in folder.glob("*.py"))
    for file in (*_IDENTITY_FILES, *code):
        path = folder / file
        if path.is_file():
            digest.update(f"{file}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    weights = sorted(folder.glob("*.safetensors"))
    read_all = sum(path.stat().st_size for path in weights) < _HASH_ALL_BYTES
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as stream:
            if read_all:
                while block := stream.read(1 << 20):
                    digest.update(block)
                continue
            header_bytes = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(header_bytes))
            for i in range(_N_SAMPLES):
                stream.seek(i * (size - _SAMPLE_BYTES) // (_N_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def identify(name: str, revision: str | None, trust_remote_code: bool) -> str:
    """Return `fingerprint_of` a folder or hub name without loading its weights.

    Raises
    ------
    ModelLoadError
    """
    folder = local_folder(name)
    if folder is not None:
        check_folder(folder)
        return fingerprint_of(name, folder, None)
    with quiet(), cache_where_no_hub():
        config = attempt(
            f"cannot read the configuration of {name!r}",
            "check the name, and that this machine reaches the hub or has the model already",
            lambda: transformers.AutoConfig.from_pretrained(
                name, revision=revision, trust_remote_code=trust_remote_code
            ),
        )
    return fingerprint_of(name, None, getattr(config, "_commit_hash", None))


def template_hash(tokenizer: Any) -> str:
    """Return a hash, in hex, of the chat template: a text, or several by their names."""
    text = json.dumps(tokenizer.chat_template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def local_folder(name: str) -> Path | None:
    """Return the folder a name means, or None for a hub name."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    # The hub's names are "owner/model" or "model"; anything else was meant as a path.
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.exists():
        what = "is not a folder" if path.exists() else "does not exist"
        raise ModelLoadError(
            f"the model folder {name!r} {what}; give the folder that holds config.json, "
            "tokenizer and *.safetensors, or a hub name such as 'owner/model'"
        )
    return None


def check_folder(folder: Path) -> None:
    """Raise `ModelLoadError` when a local folder holds no model that can be served."""
    if not (folder / "config.json").is_file():
        raise ModelLoadError(
            f"{str(folder)!r} has no config.json; give a folder written by save_pretrained "
            "or downloaded from the hub"
        )
    weights = list(folder.glob("*.safetensors"))
    if not weights:
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        also = f" (only {', '.join(pickled)}, whose pickle format can run code)" if pickled else ""
        raise ModelLoadError(
            f"{str(folder)!r} has no *.safetensors weights{also}; convert the model with "
            "save_pretrained"
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ModelLoadError(f"{str(index)!r} is damaged; download it again") from error
        missing = sorted(named - {path.name for path in weights})
        if missing:
            raise ModelLoadError(
                f"{str(folder)!r} lacks {', '.join(missing)}, named by its index; download it again"
            )
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES) and not any(
        folder.glob("*.tiktoken")
    ):
        raise ModelLoadError(
            f"{str(folder)!r} has no tokenizer; copy tokenizer.json and tokenizer_config.json of "
            "the model into it"
        )


def load_tokenizer(name: str, options: dict[str, Any]) -> Any:
    """Return the model's tokenizer, or raise `ModelLoadError`."""
    tokenizer = attempt(
        f"cannot load the tokenizer of {name!r}",
        "copy tokenizer.json and tokenizer_config.json of the model again",
        lambda: transformers.AutoTokenizer.from_pretrained(name, **options),
    )
    if not tokenizer.chat_template:
        raise ModelLoadError(
            f"the tokenizer of {name!r} has no chat template, so conversations cannot be rendered; "
            "use the instruction-tuned model, or put its chat_template.jinja beside the tokenizer"
        )
    return tokenizer


def _load_weights(name: str, config: Any, options: dict[str, Any], dtype: Any) -> Any:
    # attn_implementation stays unset: transformers then takes sdpa wherever a family has it.
    model, report = attempt(
        f"cannot load the weights of {name!r}",
        "download them again; only complete safetensors files that fit config.json are loaded",
        lambda: transformers.AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        ),
    )
    wrong = sorted(report["missing_keys"]) + sorted(str(k) for k in report["mismatched_keys"])
    if wrong:
        raise ModelLoadError(
            f"the weights of {name!r} lack {len(wrong)} tensors of a {config.model_type} causal "
            f"language model ({', '.join(wrong[:3])}, ...), which would be random numbers; "
            "give a complete causal language model"
        )
    return model


def _check_vocabulary(name: str, model: Any, tokenizer: Any) -> None:
    n_rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= largest < n_rows:
        raise ModelLoadError(
            f"the tokenizer of {name!r} has token ids up to {largest}, its model {n_rows} "
            "embeddings; the two do not belong together: download both again"
        )


def eos_ids_of(name: str, model: Any, tokenizer: Any) -> frozenset[int]:
    """Return every end token of tokenizer and generation configuration."""
    ids: set[int] = set()
    config = getattr(model, "generation_config", None)
    for source in (tokenizer.eos_token_id, getattr(config, "eos_token_id", None)):
        if isinstance(source, int):
            ids.add(source)
        elif source is not None:
            ids.update(int(token) for token in source)
    if not ids:
        raise ModelLoadError(
            f"{name!r} names no end token, so no answer would end; set eos_token_id in its "
            "generation_config.json"
        )
    return frozenset(ids)


def max_context_of(name: str, config: Any, tokenizer: Any, wanted: int | None) -> int:
    """Return the context in tokens: the model's, or less where the caller says so."""
    own = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if own is None and tokenizer.model_max_length < 10**9:  # transformers' "unknown" is 1e30
        own = tokenizer.model_max_length
    if wanted is None:
        if own is None:
            raise ModelLoadError(f"{name!r} does not say how long its context is; set max_context")
        return int(own)
    if wanted < 2 or (own is not None and wanted > own):
        limit = "unlimited" if own is None else own
        raise ModelLoadError(
            f"max_context is {wanted}, outside 2..{limit} of {name!r}; leave it out for the "
            "model's own"
        )
    return wanted


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)  # an absent device shows here, not after loading
    except (RuntimeError, AssertionError) as error:
        raise ModelLoadError(
            f"device {name!r} cannot be used here ({_first_line(error)}); use 'auto' or 'cpu'"
        ) from error
    return device


def _dtype(name: str, device: torch.device) -> Any:
    if name == "auto":
        # Half precision is slow, and for some operations missing, on a CPU.
        return torch.float32 if device.type == "cpu" else "auto"
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelLoadError(
            f"dtype {name!r} is unknown; use 'auto', 'float32', 'bfloat16' or 'float16'"
        )
    return dtype


def attempt(what: str, remedy: str, action: Any) -> Any:
    """Return what `action` returns; whatever it raises becomes a `ModelLoadError`."""
    try:
        return action()
    except Exception as error:
        # transformers raises OSError, ValueError, RuntimeError, KeyError and safetensors' own.
        if missing := why_missing(error):
            raise ModelLoadError(f"{what}: {missing}.") from error
        raise ModelLoadError(f"{what}: {_first_line(error)}. Remedy: {remedy}.") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' warnings and progress bars, which are global, and set them back."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
