"""Sources of candidates, one a file; `base` holds the interface."""
