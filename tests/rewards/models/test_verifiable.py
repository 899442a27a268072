from __future__ import annotations

import asyncio
import json
import math
import threading
import time

import numpy as np
import pytest
from pydantic import TypeAdapter

from rewards import RewardConfigError, Sample, load_rewards
from rewards.config import ScorerConfig
from rewards.errors import ScoringError
from rewards.models.verifiable import MAX_DEPTH, TIMEOUT_S, VerifiableScorer, last_number

LONG = 1_000_000


def scorer(**fields):
    config = TypeAdapter(ScorerConfig).validate_python({"kind": "verifiable", **fields})
    return VerifiableScorer("check", ["value"], config)


def score(answer, prompt="", **fields):
    messages = ({"role": "user", "content": "41"}, {"role": "user", "content": prompt})
    return scorer(**fields).score([Sample(messages, answer)]).item()


@pytest.mark.parametrize(
    ("pattern", "match", "answer", "expected"),
    [
        ("yes", "search", "oh yes!", 1),
        ("yes", "search", "YES", 0),
        ("(?i)yes", "search", "YES", 1),
        ("yes", "full", "oh yes!", 0),
        ("yes", "full", "yes", 1),
        ("a|ab", "full", "ab", 1),
        ("^b$", "search", "a\nb", 0),
        ("(?m)^b$", "search", "a\nb", 1),
        ("a.*b", "full", "a\nb", 0),
        ("", "full", "", None),
        (".*", "full", "", 1),
        (".", "search", "", 0),
        (r"\p{Han}+", "full", "我爱你", 1),
        (r"^Ü\w+", "search", "Übermut", 1),
        ("😀$", "search", "fine 😀", 1),
    ],
)
def test_regex(pattern, match, answer, expected):
    if expected is None:
        with pytest.raises(ValueError, match="at least 1 character"):
            scorer(check="regex", pattern=pattern)
        return
    assert score(answer, check="regex", pattern=pattern, match=match) == expected


def test_a_pattern_searches_unless_told():
    assert score("oh yes!", check="regex", pattern="yes") == 1


def test_a_pattern_that_takes_ages_fails_the_request_in_bounded_time():
    check = scorer(check="regex", pattern="^(a|aa)+$")
    start = time.perf_counter()
    with pytest.raises(ScoringError, match=r"\(a\|aa\).*more than 0.25 s.*possessive") as caught:
        check.score([Sample((), "a" * 100 + "!")])
    # a hundred times what is granted: without the bound it would not end in this century
    assert time.perf_counter() - start < 100 * TIMEOUT_S
    assert (caught.value.scorer, caught.value.values) == ("check", ("value",))
    assert "aaa" not in str(caught.value)
    assert check.score([Sample((), "aaa")]).tolist() == [1]


def test_the_pattern_of_the_prompt_is_bounded_too():
    with pytest.raises(ScoringError, match="takes more than"):
        score("1", "a" * 100 + "!", check="number", expected_from=r"^(?P<expected>(a|aa)+)$")


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"name": "Ann", "age": 3}', 1),
        (' {"name": "\u6211\\n"}\n', 1),
        ('{"name": "Ann", "age": -1}', 0),
        ('{"age": 3}', 0),
        ('{"name": "Ann", "x": 1}', 0),
        ("", 0),
        ("[]", 0),
        ('{"name": "Ann"} and more', 0),
        ('{"name": "Ann", "age": NaN}', 0),
        ("{'name': 'Ann'}", 0),
        ('Here:\n```json\n{"name": "Ann"}\n```\nDone.', 1),
        ('```JSON \r\n{"name": "Ann"}\n```', 1),
        ('```json\n{"name": "Ann"}', 1),
        ('```json\n{"age": 3}\n```', 0),
        ('```\n{"name": "Ann"}\n```', 0),
        ('```json\n{"name": "A"}\n```\n```json\n{"name": "B"}\n```', 0),
    ],
)
def test_json_schema(answer, expected):
    assert score(answer, check="json_schema", schema=PERSON) == expected


