"""Measurements; see docs/systems.md."""
