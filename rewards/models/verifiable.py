"""Checks of an answer that a program can decide: no model, the same everywhere."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jsonschema_rs
import numpy as np
import regex
from typing_extensions import override

from rewards.base import DirectScorer, FloatArray, Sample
from rewards.config import (
    JsonSchemaCheckConfig,
    NumberCheckConfig,
    RegexCheckConfig,
    TermsCheckConfig,
    VerifiableConfig,
    WordLimitsConfig,
)
from rewards.errors import ScoringError
from rewards.models.lexical import count_words
from rewards.templates import last_of

# Longest time a pattern may take on one text; some need ages on some texts. While one runs, other
# threads do too.
TIMEOUT_S = 0.25
# JSON nested deeper than this conforms to nothing: validation is recursive.
MAX_DEPTH = 256

_FENCE = regex.compile(r"^```json[^\S\n]*\n(.*?)(?:^```[^\S\n]*$|\Z)", regex.M | regex.S | regex.I)
# 1,234.5 is one number and so is -1e-3; 10-12 holds 10 and 12; x2 holds none, and 1.2.3 is a
# version. What is tried is consumed: else the time would grow with the square of the length.
_NUMBER = regex.compile(
    r"(?<![\d._\p{Latin}\p{Greek}\p{Cyrillic}])(?P<number>[-+]?"
    r"(?:(?:\d{1,3}(?:,\d{3}(?!\d))++|\d++)(?:\.\d++)?|\.\d++)(?:[eE][-+]?\d++)?)"
    r"(?P<version>(?:\.\d++)*+)"
)
_MINUS = str.maketrans("\u2212", "-")
# Scripts that do not put spaces between words: there, a term may stand next to any letter.
_SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"


class _UndecidedError(Exception):
    """Neither pass nor failure would be true of this sample; the message says why."""


class VerifiableScorer(DirectScorer):
    """One check of the answer: 1 for a pass and 0 for a failure, or the share of terms.

    ``regex`` needs a decision within `TIMEOUT_S` and fails the request otherwise: neither 1 nor 0
    would be true. ``number`` with ``expected_from`` does so where the prompt has no number.
    """

    # Raise it when a check changes, so that calibrations made with the old one no longer fit.
    VERSION = 1

    def __init__(self, name: str, values: Sequence[str], config: VerifiableConfig) -> None:
        super().__init__(name, values)
        self._config = config
        self._check = _check_of(config)
        if isinstance(config, RegexCheckConfig) or getattr(config, "expected_from", None):
            # A pattern may take TIMEOUT_S on each text: others must not wait for that.
            self.n_threads = 1

    @override
    def identity(self, output: str) -> dict[str, object]:
        return {**self._config.model_dump(by_alias=True), "version": self.VERSION}

    @override
    def score(self, samples: Sequence[Sample]) -> FloatArray:
        try:
            return np.array([self._check(sample) for sample in samples], dtype=np.float64)
        except _UndecidedError as error:
            raise ScoringError(self.name, self.values, str(error)) from error


def schema_validator(schema: dict[str, Any]) -> jsonschema_rs.Validator:
    """Return what validates against a JSON Schema; formats count, patterns take linear time.

    Raises
    ------
    ValueError
        When it is no JSON Schema, names an unknown format, or refers to another document: nothing
        is fetched.
    """
    try:
        return jsonschema_rs.validator_for(
            schema,
            offline=True,
            validate_formats=True,
            ignore_unknown_formats=False,
            pattern_options=jsonschema_rs.RegexOptions(),
        )
    except jsonschema_rs.ValidationError as error:
        where = "/".join(map(str, error.instance_path))
        raise ValueError(
            f"no valid JSON Schema{where and f' at {where}'}: {error.message}"
        ) from None


def _check_of(config: VerifiableConfig) -> Callable[[Sample], float]:
    if isinstance(config, RegexCheckConfig):
        return _regex_check(config)
    if isinstance(config, JsonSchemaCheckConfig):
        return _schema_check(config)
    if isinstance(config, NumberCheckConfig):
        return _number_check(config)
    if isinstance(config, WordLimitsConfig):
        return _words_check(config)
    return _terms_check(config)


def _regex_check(config: RegexCheckConfig) -> Callable[[Sample], float]:
    pattern = regex.compile(config.pattern)
    return lambda sample: float(
        _match(pattern, sample.answer, full=config.match == "full") is not None
    )


def _match(pattern: regex.Pattern[str], text: str, *, full: bool) -> regex.Match[str] | None:
    try:
        return (pattern.fullmatch if full else pattern.search)(text, timeout=TIMEOUT_S)
    except TimeoutError:
        problem = (
            f"the pattern {pattern.pattern!r} takes more than {TIMEOUT_S:g} s on a text of "
            f"{len(text)} characters; write it without repeats inside repeats, or with possessive "
            "ones (a++)"
        )
        raise _UndecidedError(problem) from None


def _schema_check(config: JsonSchemaCheckConfig) -> Callable[[Sample], float]:
    validator = schema_validator(config.json_schema)

    def check(sample: Sample) -> float:
        blocks = _FENCE.findall(sample.answer) if config.fence else []
        try:
            content = json.loads(
                blocks[0] if len(blocks) == 1 else sample.answer, parse_constant=_refuse
            )
            return float(_is_shallow(content) and validator.is_valid(content))
        # No JSON, or JSON that Python cannot hold: nested too deep, lone surrogates.
        except (ValueError, RecursionError):
            return 0.0

    return check


def _refuse(constant: str) -> NoReturn:
    """Refuse NaN and Infinity, which Python reads and JSON does not have."""
    raise ValueError(f"{constant} is no JSON")


def _is_shallow(content: object) -> bool:
    level = [content]
    for _ in range(MAX_DEPTH + 1):
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return True
    return False


def _number_check(config: NumberCheckConfig) -> Callable[[Sample], float]:
    pattern = regex.compile(config.expected_from) if config.expected_from is not None else None

    def expected(sample: Sample) -> float:
        if pattern is None:
            return float(config.expected)  # type: ignore[arg-type]  # one of the two is given
        found = _match(pattern, last_of(sample.messages, "user"), full=False)
        number = last_number(found["expected"] or "") if found else None
        if number is None:
            problem = (
                "expected_from finds no number in the last user message; mend the pattern, or "
                "leave this value out for such prompts"
            )
            raise _UndecidedError(problem)
        return number

    def check(sample: Sample) -> float:
        wanted, number = expected(sample), last_number(sample.answer)
        if number is None:
            return 0.0
        # 0.4 is within 0.1 of 0.3, though doubles say otherwise by their last digits.
        rounding = 4 * math.ulp(max(abs(number), abs(wanted)))
        return float(abs(number - wanted) <= config.tolerance + rounding)

    return check


def last_number(text: str) -> float | None:
    """Return the last number of a text; None without one, or when it is too large for a double.

    The point is the decimal mark, commas are thousands; numbers in words do not count.
    """
    found = _NUMBER.finditer(text.translate(_MINUS))
    numbers = [one["number"] for one in found if not one["version"]]
    number = float(numbers[-1].replace(",", "")) if numbers else math.inf
    return number if math.isfinite(number) else None


def _words_check(config: WordLimitsConfig) -> Callable[[Sample], float]:
    low = config.min if config.min is not None else 0
    high = config.max if config.max is not None else math.inf
    return lambda sample: float(low <= count_words(sample.answer) <= high)


def _terms_check(config: TermsCheckConfig) -> Callable[[Sample], float]:
    patterns = [regex.compile(_whole_words(term)) for term in config.terms]

    def check(sample: Sample) -> float:
        text = _fold(sample.answer)
        held = sum(pattern.search(text) is not None for pattern in patterns)
        wanted = held if config.check == "required" else len(patterns) - held
        return wanted / len(patterns)

    return check


def _whole_words(term: str) -> str:
    """Return the pattern of a term: not inside of a longer word, any white space for a space."""
    words = _fold(term).split()
    letter = rf"[^\W{_SPACELESS}]"
    before = rf"(?<!{letter})" if regex.match(letter, words[0]) else ""
    after = rf"(?!{letter})" if regex.match(letter, words[-1][-1]) else ""
    return before + r"\s++".join(map(regex.escape, words)) + after


def _fold(text: str) -> str:
    """Return the text without differences of case, of composition and of apostrophes."""
    return unicodedata.normalize("NFKC", text.casefold()).replace("\u2019", "'")
