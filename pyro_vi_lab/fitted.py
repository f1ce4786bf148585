"""The result of a fit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_vi_lab.checks import ImportanceCheck, RowImportance, importance, importance_by_row
from pyro_vi_lab.density import LogDensity
from pyro_vi_lab.density_engine import Status
from pyro_vi_lab.errors import ArgumentError, FitError
from pyro_vi_lab.families import Family, Params
from pyro_vi_lab.fixed_draws import FixedDrawELBO, Sensitivity
from pyro_vi_lab.posterior import Posterior
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.program_draws import program_draws, program_elbo
from pyro_vi_lab.row_weights import row_weights
from pyro_vi_lab.saved_fit import save_fit


@dataclass(frozen=True, eq=False)
class FixedOptimum:
    """An optimum over fixed draws, and what follows from the curvature there, computed when it is asked for."""

    target: FixedDrawELBO
    point: Params

    @cached_property
    def sensitivity(self) -> Sensitivity:
        """Linear response and Monte Carlo error."""
        return self.target.sensitivity(self.point)


class Stage(NamedTuple):
    """One stage of a fit of ``"auto"``.

    Args:
        guide: Name of the guide, or ``"nuts"``.
        decision: What the verdict on it was; ``"sample"`` of NUTS.
        reasons: Why.
        seconds: Wall-clock time, the verdict's included.
        changes: How the model had been rewritten by then, such as ``"non-center theta"``.
    """

    guide: str
    decision: str
    reasons: tuple[str, ...]
    seconds: float
    changes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Fit:
    """The result of :func:`fit`; of several restarts, ``guide``, ``status`` and ``elbo`` are those of the best.

    Args:
        problem: What was fitted.
        method: Name of the guide.
        guide: The fitted guide. One over a family is a twin of what was given; any other has been trained in place,
            its parameters in Pyro's param store, as :class:`pyro.infer.SVI` does.
        params: Location and scale of every restart, best first, ``(R, ...)``; ``None`` if the guide is not over a
            family.
        statuses: How each restart ended.
        message: What the status means here and what to do.
        num_steps: Steps taken, rejected ones included.
        num_gradients: Gradients of the log density, over particles and restarts.
        seconds: Wall-clock time, capturing the model included.
        seed: Seed of the run.
        history: One row per evaluation and, where there are restarts, one column per restart: ``negative_elbo``,
            ``gap`` (estimated nats below the optimum), ``step_size``, ``kl`` of the step, and ``num_particles``,
            ``seconds`` per row. Of a guide that is not over a family: ``negative_elbo``, ``step_size``, ``seconds``.
        objective: The :class:`~pyro_vi_lab.Captured` objective of such a guide; its ``explain()`` tells how it ran.
        mode: Value of every site where a fit of ``"map"`` or ``"mle"`` ended; ``None`` of all others. The history of
            such a fit has ``negative_log_density`` in place of ``negative_elbo``, and ``gain``, the nats that each
            step promised.
        fixed: The optimum over fixed draws of a fit with ``optim="fixed_draws"`` that has converged.
        path: The stages of a fit of ``"auto"``; empty of all others.
        verdict: What :func:`pyro_vi_lab.trust` says of a fit of ``"auto"`` that ended with a guide.
        sampled: The draws of a fit of ``"auto"`` that ended with NUTS.
    """

    problem: Problem
    method: str
    guide: Any
    params: Params | None
    statuses: tuple[Status, ...]
    message: str
    num_steps: int
    num_gradients: int
    seconds: float
    seed: int
    history: dict[str, NDArray[Any]] = field(repr=False)
    objective: Any = field(default=None, repr=False)
    mode: dict[str, Tensor] | None = field(default=None, repr=False)
    fixed: FixedOptimum | None = field(default=None, repr=False)
    path: tuple[Stage, ...] = field(default=(), repr=False)
    verdict: Any = field(default=None, repr=False)
    sampled: Posterior | None = field(default=None, repr=False)

    @property
    def status(self) -> Status:
        """How the best restart ended."""
        return self.statuses[0]

    @property
    def num_restarts(self) -> int:
        """Number of restarts, R."""
        return len(self.statuses)

    @property
    def family(self) -> Family:
        """The family of the guide.

        Raises:
            ArgumentError: The guide is not over a family.
        """
        self._members("family")
        family: Family = self.guide.family
        return family

    @property
    def loc(self) -> Tensor:
        """Mean on the unconstrained scale of the best restart, ``(D,)``.

        Raises:
            ArgumentError: The guide is not over a family.
        """
        return self._members("loc").loc[0]

    def point(self) -> dict[str, Tensor]:
        """Value of every latent and deterministic site at the mode, of a fit of ``"map"`` or ``"mle"``.

        Raises:
            ArgumentError: Another guide, which is a distribution.
            FitError: The fit diverged, so that there is no mode.
        """
        if self.mode is None:
            raise ArgumentError(f"a fit of the guide {self.method} is no point; see posterior().mean(), or fit 'map'")
        if self.status is Status.DIVERGED:
            raise FitError(f"the {self.method} fit of {self.problem.name} has no mode: {self.message}")
        return self.mode

    def covariance(self) -> Tensor:
        """Covariance on the unconstrained scale of the best restart, ``(D, D)``.

        Raises:
            ArgumentError: The guide is not over a family.
        """
        members = self._members("covariance")
        return self.family.covariance(Params(*(value[0] for value in members)))

    def linear_response(self) -> Tensor:
        r"""Covariance on the unconstrained scale by linear response, ``(D, D)``, of a fit with ``optim="fixed_draws"``.

        How the mean of z would move if the log density were tilted by :math:`t^\top z`: exact where the posterior is
        normal, also for a mean-field guide, whose own variances are too small there and whose correlations are zero.

        .. math:: \frac{\partial E_q[z]}{\partial t} = \big[(-\nabla^2 \hat{\mathcal L})^{-1}\big]_{\mu\mu}

        Raises:
            ArgumentError: A fit of another kind.
            FitError: The fit has not converged.

        References:
            Giordano, Broderick & Jordan 2018, "Covariances, robustness, and variational Bayes", JMLR 19, Theorem 1.
        """
        return self._optimum("linear response").linear_response

    def monte_carlo_error(self) -> tuple[Tensor, Tensor]:
        """How far other draws would have moved a fit with ``optim="fixed_draws"``, as standard errors.

        Of the location, and of the logarithm of every coordinate's standard deviation, ``(D,)`` each.

        Raises:
            ArgumentError: A fit of another kind.
            FitError: The fit has not converged.

        References:
            Giordano, Ingram & Broderick 2024, "Black box variational inference with a deterministic objective",
            JMLR 25, Section 3.3.
        """
        found = self._optimum("Monte Carlo error")
        return found.loc_error, found.log_sd_error

    def _optimum(self, what: str) -> Sensitivity:
        if self.fixed is not None:
            return self.fixed.sensitivity
        if "radius" in self.history and self.params is not None and "negative_elbo" in self.history:
            raise FitError(f"the {self.method} fit of {self.problem.name} has no {what}: {self.message}")
        raise ArgumentError(f"this fit has no {what}: fit 'mean_field' or 'full_rank' with optim='fixed_draws'")

    def _members(self, what: str) -> Params:
        self._refuse_point(what)
        if self.params is None:
            raise ArgumentError(
                f"a fit of the guide {self.method} has no {what}: that guide is not over a family on the unconstrained "
                "scale; take draws with posterior()"
            )
        return self.params

    def _refuse_point(self, what: str) -> None:
        if self.sampled is not None:
            raise ArgumentError(f"this fit of 'auto' ended with NUTS and has no {what}: its draws are posterior()")
        if self.mode is not None:
            raise ArgumentError(
                f"a fit of the guide {self.method} has no {what}: it is a point (see point()) and no "
                "distribution; fit 'laplace' for a normal at the mode, or 'full_rank'"
            )

    def elbo(self, num_draws: int = 1000, seed: int = 0) -> tuple[float, float]:
        """ELBO in nats and its Monte Carlo standard error, from fresh draws of the best restart.

        Raises:
            ArgumentError: Fewer than two draws, or a fit of a point, whose bound is minus infinity.
        """
        self._refuse_point("ELBO")
        if num_draws < 2:
            raise ArgumentError(f"num_draws must be at least 2 for a standard error, got {num_draws}")
        if self.params is None:
            return program_elbo(self.problem, self.guide, self.objective, num_draws, seed)
        density = self.problem.density()
        params = Params(*(value[:1] for value in self.params))
        _, log_p, log_q = draw(density, self.family, params, num_draws, seed)
        values = (log_p - log_q)[:, 0]
        return float(values.mean()), float(values.std() / math.sqrt(num_draws))

    def importance(self, num_draws: int = 10_000, seed: int = 0) -> ImportanceCheck:
        """Pareto k-hat and importance sampling effective sample size of the best restart, from fresh draws.

        The weights are those of all latent sites and all rows together. Discrete sites that the guide does not draw are
        summed out; where the model sees some of its rows at a time, each draw is weighed by all of them, in one or more
        passes over the data. Of local latent sites, :meth:`row_importance` judges each row by itself.

        Args:
            num_draws: Draws; the standard error of k-hat falls with their fourth root.
            seed: Seed of the draws.

        Raises:
            FitError: Every restart diverged.
            DataError: Too few draws, or the density cannot be computed at some of them.
            ArgumentError: A fit of a point, or a guide with a site that is one.
            ModelError: The rows cannot all be seen, as those of a data loader.
        """
        self._refuse_diverged("importance weights")
        if self.params is None:
            stats = program_draws(self.problem, self.guide, num_draws, seed, weigh=True).stats
            return importance(stats["log_p"], stats["log_q"])
        params = Params(*(value[:1] for value in self.params))
        _, log_p, log_q = draw(self.problem.density(), self.family, params, num_draws, seed)
        return importance(log_p[:, 0], log_q[:, 0])

    def row_importance(
        self, num_draws: int = 1000, seed: int = 0, *, plate: str | None = None, num_rows: int = 100
    ) -> RowImportance:
        """Pareto k-hat of the local latent sites of every row, given one draw of all others.

        For guides that draw the sites of the rows in a plate, such as amortized ones and Pyro's ``AutoNormal``. The
        rows must be independent given the latent sites outside of the plate.

        Args:
            num_draws: Draws of each row.
            seed: Seed of the draws, and of the rows that are taken.
            plate: Name of the plate of the rows; needed if latent sites lie in more than one.
            num_rows: How many rows, at least, are judged where the model sees some at a time; else it is all.

        Raises:
            FitError: Every restart diverged.
            DataError: Too few draws, or the density cannot be computed at some of them.
            ArgumentError: The guide draws all rows as one vector, there are no local sites, or one is a point.
        """
        self._refuse_diverged("importance weights")
        if self.params is not None:
            raise ArgumentError(
                f"the guide {self.method} draws all latent sites as one vector, which importance() judges: rows have "
                "weights of their own with pyro.infer.autoguide.AutoNormal or an amortized guide"
            )
        found = row_weights(self.problem, self.guide, num_draws, seed, plate=plate, num_rows=num_rows)
        return importance_by_row(found.log_p, found.log_q, rows=found.rows)

    def _refuse_diverged(self, what: str) -> None:
        self._refuse_point(what)
        if self.status is Status.DIVERGED:
            raise FitError(f"the {self.method} fit of {self.problem.name} has no posterior: {self.message}")

    def __repr__(self) -> str:
        return (
            f"Fit({self.method} of {self.problem.name}: {self.status.value} after {self.num_steps} steps, "
            f"{self.num_gradients:,} gradients, {self.seconds:.2g} s)"
        )

    def posterior(self, num_draws: int = 1000, seed: int = 0) -> Posterior:
        """Independent draws of the fitted guide, one chain per restart that did not diverge.

        Those of a fit of a point (``"map"``, ``"mle"``) are all equal to it, in one chain, as those of Pyro's
        ``Predictive`` of an ``AutoDelta``: good for predictions from the point, and no measure of uncertainty.

        Those of ``"auto"`` where it ended with NUTS are of its chains, about ``num_draws`` in all.

        Raises:
            FitError: Every restart diverged.
        """
        usable = [i for i, status in enumerate(self.statuses) if status is not Status.DIVERGED]
        if not usable:
            raise FitError(f"the {self.method} fit of {self.problem.name} has no posterior: {self.message}")
        if num_draws < 1:
            raise ArgumentError(f"num_draws must be positive, got {num_draws}")
        if self.sampled is not None:
            return self.sampled.thinned(num_draws)
        info = {
            "status": self.status.value,
            "seconds": self.seconds,
            "num_steps": self.num_steps,
            "num_gradients": self.num_gradients,
            "seed": self.seed,
            "draws_seed": seed,
        }
        if self.mode is not None:
            equal = {name: value.expand(1, num_draws, *value.shape) for name, value in self.point().items()}
            return Posterior(draws=equal, method=self.method, info={**info, "point": True})
        if self.params is None:
            drawn = program_draws(self.problem, self.guide, num_draws, seed)
            return Posterior(
                draws={name: value[None] for name, value in drawn.values.items()},
                stats={name: value[None] for name, value in drawn.stats.items()},
                method=self.method,
                info=info,
            )
        density = self.problem.density()
        params = Params(*(value[usable] for value in self.params))
        z, log_p, log_q = draw(density, self.family, params, num_draws, seed)
        z = z.transpose(0, 1)
        return Posterior(
            draws=density.constrain(z),
            stats={"log_p": log_p.T, "log_q": log_q.T},
            method=self.method,
            unconstrained=z,
            info=info,
        )

    def save(self, path: str | Path) -> None:
        """Write the fit to one file, whole or not at all; :func:`pyro_vi_lab.load` reads it.

        The file holds the parameters, the history and where they come from, as numbers and plain values. Model and
        data are not in it, nor are a verdict, the stages of ``"auto"`` and the optimum over fixed draws.

        Raises:
            FileError: It cannot be written there.
        """
        save_fit(self, Path(path))

    def plot(self, *, against: str = "steps", ax: Any = None) -> Any:
        """Axes with the negative ELBO, or the negative log density of a point, against the steps or the seconds.

        Args:
            against: ``"steps"`` or ``"seconds"``.
            ax: Axes of Matplotlib to draw into; new ones if ``None``.

        Raises:
            ArgumentError: Another word than these two.
        """
        if against not in ("steps", "seconds"):
            raise ArgumentError(f"against must be 'steps' or 'seconds', got {against!r}")
        from matplotlib import pyplot

        axes = pyplot.subplots()[1] if ax is None else ax
        kept = "negative_elbo" if "negative_elbo" in self.history else "negative_log_density"
        what = kept.replace("_elbo", " ELBO").replace("_", " ")
        values = self.history[kept].reshape(len(self.history["seconds"]), -1)
        # far starts are millions of nats above the optimum; near it the estimates of the bound scatter around zero
        known = self.status is Status.DIVERGED or kept == "negative_log_density"
        last = np.nanmin(values) if known else -self.elbo()[0]
        steps = np.arange(
            self.num_steps - len(values) + 1, self.num_steps + 1
        )  # those that count from one have no row 0
        axes.plot(steps if against == "steps" else self.history["seconds"], values - last)
        axes.set_yscale("symlog", linthresh=0.1)
        axes.set(
            xlabel={"steps": "step"}.get(against, against),
            ylabel=f"{what} above that of the fit (nats)",
            title=self.problem.name,
        )
        return axes


def draw(
    density: LogDensity, family: Family, params: Params, num_draws: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Independent draws ``(S, R, D)`` with their log densities under target and guide, ``(S, R)``."""
    generator = torch.Generator().manual_seed(seed)
    num_fits, dim = params.loc.shape
    eps = family.draw((num_draws, num_fits), dim, generator=generator, dtype=density.dtype).to(density.device)
    z = family.sample(params, eps)
    return z, density.log_prob(z), family.log_prob(params, z)
