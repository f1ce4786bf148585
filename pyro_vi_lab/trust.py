"""One call that says whether a variational posterior may be believed, and what to do if not."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from typing import Any, Literal

from pyro_vi_lab.capture import compiled_batches
from pyro_vi_lab.checks import Ensemble, ImportanceCheck, OtherModes, RestartCheck, importance
from pyro_vi_lab.checks.moments import (
    Moments,
    chain_coverage,
    chain_moments,
    chi_squared,
    closeness,
    independent_moments,
    weighted_closeness,
    weighted_coverage,
)
from pyro_vi_lab.density import LogDensity
from pyro_vi_lab.density_engine import Status
from pyro_vi_lab.density_fit import num_threads
from pyro_vi_lab.errors import ArgumentError, DataError, ModelError, unknown_name
from pyro_vi_lab.fitted import Fit
from pyro_vi_lab.isolation import default_dtype, threads
from pyro_vi_lab.posterior import Posterior
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.trust_advice import advice
from pyro_vi_lab.trust_evidence import (
    BUDGETS,
    GuideDraws,
    Quantities,
    chains_from,
    guide_draws,
    maxima_elsewhere,
    num_importance_draws,
    reference_moments,
    scalars,
)
from pyro_vi_lab.trust_further import Further, agreement
from pyro_vi_lab.trust_judgement import INTERVALS, RIGHT, WRONG, Judged, Source, judged, mixing
from pyro_vi_lab.verdict import Verdict

MAX_MEAN_SHIFT = 0.3
"""Standard deviations by which a mean may be off: a 95 % interval of the right width then holds 94 %."""
MAX_SD_RATIO = 1.5
"""Factor by which a standard deviation may be off: a 95 % interval two thirds as wide holds 81 %."""
NUM_RESAMPLED = 1000
"""Draws of the reweighted posterior, at most: as many as count where fewer do."""
NEARLY_EQUAL = 0.01
"""Sample χ² of the weights below which they are nearly equal, whatever the shape of their tail: by Cauchy and Schwarz
a mean is off by at most its square root, a tenth of the guide's standard deviation."""
UNSEEN_MASS = 0.05
"""Mass outside of the guide from which its 95 % intervals cannot hold what they say, wherever that mass is."""
MIN_ESS = 400.0
"""Draws that must count for a posterior to be handed on (Vehtari et al. 2021, Section 4)."""


