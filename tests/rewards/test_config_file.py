from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from rewards import RewardConfigError, load_rewards
from rewards.registry import find_model

GOOD = """\
version: 1
scorers:
  tone:
    kind: sequence_classifier
    model: org/name
    input: {view: text}
    output:
      margin: [POSITIVE, NEGATIVE]
  ask:
    kind: sequence_classifier
    model: models/ask
    input:
      view: pair
      a: "Q: {prompt}"
  words: {kind: lexical, measure: words}
values:
  positive:
    from: tone
    description: Speaks well of things.
    unit: logit
  helpful: {from: ask}
  words:
    from: words
"""


def write(tmp_path, text):
    path = tmp_path / "rewards.yaml"
    path.write_text(text)
    return path


def test_values_in_the_order_of_the_file(tmp_path):
    suite = load_rewards(write(tmp_path, GOOD))
    assert suite.names == ("positive", "helpful", "words")
    assert suite.values[0].description == "Speaks well of things."
    assert [value.unit for value in suite.values] == ["logit", "score", "score"]


@pytest.mark.parametrize(
    ("old", "new", "line", "field", "message"),
    [
        ("model: org/name", "modle: org/name", 5, "scorers.tone.modle", "did you mean 'model'"),
        ("view: text}", "view: text, txt: a}", 6, "scorers.tone.input.txt", "mean 'text'"),
        ('a: "Q', 'aa: "Q', 14, "scorers.ask.input.aa", "did you mean 'a'"),
        ("margin", "margn", 8, "scorers.tone.output.margn", "did you mean 'margin'"),
        (
            "output:\n      margin: [POSITIVE, NEGATIVE]",
            "outputs:\n      one: {margn: [POSITIVE, NEGATIVE]}",
            8,
            "scorers.tone.outputs.one.margn",
            "did you mean 'margin'",
        ),
        ("unit: logit", "units: logit", 20, "values.positive.units", "did you mean 'unit'"),
        ("version: 1", "version: 1\nvalue: 2", 2, "value", "did you mean 'values'"),
        ("from: tone", "from: tune", 18, "values.positive.from", "did you mean 'tone'"),
        ("from: ask", "form: ask", 21, "values.helpful.form", "did you mean 'from'"),
        ("kind: lexical", "kind: lexcal", 15, "scorers.words.kind", "did you mean 'lexical'"),
        ("{from: ask}", "{unit: x}", 21, "values.helpful", "either from or mix"),
        ("kind: lexical, ", "", 15, "scorers.words", "'kind' is missing"),
        ("measure: words", "measure: word", 15, "scorers.words.measure", "'words' or 'lexical"),
        ("view: pair", "view: chart", 13, "scorers.ask.input.view", "did you mean 'chat'"),
        ("{prompt}", "{promt}", 14, "scorers.ask.input.a", r"did you mean \{prompt\}"),
        ("{prompt}", "{prompt", 14, "scorers.ask.input.a", "literal brace twice"),
        ("{prompt}", "{answer}", 14, "scorers.ask.input.a", "a must not hold it"),
        ("view: text}", "view: text, text: hi}", 6, "scorers.tone.input.text", "must hold"),
        ("version: 1", "version: 2", 1, "version", "should be 1, not 2"),
        ("version: 1\n", "", 1, "version", "missing"),
        ("  words:\n", "  positive:\n", 22, "values.positive", "twice .first on line 17"),
        ("  words:\n", "  wo rds:\n", 22, "values.wo rds", "letters, digits"),
        ("  words:\n", "  yes:\n", 22, "values.yes", "quote"),
        ("helpful: {from: ask}", "helpful: ask", 21, "values.helpful", "section with fields"),
        ("helpful: {from", "helpful: {from: {", 21, "", "no valid YAML"),
        ("    input: {view: text}\n", "", 3, "scorers.tone.input", "missing; add it"),
        (
            "margin: [POSITIVE, NEGATIVE]",
            "margin: [POSITIVE]",
            8,
            "scorers.tone.output.margin",
            "two",
        ),
        (
            "margin: [POSITIVE, NEGATIVE]",
            "index: 1\n      label: A",
            7,
            "scorers.tone.output",
            "label and index exclude each other",
        ),
    ],
)
def test_mistakes_name_line_field_and_remedy(old, new, line, field, message, tmp_path):
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(RewardConfigError, match=message) as caught:
        load_rewards(path)
    assert (caught.value.line, caught.value.field) == (line, field)
    assert str(caught.value).startswith(f"{path}:{line}: {field}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "version, scorers and values"),
        ("- a\n- b", "version, scorers and values"),
        ("version: 1\nscorers: {w: {kind: lexical, measure: words}}\nvalues: {}", "at least one"),
        ("a: [", "no valid YAML"),
        ("a: !!python/object:os.system {}", "no valid YAML"),
        ("version: 1\nscorers:\nvalues:\n", "section is empty"),
    ],
)
def test_files_without_values(text, message, tmp_path):
    with pytest.raises(RewardConfigError, match=message):
        load_rewards(write(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(RewardConfigError, match=r"cannot read the rewards file.*none.yaml"):
        load_rewards(tmp_path / "none.yaml")


def test_what_a_model_name_means(tmp_path):
    (tmp_path / "models" / "here").mkdir(parents=True)
    assert find_model("models/here", tmp_path) == tmp_path / "models/here"
    assert find_model("models/gone", tmp_path) == "models/gone"
    assert find_model("./gone", tmp_path) == tmp_path / "gone"
    assert find_model("/gone", tmp_path) == Path("/gone")
    assert find_model("bert-base-uncased", tmp_path) == "bert-base-uncased"


def test_merge_keys_are_no_duplicates(tmp_path):
    text = textwrap.dedent("""\
        version: 1
        scorers:
          words: &words {kind: lexical, measure: words}
          other: {<<: *words, measure: lexical_diversity}
        values:
          a: {from: words}
          b: {from: other}
        """)
    assert load_rewards(write(tmp_path, text)).names == ("a", "b")
