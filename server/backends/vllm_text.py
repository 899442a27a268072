"""What the server itself needs of a model that vLLM serves: its words, its limits, its identity."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import transformers
from jinja2 import TemplateError

from rewards import Message
from rewards.hub import cache_where_no_hub
from server.backends import hf_loading
from server.backends.base import ContextLengthError, Prompt, PromptError, Tools
from server.backends.hf_text import Detokenizer

# Besides jinja's own, templates fail as the Python they are: None + "text", a missing key.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError, AttributeError)


@dataclass(frozen=True, slots=True)
class TextModel:
    """A model without its weights.

    Attributes
    ----------
    tokenizer : Any
    detokenizer : Detokenizer
    eos_ids : frozenset of int
        Every token that ends an answer.
    max_context : int
    n_vocab : int
    fingerprint : str
        That of `hf_loading.fingerprint_of`, so that calibrations hold for both backends.
    weights_bytes : int
        Of the files of a folder; 0 for a model of the hub.
    commit, chat_template : str or None
        Of a model of the hub; hash of the chat template, in hex.
    """

    tokenizer: Any
    detokenizer: Detokenizer
    eos_ids: frozenset[int]
    max_context: int
    n_vocab: int
    fingerprint: str
    weights_bytes: int
    commit: str | None = None
    chat_template: str | None = None

    def render(self, messages: Sequence[Message], tools: Tools | None) -> Prompt:
        """Return the conversation as the model reads it: see `Backend.render`."""
        ids = self._rendered(messages, tools)
        if tools is not None and tools.choice != "none" and ids == self._rendered(messages, None):
            raise PromptError("the model's chat template shows it no tools; leave `tools` out")
        self.check_length(ids, "messages")
        return Prompt(tuple(messages), tuple(ids), tools)

    def read(self, text: str | Sequence[int]) -> Prompt:
        """Return a text or its token ids as a prompt: see `Backend.read`."""
        if isinstance(text, str):
            words = text
            ids = self.tokenizer(text, verbose=False)["input_ids"] if text else []
        else:
            ids = list(text)
            words = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        if not ids:
            raise PromptError("there is no token to continue; give a text that is not empty")
        self.check_length(ids, "prompt")
        message = Message(role="user", content=words)
        return Prompt((message,), tuple(int(token) for token in ids), is_raw=True)

    def marked(self, ids: Sequence[int]) -> str:
        """Return the text of an answer with its special tokens."""
        text = self.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)

    def check_length(self, ids: Sequence[int], what: str) -> None:
        """Refuse a prompt that leaves no room for an answer.

        Raises
        ------
        ContextLengthError
        """
        if len(ids) >= self.max_context:
            raise ContextLengthError(
                f"This model's maximum context length is {self.max_context} tokens. However, your "
                f"{what} resulted in {len(ids)} tokens. Please reduce the length of the {what}."
            )

    def _rendered(self, messages: Sequence[Message], tools: Tools | None) -> list[int]:
        definitions = None
        if tools is not None and tools.choice != "none":
            definitions = [json.loads(text) for text in tools.definitions]
        try:
            text = self.tokenizer.apply_chat_template(
                [_for_template(message) for message in messages],
                tools=definitions,
                add_generation_prompt=True,
                tokenize=False,
            )
        except _TEMPLATE_ERRORS as error:
            raise PromptError(f"the chat template refuses this conversation: {error}") from error
        # The template has written the special tokens; `verbose` would warn of long texts.
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [int(token) for token in ids]


def _for_template(message: Message) -> dict[str, Any]:
    """Return the message with the arguments of its calls as objects, which templates expect."""
    shown: dict[str, Any] = dict(message)
    if "tool_calls" in message:
        shown["tool_calls"] = [
            {
                **call,
                "function": {
                    **call["function"],
                    "arguments": json.loads(call["function"]["arguments"] or "{}"),
                },
            }
            for call in message["tool_calls"]
        ]
    return shown


def load_text(
    name: str,
    *,
    revision: str | None,
    max_context: int | None,
    trust_remote_code: bool,
    has_weights: bool,
) -> TextModel:
    """Return the tokenizer and what else is known without the weights.

    Parameters
    ----------
    name : str
        Folder or hub name.
    revision : str, optional
    max_context : int, optional
    trust_remote_code : bool
    has_weights : bool
        Whether a folder must hold safetensors weights.

    Raises
    ------
    ModelLoadError
        With what is missing and what to do.
    """
    folder = hf_loading.local_folder(name)
    if folder is not None and has_weights:
        hf_loading.check_folder(folder)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    with hf_loading.quiet(), cache_where_no_hub(is_needed=folder is None):
        config = hf_loading.attempt(
            f"cannot read the configuration of {name!r}",
            "check the name (a folder with config.json, or a model of the hub that this machine "
            "can reach); a model with code of its own needs trust_remote_code",
            lambda: transformers.AutoConfig.from_pretrained(name, **options),
        )
        commit = getattr(config, "_commit_hash", None)
        if folder is None and commit is not None:
            options["revision"] = commit
        tokenizer = hf_loading.load_tokenizer(name, options)
        generation = _generation_config(name, config, options)
    weights = folder.glob("*.safetensors") if folder is not None else ()
    return TextModel(
        tokenizer=tokenizer,
        detokenizer=Detokenizer(tokenizer),
        eos_ids=hf_loading.eos_ids_of(
            name, SimpleNamespace(generation_config=generation), tokenizer
        ),
        max_context=hf_loading.max_context_of(name, config, tokenizer, max_context),
        n_vocab=int(config.get_text_config(decoder=True).vocab_size),
        fingerprint=hf_loading.fingerprint_of(name, folder, commit),
        commit=commit,
        chat_template=hf_loading.template_hash(tokenizer),
        weights_bytes=sum(path.stat().st_size for path in weights),
    )


def _generation_config(name: str, config: Any, options: dict[str, Any]) -> Any:
    try:
        return transformers.GenerationConfig.from_pretrained(name, **options)
    except OSError:  # there is none: transformers makes one of the model's own configuration
        return transformers.GenerationConfig.from_model_config(config)
