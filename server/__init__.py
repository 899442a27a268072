"""The alignment server: composes `rewards` and `solver` behind an OpenAI-compatible API."""
