"""Recording of the states and sums that calibration learns from."""
