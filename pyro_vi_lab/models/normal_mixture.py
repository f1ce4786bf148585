"""A mixture of normal distributions as one distribution, also of rows of which only some coordinates are known."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_vi_lab.mixture_moments import LOG_2_PI, Covariance


class NormalMixture(TorchDistribution):
    r"""Rows of a mixture of normals, its assignments summed out.

    .. math:: p(x) = \sum_k \pi_k \, \mathrm{Normal}(x_o; \mu_{k,o}, \Sigma_{k,oo})

    where o are the coordinates that are observed. Draws have all coordinates.

    Args:
        weights: π.
        loc: μ.
        precision: Precisions of the kind.
        kind: Of the covariances.
        observed: Which coordinates of each row are observed; all if ``None``.
        num_rows: N.

    Shape:
        weights ``(..., K)``, loc ``(..., K, D)``, precision ``(..., K, D, D)``, ``(..., D, D)``, ``(..., K, D)`` or
        ``(..., K)``, observed ``(N, D)``; batch shape ``(N,)``, event shape ``(D,)``.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support: ClassVar[Any] = constraints.real_vector
    has_rsample = False

    def __init__(
        self,
        weights: Tensor,
        loc: Tensor,
        precision: Tensor,
        kind: Covariance,
        *,
        observed: Tensor | None = None,
        num_rows: int,
        validate_args: bool | None = None,
    ) -> None:
        self.weights, self.loc, self.precision, self.kind, self.observed = weights, loc, precision, kind, observed
        super().__init__(torch.Size((num_rows,)), loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> NormalMixture:
        """The same for another number of rows; refused where rows differ in what is observed."""
        batch_shape = torch.Size(batch_shape)
        if batch_shape == self.batch_shape:
            return self
        if self.observed is not None or len(batch_shape) != 1:
            raise NotImplementedError(f"cannot expand rows {tuple(self.batch_shape)} to {tuple(batch_shape)}")
        return NormalMixture(self.weights, self.loc, self.precision, self.kind, num_rows=batch_shape[0])

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of the observed coordinates of each row."""
        each = component_log_densities(value, self.loc, self.precision, self.kind, observed=self.observed)
        return torch.logsumexp(each + self.weights.log().unsqueeze(-2), -1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Rows, all coordinates of them."""
        shape = torch.Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            component = torch.distributions.Categorical(self.weights).sample(shape)
            noise = torch.randn((*shape, *self.event_shape), dtype=self.loc.dtype).to(self.loc.device)
            return self.loc[component] + scaled(noise, self.precision, self.kind, component)


def scaled(noise: Tensor, precision: Tensor, kind: Covariance, component: Tensor) -> Tensor:
    """Standard normal noise with the covariance of each row's component."""
    if kind == "diag":
        return noise * precision[component].rsqrt()
    if kind == "spherical":
        return noise * precision[component].rsqrt().unsqueeze(-1)
    tril = torch.linalg.cholesky(precision)
    tril = tril if kind == "tied" else tril[component]
    return torch.linalg.solve_triangular(tril.mT, noise.unsqueeze(-1), upper=True).squeeze(-1)


def component_log_densities(
    x: Tensor, loc: Tensor, precision: Tensor, kind: Covariance, *, observed: Tensor | None = None
) -> Tensor:
    """Log density of each row in each component, differentiable, ``(..., N, K)``.

    Shape:
        x and observed ``(N, D)``, loc ``(..., K, D)``, precision of the kind.
    """
    apart = x.unsqueeze(-2) - loc.unsqueeze(-3)
    if kind in ("diag", "spherical"):
        tau = precision if kind == "diag" else precision.unsqueeze(-1)
        terms = (tau.log().unsqueeze(-3) - LOG_2_PI - apart.square() * tau.unsqueeze(-3)) / 2
        return (terms if observed is None else torch.where(observed.unsqueeze(-2), terms, 0.0)).sum(-1)
    tril = torch.linalg.cholesky(precision)
    if kind == "tied":
        tril = tril.unsqueeze(-3)
    if observed is None:
        white = (apart.unsqueeze(-2) @ tril.unsqueeze(-4)).squeeze(-2)
        log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return log_det.unsqueeze(-2) - (white.square().sum(-1) + x.shape[-1] * LOG_2_PI) / 2
    # what is missing becomes independent and lies at its mean
    there = observed.to(x).unsqueeze(-2)
    covariance = torch.cholesky_inverse(tril).unsqueeze(-4) * there.unsqueeze(-1) * there.unsqueeze(-2)
    root = torch.linalg.cholesky(covariance + torch.diag_embed(1 - there))
    white = torch.linalg.solve_triangular(root, (apart * there).unsqueeze(-1), upper=False).squeeze(-1)
    log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -log_det - (white.square().sum(-1) + there.sum(-1) * math.log(2 * math.pi)) / 2
