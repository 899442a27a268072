"""What is known of calibrations and drift, for Prometheus, read when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.live.follower import Follower


class LiveGauges(Collector):
    """Gauges of the live state of every calibration in use."""

    def __init__(self, follower: Follower) -> None:
        self._follower = follower

    def describe(self) -> list[Metric]:
        """Return nothing: the names show when they are collected."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield versions, live prompts, requests left out, and the state of each value."""
        of = ["calibration"]
        version = GaugeMetricFamily(
            "palette_calibration_version", "Version that is served with.", labels=of
        )
        live = GaugeMetricFamily(
            "palette_calibration_live_prompts", "Its prompts that are live traffic.", labels=of
        )
        taken = CounterMetricFamily(
            "palette_live_requests", "Requests that a calibration was watched with.", labels=of
        )
        left_out = CounterMetricFamily(
            "palette_live_left_out",
            "Requests that were no fair sample of what a calibration is about, by why.",
            labels=[*of, "reason"],
        )
        each = [*of, "value", "against"]
        drift = GaugeMetricFamily(
            "palette_drift",
            "1 or -1 where levels are found above or below what is promised, or the base level of "
            "live prompts above or below the calibration's; 0 where not.",
            labels=each,
        )
        numbers = {
            name: GaugeMetricFamily(f"palette_drift_{name}", text, labels=each)
            for name, text in {
                "mean": "Mean difference since the last change of state, reward units.",
                "low": "Lower end of its interval, which holds at all times.",
                "high": "Upper end of its interval.",
                "allowed": "What the calibration's own error allows.",
            }.items()
        }
        for name, track in self._follower.tracks().items():
            version.add_metric([name], track.calibration.version)
            live.add_metric([name], track.calibration.live_prompts)
            taken.add_metric([name], track.taken)
            for reason, count in track.left_out.copy().items():
                left_out.add_metric([name, reason], count)
            for one in track.monitor.watched:
                labels = [name, one.value, one.kind]
                drift.add_metric(labels, one.direction)
                for key, gauge in numbers.items():
                    number = getattr(one, key)
                    if number is not None:
                        gauge.add_metric(labels, number)
        yield from (version, live, taken, left_out, drift, *numbers.values())
