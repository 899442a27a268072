from tests.solver.problems import published_pilot

__all__ = ["published_pilot"]
