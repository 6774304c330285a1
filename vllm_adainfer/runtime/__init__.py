"""Runtime: what the exit loop needs from vLLM while it runs (rows, metadata, scheduling)."""
