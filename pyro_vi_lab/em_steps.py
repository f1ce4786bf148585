"""The steps of expectation maximization for mixtures of normals, and when to stop; see :mod:`pyro_vi_lab.em`."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vi_lab.density_engine import Status
from pyro_vi_lab.mixture_fit import MixtureRows
from pyro_vi_lab.mixture_moments import Covariance, Moments
from pyro_vi_lab.mixture_prior import Parameters, Prior, log_prior, maximum_likelihood, maximum_posterior

REG_COVAR = 1e-6
"""What is added to all variances of a maximum of the likelihood by default, as scikit-learn does."""
EMPTY = 1e-8
"""Rows below which a component is empty."""


class Run(NamedTuple):
    """One restart.

    Args:
        parameters: Where it ended.
        values: Free energy after each step E.
        seconds: Since the start, at each.
        status: How it ended.
        message: What went wrong, or is worth knowing.
    """

    parameters: Parameters
    values: list[float]
    seconds: list[float]
    status: Status
    message: str


class Steps:
    """Steps E and M on certain rows.

    Args:
        rows: The rows.
        prior: Of the joint density; ``None`` of the likelihood.
        kind: Of the covariances.
        reg_covar: Added to all variances of a maximum of the likelihood; by default 1e-6.
    """

    def __init__(self, rows: MixtureRows, prior: Prior | None, kind: Covariance, reg_covar: float | None) -> None:
        self.rows, self.prior, self.kind = rows, prior, kind
        self.reg_covar = REG_COVAR if reg_covar is None else reg_covar

    def expectation(self, parameters: Parameters) -> tuple[Moments, float]:
        """Step E: the moments, and the free energy."""
        found = self.rows.moments(parameters.normals())
        value = float(found.log_likelihood)
        if self.prior is not None:
            value += float(log_prior(parameters, self.prior))
        return found, value

    def maximum(self, found: Moments) -> Parameters:
        """Step M."""
        if self.prior is not None:
            return maximum_posterior(found, self.prior)
        return maximum_likelihood(found, self.kind, reg_covar=self.reg_covar)

    def reseeded(self, parameters: Parameters, empty: int) -> Parameters:
        """With an empty component at the row that fits worst."""
        X, w = self.rows.X, self.rows.weight
        density = self.rows.log_densities(parameters.normals()).logsumexp(1)
        counted = density if w is None else torch.where(w > 0, density, math.inf)
        worst = int(counted.argmin())
        weights, loc, covariance = parameters.weights.clone(), parameters.loc.clone(), parameters.covariance.clone()
        weights[empty] = 1 / len(X)
        loc[empty] = X[worst]
        if self.kind != "tied":
            covariance[empty] = covariance.mean(0)
        return Parameters(weights / weights.sum(), loc, covariance, self.kind)


def ascend(step: Steps, parameters: Parameters, began: float, *, max_steps: int, tolerance: float) -> Run:
    """Steps until the free energy stands still.

    Args:
        step: The steps.
        parameters: Where to start.
        began: When the clock started.
        max_steps: Most steps.
        tolerance: Nats that all later steps may still gain.
    """
    values: list[float] = []
    seconds: list[float] = []
    moved: list[int] = []
    rounding = 16 * torch.finfo(parameters.loc.dtype).eps
    least = EMPTY * step.rows.total / len(step.rows.X)
    previous = math.inf

    def ended(status: Status, message: str) -> Run:
        if moved:
            names = ", ".join(map(str, moved))
            message += f"; component(s) {names} had lost all rows and were put at the row that fitted worst"
        return Run(parameters, values, seconds, status, message)

    for _ in range(max_steps + 1):
        found, value = step.expectation(parameters)
        values.append(value)
        seconds.append(time.perf_counter() - began)
        if not math.isfinite(value):
            return ended(Status.DIVERGED, _why_not_finite(parameters))
        rise = values[-1] - values[-2] if len(values) > 1 else math.inf
        ratio = rise / previous if previous > 0 and math.isfinite(previous) else 1.0
        left = rise * ratio / (1 - ratio) if 0 <= ratio < 1 else math.inf
        if left <= tolerance or abs(rise) <= rounding * abs(value):
            return ended(Status.CONVERGED, _converged(step, parameters, found))
        previous = rise
        if len(values) <= max_steps:
            empty = (found.counts < least).nonzero().flatten().tolist()
            if step.prior is None and empty:
                if len(moved) >= len(found.counts):
                    return ended(
                        Status.DIVERGED,
                        f"diverged: component {empty[0]} loses all of its rows, again after a new start: take fewer "
                        "components, or objective='map'",
                    )
                moved.append(empty[0])
                parameters, previous = step.reseeded(parameters, empty[0]), math.inf
            else:
                parameters = step.maximum(found)
    return ended(
        Status.OUT_OF_STEPS,
        f"stopped after max_steps={max_steps} while the free energy was still rising (by {rise:.2g} nats in the last "
        "step): raise max_steps",
    )


def _why_not_finite(parameters: Parameters) -> str:
    factor = parameters.normals().factor
    bad = ~factor.reshape(len(factor), -1).isfinite().all(1)
    where = f"of component {int(bad.nonzero()[0])}" if bool(bad.any()) and parameters.kind != "tied" else "of all"
    return (
        f"diverged: the covariance {where} is singular, where the likelihood has no bound: raise reg_covar, or take "
        "objective='map', whose prior keeps it away"
    )


def _converged(step: Steps, parameters: Parameters, found: Moments) -> str:
    message = "converged: the free energy has a (local) maximum here"
    empty = (found.counts < EMPTY * step.rows.total / len(step.rows.X)).nonzero().flatten().tolist()
    if empty:
        message += f"; component(s) {', '.join(map(str, empty))} have no rows, and the parameters of their prior"
    if step.prior is None and step.reg_covar > 0:
        small = (_least_variances(parameters) < 2 * step.reg_covar).nonzero().flatten().tolist()
        if small:
            message += (
                f"; the covariance of component(s) {', '.join(map(str, small))} is held up by "
                f"reg_covar={step.reg_covar:g} alone: they have collapsed onto a few rows, or X has columns that "
                "depend on each other there"
            )
    return message


def _least_variances(parameters: Parameters) -> Tensor:
    """Variance of each component along the direction where it is least, ``(K,)``, of tied covariances ``(1,)``."""
    covariance = parameters.covariance
    if parameters.kind in ("full", "tied"):
        return torch.linalg.eigvalsh(covariance)[..., 0].reshape(-1)
    return covariance.reshape(len(covariance), -1).amin(1)
