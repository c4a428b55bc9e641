"""Conversion tried on every network of a collection: what was converted, what was not and why, and what it changed."""
