"""Staying true: calibrations that follow live traffic, and a watch over what was promised."""
