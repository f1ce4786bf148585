"""The evidence on one fit as it comes in, and the verdict that follows from it."""

from __future__ import annotations

import math
import time
from typing import Any

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
from pyro_vi_lab.errors import DataError
from pyro_vi_lab.fitted import Fit
from pyro_vi_lab.posterior import Posterior
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

NUM_RESAMPLED = 1000
"""Draws of the reweighted posterior, at most: as many as count where fewer do."""
NEARLY_EQUAL = 0.01
"""Sample χ² of the weights below which they are nearly equal, whatever the shape of their tail: by Cauchy and Schwarz
a mean is off by at most its square root, a tenth of the guide's standard deviation."""
UNSEEN_MASS = 0.05
"""Mass outside of the guide from which its 95 % intervals cannot hold what they say, wherever that mass is."""
MIN_ESS = 400.0
"""Draws that must count for a posterior to be handed on (Vehtari et al. 2021, Section 4)."""


class Gathered:
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
        """The verdict with all that was found."""
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
