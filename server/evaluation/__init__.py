"""Held-out prompts served under palettes and by other methods, all on the same candidates."""
