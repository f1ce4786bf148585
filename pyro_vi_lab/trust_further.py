"""Further checks of a fit: how its restarts agree; of a thorough verdict the evidence, scores, and error bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vi_lab.checks import (
    ErrorBounds,
    EvidenceBounds,
    RestartCheck,
    SteinCheck,
    Whitening,
    error_bounds,
    evidence,
    restarts,
    stein,
)
from pyro_vi_lab.density import LogDensity
from pyro_vi_lab.density_engine import Status
from pyro_vi_lab.families import Params
from pyro_vi_lab.fitted import Fit, draw
from pyro_vi_lab.trust_evidence import GuideDraws, member, root_of

RESTART_DRAWS = 500
"""Draws of each restart."""
STEIN_DRAWS = 1000
"""Draws for the kernel Stein discrepancy, whose cost is quadratic in them."""


def agreement(fit: Fit, density: LogDensity, seed: int) -> tuple[RestartCheck | None, list[str]]:
    """How the restarts of a fit agree, and what speaks against it: another optimum that is as good as the best."""
    usable = [i for i, status in enumerate(fit.statuses) if status is Status.CONVERGED]
    if fit.params is None or len(usable) < 2:
        return None, []
    params = Params(*(value[usable] for value in fit.params))
    z, log_p, log_q = draw(density, fit.family, params, RESTART_DRAWS, seed)
    found = restarts(z.transpose(0, 1), (log_p - log_q).T, labels=density.labels)
    rivals = [one for one in found.optima[1:] if not one.is_worse]
    if not rivals:
        return found, []
    far = max(rivals, key=lambda one: one.distance)
    return found, [
        f"{len(rivals) + 1} distinct optima of {len(usable)} restarts have the same bound; {far.farthest} is "
        f"{far.distance:.1f} sd away in one of them, and this fit is at the first alone"
    ]


class Further:
    """The further checks of a thorough verdict.

    Attributes:
        evidence: Bounds on the log evidence.
        stein: Kernel Stein discrepancy.
        bounds: Bounds on the errors of means and standard deviations.
        num_gradients: Gradients of the log density.
    """

    def __init__(
        self, fit: Fit, density: LogDensity, draws: GuideDraws, x: Tensor, names: Sequence[str], seed: int
    ) -> None:
        assert draws.z is not None
        assert draws.log_p is not None
        assert draws.log_q is not None
        found = member(fit)
        moments = math.inf if found is None else found[0].num_moments
        self.evidence: EvidenceBounds = evidence(draws.log_p, draws.log_q)
        self.bounds: ErrorBounds = error_bounds(x, draws.log_p, draws.log_q, labels=names, num_moments=moments)
        inside = torch.isfinite(draws.log_p)
        z = draws.z[inside][:STEIN_DRAWS]
        root = root_of(draws.z)
        scores = density.value_and_grad(z)[1]
        self.stein: SteinCheck = stein(z, scores, whitening=Whitening(draws.z.mean(0), root), seed=seed)
        self.num_gradients = len(z)

    def checks(self) -> dict[str, Any]:
        """The results by name."""
        return {"evidence": self.evidence, "stein": self.stein, "error_bounds": self.bounds}

    def sentences(self) -> list[str]:
        """What they say."""
        upper = f"and {self.evidence.upper:.2f}" if math.isfinite(self.evidence.upper) else "and no known limit"
        found = [f"the log evidence is between {self.evidence.lower:.2f} {upper}"]
        found.append(
            f"the kernel Stein discrepancy of {self.stein.num_draws:,} draws is {self.stein.ksd2:.2g} ± "
            f"{self.stein.ksd2_se:.1g} (p = {self.stein.p_value:.3g} for draws of the posterior itself)"
        )
        if self.bounds.reason:
            found.append(f"there are no error bounds: {self.bounds.reason}")
        else:
            worst = float((torch.as_tensor(self.bounds.mean_error) / torch.as_tensor(self.bounds.sd)).max())
            found.append(
                f"no mean is off by more than {worst:.2g} of the guide's standard deviations, by its χ² divergence"
            )
        return found
