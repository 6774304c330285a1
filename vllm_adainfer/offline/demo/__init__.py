"""The demo: a small real model, and prompts written for this project."""
