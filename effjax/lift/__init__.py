"""Runs any function on compressed arrays, and calibrates it, by walking its jaxpr."""

from effjax.lift.calibrate import InputStats, add_stats, calibrate
from effjax.lift.coverage import Coverage, CoverageWarning, Use
from effjax.lift.lifting import lift

__all__ = ["Coverage", "CoverageWarning", "InputStats", "Use", "add_stats", "calibrate", "lift"]
