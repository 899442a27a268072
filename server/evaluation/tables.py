"""What a report looks like to people: tables and sentences, in a terminal and on a page alike."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server import terminal

Json = dict[str, Any]

LABELS: Mapping[str, str] = {
    "base": "base model",
    "palette": "palette",
    "best_of_n": "best of N",
    "fixed_weights": "fixed weights",
    "paper": "paper's λ",
}


@dataclass(frozen=True, slots=True)
class Table:
    """Headings and rows of text; a row that is shorter ends with a remark."""

    caption: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def print_report(report: Json) -> None:
    """Print the tables of each palette, and what to know about them."""
    out = terminal.results
    out.print(head_text(report), soft_wrap=True, markup=False)
    for warning in warnings_of(report):
        out.print(f"warning: {warning}", soft_wrap=True, markup=False)
    for palette in report["palettes"]:
        title = f"\n{palette['name']}: {palette['text']}; N = {palette['candidates']}"
        out.print(title, style="bold", soft_wrap=True, markup=False)
        for text in told_status(palette):
            out.print(text, soft_wrap=True, markup=False)
        for make in (levels_table, errors_table, methods_table):
            out.print()
            _print(make(palette))
        for text in told_watches(palette):
            out.print(f"warning: {text}", soft_wrap=True, markup=False)
    if len(report["palettes"]) > 1:
        out.print()
        _print(navigation_table(report))
    out.print()
    for note in notes_of(report):
        out.print(note, soft_wrap=True, markup=False)


def head_text(report: Json) -> str:
    """Return what was evaluated, in a sentence."""
    prompts, calibration = report["prompts"], report["calibration"]
    left_out = ""
    if prompts["refused"] or prompts["incomplete"]:
        left_out = f" ({prompts['refused']} refused, {prompts['incomplete']} incomplete)"
    return (
        f"{prompts['evaluated']} prompts{left_out} x {report['candidates']} candidates of "
        f"{report['model']}; calibration {calibration['id']} of {calibration['prompts']} prompts; "
        "intervals are 95 %; σ is the standard deviation within a prompt"
    )


def warnings_of(report: Json) -> list[str]:
    """Return what speaks against the figures as a whole."""
    found = list(report["calibration"]["warnings"])
    found += [
        f"the base model's {value} is {one['shift_sigma']:+.3f} ± {one['half_width_sigma']:.3f} σ "
        "from the calibration's: these prompts are of another kind, and promises are off by as much"
        for value, one in report["base"].items()
        if one["is_shifted"]
    ]
    return found


def told_status(palette: Json) -> list[str]:
    """Return a sentence where other levels than the palette's own are served and compared."""
    found = []
    if palette["repair"] is not None:
        served = json.dumps(palette["served_palette"]["targets"])
        found.append(f"It cannot be had with so many candidates; served and compared is {served}.")
    if palette["limited_by"] is not None:
        found.append(
            f"Its {palette['limited_by']} stops it {palette['fraction']:.0%} of the way from the "
            "base model to what it names; what it asks for below is that far."
        )
    return found


def told_watches(palette: Json) -> list[str]:
    """Return a sentence for every value whose watch parts ways with it."""
    return [
        f"{LABELS[name]}: {value} improves while its watch {one['column']} gets worse "
        f"({one['gain_sigma']:+.2f} ± {one['half_width_sigma']:.2f} σ): the reward is being "
        "exploited"
        for name, figures in palette["methods"].items()
        for value, one in figures.get("watched", {}).items()
        if one["parts_ways"]
    ]


def notes_of(report: Json) -> list[str]:
    """Return how to read the tables."""
    notes = [
        "Realised levels are expectations given the candidates, Σ w r, so the draw adds no noise. "
        "The palette's intervals have the error of these prompts and that of the calibration, "
        "which promised the level; the other methods promise nothing, and theirs have that of "
        "these prompts alone. An error is 0 where nothing binds and nothing lacks; ! marks one "
        "whose interval does not hold what was asked.",
        "Wins: the chance that the served answer beats a fresh one of the base model. "
        "Improved: prompts on which every value that the palette wants more or less of is better "
        "than the base model's. KL in nats, of at most log N. Tokens and words are means of an "
        "answer: spent on all candidates, and served. Fixed weights: one weight for all, as "
        "strong as costs the palette's KL on the calibration. Paper's λ: MAP's pooled dual at "
        "N = infinity on one answer a prompt, solved exactly, for the same levels.",
    ]
    if len(report["palettes"]) > 1:
        notes.append(
            "Navigation efficiency, after MAP: the share of palettes whose values all improve on "
            "the base model, by mean reward, and by the chance of more than a half to beat it."
        )
    if report["diversity_left_out"]:
        notes.append(f"Diversity is left out: {report['diversity_left_out']}.")
    else:
        notes.append(
            "Diversity is that of one answer a prompt, drawn as the server draws: dist-2, the "
            "share of distinct bigrams (high is varied), self-BLEU-4 (high is monotonous)."
        )
    return notes


