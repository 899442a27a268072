"""The report: its form, its figures, and that the page says what the tables say and no more."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import functools
import html
import json
import math
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from server import terminal
from server.evaluation import plots, tables
from server.evaluation.collecting import Collected
from server.evaluation.comparing import Comparison
from server.evaluation.job import curves, promised
from server.evaluation.measures import quantile_of
from server.evaluation.methods import METHODS
from server.evaluation.page import make_page
from server.evaluation.report import make_report, navigation_efficiency, told
from server.promise import InfeasiblePaletteError, Promise
from server.schemas import PaletteOptions
from server.settings import load_settings
from solver import Palette, PaletteError, PilotSet, solve, tilt
from tests.server.conftest import fake_calibration, run_fake
from tests.server.evaluation.conftest import collected_by
from tests.server.questions import prompts_of

N = 8
PALETTES = [
    PaletteOptions(targets={"words": {"at_most": 9.0}, "variety": "keep"}),
    PaletteOptions(
        targets={"words": {"gain": 0.3}, "variety": {"between": [0.65, 0.72]}}, candidates=4
    ),
    PaletteOptions(floors={"words": 18}, targets={"log_likelihood": {"gain": 0.1}}),
]
LEVEL = {"mean", "low", "high"}
METHOD_FIELDS = {
    "reason", "multipliers", "levels", "gains", "gains_sigma", "win_rate", "delivered",
    "prompts_better_on_all", "better_on_all_by_reward", "better_on_all_by_wins", "kl", "kl_bound",
    "ess", "refused", "tokens_spent", "tokens_served", "words_served", "diversity",
}  # fmt: skip
PALETTE_FIELDS = {
    "name", "palette", "text", "status", "served_palette", "candidates", "asked", "senses",
    "promised", "repair", "limited_by", "fraction", "methods", "frontiers",
}  # fmt: skip
REPORT_FIELDS = {
    "format", "created", "palette_version", "model", "prompts", "candidates", "seed", "confidence",
    "calibration", "values", "within_std", "base", "palettes", "navigation_efficiency",
    "diversity_left_out",
}  # fmt: skip


@functools.cache
def made_once():
    """Return promises, the collected candidates and the report, made once."""

    async def make():
        with tempfile.TemporaryDirectory() as folder:
            settings = load_settings(state_dir=Path(folder) / "state", calibrate_at_start=False)
            async with run_fake(Path(folder), settings) as running:
                aligner = running.context.aligner
                promises = await promised(aligner, PALETTES, N)
                prompts = prompts_of(*(f"Secret question {i}" for i in range(60)))
                collected = await collected_by(
                    aligner, Path(folder) / "c.jsonl", prompts, n_candidates=N
                )
        return promises, collected, report_of(PALETTES, promises, collected)

    with ThreadPoolExecutor(1) as pool:  # a loop of its own, whatever loop the test has
        return pool.submit(asyncio.run, make()).result()


@pytest.fixture
def made():
    promises, collected, report = made_once()
    return promises, collected, copy.deepcopy(report)


def report_of(asked, promises, collected, watches=None):
    return make_report(
        asked, promises, fake_calibration(), collected, model="fake", n_candidates=N, seed=0,
        watches=watches or {},
        frontiers=[curves(promise, fake_calibration()) for promise in promises],
    )  # fmt: skip


def test_form(made):
    """Whoever reads report.json relies on these names: one may be added, none renamed."""
    _, _, report = made
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert set(report) == REPORT_FIELDS
    assert report["format"] == 1
    assert set(report["prompts"]) == {"evaluated", "different", "refused", "incomplete"}
    assert set(report["calibration"]) == {"id", "prompts", "candidates", "warnings"}
    for base in report["base"].values():
        assert set(base) == {
            "level", "stderr", "calibration", "shift_sigma", "half_width_sigma", "is_shifted"
        }  # fmt: skip
    for palette in report["palettes"]:
        assert set(palette) == PALETTE_FIELDS
        assert tuple(palette["methods"]) == METHODS
        for curve in palette["frontiers"]:
            assert set(curve) == {"values", "max_kl", "limit", "at_kl"}
        for method in palette["methods"].values():
            assert set(method) == METHOD_FIELDS
            assert set(method["levels"]) == set(report["values"])
            assert set(method["levels"]["words"]) == LEVEL
            assert set(method["diversity"]) == {"distinct_1", "distinct_2", "self_bleu"}
            assert set(method["delivered"]) == set(palette["asked"])
            for one in method["delivered"].values():
                assert set(one) == {"error_sigma", "half_width_sigma", "binds", "as_asked"}
    for name in METHODS[1:]:
        assert set(report["navigation_efficiency"][name]) == {"by_reward", "by_wins", "palettes"}


def test_figures_are_those_of_a_plain_loop(made):
    """Levels, KL, ESS and lengths once more, prompt by prompt, with the solver's own functions."""
    promises, collected, report = made
    promise, figures = promises[0], report["palettes"][0]["methods"]["palette"]
    scale = fake_calibration().pilot.scale
    levels, costs, lengths, base = [], [], [], []
    for rewards, tokens, words in zip(
        collected.rewards, collected.tokens, collected.words, strict=True
    ):
        logs = tilt.log_weights(promise.multipliers, rewards)
        levels.append(tilt.expected(logs, rewards))
        costs.append([tilt.kl(logs), tilt.ess(logs)])
        lengths.append([np.exp(logs) @ tokens, np.exp(logs) @ words])
        base.append(rewards.mean(axis=0))
    levels, base = np.array(levels), np.array(base)
    n = len(levels)
    error = levels.std(axis=0, ddof=1) / math.sqrt(n)
    gain, gain_error = (levels - base).mean(axis=0), (levels - base).std(axis=0, ddof=1)
    for i, value in enumerate(report["values"]):
        found = figures["levels"][value]
        assert found["mean"] == pytest.approx(levels[:, i].mean())
        assert found["high"] - found["mean"] == pytest.approx(quantile_of(n) * error[i])
        found = figures["gains_sigma"][value]
        assert found["mean"] == pytest.approx(gain[i] / scale[i])
        half = quantile_of(n) * gain_error[i] / math.sqrt(n) / scale[i]
        assert found["high"] - found["mean"] == pytest.approx(half)
    assert [figures["kl"], figures["ess"]] == pytest.approx(np.mean(costs, axis=0).tolist())
    assert [figures["tokens_served"], figures["words_served"]] == pytest.approx(
        np.mean(lengths, axis=0).tolist()
    )
    assert figures["tokens_spent"] == pytest.approx(N * collected.tokens.mean())
    better = (levels[:, 0] < base[:, 0]) & (levels[:, 1] > base[:, 1])
    assert figures["prompts_better_on_all"]["share"] == pytest.approx(better.mean())
    # The promise's own error is in the interval of what was delivered.
    solution = promise.solution
    both = math.hypot(error[0], solution.stderr[0])
    delivered = figures["delivered"]["words"]
    assert delivered["half_width_sigma"] == pytest.approx(quantile_of(n) * both / scale[0])
    assert delivered["error_sigma"] == pytest.approx((9.0 - levels[:, 0].mean()) / scale[0])
    other = report["palettes"][0]["methods"]["best_of_n"]["delivered"]["words"]
    assert other["half_width_sigma"] != pytest.approx(delivered["half_width_sigma"])


