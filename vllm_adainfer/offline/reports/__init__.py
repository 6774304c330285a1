"""Artifacts and evaluations as text, tables and pages."""
