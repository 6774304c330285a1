"""Decision: probes, features, classifiers, thresholds and bounds; torch and scikit-learn only."""
