from types import SimpleNamespace

from server.live.intake import Repeats


def plan(text):
    prompt = SimpleNamespace(messages=({"role": "user", "content": text},), token_ids=(1, 2))
    return SimpleNamespace(prompt=prompt)


def test_one_prompt_has_one_percent_of_those_taken_in():
    repeats = Repeats(500)
    assert sum(repeats.admits(plan("again")) for _ in range(1000)) == 5
    assert all(repeats.admits(plan(f"other {i}")) for i in range(400))
    assert not repeats.admits(plan("again"))
    assert all(repeats.admits(plan(f"more {i}")) for i in range(95))
    assert not repeats.admits(plan("again"))
    # the first of them leaves the last 500 as this one enters
    assert repeats.admits(plan("one more"))
    assert repeats.admits(plan("again"))


def test_texts_are_not_held():
    repeats = Repeats(100)
    repeats.admits(plan("a secret of mine"))
    assert "secret" not in repr(vars(repeats))
    assert vars(repeats)["_recent"] != vars(_admitted("a secret of mine"))["_recent"]  # keyed


def _admitted(text):
    repeats = Repeats(100)
    repeats.admits(plan(text))
    return repeats


def test_a_lone_surrogate_is_a_text_too():
    assert Repeats(100).admits(plan("\ud800"))
