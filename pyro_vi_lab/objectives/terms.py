"""What every site adds to the evidence lower bound, by sampling or in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vi_lab.objectives.cut import is_point, is_reparameterized
from pyro_vi_lab.objectives.plates import Frames, frames_of
from pyro_vi_lab.objectives.runs import Run


@dataclass(frozen=True, eq=False)
class Term:
    """One part of the bound.

    Args:
        site: Name of the site that it is of.
        value: With the scale and the mask of its site, one number for each element of its plates.
        frames: These plates.
        model_position: When the model came to it, ``None`` for what is of the guide alone.
        guide_position: When the guide came to it, ``None`` for what is of the model alone.
        is_log_q: Whether it is the log density of a reparameterized draw, whose score has mean zero.
        is_differentiated: Whether its gradient is more than a score that has mean zero.
        is_closed: Whether the mean over the draw of its site has been taken, so that it does not depend on that.
    """

    site: str
    value: Tensor
    frames: Frames
    model_position: int | None = None
    guide_position: int | None = None
    is_log_q: bool = False
    is_differentiated: bool = True
    is_closed: bool = False


def elbo_terms(run: Run, *, analytic_kl: bool = False, analytic_entropy: bool = False) -> list[Term]:
    r"""The terms whose sum is the bound: :math:`\log p` of the sites of the model, :math:`-\log q` of the guide's.

    Args:
        run: Model and guide, run once.
        analytic_kl: Whether :math:`\log p - \log q` of a latent site is :math:`-\mathrm{KL}(q\,\|\,p)` where that has
            a closed form and the sites before it in the model are before it in the guide too.
        analytic_entropy: Whether :math:`-\log q` of a site is its entropy where that has a closed form.
    """
    when = {name: number for number, name in enumerate(run.guide)}
    terms, done, latest = [], set(), -1
    for position, (name, site) in enumerate(run.model.items()):
        frames = frames_of(site)
        if site["is_observed"]:
            terms.append(Term(name, site["log_prob"], frames, position))
            continue
        ordered, latest = when[name] > latest, max(latest, when[name])
        divergence = _kl(run.guide[name], site) if analytic_kl and ordered else None
        if divergence is None:
            terms.append(Term(name, site["log_prob"], frames, position))
            continue
        done.add(name)
        of_guide = frames_of(run.guide[name])
        terms.append(Term(name, -divergence, of_guide, position, when[name], is_closed=True))
        rest = _not_scaled_alike(run.guide[name], site)
        if rest is not None:
            terms.append(Term(name, rest, frames | of_guide, position))
    for name, site in run.guide.items():
        if name not in done:
            terms.append(_of_guide(name, site, when[name], analytic_entropy=analytic_entropy))
    return terms


def _of_guide(name: str, site: Any, position: int, *, analytic_entropy: bool) -> Term:
    """Minus log q of a site of the guide, or its entropy."""
    frames = frames_of(site)
    drawn = not site["is_observed"] and not is_point(site["fn"])
    if analytic_entropy and drawn:
        entropy = _entropy(site)
        if entropy is not None:
            return Term(name, entropy, frames, guide_position=position, is_closed=True)
    whole = is_reparameterized(site)
    return Term(
        name,
        -site["log_prob"],
        frames,
        guide_position=position,
        is_log_q=drawn and whole,
        is_differentiated=whole or isinstance(site["score_parts"].entropy_term, Tensor),
    )


def _kl(guide_site: Any, model_site: Any) -> Tensor | None:
    """KL(q ‖ p) of a site, ``None`` if it has no closed form here."""
    if is_point(guide_site["fn"]):
        return None  # what is sampled is exact
    try:
        divergence = kl_divergence(guide_site["fn"], model_site["fn"])
    except NotImplementedError:
        return None
    if divergence.shape != guide_site["log_prob"].shape:
        divergence = divergence.expand(guide_site["log_prob"].shape)
    result: Tensor = scale_and_mask(divergence, guide_site["scale"], guide_site["mask"])
    return result


def _entropy(site: Any) -> Tensor | None:
    try:
        entropy = site["fn"].entropy()
    except NotImplementedError:
        return None
    if entropy.shape != site["log_prob"].shape:
        entropy = entropy.expand(site["log_prob"].shape)
    result: Tensor = scale_and_mask(entropy, site["scale"], site["mask"])
    return result


def _not_scaled_alike(guide_site: Any, model_site: Any) -> Tensor | None:
    """The part of log p that a KL with the guide's scale and mask leaves out, ``None`` if there is none."""
    scales = guide_site["scale"], model_site["scale"]
    same_scale = all(isinstance(scale, (int, float)) for scale in scales) and math.isclose(*scales)
    if same_scale and guide_site["mask"] is model_site["mask"]:
        return None
    covered = scale_and_mask(model_site["unscaled_log_prob"], guide_site["scale"], guide_site["mask"])
    rest: Tensor = model_site["log_prob"] - covered
    return rest