def test_without_fences_the_answer_is_json_or_fails():
    answer = '```json\n{"name": "Ann"}\n```'
    assert score(answer, check="json_schema", schema=PERSON, fence=False) == 0
    assert score('{"name": "Ann"}', check="json_schema", schema=PERSON, fence=False) == 1


@pytest.mark.parametrize(
    ("schema", "answer", "expected"),
    [
        ({"type": "string", "format": "date"}, '"2026-11-20"', 1),
        ({"type": "string", "format": "date"}, '"yesterday"', 0),
        ({"type": "integer"}, "1.0", 1),
        ({"type": "integer"}, "true", 0),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "items": [{"const": 1}]}, "[2]", 0),
        ({"pattern": "^(a|aa)+$"}, f'"{"a" * 100}!"', 0),
        ({}, "[" * MAX_DEPTH + "1" + "]" * MAX_DEPTH, 1),
        ({}, "[" * (MAX_DEPTH + 1) + "1" + "]" * (MAX_DEPTH + 1), 0),
        ({}, '{"a":' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1), 0),
        ({}, "[" * LONG, 0),
        ({"pattern": "."}, r'"\ud800"', 0),
        ({}, "NaN", 0),
        ({}, "9" * 5000, 0),
        ({}, "```json\n" * 100_000, 0),
        ({"uniqueItems": True}, json.dumps([{"a": n} for n in range(50_000)]), 1),
    ],
)
def test_json_schema_at_its_edges(schema, answer, expected):
    assert score(answer, check="json_schema", schema=schema) == expected


