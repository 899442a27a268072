"""What vLLM is started with: the operator's engine options over ours, checked before it starts."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from server.backends.base import ModelLoadError

# Options that have a setting of their own here; the same thing said twice could differ.
_OURS = {
    "model": "model",
    "tokenizer": "model",
    "revision": "revision",
    "tokenizer_revision": "revision",
    "dtype": "dtype",
    "trust_remote_code": "trust_remote_code",
    "served_model_name": "model_name",
    "lora_modules": "lora",
}
# Values that would break what a backend promises.
_FIXED: dict[str, tuple[Any, str]] = {
    "logprobs_mode": ("raw_logprobs", "log-probabilities are the model's own"),
    "skip_tokenizer_init": (False, "answers are text"),
    "enable_log_requests": (False, "prompts and answers are never logged"),
}
# Contexts that vLLM fits to the memory it finds.
_FITTED = (-1, "auto")
# Formats that are read with pickle, which can run code.
_PICKLED = ("pt", "npcache")
_CPU_KV_CACHE_BYTES = 2**30
_CPU_BATCH_TOKENS = 4096


def parse_options(arguments: Sequence[str]) -> dict[str, Any]:
    """Return vLLM's options as they stand on its command line, such as ``--max-model-len 4096``.

    A value that is JSON is read as JSON; a name without a value is true, ``--no-name`` false.

    Raises
    ------
    ModelLoadError
        For a value without a name.
    """
    options: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--") or name == "--":
            raise ModelLoadError(f"{name!r} is no engine option: options begin with --")
        if not equals:
            if not rest or rest[0].startswith("--"):
                negated = name.startswith("--no-")
                options[name[5:] if negated else name[2:]] = not negated
                continue
            value = rest.pop(0)
        try:
            options[name[2:]] = json.loads(value)
        except ValueError:
            options[name[2:]] = value
    return options


def split_lora_modules(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the arguments without ``--lora-modules name=folder ...``, and these by name.

    As vLLM's own option: one or more adapters, each `name=folder` or `{"name": ..., "path": ...}`.

    Raises
    ------
    ModelLoadError
        For an adapter that is neither, or a name given twice.
    """
    rest: list[str] = []
    adapters: dict[str, str] = {}
    is_inside = False
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if argument.startswith("--"):
            is_inside = option in ("--lora-modules", "--lora_modules")
            if not is_inside:
                rest.append(argument)
            elif equals:
                _add_adapter(value, adapters)
        elif is_inside:
            _add_adapter(argument, adapters)
        else:
            rest.append(argument)
    return rest, adapters


def _add_adapter(text: str, adapters: dict[str, str]) -> None:
    name, _, folder = text.partition("=")
    if text.lstrip().startswith("{"):
        try:
            given = json.loads(text)
            name, folder = str(given["name"]), str(given["path"])
        except (ValueError, KeyError) as error:
            raise ModelLoadError(
                f'--lora-modules {text}: an adapter is name=folder or {{"name": ..., "path": ...}}'
            ) from error
    if not (name and folder):
        raise ModelLoadError(f"--lora-modules {text}: an adapter is name=folder")
    if name in adapters:
        raise ModelLoadError(f"--lora-modules names {name!r} twice; each adapter needs its own")
    adapters[name] = folder


