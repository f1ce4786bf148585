"""What every fit of a mixture of normals needs: its rows, one pass over them, and where to start."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.kmeans import lloyd, nearest_center, spread_rows
from pyro_vi_lab.missing_moments import observed_log_densities, observed_moments
from pyro_vi_lab.mixture_moments import Moments, Normals, hard_moments, log_densities, moments
from pyro_vi_lab.models import GaussianMixture
from pyro_vi_lab.problem import Problem

Init = Literal["kmeans++", "kmeans"]
INITS = ("kmeans++", "kmeans")
"""Rows far from each other as centers; or these and some steps of k-means."""


class MixtureRows(NamedTuple):
    """The data of a mixture, with the mean of the rows at the origin.

    Args:
        X: Rows.
        observed: Which values are observed; all if ``None``.
        weight: Of each row; one if ``None``.
        center: What has been taken away.

    Shape:
        X and observed ``(N, D)``, weight ``(N,)``, center ``(D,)``.
    """

    X: Tensor
    observed: Tensor | None
    weight: Tensor | None
    center: Tensor

    @property
    def total(self) -> float:
        """Sum of the weights."""
        return float(len(self.X) if self.weight is None else self.weight.sum())

    def moments(self, normals: Normals) -> Moments:
        """One pass."""
        if self.observed is None:
            return moments(self.X, normals, weight=self.weight)
        return observed_moments(self.X, self.observed, normals, weight=self.weight)

    def log_densities(self, normals: Normals) -> Tensor:
        """Of each row in each component, ``(N, K)``."""
        if self.observed is None:
            return log_densities(self.X, normals)
        return observed_log_densities(self.X, self.observed, normals)


def mixture_of(problem: Problem, what: str) -> GaussianMixture:
    """The model of a problem.

    Raises:
        ArgumentError: It is another one.
    """
    if not isinstance(problem, Problem):
        raise ArgumentError(
            f"problem must be a pyro_vi_lab.Problem, got {type(problem).__name__}: model.problem(X) makes one"
        )
    if not isinstance(problem.model, GaussianMixture):
        name = getattr(problem.model, "__name__", type(problem.model).__name__)
        raise ArgumentError(
            f"{what} is for problems of models.GaussianMixture, and {problem.name} is one of {name}: fit 'map', 'mle' "
            "or a distribution with vl.fit"
        )
    return problem.model


def rows_of(problem: Problem) -> MixtureRows:
    """The data of a problem that holds them.

    Raises:
        ArgumentError: The problem sees some of its rows at a time.
    """
    if problem.subsamples:
        raise ArgumentError(f"problem {problem.name} sees some of its rows at a time: make it without minibatch=")
    inputs = problem.inputs
    X, observed, weight = inputs["X"], inputs.get("observed"), inputs.get("sample_weight")
    part = torch.ones_like(X) if weight is None else weight[:, None].expand_as(X)
    part = part if observed is None else part * observed
    center = (part * X).sum(0) / part.sum(0)
    centered = X - center
    return MixtureRows(centered if observed is None else torch.where(observed, centered, 0.0), observed, weight, center)


def starts(rows: MixtureRows, model: GaussianMixture, *, init: Init, num_restarts: int, seed: int) -> list[Moments]:
    """Moments of hard assignments to centers, for each restart; missing values are put at the mean for this.

    The covariances of small clusters are mixed with the one within all clusters, which counts as D + 1 rows.
    """
    X, w = rows.X, rows.weight
    part = torch.ones_like(X[:, 0]) if w is None else w
    unit = X / ((part @ X.square()) / part.sum()).sqrt()
    generator = torch.Generator().manual_seed(seed)
    chosen = spread_rows(unit, model.num_components, num_starts=num_restarts, generator=generator, weight=w)
    result = []
    for one in chosen:
        labels = nearest_center(unit, unit[one]) if init == "kmeans++" else lloyd(unit, unit[one], weight=w)
        found = hard_moments(X, labels, model.num_components, model.covariance, w)
        if model.covariance != "tied":
            shape = (-1, *([1] * (found.covariances.dim() - 1)))
            counts = (found.counts * len(X) / part.sum()).reshape(shape)
            share = (found.counts / found.counts.sum()).reshape(shape)
            within = (share * found.covariances).sum(0)
            # more clusters than their rows can tell apart: take what lies between them too
            if model.covariance == "full":
                flat = not bool((torch.linalg.cholesky_ex(within)[1] == 0).all())
                within = _total(X, part) if flat else within
            extra = X.shape[1] + 1
            found = found._replace(covariances=(counts * found.covariances + extra * within) / (counts + extra))
        result.append(found)
    return result


def _total(X: Tensor, weight: Tensor) -> Tensor:
    return (X * weight[:, None]).mT @ X / weight.sum()
