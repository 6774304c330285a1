"""Calibration: collect hidden states, fit probes and classifiers, certify a bound, report."""
