"""One call that says whether a variational posterior may be believed, and what to do if not."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from typing import Literal

from pyro_vi_lab.capture import compiled_batches
from pyro_vi_lab.density import LogDensity
from pyro_vi_lab.density_engine import Status
from pyro_vi_lab.density_fit import num_threads
from pyro_vi_lab.errors import ArgumentError, ModelError, unknown_name
from pyro_vi_lab.fitted import Fit
from pyro_vi_lab.isolation import default_dtype, threads
from pyro_vi_lab.posterior import Posterior
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.trust_evidence import (
    BUDGETS,
    Quantities,
)
from pyro_vi_lab.trust_gathered import Gathered
from pyro_vi_lab.verdict import Verdict

MAX_MEAN_SHIFT = 0.3
"""Standard deviations by which a mean may be off: a 95 % interval of the right width then holds 94 %."""
MAX_SD_RATIO = 1.5
"""Factor by which a standard deviation may be off: a 95 % interval two thirds as wide holds 81 %."""


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
    gathered = Gathered(fit, budget, quantities, (max_mean_shift, max_sd_ratio), seed)
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