def levels_table(palette: Json) -> Table:
    """Return asked, promised and realised levels of the palette, reward units."""
    figures = palette["methods"]["palette"]
    rows: list[tuple[str, ...]] = []
    for value, ends in palette["asked"].items():
        promised = palette["promised"][value]
        head = (value, _asked(ends), f"{promised['level']:.4g} ± {1.96 * promised['stderr']:.2g}")
        if figures["reason"] is not None:
            rows.append((*head, figures["reason"]))
            continue
        level, gain = figures["levels"][value], figures["gains_sigma"][value]
        watch = figures.get("watched", {}).get(value)
        rows.append(
            (
                *head,
                f"{level['mean']:.4g} ± {(level['high'] - level['low']) / 2:.2g}",
                f"{gain['mean']:+.3f} ± {(gain['high'] - gain['low']) / 2:.3f}",
                f"{figures['win_rate'][value]['mean']:.0%}",
                "" if watch is None else _error(watch, "gain_sigma"),
            )
        )
    columns = ["value", "asked", "promised", "realised", "gain, σ", "wins", "watch's gain, σ"]
    if not any(len(row) == len(columns) and row[-1] for row in rows):
        del columns[-1]
        rows = [row[: len(columns)] for row in rows]
    return Table("Levels, reward units", tuple(columns), rows)


def errors_table(palette: Json) -> Table:
    """Return realised minus asked by method and value, σ."""
    values = list(palette["asked"])
    rows: list[tuple[str, ...]] = []
    for name, figures in palette["methods"].items():
        if figures["reason"] is not None:
            rows.append((LABELS[name], figures["reason"]))
            continue
        delivered = figures["delivered"]
        marks = {value: "  " if delivered[value]["as_asked"] else " !" for value in values}
        rows.append(
            (
                LABELS[name],
                *(_error(delivered[value], "error_sigma") + marks[value] for value in values),
            )
        )
    return Table("Realised minus asked, σ", ("method", *values), rows)


def methods_table(palette: Json) -> Table:
    """Return what each method costs and does beside the levels."""
    columns = [
        "method", "improved", "KL", "ESS", "spent", "served", "words", "dist-2", "self-BLEU",
    ]  # fmt: skip
    usable = [one for one in palette["methods"].values() if one["reason"] is None]
    has_refused = any(one["refused"] for one in usable)
    if has_refused:
        columns.append("refused")
    rows: list[tuple[str, ...]] = []
    for name, figures in palette["methods"].items():
        if figures["reason"] is not None:
            rows.append((LABELS[name], figures["reason"]))
            continue
        spoken = figures["diversity"] or {}
        better = figures["prompts_better_on_all"]
        diversity = (spoken.get(key) for key in ("distinct_2", "self_bleu"))
        row = (
            LABELS[name],
            f"{better['share']:.0%} ({100 * better['low']:.0f}-{100 * better['high']:.0f})",
            f"{figures['kl']:.3f}",
            f"{figures['ess']:.1f}",
            f"{figures['tokens_spent']:.0f}",
            f"{figures['tokens_served']:.1f}",
            f"{figures['words_served']:.1f}",
            *("-" if number is None else f"{number:.3f}" for number in diversity),
        )
        rows.append((*row, f"{figures['refused']:.1%}") if has_refused else row)
    bound = next((f", log N = {one['kl_bound']:.2f}" for one in usable), "")
    return Table(f"Cost and side effects{bound}", tuple(columns), rows)


def navigation_table(report: Json) -> Table:
    """Return the share of palettes that improve all their values, by method."""
    rows = [
        (LABELS[name], f"{one['by_reward']:.0%}", f"{one['by_wins']:.0%}", str(one["palettes"]))
        for name, one in report["navigation_efficiency"].items()
    ]
    return Table(
        "Navigation efficiency",
        ("method", "by reward", "by win rate", "of"),
        rows,
    )


def base_table(report: Json) -> Table:
    """Return the base model's levels on these prompts and on the calibration's."""
    rows = [
        (
            value,
            f"{one['level']:.4g} ± {1.96 * one['stderr']:.2g}",
            f"{one['calibration']:.4g}",
            _error(one, "shift_sigma") + (" !" if one["is_shifted"] else "  "),
        )
        for value, one in report["base"].items()
    ]
    return Table(
        "Base model: these prompts and the calibration's",
        ("value", "here", "calibration", "difference, σ"),
        rows,
    )


def _print(table: Table) -> None:
    whole = [row for row in table.rows if len(row) == len(table.columns)]
    terminal.print_table(table.columns, whole, title=table.caption)
    for row in table.rows:
        if len(row) < len(table.columns):
            terminal.results.print(f"{row[0]}: {row[-1]}", soft_wrap=True, markup=False)


def _error(one: Json, key: str) -> str:
    return f"{one[key]:+.3f} ±{one['half_width_sigma']:.3f}"


def _asked(ends: Sequence[float | None]) -> str:
    low, high = ends
    if low is None:
        return f"<= {high:.4g}"
    return f">= {low:.4g}" if high is None else f"{low:.4g} to {high:.4g}"
