"""A value in one sentence, judged by another chat model: one behind an OpenAI-compatible server."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from pathlib import Path

import numpy as np
from typing_extensions import override

from rewards.base import TRIAL, DirectScorer, Facts, FloatArray, Sample
from rewards.config import JudgeConfig
from rewards.errors import RewardModelError, ScoringError
from rewards.likeliest import NoLikeliestError, answer_of, question_fields
from rewards.models.endpoint import Endpoint, EndpointError

# As many as one call may have to score; see `DirectScorer.patience_s`.
_SAMPLES_A_CALL = 512
_REMEDIES = {
    400: "; check model, extra_body, and that its context holds prompt, answer and question",
    413: "; it does not take texts this long",
    422: "; check model and extra_body",
}


class RemoteJudge(DirectScorer):
    """Log-odds of yes against no, in nats, for each question, from the likeliest tokens of a reply.

    Parameters
    ----------
    name, values
        As for every scorer.
    config : JudgeConfig
        With a url.
    token_file : Path or None
        Holds a bearer token; read once, by ``load``.

    Attributes
    ----------
    n_threads : int
        Calls of ``score`` that may run at once: they wait for the network.

    Notes
    -----
    Each question is a request of its own. One that fails fails the call, as any missing score
    does. What is beyond the likeliest tokens is read as `rewards.likeliest` says.
    """

    def __init__(
        self, name: str, values: Sequence[str], config: JudgeConfig, token_file: Path | None
    ) -> None:
        super().__init__(name, values)
        self._config = config
        assert config.url is not None  # that is what makes it remote
        self.outputs = config.output_names
        self.n_threads = config.max_concurrent
        n_turns = math.ceil(_SAMPLES_A_CALL * len(config.put) / config.max_concurrent)
        self.patience_s = config.timeout_s * n_turns
        self._token_file = token_file
        self._questions = config.put
        self._words = (config.yes_words, config.no_words)
        self._endpoint = Endpoint(
            "chat model",
            config.url,
            timeout_s=config.timeout_s,
            retries=config.retries,
            max_concurrent=config.max_concurrent,
            remedies=_REMEDIES,
        )

    @override
    def identity(self, output: str) -> dict[str, object]:
        config = self._config
        return {
            "kind": "judge",
            "asked": self._questions[self.outputs.index(output)],
            "yes_words": sorted(config.yes_words),
            "no_words": sorted(config.no_words),
            "url": config.url,
            "model": config.model,
            "extra_body": config.extra_body,
        }

    @override
    def facts(self) -> Facts:
        return Facts(model=self._config.model or "")

    @override
    def load(self, device: str) -> None:
        where = f"{self._config.model}, {self._endpoint.where}"
        try:
            self._endpoint.open(f"rewards-{self.name}", self._token_file)
        except EndpointError as error:
            raise RewardModelError(self.name, self.values, where, str(error)) from None
        try:
            self._score([TRIAL])
        except (EndpointError, ValueError) as error:
            problem = f"the trial question failed: {error}"
            raise RewardModelError(self.name, self.values, where, problem) from None

    @override
    def trial(self) -> Sample | None:
        return TRIAL

    @override
    def score(self, samples: Sequence[Sample]) -> FloatArray:
        try:
            return self._score(samples)
        except (EndpointError, ValueError) as error:
            problem = f"{self._endpoint.where}: {error}"
            raise ScoringError(self.name, self.values, problem) from None

    def _score(self, samples: Sequence[Sample]) -> FloatArray:
        bodies = [
            json.dumps(self._body(sample, question)).encode()
            for sample in samples
            for question in self._questions
        ]
        asked = list(dict.fromkeys(bodies))  # equal answers are asked about once
        began: dict[bytes, float] = {}

        def ask(body: bytes) -> float:
            began[body] = time.monotonic()
            return self._ask(body)

        futures = {body: self._endpoint.pool.submit(ask, body) for body in asked}
        self._wait(futures, began)
        found = np.array([futures[body].result() for body in bodies], dtype=np.float64)
        return found.reshape(len(samples), len(self._questions))

    def _wait(self, futures: Mapping[bytes, Future[float]], began: Mapping[bytes, float]) -> None:
        """Return when all are answered; the first failure, or one that hangs, ends the wait.

        A question's time counts from its turn, and here too: the client's own timeouts do not
        bound looking up a name.
        """
        limit_s = self._endpoint.timeout_s
        waiting = set(futures.values())
        try:
            while waiting:
                done, waiting = wait(waiting, limit_s, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                late = time.monotonic() - limit_s
                if any(
                    began.get(body, late) < late for body in futures if futures[body] in waiting
                ):
                    raise self._endpoint.slow()
        finally:
            for future in waiting:
                future.cancel()

    def _body(self, sample: Sample, question: str) -> dict[str, object]:
        return {
            "model": self._config.model,
            **question_fields(sample, question),
            "max_tokens": 1,
            # The model's own distribution, also where it is told after sampling has changed it.
            "temperature": 1,
            "top_p": 1,
            **self._config.extra_body,
        }

    def _ask(self, body: bytes) -> float:
        """Return the log-odds of a question; on a thread of the pool."""
        content = self._endpoint.post(body, time.monotonic() + self._endpoint.timeout_s)
        try:
            reply = json.loads(content)
        except (ValueError, RecursionError):
            raise EndpointError("its reply is not JSON; correct the url") from None
        try:
            with np.errstate(invalid="ignore"):  # what is not finite is refused below
                yes, no = answer_of(reply, self._words)
        except NoLikeliestError as error:
            raise EndpointError(str(error)) from None
        if not math.isfinite(yes - no):
            raise EndpointError(f"it gave {yes - no}, which is no score")
        return yes - no
