"""The evidence lower bound."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Literal

from torch import Tensor

from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.objectives.cut import path_gradient, refuse_score_function
from pyro_vi_lab.objectives.objective import Objective, Part
from pyro_vi_lab.objectives.runs import Run
from pyro_vi_lab.objectives.score import Baselines, Score, scores
from pyro_vi_lab.objectives.terms import Term, elbo_terms

Gradient = Literal["stl", "reparam", "score"]


class ELBO(Objective):
    r"""The evidence lower bound, with a choice of gradient.

    .. math:: \mathcal L(\phi) = E_{q_\phi}[\log p(x, z) - \log q_\phi(z)]

    ``"reparam"`` differentiates all of it along the draws :math:`z_\phi(\varepsilon)`, as Pyro's ``Trace_ELBO`` does.

    ``"stl"`` (sticking the landing) leaves out the score :math:`\nabla_\phi \log q_\phi(z)` at fixed z, whose mean is
    zero: what is left vanishes draw by draw where q = p, so a fit can converge to rounding error. What the guide adds
    by ``Delta`` and ``pyro.factor`` is no score and is kept.

    ``"score"`` takes guides with sites that are not reparameterized (Poisson, Bernoulli, Categorical, ...): these get
    the score function estimator, all others the gradient of ``"stl"``. Its cost has the terms that model and guide come
    to after the draw, those of the same element in plates, minus a baseline: the mean over the other particles,
    or with one particle a decaying average over the steps so far, which belongs to this objective. With ``"reparam"``
    such sites get the same without a baseline.

    ``analytic_kl`` and ``analytic_entropy`` are off unless asked for, as the noise of :math:`\log p` and of
    :math:`\log q` cancels near the optimum and a closed form takes one of the two away (Roeder et al. 2017, Section
    3). They help where q is far from the posterior, with ``"reparam"`` and with ``"score"``: at first, and in
    autoencoders.

    Args:
        num_particles: Draws per step.
        gradient: ``"stl"``, ``"reparam"`` or ``"score"``.
        analytic_kl: Whether :math:`E[\log p - \log q]` of a latent site is taken in closed form where PyTorch or Pyro
            knows :math:`\mathrm{KL}(q\,\|\,p)` of its distributions. Only for sites before which the model draws no
            site that the guide draws after it, so that it is unbiased (the rule of Pyro's ``TraceMeanField_ELBO``,
            applied to each site); others are sampled. The bound may be that of another scale or mask in model and
            guide.
        analytic_entropy: Whether :math:`-E[\log q]` of a site of the guide is taken in closed form where its
            distribution knows its entropy; the joint draw of an autoguide is such a site.
        baseline_decay: Weight of the past in the decaying average of ``"score"`` with one particle.
        **kwargs: As of :class:`pyro.infer.ELBO` (``max_plate_nesting``, ``vectorize_particles``, ...).

    Raises:
        ArgumentError: An argument is none of these.
        ModelError: In use: with ``"stl"``, a site of the guide is not reparameterized; a site is to be enumerated, or
            missing in the guide. The message names it.

    References:
        Roeder, Wu & Duvenaud 2017, "Sticking the landing", NeurIPS, eq. 8.
        Kool, van Hoof & Welling 2019, "Buy 4 REINFORCE samples, get a baseline for free!", ICLR workshop, eq. 8.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model():
        ...     count = pyro.sample("count", dist.Poisson(3.0))
        ...     pyro.sample("y", dist.Normal(count, 1.0), obs=torch.tensor(5.0))
        >>> def guide():
        ...     rate = pyro.param("rate", torch.tensor(3.0), constraint=dist.constraints.positive)
        ...     pyro.sample("count", dist.Poisson(rate))
        >>> objective = ELBO(num_particles=32, gradient="score")
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), objective)
        >>> losses = [svi.step() for _ in range(200)]
        >>> bool(3.5 < pyro.param("rate") < 4.5)
        True
    """

    gradients: ClassVar = ("stl", "reparam", "score")

    def __init__(
        self,
        num_particles: int = 1,
        *,
        gradient: Gradient = "stl",
        analytic_kl: bool = False,
        analytic_entropy: bool = False,
        baseline_decay: float = 0.9,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_particles, gradient, **kwargs)
        if not (isinstance(baseline_decay, (int, float)) and 0 <= baseline_decay < 1):
            raise ArgumentError(f"baseline_decay must be a number from 0 to below 1, got {baseline_decay!r}")
        self.analytic_kl, self.analytic_entropy = analytic_kl, analytic_entropy
        self._baselines = Baselines(baseline_decay)

    @property
    def averages_particles(self) -> bool:  # type: ignore[override]
        """Whether particles are independent: with ``"score"`` they are each other's baselines."""
        return self.gradient != "score"

    def _terms(self, run: Run) -> list[Term]:
        return elbo_terms(run, analytic_kl=self.analytic_kl, analytic_entropy=self.analytic_entropy)

    def _parts(self, runs: Iterable[Run], *, differentiate: bool) -> Iterator[Part]:
        if differentiate and not self.averages_particles:
            yield self._part(list(runs), differentiate=True)
            return
        for run in runs:
            yield self._part([run], differentiate=differentiate)

    def _part(self, runs: list[Run], *, differentiate: bool) -> Part:
        """Minus the share of some particles in the bound."""
        value: Tensor | float = 0.0
        direct: Tensor | float = 0.0
        log_q: Tensor | float = 0.0
        found: list[list[Score]] = []
        for run in runs:
            terms = self._terms(run)
            for term in terms:
                total = term.value.sum()
                value = value + total.detach()
                if not differentiate or not term.is_differentiated:
                    continue
                if term.is_log_q and self.cuts:
                    log_q = log_q + total
                else:
                    direct = direct + total
            if differentiate:
                if self.gradient == "stl":
                    self._refuse_score_functions(run)
                found.append(scores(run, terms))
        loss = -value / self.num_particles
        if not differentiate:
            return Part(loss, 0.0)
        if any(found):
            direct = direct + self._of_scores(found)
        if not self.cuts:
            return Part(loss, -(direct + log_q) / self.num_particles)
        cuts = [run.cut for run in runs if run.cut is not None]
        return Part(loss, -path_gradient(cuts, both=direct, through_draws=log_q) / self.num_particles)

    def _of_scores(self, found: list[list[Score]]) -> Tensor | float:
        if self.gradient == "score":
            return self._baselines.surrogate(found, self.num_particles)
        return sum((score.cost * score.log_q).sum() for scores in found for score in scores)

    @staticmethod
    def _refuse_score_functions(run: Run) -> None:
        for site in run.guide.values():
            refuse_score_function(site, "stl", "use gradient='score', or enumerate it with pyro.infer.TraceEnum_ELBO")
