"""Tool calls and thinking: what a schema enforces, and what vLLM's parsers find in an answer."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from server.backends.base import Candidate, ModelLoadError, PromptError, ToolCall, Tools


class AnswerReader:
    """Reads calls and thinking out of answers, by the parsers that fit the model.

    Parameters
    ----------
    tokenizer : Any
    tool_call_parser : str, optional
        vLLM's name of the parser of the model's own way to call tools.
    reasoning_parser : str, optional
        vLLM's name of the parser of its thinking.

    Raises
    ------
    ModelLoadError
        For a parser that this vLLM does not have, or that does not fit the tokenizer.
    """

    def __init__(
        self, tokenizer: Any, tool_call_parser: str | None, reasoning_parser: str | None
    ) -> None:
        from vllm.reasoning import ReasoningParserManager
        from vllm.tool_parsers import ToolParserManager

        self._tokenizer = tokenizer
        self._tool_parser: Any = None
        self._reasoning_parser: Any = None
        try:
            if tool_call_parser:
                self._tool_parser = ToolParserManager.get_tool_parser(tool_call_parser)
                self._tool_parser(tokenizer)
            if reasoning_parser:
                parser = ReasoningParserManager.get_reasoning_parser(reasoning_parser)
                self._reasoning_parser = parser(tokenizer)
        except Exception as error:
            # Parsers look for their model's tokens, each in its own way.
            raise ModelLoadError(
                f"the parser for tool calls ({tool_call_parser}) or thinking ({reasoning_parser}) "
                f"cannot be used: {error}; name the ones vLLM has for this model"
            ) from error

    def check(self, tools: Tools) -> None:
        """Refuse tools that could not be read out of the answer.

        Raises
        ------
        PromptError
        """
        if tools.choice != "auto":
            return
        if self._tool_parser is None:
            raise PromptError(
                "the model may choose its tools only with the setting tool_call_parser; set it, or "
                "send tool_choice 'required', 'none' or a function"
            )
        strict = [name for name, tool in _functions(tools).items() if tool.get("strict")]
        if strict:
            raise PromptError(
                f"the calls of {strict[0]} are held to its schema only with tool_choice "
                "'required' or the function; leave `strict` out, or send one of these"
            )

    def needs_special_tokens(self, tools: Tools | None) -> bool:
        """Whether answers must be read with their special tokens, which mark calls and thinking."""
        is_free = tools is not None and tools.choice == "auto"
        return is_free or self._reasoning_parser is not None

    def read(self, candidate: Candidate, marked: str, tools: Tools | None) -> Candidate:
        """Return the candidate with its thinking and its calls taken out of its text.

        Parameters
        ----------
        candidate : Candidate
            With the whole answer as its text.
        marked : str
            The answer with special tokens, where `needs_special_tokens`.
        tools : Tools, optional
            Of the prompt.
        """
        text, request = candidate.text, self._request(tools)
        reasoning = ""
        if self._reasoning_parser is not None:
            thought, rest = self._reasoning_parser.extract_reasoning(marked, request)
            if thought is not None:
                reasoning, marked = thought, rest or ""
                text = marked
        calls: tuple[ToolCall, ...] = ()
        if tools is not None and tools.choice == "auto":
            found = self._tool_parser(self._tokenizer, request.tools).extract_tool_calls(
                marked, request
            )
            if found.tools_called:
                named = [call.function for call in found.tool_calls]
                calls = tuple(ToolCall(call.name, call.arguments) for call in named)
                text = found.content or ""
        elif tools is not None and tools.choice == "required":
            calls, text = _listed(text)
        elif tools is not None and tools.choice != "none":
            calls, text = (ToolCall(tools.choice, text),), ""
        if tools is not None and not tools.is_parallel:
            calls = calls[:1]
        return replace(
            candidate,
            text=text,
            reasoning=reasoning,
            tool_calls=calls,
            # Calls that the token limit cut short are not complete.
            finish_reason=(
                "tool_calls"
                if calls and candidate.finish_reason == "stop"
                else candidate.finish_reason
            ),
        )

    @staticmethod
    def _request(tools: Tools | None) -> Any:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        definitions = [json.loads(text) for text in tools.definitions] if tools else None
        return ChatCompletionRequest(model="", messages=[], tools=definitions)


def call_schema(tools: Tools) -> str | None:
    """Return the JSON schema of answers that must call a tool; None when they need not.

    Raises
    ------
    PromptError
        When the function to call is not among the tools.
    """
    if tools.choice in ("auto", "none"):
        return None
    functions = _functions(tools)
    if tools.choice == "required":
        call: dict[str, Any] = {
            "type": "array",
            "minItems": 1,
            "items": {"anyOf": [_call(name, tool) for name, tool in functions.items()]},
        }
        if not tools.is_parallel:
            call["maxItems"] = 1
        return json.dumps(call)
    if tools.choice not in functions:
        raise PromptError(f"tool_choice names {tools.choice!r}, which is not among the tools")
    return json.dumps(_parameters(functions[tools.choice]))


def enforced_schema(json_schema: str | None, tools: Tools | None) -> str | None:
    """Return the one schema that answers are held to, of the request's and its tools'.

    Raises
    ------
    PromptError
        When both want to say what an answer looks like.
    """
    calls = None if tools is None else call_schema(tools)
    if calls is not None and json_schema is not None:
        raise PromptError("an answer cannot be a tool call and a JSON object; ask for one of them")
    return json_schema if calls is None else calls


def _functions(tools: Tools) -> dict[str, dict[str, Any]]:
    functions = [json.loads(text)["function"] for text in tools.definitions]
    return {function["name"]: function for function in functions}


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    return function.get("parameters") or {"type": "object", "properties": {}}


def _call(name: str, function: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"enum": [name]}, "parameters": _parameters(function)},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _listed(text: str) -> tuple[tuple[ToolCall, ...], str]:
    """Return the calls of a JSON list of calls and no text; or the text, when it is cut short."""
    try:
        calls = json.loads(text)
    except ValueError:
        return (), text
    return tuple(
        ToolCall(call["name"], json.dumps(call["parameters"], ensure_ascii=False)) for call in calls
    ), ""
