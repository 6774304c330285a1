"""Answers compared with full depth: counts of them, and what closes and admits by these."""
