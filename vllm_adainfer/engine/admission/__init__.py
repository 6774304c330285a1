"""Decides once, when a request arrives, whether and how it may exit."""