def test_base_is_the_base_model(made):
    _, collected, report = made
    for palette in report["palettes"]:
        base = palette["methods"]["base"]
        assert base["kl"] == pytest.approx(0.0, abs=1e-12)
        assert base["ess"] == pytest.approx(palette["candidates"])
        assert base["tokens_spent"] == base["tokens_served"]
        assert base["levels"]["words"]["mean"] == pytest.approx(collected.rewards[..., 0].mean())
        assert base["prompts_better_on_all"]["share"] == 0
        assert base["win_rate"]["words"]["mean"] == pytest.approx(0.5)


def test_served_palettes_come_as_asked(made):
    """The fake model's prompts are all of one kind: what is promised is delivered."""
    _, _, report = made
    delivered = [
        one for p in report["palettes"] for one in p["methods"]["palette"]["delivered"].values()
    ]
    assert len(delivered) == 5
    assert sum(not one["as_asked"] for one in delivered) <= 1  # 95 %
    assert not report["palettes"][0]["methods"]["base"]["delivered"]["words"]["as_asked"]


def test_floors_refuse(made):
    _, _, report = made
    served = report["palettes"][2]["methods"]
    # No candidate of 8 has 18 words or more with probability 0.85^8 = 0.27.
    assert served["palette"]["refused"] == pytest.approx(0.27, abs=0.15)
    assert served["palette"]["levels"]["words"]["low"] > 17
    assert served["best_of_n"]["refused"] == 0


def test_smaller_n_takes_all_candidates_in_groups(made):
    _, _, report = made
    assert report["palettes"][1]["candidates"] == 4
    best = report["palettes"][1]["methods"]["best_of_n"]
    assert best["kl_bound"] == pytest.approx(math.log(4))
    assert 1.2 < best["kl"] < math.log(4)  # lengths are whole numbers: ties share


def test_without_texts_there_is_no_diversity(made):
    promises, collected, _ = made
    report = report_of(PALETTES, promises, dataclasses.replace(collected, texts=None))
    assert "without --keep-texts" in report["diversity_left_out"]
    assert report["palettes"][0]["methods"]["palette"]["diversity"] is None
    assert "without --keep-texts" in make_page(report)
    assert any("without --keep-texts" in note for note in tables.notes_of(report))