def trust(
    fit: Fit,
    *,
    budget: Literal["fast", "thorough"] = "fast",
    quantities: Quantities = None,
    reference: Posterior | None = None,
    max_mean_shift: float = MAX_MEAN_SHIFT,
    max_sd_ratio: float = MAX_SD_RATIO,
    seed: int = 0,
) -> Verdict:
    r"""Say whether a fit may be believed, parameter by parameter, without a reference.

    Two estimates of the true moments are made, each with standard errors, and the guide's own are held against them:

    - *chains*: draws of the guide are moved towards the posterior by many short Hamiltonian chains at once. Where the
      guide is right they stay a sample of it; where it is too narrow, too wide or displaced, they move. Chains that
      still remember where they started do not speak for a fit, only against it.
    - *weights*: Pareto-smoothed importance sampling, where k-hat says that it is reliable.

    A search from scattered starts adds what neither can see: maxima that the guide never draws near.
    Restarts that ended at other optima as good as the best one speak against the fit, too.

    ``"trust"``: a reliable estimate confirms every mean to within ``max_mean_shift`` standard deviations and every
    standard deviation to within the factor ``max_sd_ratio``, each with two standard errors to spare, the central 50 %
    and 90 % intervals hold what they would of a normal within twice these tolerances, the fit has converged, and
    nothing speaks against it. ``"reweight"``: the guide's own draws are off, but reweighted ones are not; they are
    attached. ``"refine"``: a richer guide or another parameterization is likely to do; it is named, with the evidence.
    ``"sample"``: use NUTS. What cannot be decided is not trusted, and says so.

    Args:
        fit: The fit; of several restarts the best one.
        budget: ``"fast"`` is for every fit; ``"thorough"`` takes more chains, for longer, more draws, and more starts,
            and adds bounds on the log evidence and on the errors, and the kernel Stein discrepancy.
        quantities: What is to be right, if not all sites: their names, or a function that is given draws
            ``{site: (S, *shape)}`` and returns ``{name: (S, ...)}``, such as predictions.
        reference: Draws that are known to be right, such as those of NUTS, as one more estimate of the truth. One that
            fails its own checks (:meth:`Posterior.problems`) is not used, and the reasons say which.
        max_mean_shift: Largest error of a mean, in standard deviations.
        max_sd_ratio: Largest factor between standard deviations, either way.
        seed: Seed of all randomness.

    Raises:
        ArgumentError: A fit of a point, an unknown budget, a tolerance out of range, or ``quantities`` that name or
            return something else.
        DataError: A site of the reference has another shape.

    References:
        Yao, Vehtari, Simpson & Gelman 2018, "Yes, but did it work?: Evaluating variational inference", ICML. Vehtari,
        Simpson, Gelman, Yao & Gabry 2024, "Pareto smoothed importance sampling", JMLR 25(72). Margossian et al. 2024,
        "Nested R-hat", Bayesian Analysis (many short chains). Huggins et al. 2020, "Validated variational inference
        via practical posterior error bounds", AISTATS (errors of means and standard deviations as what matters).

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_vi_lab.fit import fit
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(2 * x, 0.5))
        >>> problem = Problem(model)
        >>> verdict = trust(fit(problem, "full_rank", progress=False))
        >>> verdict.decision
        'trust'
        >>> verdict = trust(fit(problem, "mean_field", progress=False))
        >>> verdict.decision, verdict.suggestions
        ('refine', ['full_rank'])
    """
    if not isinstance(fit, Fit):
        raise ArgumentError(f"trust judges a Fit, got {type(fit).__name__}: pass the result of pyro_vi_lab.fit")
    if fit.mode is not None:
        raise ArgumentError(
            f"a fit of {fit.method!r} is a point, which has no spread to be right or wrong: fit 'laplace' or "
            "'full_rank'"
        )
    if budget not in BUDGETS:
        raise unknown_name("budget", budget, BUDGETS)
    if not 0 < max_mean_shift < math.inf:
        raise ArgumentError(f"max_mean_shift is in standard deviations and must be positive, got {max_mean_shift!r}")
    if not 1 < max_sd_ratio < math.inf:
        raise ArgumentError(f"max_sd_ratio is a factor and must be above 1, got {max_sd_ratio!r}")
    began = time.perf_counter()
    gathered = _Gathered(fit, budget, quantities, (max_mean_shift, max_sd_ratio), seed)
    if fit.sampled is not None:
        return gathered.verdict("sample", [f"the fit {fit.message}"], [], None, began)
    if fit.status is Status.DIVERGED:
        return gathered.verdict("refine", [f"the fit {fit.message}"], [], None, began)
    density = density_of(fit.problem)
    with threads(1 if density is None else num_threads(density)):
        if density is None:
            gathered.weigh(None)
        else:
            compiled = compiled_batches() if gathered.budget.compile else nullcontext()
            with default_dtype(density.dtype), compiled:
                gathered.weigh(density)
                gathered.move(density)
                gathered.look_further(density)
    if reference is not None:
        gathered.hold_against(reference)
    return gathered.conclude(began)


def density_of(problem: Problem) -> LogDensity | None:
    """The density of all rows of the data, also of a problem that is fitted on batches; ``None`` if there is none."""
    if not problem.subsamples:
        return problem.density()
    try:
        args, kwargs, around = problem.all_rows()
        with around():
            return Problem(problem.model, *args, name=problem.name, dtype=problem.dtype, **kwargs).density()
    except ModelError:
        return None


