"""What the server counts, for Prometheus: on a registry of its own, labels from bounded sets."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    Summary,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.alignment import Aligner
from server.alignment_stages import Served
from server.draining import Drain

# Seconds. A cached solve takes microseconds, a long answer minutes.
_STAGE_BUCKETS = (
    0.0001, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600,
)  # fmt: skip
_REQUEST_BUCKETS = _STAGE_BUCKETS[1:]
_ESS_BUCKETS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512, 1024)
_KL_BUCKETS = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 4, 5, 7)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_STATES = ("ok", "failing", "stopped")


class Metrics:
    """The counters of one app.

    Attributes
    ----------
    registry : CollectorRegistry
    in_progress : Gauge
        HTTP requests not answered to the end.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter(
            "palette_http_requests",
            "Requests answered; status 499: the client left before the end.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "palette_http_request_seconds",
            "From the request's arrival to the end of its answer, streams included.",
            ("route",),
            buckets=_REQUEST_BUCKETS,
            registry=self.registry,
        )
        self.in_progress = Gauge(
            "palette_http_requests_in_progress",
            "Requests not answered to the end.",
            registry=self.registry,
        )
        self._errors = Counter(
            "palette_errors",
            "Errors told to clients, in streams too, by code.",
            ("code",),
            registry=self.registry,
        )
        self._stages = Histogram(
            "palette_stage_seconds",
            "Time in each stage of an answered request; scoring overlaps generation, and score is "
            "what came after it.",
            ("stage",),
            buckets=_STAGE_BUCKETS,
            registry=self.registry,
        )
        self._palettes = Counter(
            "palette_palettes",
            "Answered requests by what became of their palette; none: they had none.",
            ("status",),
            registry=self.registry,
        )
        self._candidates = Counter(
            "palette_candidates",
            "Candidates generated, and those of them served.",
            ("kind",),
            registry=self.registry,
        )
        self._tokens = Counter(
            "palette_tokens",
            "Tokens of prompts, of all candidates generated, and of those served.",
            ("kind",),
            registry=self.registry,
        )
        self._ess = Histogram(
            "palette_ess",
            "Effective number of candidates of a request with a palette.",
            buckets=_ESS_BUCKETS,
            registry=self.registry,
        )
        self._kl = Histogram(
            "palette_kl_nats",
            "KL of a request's choice from a uniform one among its candidates.",
            buckets=_KL_BUCKETS,
            registry=self.registry,
        )

        self._gains = Summary(
            "palette_gain",
            "What the choice gains over the base model, in reward units, of values that have a "
            "held-out scorer: of the value, and of what watches it.",
            ("value", "kind"),
            registry=self.registry,
        )

    def watch(self, aligner: Aligner, drain: Drain) -> None:
        """Report the state of these whenever metrics are asked for."""
        self.registry.register(_State(aligner, drain))

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an HTTP request that has ended."""
        known = method if method in _METHODS else "other"
        self._requests.labels(known, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def failed(self, code: str) -> None:
        """Count an error told to a client."""
        self._errors.labels(code).inc()

    def served(self, served: Served) -> None:
        """Count what the aligner answered."""
        timing, report = served.timing, served.report
        of_palette = () if report is None else ("solve", "score")
        for stage in ("queue", "generate", "total", *of_palette):
            self._stages.labels(stage).observe(getattr(timing, stage) / 1e3)
        self._candidates.labels("generated").inc(served.n_candidates)
        self._candidates.labels("served").inc(served.n_served)
        self._tokens.labels("prompt").inc(served.prompt_tokens)
        self._tokens.labels("generated").inc(served.spent_tokens)
        self._tokens.labels("served").inc(served.served_tokens)
        self._palettes.labels("none" if report is None else report.status).inc()
        if report is not None:
            self._ess.observe(report.ess)
            self._kl.observe(report.kl)
            for name, pair in (report.watched or {}).items():
                for kind, one in (("value", pair.value), ("watch", pair.watch)):
                    self._gains.labels(name, kind).observe(one.weighted - one.candidates)


class _State(Collector):
    """Reads what others count already, at the moment it is asked for."""

    def __init__(self, aligner: Aligner, drain: Drain) -> None:
        self._aligner = aligner
        self._drain = drain

    def describe(self) -> list[Metric]:
        """Return nothing: the names show when they are collected."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the queue, the engine, the rewards."""
        admission = self._aligner.admission
        yield _gauge("palette_requests_running", "Requests generated now.", admission.n_running)
        yield _gauge("palette_requests_waiting", "Requests in the queue.", admission.n_waiting)
        yield _gauge("palette_draining", "1 once the server is stopping.", self._drain.is_draining)
        yield _gauge(
            "palette_calibrated",
            "1 when there is a calibration.",
            self._aligner.calibration is not None,
        )
        engine = GaugeMetricFamily(
            "palette_engine_state", "1 for the state of the backend.", labels=["state"]
        )
        found = self._aligner.backend.health()["state"]
        for state in _STATES:
            engine.add_metric([state], found == state)
        yield engine
        solves = CounterMetricFamily(
            "palette_solves",
            "Solutions by where they came from (cached, warm, cold) and what they found.",
            labels=["origin", "verdict"],
        )
        for (origin, status), count in self._aligner.promiser.cache.counts.copy().items():
            solves.add_metric([origin, status.value], count)
        yield solves
        yield from self._rewards()
        yield from self._judges()

    def _rewards(self) -> Iterator[Metric]:
        up = GaugeMetricFamily(
            "palette_reward_up", "1 when the scorer's last attempt went well.", labels=["scorer"]
        )
        counted = {
            "batches": "Forward passes",
            "texts": "Texts scored",
            "duplicates": "Texts answered without a forward pass of their own",
        }
        counters = {
            key: CounterMetricFamily(
                f"palette_reward_{key}", f"{text}, by scorer.", labels=["scorer"]
            )
            for key, text in counted.items()
        }
        for scorer, health in self._aligner.rewards.health().items():
            up.add_metric([scorer], health["state"] == "ok")
            for key, counter in counters.items():
                count = health[key]
                assert isinstance(count, int)
                counter.add_metric([scorer], count)
        yield up
        yield from counters.values()

    def _judges(self) -> Iterator[Metric]:
        questions = CounterMetricFamily(
            "palette_judge_questions", "Questions put to the chat model.", labels=["scorer"]
        )
        tokens = CounterMetricFamily(
            "palette_judge_prompt_tokens",
            "Tokens of their prompts, most of which the model has read already; no part of "
            "palette_tokens.",
            labels=["scorer"],
        )
        mass = GaugeMetricFamily(
            "palette_judge_words_mass",
            "Probability that the chat model replies with one of the words for yes and no: mean "
            "over the last samples. Below 0.5 the log-odds mean little.",
            labels=["scorer", "question"],
        )
        for scorer, judging in self._aligner.rewards.judging().items():
            questions.add_metric([scorer], judging.asked.n_questions)
            tokens.add_metric([scorer], judging.asked.n_tokens)
            for question, share in judging.mass().items():
                mass.add_metric([scorer, question], share)
        yield from (questions, tokens, mass)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=float(value))
