"""Artifacts: what `calibrate` writes and engines serve. Data only, never code."""
