"""Reward models behind HTTP: vLLM, Text Embeddings Inference, OpenRLHF, or one's own webhook."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, TypeAdapter, ValidationError
from scipy.special import expit, log_expit, logsumexp, softmax
from typing_extensions import override

from rewards.base import TRIAL, DirectScorer, Facts, FloatArray, Message, Sample
from rewards.config import ChatInput, OutputConfig, RemoteConfig
from rewards.errors import RewardModelError, ScoringError
from rewards.models.endpoint import Endpoint, EndpointError
from rewards.models.views import make_view

_QUESTION = "What is the capital of France?"
_ANSWERS = ("Paris.", "I do not know, and I would rather talk about something else.")
_REMEDIES = {
    400: "; check api, model and input; if inputs are too long, set truncate",
    413: "; lower max_batch, or set truncate",
    422: "; check api and input, lower max_batch, or set truncate",
}


class _Classified(BaseModel):
    index: int
    probs: list[float]


class _Scored(BaseModel):
    index: int
    score: float


class _ClassifyReply(BaseModel):
    data: list[_Classified]


class _ScoreReply(BaseModel):
    data: list[_Scored]


class _Prediction(BaseModel):
    label: str
    score: float


class _Rewards(BaseModel):
    rewards: list[float] | list[list[float]]


_REPLIES: dict[str, TypeAdapter[Any]] = {
    "vllm_classify": TypeAdapter(_ClassifyReply),
    "vllm_score": TypeAdapter(_ScoreReply),
    "tei_predict": TypeAdapter(list[list[_Prediction]]),
    "openrlhf": TypeAdapter(_Rewards),
    "webhook": TypeAdapter(_Rewards | list[float] | list[list[float]]),
}


class RemoteScorer(DirectScorer):
    """One reward model behind HTTP, and one or several ways to read its numbers.

    Parameters
    ----------
    name, values
        As for every scorer.
    config : RemoteConfig
    token_file : Path or None
        Holds a bearer token; read once, by ``load``.

    Attributes
    ----------
    n_threads : int
        Calls of ``score`` that may run at once: they wait for the network.

    Notes
    -----
    A failed HTTP request fails the call, as any missing score does. What stands behind the url
    cannot be seen: another model there keeps the identity unless ``model`` is changed.
    """

    def __init__(
        self, name: str, values: Sequence[str], config: RemoteConfig, token_file: Path | None
    ) -> None:
        super().__init__(name, values)
        self.outputs = config.output_names
        self.n_threads = config.max_concurrent
        self.patience_s = config.timeout_s
        self._config = config
        self._token_file = token_file
        self._endpoint = Endpoint(
            config.api,
            config.url,
            timeout_s=config.timeout_s,
            retries=config.retries,
            max_concurrent=config.max_concurrent,
            remedies=_REMEDIES,
        )
        self._where = self._endpoint.where
        is_text = config.input is not None and not isinstance(config.input, ChatInput)
        self._view = make_view(config.input, None) if config.input and is_text else None

    @override
    def identity(self, output: str) -> dict[str, object]:
        settings = self._config.model_dump(
            include={"kind", "api", "url", "model", "input", "truncate"}
        )
        return {**settings, "output": self._config.reads[output].model_dump()}

    @override
    def facts(self) -> Facts:
        return Facts(model=self._config.model or self._where)

    @override
    def load(self, device: str) -> None:
        try:
            self._endpoint.open(f"rewards-{self.name}", self._token_file)
        except EndpointError as error:
            raise RewardModelError(self.name, self.values, self._where, str(error)) from None
        question = Message(role="user", content=_QUESTION)
        try:
            self._score([Sample((question,), answer) for answer in _ANSWERS])
        except EndpointError as error:
            problem = f"the trial request failed: {error}"
            raise RewardModelError(self.name, self.values, self._where, problem) from None

    @override
    def trial(self) -> Sample | None:
        return TRIAL

    @override
    def score(self, samples: Sequence[Sample]) -> FloatArray:
        try:
            return self._score(samples)
        except EndpointError as error:
            raise ScoringError(self.name, self.values, f"{self._where}: {error}") from None

    def _score(self, samples: Sequence[Sample]) -> FloatArray:
        config = self._config
        deadline = time.monotonic() + self._endpoint.timeout_s
        rendered = [json.dumps(self._render(sample)) for sample in samples]
        texts = list(dict.fromkeys(rendered))  # equal inputs are sent once
        is_dialogue = config.api == "vllm_classify" and self._view is None
        size = 1 if is_dialogue else config.max_batch
        batches = [texts[start : start + size] for start in range(0, len(texts), size)]
        futures = [
            self._endpoint.pool.submit(self._score_batch, batch, deadline) for batch in batches
        ]
        # The wait here bounds what the client's own timeouts do not: name look-up, slow trickles.
        done, _ = wait(futures, deadline - time.monotonic(), FIRST_EXCEPTION)
        for future in futures:
            future.cancel()
        for future in futures:
            if future in done and (error := future.exception()) is not None:
                raise error
        if len(done) < len(futures):
            raise self._endpoint.slow()
        scores = [score for future in futures for score in future.result().tolist()]
        score_of = dict(zip(texts, scores, strict=True))
        return np.array([score_of[text] for text in rendered], dtype=np.float64)

    def _render(self, sample: Sample) -> Any:
        """Return what is sent for a sample: one or two texts, a dialogue, or an object."""
        if self._view is not None:
            rendered = self._view.render(sample)
            return [rendered.text] if rendered.first is None else [rendered.first, rendered.text]
        view = self._config.input
        drops_system = isinstance(view, ChatInput) and view.system == "drop"
        messages = [
            {"role": message["role"], "content": message["content"]}
            for message in sample.messages
            if not (drops_system and message["role"] == "system")
        ]
        if self._config.api == "webhook":
            return {"messages": messages, "answer": sample.answer}
        return [*messages, {"role": "assistant", "content": sample.answer}]

    def _score_batch(self, texts: Sequence[str], deadline: float) -> FloatArray:
        """Return the outputs of each input, shape (n, n_outputs); on a thread of the pool."""
        config = self._config
        inputs = [json.loads(text) for text in texts]
        reply = self._endpoint.post(json.dumps(_body(config, inputs)).encode(), deadline)
        numbers, labels = _numbers(config, reply, len(inputs))
        reads = config.reads.values()
        return np.stack([_read(output, numbers, labels) for output in reads], axis=1)


def _body(config: RemoteConfig, inputs: Sequence[Any]) -> dict[str, Any]:
    """Return the JSON that asks for the raw numbers of these inputs."""
    if config.api == "webhook":
        return {"samples": inputs}
    if config.api == "tei_predict":
        return {"inputs": inputs, "raw_scores": True, "truncate": config.truncate}
    if config.api == "openrlhf":
        body: dict[str, Any] = {"query": ["".join(texts) for texts in inputs]}
        return body | ({"prompts": [texts[0] for texts in inputs]} if len(inputs[0]) == 2 else {})
    # Left to itself, vLLM squeezes rewards through a sigmoid or softmax.
    body = {"use_activation": False}
    if config.model is not None:
        body["model"] = config.model
    if config.truncate:
        body["truncate_prompt_tokens"] = -1
    if config.api == "vllm_score":
        return body | {"text_1": [first for first, _ in inputs], "text_2": [b for _, b in inputs]}
    if isinstance(config.input, ChatInput):
        return body | {"messages": inputs[0], "add_generation_prompt": False}
    return body | {"input": [text for (text,) in inputs]}


def _numbers(config: RemoteConfig, body: bytes, n: int) -> tuple[FloatArray, list[str] | None]:
    """Return the numbers of a reply, shape (n, n_numbers), and their labels where it names them."""
    try:
        reply = _REPLIES[config.api].validate_json(body, strict=True)
    except ValidationError as error:
        is_json = error.errors(include_input=False, include_url=False)[0]["type"] != "json_invalid"
        problem = f"its reply is not that of {config.api}; correct api or url"
        raise EndpointError(problem if is_json else "its reply is not JSON") from None
    labels = None
    if isinstance(reply, _ClassifyReply | _ScoreReply):
        if sorted(entry.index for entry in reply.data) != list(range(len(reply.data))):
            raise EndpointError("the indices of its reply do not count from 0")
        entries: Any = sorted(reply.data, key=lambda entry: entry.index)
        is_classify = config.api == "vllm_classify"
        rows: Any = [entry.probs if is_classify else entry.score for entry in entries]
    elif config.api == "tei_predict":
        labels = sorted({one.label for predictions in reply for one in predictions})
        found = [{one.label: one.score for one in predictions} for predictions in reply]
        if any(len(row) != len(labels) for row in found):
            raise EndpointError("its reply does not have the same labels for all samples")
        rows = [[row[label] for label in labels] for row in found]
    else:
        rows = reply.rewards if isinstance(reply, _Rewards) else reply
    if len(rows) != n:
        raise EndpointError(f"it gave scores of {len(rows)} samples for {n}")
    if len({len(row) if isinstance(row, list) else 1 for row in rows}) != 1 or rows[0] == []:
        raise EndpointError("it gave no numbers, or not equally many for all samples")
    return np.array(rows, dtype=np.float64).reshape(n, -1), labels


def _read(output: OutputConfig, numbers: FloatArray, labels: list[str] | None) -> FloatArray:
    """Return one number per sample, shape (n,)."""
    n_columns = numbers.shape[1]
    known = f"the labels {', '.join(labels)}" if labels else f"{n_columns} numbers per sample"
    wanted = output.margin or tuple(one for one in (output.label, output.index) if one is not None)
    if output.expect is not None and set(output.expect) != set(labels or ()):
        raise EndpointError(f"expect must have a number for each label; it gives {known}")
    positions: dict[str | int, int] = {one: one for one in range(n_columns)}
    if labels is not None:
        positions = {label: position for position, label in enumerate(labels)}
    if any(one not in positions for one in wanted):
        raise EndpointError(f"the output asks for what it does not give; it gives {known}")
    if not wanted and n_columns > 1 and output.expect is None:
        how = "label" if labels else "index"
        raise EndpointError(f"it gives {known} and none is chosen; set output: {{{how}: ...}}")
    if output.activation == "log_odds" and n_columns == 1:
        raise EndpointError(f"log_odds need several labels; it gives {known}")
    columns = [positions[one] for one in wanted] or [0]
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused below
        is_softmax = output.activation == "softmax" or output.expect is not None
        logits = softmax(numbers, axis=1) if is_softmax else numbers
        scores = logits[:, columns[0]]
        if len(columns) == 2:
            scores = scores - logits[:, columns[1]]
        if output.expect is not None:
            scores = logits @ np.array([output.expect[label] for label in labels or ()])
        elif output.activation == "log_odds":
            scores = scores - logsumexp(np.delete(numbers, columns[0], axis=1), axis=1)
        if output.activation == "sigmoid":
            scores = expit(scores)
        elif output.activation == "log_sigmoid":
            scores = log_expit(scores)
    for score in scores.tolist():
        if not math.isfinite(score):
            raise EndpointError(f"it gave {score}, which is no score")
    return np.asarray(output.sign * scores, dtype=np.float64)
