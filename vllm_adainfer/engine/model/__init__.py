"""Model classes of vLLM with exit points."""
