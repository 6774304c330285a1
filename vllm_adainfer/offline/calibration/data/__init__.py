"""Prompts to calibrate on, from rows or from requests."""
