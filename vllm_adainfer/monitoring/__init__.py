"""Disagreement in service, measured on shadow requests."""
