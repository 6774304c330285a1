"""Calibration: prompts in, artifact out."""
