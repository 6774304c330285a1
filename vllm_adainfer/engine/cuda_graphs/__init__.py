"""CUDA graphs of segments."""
