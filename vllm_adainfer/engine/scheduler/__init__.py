"""The code of the scheduler's process."""
