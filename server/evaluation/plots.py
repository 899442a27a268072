"""The plots of a report, as SVG to be written into a page. Only this file needs matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from server.evaluation.tables import LABELS

Json = dict[str, Any]

# Okabe & Ito (2008): told apart with any colour vision; markers and lines differ too.
_STYLE: Final[dict[str, tuple[str, str, str]]] = {
    "base": ("#555555", "o", ":"),
    "palette": ("#0072B2", "s", "-"),
    "best_of_n": ("#B87800", "^", "--"),
    "fixed_weights": ("#009E73", "D", "-."),
    "paper": ("#D55E00", "v", "-"),
}
_RC: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",  # real text: smaller, can be searched and read aloud
    "svg.hashsalt": "palette",  # the same figures give the same file
    "text.parse_math": False,  # a value may have $ in its name
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "grid.color": "#dddddd",
    "legend.frameon": False,
}


def delivery_plot(report: Json) -> str:
    """Return promised against realised levels of all palettes, for its own λ and the paper's."""
    with _figure(6.4, 5.2) as (figure, drawn):
        axes = figure.add_subplot()
        ends: list[float] = []
        for name in ("paper", "palette"):
            colour, marker, _ = _STYLE[name]
            points = list(_promised(report, name))
            if not points:
                continue
            x, y, half = zip(*points, strict=True)
            ends += [*x, *(a - b for a, b in zip(y, half, strict=True))]
            ends += [a + b for a, b in zip(y, half, strict=True)]
            axes.errorbar(
                x, y, yerr=half, fmt=marker, color=colour, markersize=6, capsize=2,
                elinewidth=1, label=LABELS[name], alpha=0.9,
            )  # fmt: skip
        if ends:
            low, high = min(ends), max(ends)
            pad = 0.06 * (high - low or 1.0)
            axes.plot(
                [low - pad, high + pad], [low - pad, high + pad], color="#777777", lw=1,
                label="as promised", zorder=0,
            )  # fmt: skip
        axes.set_xlabel("promised: gain over the calibration's base level, σ")
        axes.set_ylabel("realised, σ")
        axes.grid(True)
        axes.set_axisbelow(True)
        axes.legend(loc="upper left")
        drawn(
            "Promised against realised levels of every value that a palette names, in standard "
            "deviations within a prompt, with 95 % intervals. On the diagonal, what was promised "
            "is what was served."
        )
    return drawn.svg


def error_plot(palette: Json) -> str:
    """Return realised minus asked by value and method."""
    values = list(palette["asked"])
    methods = [name for name in _usable(palette) if name != "base"]
    height = 1.1 + len(values) * (0.22 * len(methods) + 0.18)
    with _figure(6.4, height) as (figure, drawn):
        axes = figure.add_subplot()
        for k, name in enumerate(methods):
            colour, marker, _ = _STYLE[name]
            delivered = [palette["methods"][name]["delivered"][value] for value in values]
            offset = (k - (len(methods) - 1) / 2) * 0.8 / len(methods)
            axes.errorbar(
                [one["error_sigma"] for one in delivered],
                [i + offset for i in range(len(values))],
                xerr=[one["half_width_sigma"] for one in delivered],
                fmt=marker, color=colour, markersize=5, capsize=2, elinewidth=1,
                label=LABELS[name],
            )  # fmt: skip
        axes.axvline(0, color="#333333", lw=1)
        axes.set_yticks(range(len(values)), values)
        axes.set_ylim(len(values) - 0.5, -0.5)
        for i in range(1, len(values)):
            axes.axhline(i - 0.5, color="#dddddd", lw=0.8)
        axes.set_xlabel("realised - asked, σ (negative: a shortfall)")
        axes.grid(True, axis="x")
        axes.set_axisbelow(True)
        figure.legend(loc="outside upper center", ncols=len(methods), columnspacing=1.2)
        drawn(
            "How far each value's realised level is from what was asked, by method, with 95 % "
            "intervals; the table below has the numbers."
        )
    return drawn.svg


