"""What vLLM's engine is started with, and what is known of its model before it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from server.backends.vllm_adapter import Adapter, adapter_options
from server.backends.vllm_memory import split_gpu
from server.backends.vllm_options import context_wanted, engine_environment, engine_options
from server.backends.vllm_process import option_names
from server.backends.vllm_tools import AnswerReader

if TYPE_CHECKING:
    from server.backends.vllm_text import TextModel


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model and its engine's options, all checked; nothing is loaded yet.

    Attributes
    ----------
    text : TextModel
    reader : AnswerReader
    options : mapping
        For `start_engine`, like the environment.
    environment : mapping of str to str
    """

    text: TextModel
    reader: AnswerReader
    options: Mapping[str, Any]
    environment: Mapping[str, str]


def prepare(
    model: str,
    *,
    revision: str | None,
    dtype: str,
    max_context: int | None,
    trust_remote_code: bool,
    max_rows: int,
    n_threads: int | None,
    engine_args: Mapping[str, Any],
    tool_call_parser: str | None,
    adapters: Sequence[Adapter],
    rewards_bytes: int,
) -> Prepared:
    """Check the options and read all but the weights; in a thread, for it imports vLLM.

    Parameters
    ----------
    model : str
        Like all that is not named here: see `VllmEngineBackend`.
    engine_args : mapping of str to Any
        By vLLM's names in Python.
    adapters : sequence of Adapter

    Raises
    ------
    ModelLoadError
        For a model that cannot be read, and for options that vLLM does not have.
    """
    known = option_names()
    from vllm.platforms import current_platform

    from server.backends.vllm_text import load_text

    is_cpu = current_platform.is_cpu()
    text = load_text(
        model,
        revision=revision,
        max_context=context_wanted(max_context, engine_args),
        trust_remote_code=trust_remote_code,
        has_weights="load_format" not in engine_args,
    )
    options = engine_options(
        {**adapter_options(adapters, is_cpu=is_cpu), **engine_args},
        known,
        model=model,
        revision=revision,
        max_context=text.max_context,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        max_rows=max_rows,
        is_cpu=is_cpu,
    )
    reader = AnswerReader(text.tokenizer, tool_call_parser, options.get("reasoning_parser"))
    environment = engine_environment(n_threads, is_cpu=is_cpu)
    if rewards_bytes and current_platform.is_cuda_alike():
        options |= split_gpu(options, rewards_bytes, text.weights_bytes)
    return Prepared(text, reader, options, environment)
