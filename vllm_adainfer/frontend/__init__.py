"""The part in vLLM's API server: request check, metrics, log line, endpoints."""
