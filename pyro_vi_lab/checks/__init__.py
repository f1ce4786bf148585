"""Numbers that say how far an approximation can be trusted, from draws and log densities alone."""

from __future__ import annotations

from pyro_vi_lab.checks.bounds import ErrorBounds, error_bounds
from pyro_vi_lab.checks.calibration import CalibrationCheck, Coverage, check_ranks, holm, ranks_of
from pyro_vi_lab.checks.classifier import ClassifierTest, classifier_test
from pyro_vi_lab.checks.correlations import CorrelationError, correlation_error
from pyro_vi_lab.checks.discrepancy import Discrepancy, DiscrepancySummary, discrepancy
from pyro_vi_lab.checks.ensemble import Ensemble, run_ensemble
from pyro_vi_lab.checks.evidence import EvidenceBounds, evidence
from pyro_vi_lab.checks.interval_coverage import IntervalCoverage, LevelCoverage, interval_coverage
from pyro_vi_lab.checks.modes import OtherModes, other_modes
from pyro_vi_lab.checks.pareto import ImportanceCheck, importance
from pyro_vi_lab.checks.predictive_density import LeaveOneOut, PredictiveComparison, compare_predictions, leave_one_out
from pyro_vi_lab.checks.reference_comparison import Measure, ReferenceComparison, against_reference
from pyro_vi_lab.checks.restarts import Optimum, RestartCheck, restarts
from pyro_vi_lab.checks.rows import RowImportance, importance_by_row
from pyro_vi_lab.checks.sliced_wasserstein import SlicedWasserstein, sliced_wasserstein
from pyro_vi_lab.checks.stein import SteinCheck, Whitening, stein
from pyro_vi_lab.checks.uniformity import Band, ecdf_band, uniformity_p_values

__all__ = [
    "Band",
    "CalibrationCheck",
    "ClassifierTest",
    "CorrelationError",
    "Coverage",
    "Discrepancy",
    "DiscrepancySummary",
    "Ensemble",
    "ErrorBounds",
    "EvidenceBounds",
    "ImportanceCheck",
    "IntervalCoverage",
    "LeaveOneOut",
    "LevelCoverage",
    "Measure",
    "Optimum",
    "OtherModes",
    "PredictiveComparison",
    "ReferenceComparison",
    "RestartCheck",
    "RowImportance",
    "SlicedWasserstein",
    "SteinCheck",
    "Whitening",
    "against_reference",
    "check_ranks",
    "classifier_test",
    "compare_predictions",
    "correlation_error",
    "discrepancy",
    "ecdf_band",
    "error_bounds",
    "evidence",
    "holm",
    "importance",
    "importance_by_row",
    "interval_coverage",
    "leave_one_out",
    "other_modes",
    "ranks_of",
    "restarts",
    "run_ensemble",
    "sliced_wasserstein",
    "stein",
    "uniformity_p_values",
]
