"""Undocumented names of vLLM that we use: a file for each subsystem, each name with its reason.

Each was checked against vLLM 0.32.0 (CPU build).
"""
