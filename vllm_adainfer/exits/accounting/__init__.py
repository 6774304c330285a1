"""Counters of executed work, and their way to the frontends."""