def radar_plot(values: Sequence[str], palette: Json) -> str:
    """Return the gain of every value over the base model by method; a ring marks the base."""
    with _figure(6.4, 5.4) as (figure, drawn):
        axes: Any = figure.add_subplot(projection="polar")
        angles = [2 * math.pi * i / len(values) for i in range(len(values))]
        low = high = 0.0
        for name in _usable(palette):
            colour, marker, line = _STYLE[name]
            gains = palette["methods"][name]["gains_sigma"]
            radii = [gains[value]["mean"] for value in values]
            low, high = min(low, *radii), max(high, *radii)
            axes.plot(
                [*angles, angles[0]], [*radii, radii[0]], color=colour, marker=marker,
                markersize=4, lw=1.6, linestyle=line, label=LABELS[name],
            )  # fmt: skip
        span = max(high - low, 0.2)
        rim = high + 0.05 * span
        axes.set_rlim(low - 0.35 * span, rim)
        axes.set_theta_offset(math.pi / 2)
        axes.set_theta_direction(-1)
        axes.set_xticks(angles, [""] * len(values))
        for value, angle in zip(values, angles, strict=True):
            # The layout makes room for texts, and not for the labels of a round axis.
            across, up = math.sin(angle), math.cos(angle)
            axes.text(
                angle, rim + 0.08 * span, value,
                ha="center" if abs(across) < 0.1 else ("left" if across > 0 else "right"),
                va="center" if abs(up) < 0.3 else ("bottom" if up > 0 else "top"),
            )  # fmt: skip
        # Between two spokes, where no line has a corner.
        axes.set_rlabel_position(180 / len(values))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.tick_params(axis="y", labelsize=8, labelcolor="#333333")
        for label in axes.get_yticklabels():
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.75})
        axes.spines["polar"].set_visible(False)
        figure.legend(loc="outside lower center", ncols=3, columnspacing=1.2)
        drawn(
            "Radar chart: gain of every value over the base model by method, in standard "
            "deviations within a prompt, further out is more; free values are there too."
        )
    return drawn.svg


def tradeoff_plot(palette: Json) -> str | None:
    """Return the trade-off curves of the palette's pairs of values; None where there are none."""
    curves = [curve for curve in palette["frontiers"] if curve["limit"]]
    if not curves:
        return None
    n = len(curves)
    with _figure(min(4.6 * n, 10.5) if n > 1 else 6.4, 4.4) as (figure, drawn):
        for k, curve in enumerate(curves):
            axes = figure.add_subplot(1, n, k + 1)
            _curve(axes, curve, palette)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=4 if n > 1 else 3,
            columnspacing=1.2,
        )  # fmt: skip
        pairs = "; ".join(" and ".join(curve["values"]) for curve in curves)
        drawn(
            f"Trade-off of {pairs}: the limit of what a choice among the candidates reaches, what "
            "can be had at the palette's own KL, and where each method came out, with 95 % "
            "intervals."
        )
    return drawn.svg


def _curve(axes: Axes, curve: Json, palette: Json) -> None:
    first, second = curve["values"]
    for key, colour, line, label in (
        ("limit", "#333333", "-", "Pareto limit"),
        ("at_kl", "#0072B2", "--", "at the palette's KL"),
    ):
        if curve[key]:
            x, y = zip(*curve[key], strict=True)
            marker = "." if len(x) == 1 else ""
            axes.plot(x, y, color=colour, lw=1.4, linestyle=line, marker=marker, label=label)
    for name in _usable(palette):
        colour, marker, _ = _STYLE[name]
        levels = palette["methods"][name]["levels"]
        a, b = levels[first], levels[second]
        axes.errorbar(
            a["mean"], b["mean"], xerr=(a["high"] - a["low"]) / 2, yerr=(b["high"] - b["low"]) / 2,
            fmt=marker, color=colour, markersize=6, capsize=2, elinewidth=1, label=LABELS[name],
        )  # fmt: skip
    axes.locator_params(axis="x", nbins=5)
    less = {value: " (less is wanted)" for value, sense in palette["senses"].items() if sense < 0}
    axes.set_xlabel(first + less.get(first, ""))
    axes.set_ylabel(second + less.get(second, ""))
    axes.grid(True)
    axes.set_axisbelow(True)


def _promised(report: Json, method: str) -> Iterator[tuple[float, float, float]]:
    """Yield promised and realised gain over the base and half of its interval, in σ."""
    for palette in report["palettes"]:
        figures = palette["methods"][method]
        if figures["reason"] is not None:
            continue
        for value in palette["asked"]:
            sigma, base = report["within_std"][value], report["base"][value]["calibration"]
            level = figures["levels"][value]
            yield (
                (palette["promised"][value]["level"] - base) / sigma,
                (level["mean"] - base) / sigma,
                figures["delivered"][value]["half_width_sigma"],
            )


def _usable(palette: Json) -> list[str]:
    return [name for name, figures in palette["methods"].items() if figures["reason"] is None]


class _Drawn:
    """Takes the description of a figure and holds its SVG."""

    def __init__(self) -> None:
        self.description = ""
        self.svg = ""

    def __call__(self, description: str) -> None:
        self.description = description


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Figure, _Drawn]]:
    """Give a figure to draw on; its SVG is there at the end. Inches."""
    with mpl.rc_context(_RC):
        figure, drawn = Figure(figsize=(width, height), layout="constrained"), _Drawn()
        yield figure, drawn
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg ") :]
    title = escape(drawn.description)
    head, rest = text[: text.index(">")], text[text.index(">") + 1 :]
    drawn.svg = f'{head} role="img" aria-label="{title}"><title>{title}</title>{rest}'
