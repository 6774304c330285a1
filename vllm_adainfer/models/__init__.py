"""Model classes: vLLM models whose layer stack has exit points."""
