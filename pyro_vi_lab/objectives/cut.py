"""Draws of a guide as leaves of the graph, so that the gradient through them is told from the one past them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions import Delta, Distribution, MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vi_lab.errors import ModelError
from pyro_vi_lab.loss_trace import graph_leaves


class Draw(NamedTuple):
    """A reparameterized draw of a guide's site, and the leaf that took its place."""

    site: str
    value: Tensor
    leaf: Tensor


class Cut(Messenger):
    r"""Replaces every reparameterized draw :math:`z = z_\phi(\varepsilon)` by a leaf of the same value.

    What is computed afterwards depends on the parameters directly, and through the leaves: the chain rule of
    :func:`path_gradient` puts both together. Points (``Delta``) stay what they are, functions of draws before them.
    It has to be around the run, so that the trace inside sees the leaves.

    Attributes:
        drawn: The draws, in the order of the run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[Draw] = []

    def __enter__(self) -> Any:
        if torch._C._are_functorch_transforms_active():
            raise ModelError(
                "gradients of draws cannot be told apart inside torch.func transforms; use gradient='reparam' there"
            )
        return super().__enter__()

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if msg["is_observed"] or site_is_subsample(msg) or is_point(msg["fn"]):
            return
        if isinstance(value, Tensor) and value.requires_grad and not any(value is draw.leaf for draw in self.drawn):
            leaf = value.detach().requires_grad_()
            self.drawn.append(Draw(msg["name"], value, leaf))
            msg["value"] = leaf


def is_point(fn: Any) -> bool:
    """Whether a distribution is a ``Delta``, whose log density is of no draw of its own."""
    while isinstance(fn, (torch.distributions.Independent, MaskedDistribution, ExpandedDistribution)):
        fn = fn.base_dist
    return isinstance(fn, Delta)


def is_reparameterized(site: Any) -> bool:
    """Whether a site of a guide has no part of its gradient in a score function."""
    score = site["score_parts"].score_function
    return not isinstance(score, Tensor) and score == 0


def refuse_score_function(site: Any, gradient: str, advice: str) -> None:
    """Name a site that is not reparameterized.

    Raises:
        ModelError: The site is none that ``gradient`` can take.
    """
    if is_reparameterized(site):
        return
    fn: Distribution = site["fn"]
    raise ModelError(
        f"guide site {site['name']!r} ({type(fn).__name__}) is not reparameterized, so it has no {gradient!r} "
        f"gradient; {advice}"
    )


def path_gradient(
    cuts: Sequence[Cut],
    *,
    both: Tensor | float = 0.0,
    through_draws: Tensor | float = 0.0,
    past_draws: Tensor | float = 0.0,
    by_site: Tensor | float = 0.0,
    factors: Sequence[Mapping[str, Tensor | float]] = (),
) -> Tensor | float:
    r"""A sum over leaves whose gradient is the one asked for; its value means nothing.

    .. math:: \sum_i \frac{\partial z_i}{\partial\phi}^\top \Big[
        \frac{d (\text{both} + \text{through})}{d z_i} + c_i \frac{d\, \text{by site}}{d z_i} \Big]
        + \frac{\partial (\text{both} + \text{past})}{\partial \phi}

    Args:
        cuts: Those around the runs of the guide.
        both: What is differentiated in full.
        through_draws: What is differentiated with respect to the draws alone.
        past_draws: What is differentiated with the draws held.
        by_site: What is differentiated with respect to the draws alone, and multiplied by a factor of each.
        factors: These factors c, for each cut by the name of the site.

    References:
        Roeder, Wu & Duvenaud 2017, "Sticking the landing", NeurIPS, eq. 8.
    """
    draws = [draw for cut in cuts for draw in cut.drawn]
    points = [draw.leaf for draw in draws]
    gradients: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(leaves: Sequence[Tensor], found: Sequence[Tensor | None]) -> None:
        for leaf, value in zip(leaves, found, strict=True):
            if value is not None:
                known = gradients.get(id(leaf))
                gradients[id(leaf)] = (leaf, value if known is None else known[1] + value)

    def parameters(*outputs: Tensor) -> list[Tensor]:
        own = {id(point) for point in points}
        return [leaf for leaf in graph_leaves(*outputs) if id(leaf) not in own]

    adjoints: list[Tensor | None] = [None] * len(points)
    for total, through, past in ((both, True, True), (through_draws, True, False), (past_draws, False, True)):
        if isinstance(total, Tensor) and total.requires_grad:
            leaves = parameters(total) if past else []
            found = _grad([total], [*(points if through else ()), *leaves])
            if through:
                adjoints = list(map(_add, adjoints, found[: len(points)]))
            keep(leaves, found[len(found) - len(leaves) :])
    adjoints = _through_later_draws(cuts, adjoints)
    if isinstance(by_site, Tensor) and by_site.requires_grad:
        weights = [factors[number][draw.site] for number, cut in enumerate(cuts) for draw in cut.drawn]
        others = _through_later_draws(cuts, _grad([by_site], points))
        scaled = [None if other is None else weight * other for weight, other in zip(weights, others, strict=True)]
        adjoints = list(map(_add, adjoints, scaled))
    reached = [(draw.value, adjoint) for draw, adjoint in zip(draws, adjoints, strict=True) if adjoint is not None]
    if reached:
        values, adjoint_values = zip(*reached, strict=True)
        leaves = parameters(*values)
        keep(leaves, _grad(values, leaves, adjoint_values))
    return sum(((leaf * gradient).sum() for leaf, gradient in gradients.values()), start=0.0)


def _through_later_draws(cuts: Sequence[Cut], adjoints: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Total derivatives with respect to draws, on which later draws of the same run may depend."""
    result = list(adjoints)
    end = len(result)
    for cut in reversed(cuts):
        start = end - len(cut.drawn)
        for number in reversed(range(1, len(cut.drawn))):
            adjoint = result[start + number]
            if adjoint is not None:
                found = _grad([cut.drawn[number].value], [draw.leaf for draw in cut.drawn[:number]], [adjoint])
                result[start : start + number] = map(_add, result[start : start + number], found)
        end = start
    return result


def _grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor] | None = None
) -> Sequence[Tensor | None]:
    if not inputs:
        return ()
    return torch.autograd.grad(outputs, inputs, weights, allow_unused=True, retain_graph=True)


def _add(one: Tensor | None, two: Tensor | None) -> Tensor | None:
    return two if one is None else one if two is None else one + two
