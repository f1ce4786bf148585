"""Numbers that say how far an approximation can be trusted, from draws and log densities alone."""

from __future__ import annotations

from pyro_vi_lab.checks.bounds import ErrorBounds, error_bounds
from pyro_vi_lab.checks.calibration import CalibrationCheck, Coverage, check_ranks, holm, ranks_of
from pyro_vi_lab.checks.discrepancy import Discrepancy, DiscrepancySummary, discrepancy
from pyro_vi_lab.checks.ensemble import Ensemble, run_ensemble
from pyro_vi_lab.checks.evidence import EvidenceBounds, evidence
from pyro_vi_lab.checks.modes import OtherModes, other_modes
from pyro_vi_lab.checks.pareto import ImportanceCheck, importance
from pyro_vi_lab.checks.restarts import Optimum, RestartCheck, restarts
from pyro_vi_lab.checks.rows import RowImportance, importance_by_row
from pyro_vi_lab.checks.stein import SteinCheck, Whitening, stein
from pyro_vi_lab.checks.uniformity import Band, ecdf_band, uniformity_p_values

__all__ = [
    "Band",
    "CalibrationCheck",
    "Coverage",
    "Discrepancy",
    "DiscrepancySummary",
    "Ensemble",
    "ErrorBounds",
    "EvidenceBounds",
    "ImportanceCheck",
    "Optimum",
    "OtherModes",
    "RestartCheck",
    "RowImportance",
    "SteinCheck",
    "Whitening",
    "check_ranks",
    "discrepancy",
    "ecdf_band",
    "error_bounds",
    "evidence",
    "holm",
    "importance",
    "importance_by_row",
    "other_modes",
    "ranks_of",
    "restarts",
    "run_ensemble",
    "stein",
    "uniformity_p_values",
]