def test_prompts_of_another_kind_are_told(made):
    promises, collected, report = made
    assert not any(one["is_shifted"] for one in report["base"].values())
    moved = collected.rewards + np.array([3.0, 0.0, 0.0])
    report = report_of(PALETTES, promises, dataclasses.replace(collected, rewards=moved))
    assert [value for value, one in report["base"].items() if one["is_shifted"]] == ["words"]
    (warning,) = tables.warnings_of(report)
    assert "the base model's words is +0." in warning
    assert html.escape(warning, quote=False).replace("'", "&#39;") in make_page(report)


# the watch


def synthetic(watch):
    """Return a comparison whose watch column is a function of the rewards."""
    rng = np.random.default_rng(0)
    values = ("good", "other")
    pilot = PilotSet(rng.normal(size=(100, 8, 2)), values)
    palette = Palette({"good": {"gain": 0.5}})
    solution = solve(palette, pilot, N)
    rewards = rng.normal(size=(50, N, 2))
    ones = np.ones((50, N))
    collected = Collected(
        rewards, watch(rewards[..., :1]), ones, ones, None, np.arange(50), tuple(range(50)), 0, 0
    )
    promise = Promise("met", palette, N, solution.multipliers, solution)
    return Comparison(promise, pilot, collected, [("good", "good_too")]).to_dict()


def test_exploited_reward_is_watched():
    found = synthetic(lambda good: -0.5 * good)["methods"]["palette"]["watched"]["good"]
    assert found["parts_ways"]
    assert found["column"] == "good_too"
    assert found["gain_sigma"] < -0.3


def test_watch_that_agrees_is_silent():
    rng = np.random.default_rng(1)
    found = synthetic(lambda good: good + rng.normal(size=good.shape))["methods"]
    assert not any(one["watched"]["good"]["parts_ways"] for one in found.values())
    assert found["palette"]["watched"]["good"]["gain_sigma"] > 0.2


def test_watch_that_says_nothing_is_silent():
    rng = np.random.default_rng(2)
    found = synthetic(lambda good: rng.normal(size=good.shape))["methods"]
    assert not any(one["watched"]["good"]["parts_ways"] for one in found.values())


# navigation efficiency, by hand


def test_navigation_efficiency_by_hand():
    def palette(reward, wins):
        figures = {"better_on_all_by_reward": reward, "better_on_all_by_wins": wins}
        methods = {name: {"reason": "none"} for name in METHODS}
        return {"methods": methods | {"palette": figures, "paper": figures}}

    found = navigation_efficiency(
        [palette(True, True), palette(True, False), palette(False, False)]
    )
    assert found["palette"] == {"by_reward": 2 / 3, "by_wins": 1 / 3, "palettes": 3}
    assert found["best_of_n"] == {"by_reward": 0.0, "by_wins": 0.0, "palettes": 3}
    assert "base" not in found


def test_told():
    options = PaletteOptions(
        targets={"a": {"quantile": 0.6, "of": "traffic"}, "b": "keep", "c": {"at_most": 3}},
        floors={"a": -1.5}, max_kl=2,
    )  # fmt: skip
    assert told(options) == (
        "a quantile 0.6 of traffic, b keep, c at most 3, a floor -1.5, KL at most 2"
    )
    assert told(PaletteOptions()) == "nothing asked"


async def test_levels_other_than_the_palettes_own_are_told(aligner):
    aligner.calibration = fake_calibration()
    palettes = [
        PaletteOptions(targets={"words": {"at_least": 30}}, on_infeasible="repair"),
        PaletteOptions(targets={"words": {"gain": 0.8}}, max_kl=0.1),
        PALETTES[0],
    ]
    promises = await promised(aligner, palettes, N)
    report = report_of(palettes, promises, made_once()[1])
    repaired, limited, met = (tables.told_status(palette) for palette in report["palettes"])
    assert "cannot be had" in repaired[0]
    assert re.search(r"max_kl stops it \d\d % of the way", limited[0].replace("%", " %"))
    assert met == []
    page = html.unescape(make_page(report))
    assert repaired[0] in page
    assert limited[0] in page


# curves


def test_curves_bound_what_the_palette_promises(made):
    promises, _, report = made
    (curve,) = report["palettes"][0]["frontiers"]
    assert curve["values"] == ["words", "variety"]
    expected = promises[0].solution.expected
    limit = np.array(curve["limit"])
    # Fewer words and more variety are wanted: no point of the limit is worse in both.
    assert not ((limit[:, 0] > expected[0] + 1e-6) & (limit[:, 1] < expected[1] - 1e-6)).any()
    assert len(curve["at_kl"]) > 2


# the page


