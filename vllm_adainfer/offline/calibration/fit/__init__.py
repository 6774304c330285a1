"""Fit probes and classifiers, and choose the exit points."""
