"""Segments of vLLM's decoder layers, and what they need to run on part of a batch."""
