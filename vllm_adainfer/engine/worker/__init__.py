"""Workers, and what changes their policies while they run."""
