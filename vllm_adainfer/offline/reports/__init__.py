"""Artifacts and evaluations for people: text, tables and pages."""