def cells(report):
    for palette in report["palettes"]:
        for make in (tables.levels_table, tables.errors_table, tables.methods_table):
            for row in make(palette).rows:
                yield from row


def test_page_says_what_the_tables_say(made):
    _, _, report = made
    page = html.unescape(make_page(report))
    wanted = list(cells(report))
    assert len(wanted) > 100
    assert not [cell for cell in wanted if cell not in page]
    assert all(warning in page for warning in tables.warnings_of(report))
    assert all(note in page for note in tables.notes_of(report))


def test_page_needs_nothing_else_and_can_be_read_aloud(made):
    _, _, report = made
    page = make_page(report)
    addresses = set(re.findall(r"https?://[^\"'\s<)]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!#)', page)
    n_plots = page.count("<svg ")
    assert n_plots == 1 + 3 * 2 + 1  # one for all; errors and radar of each; one trade-off
    assert page.count('role="img" aria-label="') == page.count("<title>") - 1 == n_plots
    assert len(page) < 1_000_000


def test_nothing_holds_an_answer(made):
    _, collected, report = made
    texts = [text for own in collected.texts for text in own if text.count(" ") > 2]
    assert len(texts) > 200
    told_all = json.dumps(report) + make_page(report)
    assert "Secret" not in told_all
    assert not [text for text in texts if text in told_all]


def test_same_report_same_page(made):
    _, _, report = made
    assert make_page(report) == make_page(report)


def test_names_are_escaped(made):
    _, _, report = made
    text = json.dumps(report).replace('"words"', '"<b>wörds</b> $x_1$ & co"')
    page = make_page(json.loads(text))
    assert "<b>" not in page
    assert "&lt;b&gt;wörds&lt;/b&gt; $x_1$ &amp; co" in page
    for plot in (plots.error_plot, functools.partial(plots.radar_plot, ["<$x_1$>", "a", "b"])):
        renamed = json.dumps(report["palettes"][0]).replace('"words"', '"<$x_1$>"')
        renamed = renamed.replace('"variety"', '"a"').replace('"log_likelihood"', '"b"')
        assert "&lt;$x_1$&gt;</text>" in plot(json.loads(renamed))


def test_page_of_a_method_that_cannot_be_used(made):
    _, _, report = made
    for name in ("paper", "best_of_n", "fixed_weights"):
        report["palettes"][0]["methods"][name] = {"reason": "because of <this>"}
    page = make_page(report)
    assert page.count("because of &lt;this&gt;") == 6
    tables.print_report(report)


def test_tables_are_whole_in_80_columns(made, monkeypatch, capsys):
    _, _, report = made
    monkeypatch.setattr(terminal, "results", Console(width=80, highlight=False))
    tables.print_report(report)
    text = capsys.readouterr().out
    assert "…" not in text
    for palette in report["palettes"]:
        for make in (tables.levels_table, tables.errors_table, tables.methods_table):
            table = make(palette)
            for row in (table.columns, *table.rows):
                for cell in row:
                    assert cell.strip() in text


def test_page_of_a_palette_whose_floors_refuse_everything(made):
    _, _, report = made
    report["palettes"][0]["methods"]["palette"] = {"reason": "the floors refuse every answer"}
    assert "the floors refuse every answer" in make_page(report)
    tables.print_report(report)


async def test_palette_that_asks_for_nothing(aligner):
    aligner.calibration = fake_calibration()
    promises = await promised(aligner, [PaletteOptions()], N)
    report = report_of([PaletteOptions()], promises, made_once()[1])
    methods = report["palettes"][0]["methods"]
    assert methods["palette"]["levels"] == methods["base"]["levels"]
    assert "names no value" in methods["best_of_n"]["reason"]
    page = make_page(report)
    assert "nothing asked" in page
    assert page.count("<svg ") == 1
    tables.print_report(report)


# palettes that cannot be evaluated


@pytest.mark.parametrize(
    ("palette", "error", "words"),
    [
        (PaletteOptions(scope="answer"), PaletteError, "scope"),
        (PaletteOptions(deadline_ms=5.0), PaletteError, "deadline_ms"),
        (PaletteOptions(candidates=9), PaletteError, "raise --candidates"),
        (PaletteOptions(targets={"words": {"at_least": 30}}), InfeasiblePaletteError, "no choice"),
    ],
)
async def test_palette_that_cannot_be_evaluated(aligner, palette, error, words):
    aligner.calibration = fake_calibration()
    with pytest.raises(error, match=f"palette 2: .*{words}"):
        await promised(aligner, [PaletteOptions(), palette], N)


async def test_more_candidates_than_the_calibration_has(aligner):
    from solver import PilotError

    aligner.calibration = fake_calibration()
    with pytest.raises(PilotError, match="calibrate with more candidates"):
        await promised(aligner, [PALETTES[0]], 64)
