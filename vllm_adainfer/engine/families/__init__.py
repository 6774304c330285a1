"""VLLM's model classes with exit points, by family."""
