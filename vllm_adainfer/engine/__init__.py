"""Everything that runs inside vLLM's engine."""
