"""Is a guide right for a model? Fits to simulated data, whose parameters are known."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyro_vi_lab.checks.calibration import LEVELS, CalibrationCheck, check_ranks, ranks_of
from pyro_vi_lab.checks.uniformity import MIN_NUMBERS, ecdf, ecdf_band
from pyro_vi_lab.density_engine import Status
from pyro_vi_lab.errors import ArgumentError, FitError
from pyro_vi_lab.export import plain
from pyro_vi_lab.fit_guide import is_point_estimate
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.simulated_fits import Quantity, compare_quantities
from pyro_vi_lab.simulation import simulate

if TYPE_CHECKING:
    import pandas

Array = NDArray[Any]

MIN_DRAWS = 39
"""Fewest draws of a fit: one lies beyond each end of their central interval of 95 %."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Whether fits of a guide to simulated data are right; :func:`calibrate` makes it.

    Args:
        problem: The model, with the data that the simulated ones took the place of.
        method: Name of the guide.
        check: What the ranks say.
        ranks: Rank of every parameter among the draws of its fit, ``(R, P)``.
        num_draws: Draws per fit, S.
        num_simulations: Simulations that were asked for.
        statuses: How many fits ended in each way.
        failures: Why simulations are missing among the ranks, and how many for each reason.
        constant: Scalars that are the same in all simulations, which have no rank.
        seconds: Wall-clock time.
        seed: Seed of the run.
    """

    problem: Problem
    method: str
    check: CalibrationCheck
    ranks: Array
    num_draws: int
    num_simulations: int
    statuses: Mapping[str, int]
    failures: Mapping[str, int]
    constant: tuple[str, ...]
    seconds: float
    seed: int

    @property
    def alarm(self) -> bool:
        """Whether any parameter is calibrated so badly that chance does not explain it."""
        return self.check.alarm

    def table(self) -> pandas.DataFrame:
        """One row per parameter: p-values, coverage of central intervals with Wilson intervals, and what is wrong."""
        import pandas

        check = self.check
        columns: dict[str, Any] = {
            "parameter": list(check.parameters),
            "p_value": check.p_value,
            "adjusted_p_value": check.adjusted_p_value,
            "symmetry_p_value": check.symmetry_p_value,
        }
        for level in LEVELS:
            name, covered = f"coverage_{100 * level:.0f}", check.coverage[level]
            columns |= {name: covered.value, f"{name}_lower": covered.lower, f"{name}_upper": covered.upper}
        return pandas.DataFrame({**columns, "direction": list(check.direction)})

    def summary(self) -> str:
        """What was found, in words."""
        check, bad = self.check, np.flatnonzero(self.check.adjusted_p_value < self.check.alpha)
        head = f"{self.method} on {len(self.ranks)} simulated data sets of {self.problem.name}: "
        if len(bad):
            order = bad[np.argsort(check.p_value[bad])]
            shown = [
                f"{check.parameters[i]} {check.direction[i]} (adjusted p-value {check.adjusted_p_value[i]:.2g})"
                for i in order[:3]
            ]
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            head += f"not calibrated in {len(bad)} of {len(check.parameters)} parameters: {'; '.join(shown)}{more}"
        else:
            least = int(check.adjusted_p_value.argmin())
            head += (
                f"nothing speaks against it in {len(check.parameters)} parameters; smallest adjusted p-value "
                f"{check.adjusted_p_value[least]:.2g} ({check.parameters[least]})"
            )
        missing = [f"{count} of {self.num_simulations} missing: {reason}" for reason, count in self.failures.items()]
        unfinished = self.statuses.get(Status.OUT_OF_STEPS.value, 0)
        if unfinished:
            missing.append(f"{unfinished} fits counted that stopped before they converged")
        return ". ".join([head, *missing])

    def to_dict(self) -> dict[str, Any]:
        """All numbers as plain values, ready for JSON."""
        found: dict[str, Any] = {
            "problem": self.problem.name,
            "guide": self.method,
            "alarm": self.alarm,
            "alpha": self.check.alpha,
            "num_simulations": self.num_simulations,
            "num_draws": self.num_draws,
            "statuses": dict(self.statuses),
            "failures": dict(self.failures),
            "constant": list(self.constant),
            "parameters": self.table().to_dict("records"),
            "ranks": self.ranks.T.tolist(),
            "seconds": self.seconds,
            "seed": self.seed,
        }
        result: dict[str, Any] = plain(found)
        return result

    def plot(self) -> Any:
        """Axes with the distribution function of every parameter's ranks minus the uniform one, and their band.

        All functions stay inside the band with the probability 1 - alpha where the fits are right (Bonferroni).
        """
        from matplotlib import pyplot

        check = self.check
        band = ecdf_band(len(self.ranks), 1 - check.alpha / len(check.parameters))
        difference = ecdf(check.fractions, band.points) - band.points[:, None]
        _, axes = pyplot.subplots()
        axes.fill_between(band.points, band.lower - band.points, band.upper - band.points, color="0.85", lw=0)
        for i, name in enumerate(check.parameters):
            bad = bool(check.direction[i])
            label = f"{name}: {check.direction[i]}" if bad else None
            axes.plot(band.points, difference[:, i], label=label, lw=1.5 if bad else 0.8, color=None if bad else "0.5")
        if self.alarm:
            axes.legend(fontsize="small")
        axes.set(xlabel="rank / number of draws", ylabel="share below, minus uniform", title=self.problem.name)
        return axes

    def __repr__(self) -> str:
        return f"Calibration({self.summary()})"

    def _repr_html_(self) -> str:
        from html import escape

        return f"<p>{escape(self.summary())}</p>{self.table().to_html(index=False, float_format='%.3g')}"


def calibrate(
    problem: Problem,
    guide: Any = "full_rank",
    *,
    num_simulations: int = 200,
    num_draws: int = 399,
    seed: int = 0,
    quantities: Mapping[str, Quantity] | None = None,
    alpha: float = 0.05,
    progress: bool = True,
) -> Calibration:
    """Simulation-based calibration of a guide: fit data whose parameters are known.

    Parameters are drawn from the prior, data from the model given these, and the guide is fitted to every data set.
    Where the fits are the posteriors, the parameters that made the data are ranked among the draws of their fits as
    if they were one more of them. This judges a guide for a model, on the data that the prior brings about; whether
    one fit is right, :func:`~pyro_vi_lab.fit`'s own checks tell.

    All scalars of the latent and deterministic sites are ranked, and the log joint density of parameters and data,
    which sees what no single parameter shows, such as correlations that are missing (Modrák et al. 2023); discrete
    sites that the density sums out are not. The p-values of all are adjusted for their number.

    Args:
        problem: Model and data; the simulated data take the place of the observed ones, and have their shapes.
        guide: What :func:`~pyro_vi_lab.fit` takes. Guides over a family are fitted to all data sets in one batch,
            others one by one.
        num_simulations: Data sets, R, at least 10. More find smaller errors.
        num_draws: Draws of each fit, S, at least 39.
        seed: Seed of everything.
        quantities: More to rank: a name and a function of draws and data, as of the observed sites, that gives one
            number per draw; of several draws at once.
        alpha: Probability of a false alarm.
        progress: Show a progress line on a terminal when the work takes long.

    Shape:
        of quantities: draws of a site ``(S, *site shape)``, data ``(*site shape)``, result ``(S,)``.

    Raises:
        ArgumentError: A number out of range, a guide that is a point, or a quantity that has another shape.
        ModelError: Parameters or data cannot be drawn; the message names the site and the reason.
        FitError: Fewer than 10 simulations could be used.

    References:
        Talts et al. 2018, "Validating Bayesian inference algorithms with simulation-based calibration",
        arXiv:1804.06788. Yao et al. 2018, "Yes, but did it work?: Evaluating variational inference", ICML, Section 3.
        Modrák et al. 2023, "Simulation-based calibration checking for Bayesian computation: the choice of test
        quantities shapes sensitivity", Bayesian Analysis.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("row", len(y)):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> result = calibrate(Problem(model, torch.zeros(3)), num_simulations=50, progress=False)
        >>> result.alarm, result.ranks.shape
        (False, (50, 2))
    """
    _check_numbers(problem, num_simulations, num_draws)
    if is_point_estimate(guide):
        raise ArgumentError(f"the guide {guide!r} is a point: a fit of it has no draws to rank among")
    began = time.perf_counter()
    simulation = simulate(problem, num_simulations, seed)
    compared = compare_quantities(
        problem, simulation, guide, num_draws=num_draws, seed=seed, quantities=quantities or {}, progress=progress
    )
    failures = Counter(compared.failures)
    if simulation.num_discarded:
        failures["the simulated data are not finite"] = simulation.num_discarded
    if len(compared.truth) < MIN_NUMBERS:
        reasons = "; ".join(f"{count}: {reason}" for reason, count in failures.items())
        raise FitError(
            f"{len(compared.truth)} of {num_simulations} simulations of {problem.name} can be used ({reasons}); "
            f"calibration is judged from at least {MIN_NUMBERS}"
        )
    moves = np.ptp(compared.truth, axis=0) > 0
    ranks = ranks_of(compared.truth[:, moves], compared.draws[..., moves], seed=seed)
    names = np.array(compared.names)
    return Calibration(
        problem=problem,
        method=compared.method,
        check=check_ranks(ranks, num_draws, parameters=names[moves].tolist(), alpha=alpha, seed=seed),
        ranks=ranks,
        num_draws=num_draws,
        num_simulations=num_simulations,
        statuses=compared.statuses,
        failures=dict(failures),
        constant=tuple(names[~moves].tolist()),
        seconds=time.perf_counter() - began,
        seed=seed,
    )


def _check_numbers(problem: Problem, num_simulations: int, num_draws: int) -> None:
    if not isinstance(problem, Problem):
        raise ArgumentError(
            f"problem must be a pyro_vi_lab.Problem, got {type(problem).__name__}; wrap it: Problem(model, *args)"
        )
    for name, value, least in (("num_simulations", num_simulations, MIN_NUMBERS), ("num_draws", num_draws, MIN_DRAWS)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ArgumentError(f"{name} must be a whole number of at least {least}, got {value!r}")
