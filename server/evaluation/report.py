"""The report of an evaluation: one JSON-safe object with everything that was found."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from server.calibration import Calibration
from server.evaluation.collecting import Collected
from server.evaluation.comparing import Comparison, base_levels
from server.evaluation.methods import METHODS
from server.promise import Promise
from server.schemas import PaletteOptions
from server.version import VERSION

Json = dict[str, Any]

# Raised when a field of the report changes its meaning or goes away.
FORMAT = 1


def make_report(
    asked: Sequence[PaletteOptions],
    promises: Sequence[Promise],
    calibration: Calibration,
    collected: Collected,
    *,
    model: str,
    n_candidates: int,
    seed: int,
    watches: Mapping[str, str],
    warnings: Sequence[str] = (),
    frontiers: Sequence[Sequence[Json]] = (),
) -> Json:
    """Return everything that was found; texts are not in it.

    Parameters
    ----------
    asked, promises : sequence
        Of each palette.
    calibration : Calibration
        Behind the promises.
    collected : Collected
    model : str
    n_candidates, seed : int
        Of the collection.
    watches : mapping of str to str
        Value to column, in the order of `Collected.watched`.
    warnings : sequence of str
        What the calibration does not cover.
    frontiers : sequence
        Of each palette, its trade-off curves.
    """
    pilot = calibration.pilot
    palettes = []
    for k, (options, promise) in enumerate(zip(asked, promises, strict=True)):
        figures = Comparison(promise, pilot, collected, list(watches.items())).to_dict()
        head = {
            "name": f"palette {k + 1}",
            "palette": options.model_dump(mode="json", exclude_defaults=True),
            "text": told(options),
        }
        palettes.append(head | figures | {"frontiers": list(frontiers[k]) if frontiers else []})
    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "palette_version": VERSION,
        "model": model,
        "prompts": {
            "evaluated": len(collected.rewards),
            "different": len(set(collected.cluster.tolist())),
            "refused": collected.n_refused,
            "incomplete": collected.n_incomplete,
        },
        "candidates": n_candidates,
        "seed": seed,
        "confidence": 0.95,
        "calibration": {
            "id": calibration.id,
            "prompts": pilot.n_prompts,
            "candidates": pilot.n_candidates,
            "warnings": list(warnings),
        },
        "values": list(pilot.values),
        "within_std": dict(zip(pilot.values, pilot.scale.tolist(), strict=True)),
        "base": base_levels(pilot, collected.rewards, collected.cluster),
        "palettes": palettes,
        "navigation_efficiency": navigation_efficiency(palettes),
        "diversity_left_out": (
            None
            if collected.texts is not None
            else "an earlier run sampled some of the candidates without --keep-texts"
        ),
    }


def navigation_efficiency(palettes: Sequence[Json]) -> Json:
    """Return, by method, the share of palettes whose named values all improve on the base model.

    MAP (arXiv 2410.19198, section 4) counts settings this way, once by expected reward and once by
    win rate. A method that cannot be used for a palette does not improve anything there.
    """
    found = {}
    for method in METHODS[1:]:
        figures = [palette["methods"][method] for palette in palettes]
        found[method] = {
            "by_reward": _share(one.get("better_on_all_by_reward", False) for one in figures),
            "by_wins": _share(one.get("better_on_all_by_wins", False) for one in figures),
            "palettes": len(figures),
        }
    return found


def told(options: PaletteOptions) -> str:
    """Return a palette in one short line."""
    parts = []
    for name, target in options.targets.items():
        if isinstance(target, dict) and target:
            kind, number = next(iter(target.items()))
            of = " of traffic" if target.get("of") == "traffic" else ""
            parts.append(f"{name} {str(kind).replace('_', ' ')} {json.dumps(number)}{of}")
        else:
            parts.append(f"{name} {target}")
    parts += [f"{name} floor {floor:g}" for name, floor in options.floors.items()]
    if options.max_kl is not None:
        parts.append(f"KL at most {options.max_kl:g}")
    return ", ".join(parts) or "nothing asked"


def _share(are: Iterable[bool]) -> float:
    found = list(are)
    return sum(found) / len(found) if found else 0.0