class _Gathered:
    """The evidence on one fit, as it comes in."""

    def __init__(
        self, fit: Fit, budget: str, quantities: Quantities, tolerances: tuple[float, float], seed: int
    ) -> None:
        self.fit, self.budget_name, self.quantities, self.tolerances, self.seed = (
            fit,
            budget,
            quantities,
            tolerances,
            seed,
        )
        self.budget = BUDGETS[budget]
        self.num_gradients = 0
        self.names: list[str] = []
        self.own: Moments | None = None
        self.draws: GuideDraws | None = None
        self.weights: ImportanceCheck | None = None
        self.divergence = math.inf
        self.chains: Ensemble | None = None
        self.modes: OtherModes | None = None
        self.restarts: RestartCheck | None = None
        self.further: Further | None = None
        self.against: list[str] = []
        self.sources: list[Source] = []
        self.notes: list[str] = []

    def weigh(self, density: LogDensity | None) -> None:
        """Draw from the guide and weigh its draws."""
        number = num_importance_draws(density, self.budget)
        # the fit has seen draws of its own seed
        self.draws = guide_draws(self.fit, density, number, self.seed + 1)
        self.names, self.x = scalars(self.draws.values, self.quantities)
        self.own = independent_moments(self.x)
        log_p, log_q = self.draws.log_p, self.draws.log_q
        if log_p is None or log_q is None:
            self.notes.append(
                f"the guide {self.fit.method} cannot be weighted draw by draw, so k-hat says nothing about it"
            )
            return
        try:
            self.weights = importance(log_p, log_q)
        except DataError as error:
            self.notes.append(f"importance weights are of no use: {error}")
            return
        self.divergence = chi_squared(log_p - log_q)
        if self.weights.khat < self.weights.khat_threshold or self.divergence < NEARLY_EQUAL:
            share = self.weights.smoothed_log_weights.exp().double()
            near = weighted_closeness(self.x, share)
            inside = {level: weighted_coverage(self.x, share, level) for level in INTERVALS}
            self.sources.append(Source("weights", near, inside, reliable=True))

    def move(self, density: LogDensity) -> None:
        """Look for other maxima, and run chains until they are decided or the budget is spent."""
        assert self.draws is not None
        self.modes = maxima_elsewhere(self.fit, density, self.draws, self.budget, self.seed)
        if self.modes is not None:
            self.num_gradients += self.modes.num_gradients
        try:
            chains = chains_from(density, self.draws, self.budget, self.seed)
        except DataError as error:
            self.notes.append(str(error))
            return
        for doubling in range(self.budget.doublings + 1):
            source = self._source_of(density, chains)
            outcome = judged(self.names, [source], self.tolerances)
            # what is wrong stays wrong; what is right needs chains that have forgotten their start, and where no
            # weights speak for it too, long ones: they may creep out into a tail
            confirmed = source.reliable and set(outcome.verdicts) == {RIGHT} and bool(self.sources)
            if WRONG in outcome.verdicts or confirmed:
                break
            if doubling < self.budget.doublings:
                chains = chains.more(chains.z.shape[1])
        self.chains = chains
        self.num_gradients += chains.num_gradients
        self.sources.append(source)

    def look_further(self, density: LogDensity) -> None:
        """Hold restarts against each other; of a thorough verdict, bounds and the Stein discrepancy."""
        assert self.draws is not None
        self.restarts, self.against = agreement(self.fit, density, self.seed + 2)
        if self.budget_name == "thorough" and self.weights is not None:
            self.further = Further(self.fit, density, self.draws, self.x, self.names, self.seed)
            self.num_gradients += self.further.num_gradients

    def hold_against(self, reference: Posterior) -> None:
        """Take draws that are known to be right as one more estimate, if they are fit."""
        assert self.own is not None
        assert self.draws is not None
        problems = reference.problems()
        if problems:
            self.notes.append(f"the reference is unfit and was not used: {'; '.join(problems)}")
            return
        moments, x = reference_moments(reference, self.names, self.draws.values, self.quantities)
        inside = {level: chain_coverage(self.x, x, level) for level in INTERVALS}
        self.sources.append(Source("reference", closeness(self.own, moments), inside, reliable=True))

    def _source_of(self, density: LogDensity, chains: Ensemble) -> Source:
        assert self.own is not None
        later = chains.z[:, chains.z.shape[1] // 2 :]  # nearer to where the chains go
        shape = later.shape[:2]
        values = {name: value.flatten(0, 1) for name, value in density.constrain(later).items()}
        _, x = scalars(values, self.quantities)
        x = x.unflatten(0, shape)
        inside = {level: chain_coverage(self.x, x, level) for level in INTERVALS}
        return Source("chains", closeness(self.own, chain_moments(x)), inside, reliable=mixing(chains).reliable)

    def conclude(self, began: float) -> Verdict:
        """The decision."""
        outcome = judged(self.names, self.sources, self.tolerances)
        reasons = outcome.reasons(self.tolerances)
        unseen = self._unseen_mass()
        against = [*unseen, *self.against]
        if self.fit.status is Status.OUT_OF_STEPS:
            against.append(f"the fit {self.fit.message}")
        fine = outcome.all_right and not against
        reasons = [*against, *reasons, *self._of_weights(), *self._of_chains()]
        reasons += [*(self.further.sentences() if self.further else []), *self.notes]
        if fine:
            return self.verdict("trust", reasons, [], outcome, began)
        suggestions, why = advice(self.fit, self.draws, self.chains, self.modes, outcome)
        reasons += why
        reweighted = None if unseen else self._reweighted(outcome)
        if reweighted is not None:
            return self.verdict("reweight", reasons, suggestions, outcome, began, posterior=reweighted)
        return self.verdict("refine" if suggestions else "sample", reasons, suggestions, outcome, began)

    def _unseen_mass(self) -> list[str]:
        """Maxima that the guide leaves out, where they matter."""
        if self.modes is None or not len(self.modes.mass):
            return []
        mass = float(self.modes.mass.sum())
        assert self.draws is not None
        assert self.draws.z is not None
        center, spread = self.draws.z.mean(0), self.draws.z.std(0)
        # the mean of all maxima together, in standard deviations of all of them together
        offset = self.modes.points - center
        shift = (self.modes.mass[:, None] * offset).sum(0)
        total = (spread.square() + (self.modes.mass[:, None] * offset.square()).sum(0) - shift.square()).sqrt()
        worst, wider = float((shift.abs() / total).max()), float((total / spread).max())
        if mass < UNSEEN_MASS and worst < self.tolerances[0] and wider < self.tolerances[1]:
            return []
        number = len(self.modes.mass)
        return [
            f"{number} other maxim{'um' if number == 1 else 'a'} of the density, where the guide never draws, hold"
            f"{'s' if number == 1 else ''} about {mass:.0%} of the posterior's mass; with them means would move by up "
            f"to {worst:.2g} sd, and standard deviations grow up to {wider:.2g} times"
        ]

    def _of_weights(self) -> list[str]:
        check = self.weights
        if check is None:
            return []
        said = f"k-hat is {check.khat:.2f} ± {check.khat_se:.2f} of {check.num_draws:,} draws"
        if check.khat == -math.inf:
            said = f"the importance weights of all {check.num_draws:,} draws are equal"
        if check.khat < check.khat_threshold:
            found = [f"{said}, of which {check.ess:,.0f} count"]
        elif self.divergence < NEARLY_EQUAL:
            found = [f"{said}, but the weights are nearly equal (χ² {self.divergence:.2g}), so that it says nothing"]
        else:
            found = [f"{said}: importance weights are not reliable, and are not used"]
        if check.support_mismatch:
            found.append(
                f"mismatch of support: the model's density is zero at {check.support_mismatch:.1%} of the guide's draws"
            )
        return found

    def _of_chains(self) -> list[str]:
        if self.chains is None:
            return []
        mixed = mixing(self.chains)
        chains, kept, _ = self.chains.z.shape
        what = f"{chains} chains of {kept} draws, started at draws of the guide,"
        labels = self.fit.problem.density().labels if not self.fit.problem.subsamples else None
        if mixed.forgotten and not mixed.settled:
            where = f" along {labels[mixed.drifting]}" if labels else ""
            return [f"{what} still move{where}: they cannot speak for the fit, only against it"]
        if mixed.forgotten:
            return [f"{what} have forgotten their start (largest correlation with it {mixed.memory:.2f})"]
        where = f" along {labels[mixed.coordinate]}" if labels else ""
        return [
            f"{what} still remember it{where} (correlation {mixed.memory:.2f}): they cannot speak for the fit, only "
            "against it"
        ]

    def _reweighted(self, outcome: Judged) -> Posterior | None:
        """Resampled draws, if the weights are reliable and the chains do not contradict them."""
        check, draws = self.weights, self.draws
        if check is None or draws is None or not any(source.name == "weights" for source in self.sources):
            return None
        if check.ess < MIN_ESS:
            self.notes.append(f"reweighted draws need an effective number of {MIN_ESS:.0f}, these have {check.ess:.0f}")
            return None
        if self.chains is not None and not outcome.sources_agree(self.tolerances):
            return None
        number = int(min(NUM_RESAMPLED, check.ess))
        index = check.resample(number, seed=self.seed)
        chosen = {name: value[index][None] for name, value in draws.values.items()}
        unconstrained = None if draws.z is None else draws.z[index][None]
        info = {"khat": check.khat, "importance_ess": check.ess, "seed": self.seed, "resampled_from": check.num_draws}
        return Posterior(chosen, method=f"{self.fit.method}, reweighted", unconstrained=unconstrained, info=info)

    def verdict(
        self,
        decision: Any,
        reasons: list[str],
        suggestions: list[str],
        outcome: Judged | None,
        began: float,
        *,
        posterior: Posterior | None = None,
    ) -> Verdict:
        import pandas

        table = pandas.DataFrame() if outcome is None or self.own is None else outcome.table(self.own)
        found: dict[str, Any] = {"importance": self.weights, "chains": self.chains, "other_modes": self.modes}
        found |= {"restarts": self.restarts, **(self.further.checks() if self.further else {})}
        return Verdict(
            decision=decision,
            reasons=reasons,
            suggestions=suggestions,
            parameters=table,
            posterior=posterior,
            checks={name: value for name, value in found.items() if value is not None},
            problem=self.fit.problem.name,
            method=self.fit.method,
            budget=self.budget_name,
            tolerances=self.tolerances,
            seconds=time.perf_counter() - began,
            num_gradients=self.num_gradients,
            seed=self.seed,
        )
