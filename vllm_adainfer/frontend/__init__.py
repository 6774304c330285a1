"""Everything that runs in vLLM's API server."""