def test_no_schema_is_fetched(tmp_path):
    other = tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json"):
        scorer(check="json_schema", schema={"$ref": other.as_uri()})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("forty-two", None),
        ("42", 42),
        ("First 1, then 42.", 42),
        ("It costs $1,234,567.50!", 1234567.5),
        ("1,2345", 2345),
        ("1, 2", 2),
        ("-3", -3),
        ("x = \u22123,5", 5),
        ("x = \u22123", -3),
        ("+3", 3),
        ("10-12", 12),
        ("3 - 4", 4),
        (".5", 0.5),
        ("1e-3", 0.001),
        ("6.02E23 of them", 6.02e23),
        ("5km", 5),
        ("20%", 20),
        ("**7**", 7),
        ("\\boxed{8}", 8),
        ("答案是42。", 42),
        ("答案是-3。", -3),
        ("GPT-4", 4),
        ("４２", 42),
        ("10²", 10),
        ("3 of x2", 3),
        ("7 in version 1.2.3", 7),
        ("1e999", None),
        ("9" * LONG, None),
        ("1," * (LONG // 2), 1),
        ("1.1." * (LONG // 4), None),
        ("1" + ",234" * 200_000 + ",2345", 2345),
        ("1" + ",234" * 200_000 + ".5.5", None),
    ],
)
def test_the_last_number(text, expected):
    assert last_number(text) == expected


@pytest.mark.parametrize(
    ("answer", "fields", "expected"),
    [
        ("so 42", {"expected": 42}, 1),
        ("so 42.0", {"expected": 42}, 1),
        ("42, or 41", {"expected": 42}, 0),
        ("", {"expected": 0}, 0),
        ("1e999", {"expected": 5}, 0),
        ("0.4", {"expected": 0.3, "tolerance": 0.1}, 1),
        ("0.2", {"expected": 0.3, "tolerance": 0.1}, 1),
        ("0.401", {"expected": 0.3, "tolerance": 0.1}, 0),
        ("42.0000001", {"expected": 42}, 0),
    ],
)
def test_number(answer, fields, expected):
    assert score(answer, check="number", **fields) == expected


def test_the_expected_number_of_the_prompt():
    fields = {"check": "number", "expected_from": r"answer (is )?(?P<expected>\S+)"}
    assert score("7", "The answer is 7 I think", **fields) == 1
    assert score("1234.5", "The answer is 1,234.5", **fields) == 1
    assert score("8", "The answer is 7", **fields) == 0
    # of the last user message alone: the one before it has a 41
    for prompt in ("", "What?", "The answer is unknown"):
        with pytest.raises(ScoringError, match="no number in the last user message; mend"):
            score("41", prompt, **fields)


@pytest.mark.parametrize(
    ("answer", "fields", "expected"),
    [
        ("", {"min": 1}, 0),
        ("", {"max": 0}, 1),
        ("...", {"max": 0}, 1),
        ("one two", {"min": 2, "max": 2}, 1),
        ("one two", {"min": 3}, 0),
        ("one two", {"max": 1}, 0),
        ("我爱你", {"min": 3, "max": 3}, 1),
        ("w " * 500_000, {"min": 500_000}, 1),
    ],
)
def test_words(answer, fields, expected):
    assert score(answer, check="words", **fields) == expected


@pytest.mark.parametrize(
    ("term", "answer", "is_held"),
    [
        ("cat", "A Cat!", True),
        ("cat", "concatenate", False),
        ("cat", "cats", False),
        ("cat", "tomcat", False),
        ("Acme", "ACME's", True),
        ("new york", "New\n  York", True),
        ("new york", "new, york", False),
        ("c++", "I like C++.", True),
        ("c++", "c", False),
        ("a.c", "abc", False),
        ("STRASSE", "die Straße", True),
        ("e\u0301t\u00e9", "ÉTÉ", True),
        ("don't", "Don\u2019t", True),
        ("我爱", "我爱你", True),
        ("AI", "使用AI技术", True),
        ("हिन्द", "हिन्दी", False),
        ("😀", "so😀so", True),
        ("x", "", False),
        ("x x", "x " * 200_000 + "x", True),
        ("x y", ("x" + " " * 50) * 20_000, False),
    ],
)
def test_terms(term, answer, is_held):
    assert score(answer, check="required", terms=[term]) == is_held
    assert score(answer, check="banned", terms=[term]) == (not is_held)


def test_terms_give_their_share():
    terms = ["one", "two", "three", "four"]
    assert score("One and one: two.", check="required", terms=terms) == 0.5
    assert score("One.", check="banned", terms=terms) == 0.75


def test_one_number_per_sample_in_order():
    samples = [Sample((), answer) for answer in ("a", "b", "ab")]
    scores = scorer(check="regex", pattern="a").score(samples)
    np.testing.assert_array_equal(scores, [1, 0, 1])
    assert scores.dtype == np.float64


def test_identity_holds_every_setting():
    variants = [
        {"check": "regex", "pattern": "a"},
        {"check": "regex", "pattern": "b"},
        {"check": "regex", "pattern": "a", "match": "full"},
        {"check": "json_schema", "schema": {}},
        {"check": "json_schema", "schema": {"type": "string"}},
        {"check": "json_schema", "schema": {}, "fence": False},
        {"check": "number", "expected": 1},
        {"check": "number", "expected": 2},
        {"check": "number", "expected": 1, "tolerance": 0.5},
        {"check": "number", "expected_from": "(?P<expected>.)"},
        {"check": "words", "min": 1},
        {"check": "words", "max": 1},
        {"check": "required", "terms": ["a"]},
        {"check": "banned", "terms": ["a"]},
        {"check": "banned", "terms": ["a", "b"]},
    ]
    identities = [
        json.dumps(scorer(**fields).identity("score"), sort_keys=True) for fields in variants
    ]
    assert len(set(identities)) == len(variants)
    assert all(json.loads(text)["version"] == VerifiableScorer.VERSION for text in identities)
    assert json.loads(identities[3])["schema"] == {}


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ("check: regx, pattern: a", ".check", "unknown check 'regx'; did you mean 'regex'"),
        ("pattern: a", "", "'check' is missing; add it"),
        ("check: regex", ".pattern", "missing; add it"),
        ("check: regex, patern: a", ".patern", "did you mean 'pattern'"),
        ("check: regex, pattern: '(a'", ".pattern", "no valid pattern: missing [)]"),
        ("check: regex, pattern: a, match: all", ".match", "'search' or 'full'"),
        ("check: json_schema, schema: {type: strng}", ".schema", "at type: .strng"),
        ("check: json_schema, schema: {format: foo}", ".schema", "foo"),
        ("check: json_schema, schema: {$ref: 'http://a/b'}", ".schema", "http://a/b"),
        ("check: json_schema, schema: {pattern: '(?=a)'}", ".schema", "regex"),
        ("check: json_schema, schema: string", ".schema", "section with fields"),
        ("check: number", "", "either expected or expected_from"),
        ("check: number, expected: 1, expected_from: '(?P<expected>.)'", "", "not both"),
        ("check: number, expected_from: '(.)'", ".expected_from", "must name what it takes"),
        ("check: number, expected: .nan", ".expected", "finite"),
        ("check: number, expected: 1, tolerance: -1", ".tolerance", "greater than or equal to 0"),
        ("check: words", "", "give min, max or both"),
        ("check: words, min: 3, max: 2", "", "3 words or more and 2 or less"),
        ("check: words, minimum: 3", ".minimum", "did you mean 'min'"),
        ("check: required, terms: []", ".terms", "at least one term"),
        ("check: banned, terms: [' ']", ".terms", "none that is blank"),
        ("check: banned, terms: [A, a]", ".terms", "'a' stands twice"),
        ("check: banned, terms: [a, 1]", ".terms.1", "valid string"),
    ],
)
def test_mistakes_name_line_field_and_remedy(fields, field, message, tmp_path):
    path = tmp_path / "rewards.yaml"
    path.write_text(
        f"version: 1\nscorers:\n  c: {{kind: verifiable, {fields}}}\nvalues: {{v: {{from: c}}}}\n"
    )
    with pytest.raises(RewardConfigError, match=message) as caught:
        load_rewards(path)
    assert (caught.value.line, caught.value.field) == (3, f"scorers.c{field}")


