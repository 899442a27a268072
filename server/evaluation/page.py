"""The report as one page that needs nothing but itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from server.evaluation import plots, tables

Json = dict[str, Any]


def make_page(report: Json) -> str:
    """Return the HTML of a report: its tables, and plots as SVG in the page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = [
        {
            "palette": palette,
            "tables": [
                tables.levels_table(palette),
                tables.errors_table(palette),
                tables.methods_table(palette),
            ],
            "status": tables.told_status(palette),
            "warnings": tables.told_watches(palette),
            "plots": _plots(report, palette),
        }
        for palette in report["palettes"]
    ]
    overview = None
    if any(palette["asked"] for palette in report["palettes"]):
        overview = _svg(plots.delivery_plot(report))
    return environment.get_template("page.html").render(
        report=report,
        head=tables.head_text(report),
        warnings=tables.warnings_of(report),
        overview=overview,
        base=tables.base_table(report),
        navigation=tables.navigation_table(report),
        notes=tables.notes_of(report),
        sections=sections,
    )


def _plots(report: Json, palette: Json) -> list[tuple[str, Markup]]:
    """Return captions and plots of one palette."""
    found = []
    if palette["methods"]["palette"]["reason"] is not None:
        return []
    if palette["asked"]:
        found.append(("Delivered against asked", _svg(plots.error_plot(palette))))
    if len(report["values"]) > 2:
        radar = plots.radar_plot(report["values"], palette)
        found.append(("Gain over the base model, all values, σ", _svg(radar)))
    tradeoff = plots.tradeoff_plot(palette)
    if tradeoff is not None:
        found.append(("Trade-offs, reward units, the rest of the palette held", _svg(tradeoff)))
    return found


def _svg(text: str) -> Markup:
    # matplotlib escapes what it writes, and `plots` escapes the description.
    return Markup(text)
