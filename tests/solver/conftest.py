import pytest

from tests.solver.problems import published_pilot

__all__ = ["published_pilot"]

# Checks in there, too, tell the values when they fail.
pytest.register_assert_rewrite("tests.solver.arena", "tests.solver.curves")
