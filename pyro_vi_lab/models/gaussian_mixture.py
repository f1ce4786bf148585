"""Mixtures of normals: a Dirichlet or a truncated Dirichlet process prior, four kinds of covariances."""

from __future__ import annotations

import copy
from typing import Any, Literal

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.ops.indexing import Vindex
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError, DataError, ModelError, unknown_name
from pyro_vi_lab.isolation import model_run
from pyro_vi_lab.mixture_moments import COVARIANCES, Covariance
from pyro_vi_lab.mixture_prior import Parameters, Prior, stick_weights, sticks_of_weights
from pyro_vi_lab.models import mixture_posterior
from pyro_vi_lab.models.design import numeric, positive
from pyro_vi_lab.models.mixture_data import Missing, Table, mean_and_covariance, scanned, table
from pyro_vi_lab.models.mixture_priors import check_priors, covariance_prior_of, sample_loc, sample_precision
from pyro_vi_lab.models.normal_mixture import NormalMixture
from pyro_vi_lab.posterior import Posterior
from pyro_vi_lab.problem import Problem

Weights = Literal["dirichlet", "dirichlet_process"]


class GaussianMixture(PyroModule):
    r"""A mixture of K normal distributions with unknown weights, means and covariances.

    .. math::
        \pi \sim \mathrm{Dirichlet}(\alpha, \ldots, \alpha), \quad \Lambda_k \sim \mathrm{Wishart}(\nu, C^{-1}), \quad
        \mu_k \mid \Lambda_k \sim \mathrm{Normal}(m, (\beta \Lambda_k)^{-1})

    .. math::
        z_n \sim \mathrm{Categorical}(\pi), \quad x_n \sim \mathrm{Normal}(\mu_{z_n}, \Lambda_{z_n}^{-1})

    Covariances are ``"full"`` as above; ``"tied"``, one Λ for all; ``"diag"``, with
    :math:`\tau_{kd} \sim \mathrm{Gamma}(\nu/2, c_d/2)` on the diagonal of Λₖ; or ``"spherical"``, with one
    :math:`\tau_k \sim \mathrm{Gamma}(\nu/2, c/2)` for all of it. With ``weights="dirichlet_process"`` the weights are
    the pieces broken off a stick, :math:`v_k \sim \mathrm{Beta}(1, \alpha)`,
    :math:`\pi_k = v_k \prod_{j<k} (1 - v_j)`, the last one what is left.

    Sites ``weights`` (of a process ``stick``, and ``weights`` deterministic), ``precision``, ``loc``, ``assignment``
    (discrete, enumerated), ``x``. Components have no order: every permutation of them is as probable; see
    :meth:`align`.

    The m and C that are not given are those of the data, taken when :meth:`problem` is called and kept in the model of
    the problem; then the prior expects the covariance of a component to be that of all data.

    Args:
        num_components: K.
        covariance: Kind of the covariances.
        weights: Prior of the weights.
        concentration: α, of each component; of a process its concentration.
        mean_prior: m; the mean of the data if ``None``.
        mean_precision: β, in rows: how much the prior knows of each mean.
        degrees_of_freedom: ν; by default D + 2, for diagonal covariances 3: the fewest with which the prior expectation
            of a covariance, :math:`C / (\nu - D - 1)`, is C itself.
        covariance_prior: C, c: a matrix, a vector (diag) or a number (spherical); the covariance of the data, its
            diagonal, or the mean of that if ``None``.
        marginal: Whether the assignments are summed out inside the density of x, so that there is no site
            ``assignment``. Always so with row weights or missing values.

    Shape:
        X ``(N, D)``, plates ``row`` and ``component``; weights ``(K,)``, loc ``(K, D)``, precision ``(K, D, D)``,
        ``(D, D)``, ``(K, D)`` or ``(K,)``.

    Raises:
        ArgumentError: A number that is out of range, or a name that is not known.

    References:
        Bishop 2006, "Pattern Recognition and Machine Learning", Section 10.2. Blei & Jordan 2006, "Variational
        inference for Dirichlet process mixtures", Bayesian Analysis 1(1). Fraley & Raftery 2007, "Bayesian
        regularization for normal mixture estimation", Journal of Classification 24, for C and ν.

    Example:
        >>> model = GaussianMixture(2, mean_prior=[0.0, 0.0], covariance_prior=torch.eye(2))
        >>> X, _ = model.simulate(100, seed=0)
        >>> list(model.problem(X).sites)
        ['weights', 'precision', 'loc', 'assignment', 'x']
    """

    def __init__(
        self,
        num_components: int,
        *,
        covariance: Covariance = "full",
        weights: Weights = "dirichlet",
        concentration: float = 1.0,
        mean_prior: Any = None,
        mean_precision: float = 1.0,
        degrees_of_freedom: float | None = None,
        covariance_prior: Any = None,
        marginal: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(num_components, bool) or not isinstance(num_components, int) or num_components < 1:
            raise ArgumentError(f"num_components must be a positive whole number, got {num_components!r}")
        if covariance not in COVARIANCES:
            raise unknown_name("covariance", covariance, COVARIANCES)
        if weights not in ("dirichlet", "dirichlet_process"):
            raise unknown_name("weights", weights, ("dirichlet", "dirichlet_process"))
        if weights == "dirichlet_process" and num_components < 2:
            raise ArgumentError(
                "a Dirichlet process that is cut off after one component is one normal: use 'dirichlet'"
            )
        positive(concentration=concentration, mean_precision=mean_precision)
        self.num_components, self.covariance, self.weight_prior = num_components, covariance, weights
        self.concentration, self.mean_precision, self.marginal = concentration, mean_precision, marginal
        self.degrees_of_freedom = degrees_of_freedom
        self.mean_prior = None if mean_prior is None else numeric("mean_prior", mean_prior)
        self.covariance_prior = None if covariance_prior is None else numeric("covariance_prior", covariance_prior)
        self._check_priors()

    def _check_priors(self) -> None:
        check_priors(self.covariance, self.mean_prior, self.covariance_prior, self.degrees_of_freedom)

    @property
    def prior(self) -> Prior:
        """All parameters of the prior.

        Raises:
            ModelError: Some are still to be taken from data.
        """
        if self.mean_prior is None or self.covariance_prior is None:
            raise ModelError(
                "mean_prior or covariance_prior of GaussianMixture is not set: give them, or take those of the data "
                "with model.problem(X), whose .model has them"
            )
        dim = len(self.mean_prior)
        default = dim + 2 if self.covariance in ("full", "tied") else 3
        is_process = self.weight_prior == "dirichlet_process"
        number = self.num_components - is_process
        return Prior(
            kind=self.covariance,
            concentration=self.mean_prior.new_full((number,), self.concentration),
            is_process=is_process,
            loc=self.mean_prior,
            relative_precision=self.mean_precision,
            df=float(default if self.degrees_of_freedom is None else self.degrees_of_freedom),
            scatter=self.covariance_prior,
        )

    # --- the model ----------------------------------------------------------------------------------------------------

    def forward(self, X: Tensor, observed: Tensor | None = None, sample_weight: Tensor | None = None) -> None:
        """Run the model.

        Args:
            X: Data; what is not observed is not looked at.
            observed: Which values are observed; all if ``None``.
            sample_weight: How much each row counts.

        Shape:
            X and observed ``(N, D)``, sample_weight ``(N,)``.
        """
        prior, K, kind = self.prior, self.num_components, self.covariance
        if X.dim() != 2 or X.shape[1] != prior.dim:
            raise DataError(f"X has shape {tuple(X.shape)}; expected (rows, {prior.dim}), as mean_prior has it")
        prior = prior.like(X)
        if prior.is_process:
            with pyro.plate("stick_piece", K - 1):
                stick = pyro.sample("stick", dist.Beta(1.0, prior.concentration))
            weights = pyro.deterministic("weights", stick_weights(stick))
        else:
            weights = pyro.sample("weights", dist.Dirichlet(prior.concentration))
        precision = sample_precision(prior) if kind == "tied" else None
        with pyro.plate("component", K):
            precision = sample_precision(prior) if precision is None else precision
            loc = sample_loc(prior, precision)
        with pyro.plate("row", len(X)):
            if self.marginal or observed is not None or sample_weight is not None:
                # Pyro takes no scale of zero; times the least number a log density is nothing
                tiny = torch.finfo(X.dtype).tiny
                with poutine.scale(scale=1.0 if sample_weight is None else sample_weight.clamp_min(tiny)):
                    fn = NormalMixture(weights, loc, precision, kind, observed=observed, num_rows=len(X))
                    pyro.sample("x", fn, obs=X)
                return
            z = pyro.sample("assignment", dist.Categorical(weights), infer={"enumerate": "parallel"})
            mean = Vindex(loc)[..., z, :]
            if kind in ("full", "tied"):
                tril = dist.MultivariateNormal(prior.loc, precision_matrix=precision).scale_tril
                tril = tril if kind == "tied" else Vindex(tril)[..., z, :, :]
                pyro.sample("x", dist.MultivariateNormal(mean, scale_tril=tril), obs=X)
            else:
                sd = precision.rsqrt()
                sd = Vindex(sd)[..., z, :] if kind == "diag" else Vindex(sd)[..., z].unsqueeze(-1)
                pyro.sample("x", dist.Normal(mean, sd).to_event(1), obs=X)

    # --- with data ----------------------------------------------------------------------------------------------------

    def problem(
        self,
        X: Any,
        *,
        sample_weight: Any = None,
        missing: Missing = "error",
        minibatch: int | None = None,
        name: str | None = None,
    ) -> Problem:
        """The model with checked data, and with the priors that are still open taken from them.

        Args:
            X: Rows: a tensor, an array or a data frame. A memory-mapped array (``numpy.load(..., mmap_mode="r")``) of
                float64 is read through once, in pieces, and not held.
            sample_weight: How much each row counts, ``(N,)``: a weight of two is the row twice.
            missing: What NaN in X means: ``"error"``, or ``"marginalize"``: a value that is not known, which is
                integrated out.
            minibatch: Rows in a batch, for fits on some of the rows at a time.
            name: What to call the problem.

        Raises:
            DataError: As in :func:`pyro_vi_lab.models.mixture_data.table`, or the data have no covariance to take the
                prior from.
        """
        arguments: dict[str, Any] = {}
        if isinstance(X, np.memmap):
            if sample_weight is not None or missing != "error":
                raise ArgumentError("row weights and missing values are for data in memory, X is memory-mapped")
            if minibatch is None:
                raise ArgumentError("X is memory-mapped: say how many rows a batch has, minibatch=...")
            columns, mean, covariance = scanned(X, self.num_components)
            model, arguments["X"] = self._with_prior(mean, covariance, len(X)), X
            model.marginal = True
        else:
            data = table(X, sample_weight=sample_weight, missing=missing, num_components=self.num_components)
            model, columns, arguments["X"] = self.with_prior_of(data), data.columns, data.X
            arguments |= {"observed": data.observed} if data.observed is not None else {}
            arguments |= {"sample_weight": data.weight} if data.weight is not None else {}
            # an assignment for each row is nothing that a guide could hold batch by batch
            model.marginal = model.marginal or minibatch is not None or len(arguments) > 1
        dims = {"loc": ["component", "column"], "x": ["row", "column"]}
        square = ["column", "column_2"]
        dims |= {"full": {"precision": ["component", *square]}, "tied": {"precision": square}}.get(self.covariance, {})
        dims |= {"precision": dims["loc"]} if self.covariance == "diag" else {}
        coords = {"column": columns}
        coords |= {"column_2": columns} if self.covariance in ("full", "tied") else {}
        by_row = list(arguments) if minibatch is not None else None
        return Problem(
            model,
            dims=dims,
            coords=coords,
            name=name or "GaussianMixture",
            minibatch=minibatch,
            rows=by_row,
            **arguments,
        )

    def with_prior_of(self, data: Table) -> GaussianMixture:
        """A copy whose open priors are those of the data."""
        mean, covariance = mean_and_covariance(data)
        return self._with_prior(mean, covariance, len(data.X))

    def _with_prior(self, mean: Tensor, covariance: Tensor, num_rows: int) -> GaussianMixture:
        model = copy.copy(self)
        if model.mean_prior is None:
            model.mean_prior = mean
        if len(model.mean_prior) != len(mean):
            raise DataError(f"X has {len(mean)} columns; mean_prior has {len(model.mean_prior)} numbers")
        if model.covariance_prior is None:
            model.covariance_prior = covariance_prior_of(self.covariance, covariance, num_rows)
        model._check_priors()
        return model

    def simulate(self, num_rows: int, *, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """Data ``(N, D)``, and the values of the other sites that made them, drawn from the prior.

        Raises:
            ArgumentError: No rows.
            ModelError: ``mean_prior`` or ``covariance_prior`` is not set.
        """
        if num_rows < 1:
            raise ArgumentError(f"num_rows must be at least 1, got {num_rows}")
        dim = self.prior.dim
        with model_run(seed=seed, dtype=torch.float64, validate=True), torch.no_grad():
            nodes: Any = poutine.trace(poutine.uncondition(self)).get_trace(torch.zeros(num_rows, dim)).nodes
        names = [key for key in ("weights", "stick", "precision", "loc", "assignment") if key in nodes]
        return nodes["x"]["value"], {key: nodes[key]["value"] for key in names}

    def site_values(self, parameters: Parameters) -> dict[str, Tensor]:
        """Values of the sites, deterministic ones included, of one mixture."""
        values = {"weights": parameters.weights, "precision": parameters.precision(), "loc": parameters.loc}
        if self.weight_prior == "dirichlet_process":
            values["stick"] = sticks_of_weights(parameters.weights)
        return values

    # --- with a posterior ---------------------------------------------------------------------------------------------

    def align(self, posterior: Posterior, *, reference: Posterior | None = None) -> Posterior:
        """The same draws with their components in one order, chosen draw by draw.

        See :func:`pyro_vi_lab.models.mixture_posterior.align`.

        Args:
            posterior: Draws of chains or restarts whose components come in any order.
            reference: Whose order to take; that of the draws themselves if ``None``.
        """
        return mixture_posterior.align(posterior, self.covariance, reference=reference)

    def responsibilities(self, posterior: Posterior, X: Any, *, missing: Missing = "error") -> Tensor:
        """Probability of each component for each row, over the draws, ``(N, K)``; align these first.

        Args:
            posterior: Draws of a fit, of NUTS or of anything else that has the sites of this model.
            X: Rows.
            missing: As in :meth:`problem`.

        Raises:
            ArgumentError: The posterior lacks a site of this model.
            DataError: A value that is not finite, or other columns than the model's.
        """
        return mixture_posterior.responsibilities(posterior, *self._rows(X, missing), self.covariance)

    def predict(self, posterior: Posterior, X: Any, *, missing: Missing = "error") -> Tensor:
        """The most probable component of each row, ``(N,)``; otherwise as :meth:`responsibilities`."""
        return self.responsibilities(posterior, X, missing=missing).argmax(1)

    def score_samples(self, posterior: Posterior, X: Any, *, missing: Missing = "error") -> Tensor:
        """Log posterior predictive density of each row, ``(N,)``; the order of components has no part in it."""
        return mixture_posterior.score_samples(posterior, *self._rows(X, missing), self.covariance)

    def sample(self, posterior: Posterior, num_rows: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
        """New rows ``(N, D)`` from the posterior predictive distribution, and their components ``(N,)``."""
        if num_rows < 1:
            raise ArgumentError(f"num_rows must be at least 1, got {num_rows}")
        return mixture_posterior.sample(posterior, num_rows, self.covariance, seed=seed)

    def _rows(self, X: Any, missing: Missing) -> tuple[Tensor, Tensor | None]:
        values = numeric("X", X)
        if values.dim() != 2 or (self.mean_prior is not None and values.shape[1] != len(self.mean_prior)):
            width = "columns" if self.mean_prior is None else len(self.mean_prior)
            raise DataError(f"X has shape {tuple(values.shape)}; expected (rows, {width})")
        observed = ~values.isnan()
        bad = ~(values.isfinite() | (~observed if missing == "marginalize" else torch.zeros_like(observed)))
        if bool(bad.any()):
            row, column = bad.nonzero()[0].tolist()
            raise DataError(f"X has a missing or infinite value in row {row}, column {column}")
        return (values, None) if bool(observed.all()) else (torch.where(observed, values, 0.0), observed)


def example() -> Problem:
    """Three groups in two dimensions: simulated, 150 rows, full covariances."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.tensor([[0.0, 0.0], [4.0, 1.0], [1.0, 5.0]], dtype=torch.float64).repeat_interleave(50, 0)
    X = centers + torch.randn(150, 2, generator=generator, dtype=torch.float64)
    return GaussianMixture(3).problem(X, name="gaussian_mixture")
