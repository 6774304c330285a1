"""Undocumented names of vLLM that we use: a file per subsystem, each name with its reason.

All were checked against vLLM 0.32.0 (CPU build).
"""
