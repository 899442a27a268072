"""Scorers of one's own: what is run, what is refused, and what a failure tells."""

from __future__ import annotations

import sys
import textwrap

import numpy as np
import pytest

from rewards import RewardConfigError, RewardModelError, Sample, ScoringError, load_rewards
from tests.rewards.fakes import sample

MODULE = "own_scorer_under_test"
CODE = """
import functools
import numpy as np

SECRETS = []

def length(samples, factor=1.0):
    if any("raise" in one.answer for one in samples):
        raise ValueError("cannot score " + samples[0].answer)
    if any("exit" in one.answer for one in samples):
        raise SystemExit("bye")
    return [factor * len(one.answer) for one in samples]

def table(samples):
    return np.array([[len(one.answer), -1] for one in samples])

def odd(samples, give):
    n = len(samples)
    if samples[0].answer == "Paris.":  # the trial run
        return [0.0] * n
    return {
        "few": [1.0] * (n - 1), "nan": [float("nan")] * n, "text": ["3"] * n, "none": None,
        "scalar": 1.0, "deep": [[[1.0]]] * n, "empty": [[]] * n, "ragged": [[1], [1, 2]],
        "complex": [1j] * n, "huge": [10 ** 400] * n,
    }[give]

def fluency(samples):
    return [sum(one.token_logprobs) for one in samples]

def always_wrong(samples):
    return [1.0]

async def later(samples):
    return [1.0]

@functools.wraps(length)
def wrapped(samples):
    return length(samples)

number = 3
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Return a function that loads a file with one scorer of the module, and a lexical one."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(entry_point, extra="trust_code: true", code=CODE):
        for name in [name for name in sys.modules if name.split(".")[0] == MODULE]:
            monkeypatch.delitem(sys.modules, name)
        (tmp_path / f"{MODULE}.py").write_text(textwrap.dedent(code))
        path = tmp_path / "rewards.yaml"
        path.write_text(
            "version: 1\nscorers:\n"
            f"  own: {{kind: python, entry_point: '{entry_point}', {extra}}}\n"
            "  near: {kind: lexical, measure: words}\n"
            "values: {liked: {from: own}, words: {from: near}}\n"
        )
        return load_rewards(path)

    # Two modules of one name and size within a second would share a cached compilation.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield make
    sys.modules.pop(MODULE, None)


@pytest.mark.parametrize(
    ("function", "extra", "expected"),
    [
        ("length", "", [[3, 1], [5, 1]]),
        ("length", "options: {factor: -2}", [[-6, 1], [-10, 1]]),
        ("table", "index: 0", [[3, 1], [5, 1]]),
        ("table", "index: 1", [[-1, 1], [-1, 1]]),
        ("wrapped", "", [[3, 1], [5, 1]]),
    ],
)
async def test_scores(function, extra, expected, load):
    async with load(f"{MODULE}:{function}", f"trust_code: true, {extra}") as suite:
        scores = await suite.score([sample("one"), sample("other")])
        assert suite.text_only_names == ("liked", "words")
    np.testing.assert_array_equal(scores, expected)


@pytest.mark.parametrize("extra", ["", "trust_code: false"])
def test_code_is_not_run_unless_trusted(extra, load, tmp_path):
    code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n{CODE}"
    with pytest.raises(RewardConfigError, match=r"yaml:3: .*trust_code: true"):
        load(f"{MODULE}:length", extra, code)
    assert MODULE not in sys.modules
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("entry_point", ["length", "a:", ":b", "a b:c", "../a:b", "a:b.c", "a:b:c"])
def test_what_is_no_entry_point(entry_point, load):
    with pytest.raises(RewardConfigError, match="is module:function"):
        load(entry_point)


@pytest.mark.parametrize(
    ("entry_point", "extra", "problem"),
    [
        ("no_such_module_x:score", "", "no module no_such_module_x; install it.*PYTHONPATH"),
        (f"{MODULE}.inner:score", "", f"no module {MODULE}.inner"),
        (f"{MODULE}:lenght", "", "has no lenght; did you mean 'length'"),
        (f"{MODULE}:number", "", "plain function"),
        (f"{MODULE}:later", "", "plain function"),
        (f"{MODULE}:length", "options: {factr: 1}", "factr.*correct the options"),
        (f"{MODULE}:odd", "", "'give'.*correct the options"),
        (f"{MODULE}:table", "", "trial run failed.*2 columns; choose an index"),
        (f"{MODULE}:table", "index: 2", "2 columns, index is 2"),
        (f"{MODULE}:always_wrong", "", r"trial run failed.*shape \(1,\) for 2 samples"),
        (f"{MODULE}:fluency", "", r"trial run failed.*TypeError \(own_scorer_under_test.py:\d+\)"),
    ],
)  # fmt: skip
async def test_what_does_not_start(entry_point, extra, problem, load):
    with pytest.raises(RewardModelError, match=rf"(?s)'own' \(feeds liked\).*{problem}"):
        await load(entry_point, f"trust_code: true, {extra}").start()


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import no_such_module_y", "needs the module no_such_module_y; install that"),
        ("def broken(:", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit"),
    ],
)
async def test_a_module_that_cannot_be_imported(code, problem, load):
    with pytest.raises(RewardModelError, match=problem):
        await load(f"{MODULE}:length", code=code).start()


@pytest.mark.parametrize(
    ("give", "problem"),
    [
        ("few", r"shape \(1,\) for 2 samples"),
        ("nan", "not finite"),
        ("text", "list, not one number"),
        ("none", r"shape \(\)|not one number"),
        ("scalar", r"shape \(\) for 2"),
        ("deep", r"shape \(2, 1, 1\)"),
        ("empty", r"shape \(2, 0\)"),
        ("ragged", "not one number"),
        ("complex", "not one number"),
        ("huge", "not one number"),
    ],
)
async def test_wrong_numbers(give, problem, load):
    async with load(f"{MODULE}:odd", f"trust_code: true, options: {{give: {give}}}") as suite:
        with pytest.raises(
            ScoringError, match=rf"'own' \(feeds liked\): {MODULE}:odd: .*{problem}"
        ):
            await suite.score([sample("one"), sample("other")])


@pytest.mark.parametrize(
    ("answer", "kind"), [("raise secret", "ValueError"), ("exit", "SystemExit")]
)
async def test_a_failure_tells_where_and_not_what(answer, kind, load):
    async with load(f"{MODULE}:length") as suite:
        with pytest.raises(ScoringError, match=rf"raised {kind} \({MODULE}.py:\d+\)") as caught:
            await suite.score([sample(answer)])
        assert "secret" not in str(caught.value)
        assert caught.value.__cause__ is None
        np.testing.assert_array_equal(
            await suite.score([sample(answer)], ["words"]), [[len(answer.split())]]
        )
        np.testing.assert_array_equal(await suite.score([sample("good")]), [[4, 1]])


async def test_logprobs(load):
    async with load(f"{MODULE}:fluency", "trust_code: true, needs_logprobs: true") as suite:
        assert suite.text_only_names == ("words",)
        scores = await suite.score([Sample((), "x", (-1.0, -0.5))], ["liked"])
        np.testing.assert_array_equal(scores, [[-1.5]])
        with pytest.raises(ScoringError, match="use a backend that reports them"):
            await suite.score([sample("x")])


async def test_the_fingerprint_sees_code_and_options(load):
    prints = []
    for entry, extra, code in (
        ("length", "", CODE),
        ("length", "", CODE),
        ("wrapped", "", CODE),
        ("length", "options: {factor: 2}", CODE),
        ("length", "", f"{CODE}\n# changed"),
    ):
        async with load(f"{MODULE}:{entry}", f"trust_code: true, {extra}", code) as suite:
            prints.append(suite.fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4


async def test_the_fingerprint_sees_the_module_that_defines_the_function(load, tmp_path):
    prints = []
    for code in ("def score(samples):\n    return [1] * len(samples)\n",) * 2:
        (tmp_path / "own_scorer_home.py").write_text(f"{code}# {len(prints)}\n")
        sys.modules.pop("own_scorer_home", None)
        entry = load(f"{MODULE}:score", code="from own_scorer_home import score")
        async with entry as suite:
            prints.append(suite.fingerprint)
    sys.modules.pop("own_scorer_home")
    assert prints[0] != prints[1]


async def test_the_function_cannot_change_scores_afterwards(load):
    code = """
    import numpy as np
    KEPT = np.zeros(2)
    def score(samples):
        KEPT[:] += 1
        return KEPT[: len(samples)]
    """
    async with load(f"{MODULE}:score", code=code) as suite:
        first = suite._scorers["own"].score([sample("a")])
        suite._scorers["own"].score([sample("b")])
    np.testing.assert_array_equal(first, [2.0])
