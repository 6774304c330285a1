"""The commands' work: calibration, evaluation, reports, doctor and demo."""