def test_a_file_of_checks(tmp_path):
    path = tmp_path / "rewards.yaml"
    path.write_text("""\
version: 1
scorers:
  polite: {kind: verifiable, check: required, terms: [please, thank you]}
  json: {kind: verifiable, check: json_schema, schema: {type: object}}
  short: {kind: verifiable, check: words, max: 3}
values:
  polite: {from: polite, unit: share}
  json: {from: json, unit: pass}
  short: {from: short, unit: pass}
""")
    with load_rewards(path) as suite:
        scores = suite.score_sync([Sample((), "Thank you!"), Sample((), "{}")])
        assert scores.tolist() == [[0.5, 0, 1], [0, 1, 1]]
        assert not math.isnan(scores.sum())


@pytest.mark.parametrize(
    "slow",
    [
        "{kind: verifiable, check: regex, pattern: a+b}",
        "{kind: verifiable, check: number, expected_from: '(?P<expected>.+)'}",
    ],
)
async def test_a_slow_pattern_holds_up_no_other_value(slow, tmp_path):
    path = tmp_path / "rewards.yaml"
    path.write_text(f"""
version: 1
scorers:
  slow: {slow}
  words: {{kind: verifiable, check: words, max: 3}}
values:
  slow: {{from: slow}}
  words: {{from: words}}
""")
    sample = Sample(({"role": "user", "content": "1"},), "a 1")
    async with load_rewards(path) as suite:
        gate = threading.Event()
        check = suite._scorers["slow"]._check
        suite._scorers["slow"]._check = lambda one: check(one) if gate.wait(20) else None
        waiting = asyncio.create_task(suite.score([sample]))
        assert (await suite.score([sample], ["words"])).tolist() == [[1]]
        assert not waiting.done()
        gate.set()
        assert (await waiting)[0, 1] == 1
