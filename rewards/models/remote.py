"""Reward models behind HTTP: vLLM, Text Embeddings Inference, OpenRLHF, or one's own webhook."""

from __future__ import annotations

import email.utils
import json
import math
import random
import re
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from pydantic import BaseModel, TypeAdapter, ValidationError
from scipy.special import expit, log_expit, logsumexp, softmax
from typing_extensions import override

from rewards.base import TRIAL, DirectScorer, Facts, FloatArray, Message, Sample
from rewards.config import ChatInput, OutputConfig, RemoteConfig
from rewards.errors import RewardModelError, ScoringError
from rewards.models.views import make_view

_MAX_REPLY_BYTES = 16 << 20
_FIRST_BACKOFF_S = 0.1
_QUESTION = "What is the capital of France?"
_ANSWERS = ("Paris.", "I do not know, and I would rather talk about something else.")
_REMEDIES = {
    400: "; check api, model and input; if inputs are too long, set truncate",
    401: "; set token_file to a file with a token that it accepts",
    403: "; set token_file to a file with a token that it accepts",
    404: "; correct the path of the url, or the model",
    405: "; correct the path of the url",
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


class _RemoteError(Exception):
    """Why a remote gave no scores; never holds what was sent or what came back."""


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
        parts = urlsplit(config.url)
        port = f":{parts.port}" if parts.port is not None else ""
        self._where = f"{config.api} at {parts.hostname}{port}"
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
        config = self._config
        headers = {"Content-Type": "application/json"}
        if self._token_file is not None:
            headers["Authorization"] = f"Bearer {self._read_token(self._token_file)}"
        # No redirects: the texts would go where nobody meant them to.
        limits = httpx.Limits(max_connections=config.max_concurrent)
        self._client = httpx.Client(headers=headers, limits=limits, follow_redirects=False)
        self._pool = ThreadPoolExecutor(config.max_concurrent, f"rewards-{self.name}")
        weakref.finalize(self, _release, self._client, self._pool)
        question = Message(role="user", content=_QUESTION)
        try:
            self._score([Sample((question,), answer) for answer in _ANSWERS])
        except _RemoteError as error:
            problem = f"the trial request failed: {error}"
            raise RewardModelError(self.name, self.values, self._where, problem) from None

    @override
    def trial(self) -> Sample | None:
        return TRIAL

    @override
    def score(self, samples: Sequence[Sample]) -> FloatArray:
        try:
            return self._score(samples)
        except _RemoteError as error:
            raise ScoringError(self.name, self.values, f"{self._where}: {error}") from None

    def _score(self, samples: Sequence[Sample]) -> FloatArray:
        config = self._config
        deadline = time.monotonic() + config.timeout_s
        rendered = [json.dumps(self._render(sample)) for sample in samples]
        texts = list(dict.fromkeys(rendered))  # equal inputs are sent once
        is_dialogue = config.api == "vllm_classify" and self._view is None
        size = 1 if is_dialogue else config.max_batch
        batches = [texts[start : start + size] for start in range(0, len(texts), size)]
        futures = [self._pool.submit(self._score_batch, batch, deadline) for batch in batches]
        # The wait here bounds what the client's own timeouts do not: name look-up, slow trickles.
        done, _ = wait(futures, deadline - time.monotonic(), FIRST_EXCEPTION)
        for future in futures:
            future.cancel()
        for future in futures:
            if future in done and (error := future.exception()) is not None:
                raise error
        if len(done) < len(futures):
            raise self._slow()
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
        reply = self._post(json.dumps(_body(config, inputs)).encode(), deadline)
        numbers, labels = _numbers(config, reply, len(inputs))
        reads = config.reads.values()
        return np.stack([_read(output, numbers, labels) for output in reads], axis=1)

    def _post(self, content: bytes, deadline: float) -> bytes:
        """Return the body of the first good response."""
        for attempt in range(self._config.retries + 1):
            try:
                status, retry_after, body = self._send(content, deadline)
            except httpx.TimeoutException:
                raise self._slow() from None
            except httpx.ConnectError as error:
                pause, problem = (
                    None,
                    f"it cannot be reached ({error}); start it, or correct the url",
                )
            except httpx.HTTPError as error:
                pause, problem = None, f"the connection broke ({type(error).__name__})"
            else:
                if status == httpx.codes.OK:
                    return body
                if 300 <= status < 400:
                    problem = f"it redirects ({status}), which is not followed; give the final url"
                    raise _RemoteError(problem)
                pause, problem = retry_after, f"it answered {status}{_REMEDIES.get(status, '')}"
                if status != httpx.codes.TOO_MANY_REQUESTS and status < 500:
                    raise _RemoteError(problem)
            if attempt == self._config.retries:
                break
            if pause is None:
                # Jitter: requests that failed together must not come back together.
                pause = _FIRST_BACKOFF_S * 2**attempt * random.uniform(0.5, 1.5)
            if time.monotonic() + pause >= deadline:
                problem += f", and another try in {pause:.3g} s would exceed timeout_s"
                break
            _pause(pause)
        raise _RemoteError(f"{problem} (tries: {attempt + 1})")

    def _send(self, content: bytes, deadline: float) -> tuple[int, float | None, bytes]:
        """Return status, Retry-After in seconds if given, and the body, of one HTTP request."""
        url, left = self._config.url, deadline - time.monotonic()
        if left <= 0:
            raise self._slow()
        with self._client.stream("POST", url, content=content, timeout=left) as response:
            body = bytearray()
            if response.status_code == httpx.codes.OK:
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > _MAX_REPLY_BYTES:
                        raise _RemoteError(f"its reply is longer than {_MAX_REPLY_BYTES} bytes")
                    if time.monotonic() > deadline:
                        raise self._slow()
            return response.status_code, _seconds(response.headers.get("Retry-After")), bytes(body)

    def _slow(self) -> _RemoteError:
        limit = f"{self._config.timeout_s:g} s"
        return _RemoteError(f"no scores within {limit}; raise timeout_s, or give it more hardware")

    def _read_token(self, path: Path) -> str:
        try:
            token = path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            problem = f"its token_file cannot be read ({type(error).__name__}: {path})"
            raise RewardModelError(self.name, self.values, self._where, problem) from None
        if not re.fullmatch(r"[!-~]+", token):
            problem = f"its token_file must hold one token and nothing else ({path})"
            raise RewardModelError(self.name, self.values, self._where, problem)
        return token


def _release(client: httpx.Client, pool: ThreadPoolExecutor) -> None:
    pool.shutdown(wait=False, cancel_futures=True)
    client.close()


def _pause(seconds: float) -> None:
    time.sleep(seconds)


def _seconds(retry_after: str | None) -> float | None:
    """Return the wait that a Retry-After header asks for, in seconds; None without a valid one."""
    if retry_after is None or re.fullmatch(r"\d{1,9}(\.\d+)?", retry_after):
        return None if retry_after is None else float(retry_after)
    try:
        moment = email.utils.parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(
        0.0, (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    )


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
        raise _RemoteError(problem if is_json else "its reply is not JSON") from None
    labels = None
    if isinstance(reply, _ClassifyReply | _ScoreReply):
        if sorted(entry.index for entry in reply.data) != list(range(len(reply.data))):
            raise _RemoteError("the indices of its reply do not count from 0")
        entries: Any = sorted(reply.data, key=lambda entry: entry.index)
        is_classify = config.api == "vllm_classify"
        rows: Any = [entry.probs if is_classify else entry.score for entry in entries]
    elif config.api == "tei_predict":
        labels = sorted({one.label for predictions in reply for one in predictions})
        found = [{one.label: one.score for one in predictions} for predictions in reply]
        if any(len(row) != len(labels) for row in found):
            raise _RemoteError("its reply does not have the same labels for all samples")
        rows = [[row[label] for label in labels] for row in found]
    else:
        rows = reply.rewards if isinstance(reply, _Rewards) else reply
    if len(rows) != n:
        raise _RemoteError(f"it gave scores of {len(rows)} samples for {n}")
    if len({len(row) if isinstance(row, list) else 1 for row in rows}) != 1 or rows[0] == []:
        raise _RemoteError("it gave no numbers, or not equally many for all samples")
    return np.array(rows, dtype=np.float64).reshape(n, -1), labels


def _read(output: OutputConfig, numbers: FloatArray, labels: list[str] | None) -> FloatArray:
    """Return one number per sample, shape (n,)."""
    n_columns = numbers.shape[1]
    known = f"the labels {', '.join(labels)}" if labels else f"{n_columns} numbers per sample"
    wanted = output.margin or tuple(one for one in (output.label, output.index) if one is not None)
    if output.expect is not None and set(output.expect) != set(labels or ()):
        raise _RemoteError(f"expect must have a number for each label; it gives {known}")
    positions: dict[str | int, int] = {one: one for one in range(n_columns)}
    if labels is not None:
        positions = {label: position for position, label in enumerate(labels)}
    if any(one not in positions for one in wanted):
        raise _RemoteError(f"the output asks for what it does not give; it gives {known}")
    if not wanted and n_columns > 1 and output.expect is None:
        how = "label" if labels else "index"
        raise _RemoteError(f"it gives {known} and none is chosen; set output: {{{how}: ...}}")
    if output.activation == "log_odds" and n_columns == 1:
        raise _RemoteError(f"log_odds need several labels; it gives {known}")
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
            raise _RemoteError(f"it gave {score}, which is no score")
    return np.asarray(output.sign * scores, dtype=np.float64)
