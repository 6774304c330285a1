"""Certify bounds on held-out prompts."""
