"""The score function estimator of sites that are not reparameterized, with costs and baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from pyro_vi_lab.errors import CaptureError
from pyro_vi_lab.objectives.cut import is_reparameterized
from pyro_vi_lab.objectives.plates import PARTICLES, Frames, frames_of, is_subsampled, sum_to
from pyro_vi_lab.objectives.runs import Run
from pyro_vi_lab.objectives.terms import Term


@dataclass(frozen=True, eq=False)
class Score:
    """A site of the guide that is not reparameterized, in one run.

    Args:
        site: Its name.
        frames: Its plates.
        log_q: What its score is the gradient of.
        cost: The part of the bound that its draw has an effect on, one number for each element of its plates.
    """

    site: str
    frames: Frames
    log_q: Tensor
    cost: Tensor


def scores(run: Run, terms: Sequence[Term]) -> list[Score]:
    r"""Sites that are not reparameterized and the terms downstream of each, Rao-Blackwellized.

    .. math:: \nabla E_q[f] = E_q\Big[\sum_k (f_k - b_k) \nabla \log q_k(z_k)\Big]

    where :math:`f_k` has the terms that model and guide come to after they have drawn :math:`z_k`, those of the same
    element only where k lies in a plate.

    References:
        Ranganath, Gerrish & Blei 2014, "Black box variational inference", AISTATS, eq. 5.
        Schulman et al. 2015, "Gradient estimation using stochastic computation graphs", NeurIPS, eq. 7.
    """
    when_model = {name: number for number, name in enumerate(run.model)}
    found = []
    for position, (name, site) in enumerate(run.guide.items()):
        if is_reparameterized(site):
            continue
        frames = frames_of(site)
        first = when_model.get(name, -1)
        if site["is_observed"]:  # a factor is of draws before it
            position, first = -1, -1
        cost: Tensor | None = None
        for term in terms:
            if _is_after(term, name, position, first):
                part = sum_to(term.value.detach(), term.frames & frames)
                cost = part if cost is None else cost + part
        if cost is not None:
            found.append(Score(name, frames, site["score_parts"].score_function, cost))
    return found


def _is_after(term: Term, name: str, guide_position: int, model_position: int) -> bool:
    if term.site == name and term.is_closed:
        return False
    return (term.model_position is not None and term.model_position >= model_position) or (
        term.guide_position is not None and term.guide_position >= guide_position
    )


class Baselines:
    """What is taken off the costs: the mean of the other particles, or of the steps before.

    Args:
        decay: Weight of the past in the decaying average that one particle is compared with.

    References:
        Salimans & Knowles 2014, "On using control variates with stochastic approximation for variational Bayes",
        arXiv:1401.1022; Kool, van Hoof & Welling 2019, "Buy 4 REINFORCE samples, get a baseline for free!", ICLR
        workshop, eq. 8: the other particles. Mnih & Gregor 2014, "Neural variational inference and learning in belief
        networks", ICML, Section 2.3.1: the average.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._averages: dict[str, Tensor] = {}

    def surrogate(self, of_runs: Sequence[Sequence[Score]], num_particles: int) -> Tensor | float:
        """A sum whose gradient is the score function estimate of that of the sum of the bounds of the particles."""
        total: Tensor | float = 0.0
        by_site: dict[str, list[Score]] = {}
        for found in of_runs:
            for score in found:
                by_site.setdefault(score.site, []).append(score)
        for name, same in by_site.items():
            if num_particles == 1:
                (score,) = same
                total = total + ((score.cost - self._past(name, score)) * score.log_q).sum()
                continue
            for number, score in enumerate(same):
                others = [other.cost for other in same[:number] + same[number + 1 :]]
                total = total + ((score.cost - _mean_of_others(score, others)) * score.log_q).sum()
        return total

    def _past(self, name: str, score: Score) -> Tensor | float:
        """The average cost of the steps before, which takes in the present one for the steps to come."""
        if get_proxy_mode() is not None:
            raise CaptureError(
                f"the baseline of site {name!r} changes from step to step, as there is one particle; with "
                "num_particles=2 or more the particles are each other's"
            )
        cost = score.cost
        if any(map(is_subsampled, score.frames)):  # other rows at the next step
            cost = cost.mean()
        before = self._averages.get(name)
        if before is not None and before.shape != cost.shape:
            before, cost = before.mean(), cost.mean()
        self._averages[name] = cost if before is None else self.decay * before + (1 - self.decay) * cost
        return 0.0 if before is None else before


def _mean_of_others(score: Score, others: Sequence[Tensor]) -> Tensor | float:
    frame: Any = next((frame for frame in score.frames if frame.name == PARTICLES), None)
    if frame is not None:
        cost = score.cost
        return (cost.sum(frame.dim, keepdim=True) - cost) / (frame.size - 1)
    alike = [cost for cost in others if cost.shape == score.cost.shape]
    mean: Tensor | float = sum(alike[1:], start=alike[0]) / len(alike) if alike else 0.0
    return mean
