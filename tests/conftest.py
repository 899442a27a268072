"""Settings of all tests."""

from __future__ import annotations

import hypothesis

# The same examples each time, and no example may fail for the machine's pace.
hypothesis.settings.register_profile("here", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("here")
