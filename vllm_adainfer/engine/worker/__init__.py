"""What runs in a worker's process beside the model."""