def engine_options(
    given: Mapping[str, Any],
    known: Collection[str],
    *,
    model: str,
    revision: str | None,
    max_context: int,
    dtype: str,
    trust_remote_code: bool,
    max_rows: int,
    is_cpu: bool,
) -> dict[str, Any]:
    """Return the arguments of vLLM's engine: ours, under what the operator gives.

    Parameters
    ----------
    given : mapping of str to Any
        From `by_python_name`.
    known : collection of str
        The names this vLLM has.
    model, revision, dtype, trust_remote_code
        Of the settings of the same names.
    max_context : int
        Tokens that prompt and answer may have together.
    max_rows : int
        Answers in progress at most, unless `given` says ``max_num_seqs``.
    is_cpu : bool
        Whether vLLM runs on a CPU here.

    Raises
    ------
    ModelLoadError
        For options that vLLM does not have, that another setting has, or that cannot work.
    """
    for name in given:
        _check_name(name, known)
    for name, (value, reason) in _FIXED.items():
        if given.get(name, value) != value:
            raise ModelLoadError(
                f"engine option {name} must stay {value!r}: {reason}; leave it out"
            )
    if given.get("load_format") in _PICKLED:
        raise ModelLoadError(
            f"engine option load_format={given['load_format']!r} reads pickled weights, which can "
            "run code; convert the model to safetensors with save_pretrained"
        )
    options = {
        "model": model,
        "tokenizer": model,
        "revision": revision,
        "tokenizer_revision": revision,
        "trust_remote_code": trust_remote_code,
        "dtype": dtype,
        "max_model_len": -1 if given.get("max_model_len") in _FITTED else max_context,
        "max_num_seqs": max_rows,
        "enable_prefix_caching": True,
        "load_format": "safetensors",
        "disable_log_stats": True,
    }
    if is_cpu:
        options |= _cpu_options(given, max_context, dtype)
    return options | {name: value for name, value in given.items() if name != "max_model_len"}


def engine_environment(n_threads: int | None, *, is_cpu: bool) -> dict[str, str]:
    """Return what vLLM takes from the environment only, where the operator has not set it.

    Parameters
    ----------
    n_threads : int, optional
        CPU threads of one operation.
    is_cpu : bool
    """
    if not is_cpu:
        return {}
    # Compiled samplers cost the first request of every kind half a minute.
    environment = {"TORCHDYNAMO_DISABLE": "1"}
    if n_threads is not None:
        environment["OMP_NUM_THREADS"] = str(n_threads)
    return environment


def context_wanted(max_context: int | None, given: Mapping[str, Any]) -> int | None:
    """Return the context asked for, by the setting or by vLLM's option, in tokens.

    Raises
    ------
    ModelLoadError
        When the two differ.
    """
    option = given.get("max_model_len")
    if option is None or option in _FITTED:
        return max_context
    if not isinstance(option, int):
        raise ModelLoadError(f"engine option max_model_len is {option!r}, not a number of tokens")
    if max_context not in (None, option):
        raise ModelLoadError(
            f"max_context is {max_context} and engine option max_model_len is {option}; say one"
        )
    return option


def by_python_name(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options by vLLM's names in Python: ``max_model_len`` for ``--max-model-len``."""
    return {name.lstrip("-").replace("-", "_"): value for name, value in given.items()}


def _check_name(name: str, known: Collection[str]) -> None:
    if name in _OURS:
        raise ModelLoadError(f"engine option {name} has a setting of its own here: {_OURS[name]}")
    if name in known:
        return
    close = difflib.get_close_matches(name, sorted(known), n=3)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    raise ModelLoadError(f"this vLLM has no engine option {name!r}{hint}")


def _cpu_options(given: Mapping[str, Any], max_context: int, dtype: str) -> dict[str, Any]:
    """Return what differs on a CPU, after checking what the operator says there."""
    if given.get("enable_chunked_prefill"):
        raise ModelLoadError(
            "engine option enable_chunked_prefill cannot be used on a CPU: vLLM's engine dies of "
            "a seeded request whose prompt is read in pieces; leave it out"
        )
    # A prompt is read in one piece or waits, so the budget of a step must hold the longest.
    budget = given.get("max_num_batched_tokens", max_context)
    if budget < max_context:
        raise ModelLoadError(
            f"engine option max_num_batched_tokens is {budget}, below max_context ({max_context}); "
            "on a CPU a prompt is read in one piece: raise the first or lower the second"
        )
    options: dict[str, Any] = {
        "dtype": "float32" if dtype == "auto" else dtype,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(max_context, _CPU_BATCH_TOKENS),
        # Compiling takes longer than a CPU server gains by it.
        "enforce_eager": True,
        # Only whole blocks of a prompt are shared between its candidates; vLLM's own is 128.
        "block_size": 32,
    }
    if "gpu_memory_utilization" not in given:
        # vLLM would take 92 % of the machine's memory, which the reward models share here.
        options["kv_cache_memory_bytes"] = _CPU_KV_CACHE_BYTES
    return options
