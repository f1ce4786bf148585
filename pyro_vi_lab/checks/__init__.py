"""Numbers that say how far an approximation can be trusted, from draws and log densities alone."""

from __future__ import annotations

from pyro_vi_lab.checks.discrepancy import Discrepancy, DiscrepancySummary, discrepancy
from pyro_vi_lab.checks.pareto import ImportanceCheck, importance

__all__ = ["Discrepancy", "DiscrepancySummary", "ImportanceCheck", "discrepancy", "importance"]
