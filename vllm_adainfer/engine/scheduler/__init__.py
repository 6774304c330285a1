"""What runs in the scheduler's process."""
