"""Draws of a guide as leaves of the graph, so that the gradient through them is told from the one past them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import Delta, Distribution, MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vi_lab.errors import ModelError
from pyro_vi_lab.loss_trace import graph_leaves


class Cut(Messenger):
    r"""Replaces every reparameterized draw :math:`z = z_\phi(\varepsilon)` by a leaf of the same value.

    What is computed afterwards depends on the parameters directly, and through the leaves: the chain rule of
    :func:`path_gradient` puts both together. Points (``Delta``) stay what they are, functions of draws before them.
    It has to be around the run, so that the trace inside sees the leaves.

    Attributes:
        drawn: Draws and their leaves, in the order of the run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[tuple[Tensor, Tensor]] = []

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
        if isinstance(value, Tensor) and value.requires_grad and not any(value is leaf for _, leaf in self.drawn):
            leaf = value.detach().requires_grad_()
            self.drawn.append((value, leaf))
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
) -> Tensor | float:
    r"""A sum over leaves whose gradient is the one asked for; its value means nothing.

    .. math:: \sum_i \frac{\partial z_i}{\partial\phi}^\top
        \frac{d (\text{both} + \text{through})}{d z_i} + \frac{\partial (\text{both} + \text{past})}{\partial \phi}

    Args:
        cuts: Those around the runs of the guide.
        both: What is differentiated in full.
        through_draws: What is differentiated with respect to the draws alone.
        past_draws: What is differentiated with the draws held.

    References:
        Roeder, Wu & Duvenaud 2017, "Sticking the landing", NeurIPS, eq. 8.
    """
    points = [leaf for cut in cuts for _, leaf in cut.drawn]
    position = {id(leaf): number for number, leaf in enumerate(points)}
    adjoints: list[Tensor | None] = [None] * len(points)
    gradients: dict[int, tuple[Tensor, Tensor]] = {}

    def collect(outputs: Sequence[Tensor], wanted: Sequence[Tensor], weights: Sequence[Tensor] | None = None) -> None:
        """Add the gradient of the outputs to that of draws and of leaves."""
        if not outputs or not wanted:
            return
        found: Sequence[Tensor | None] = torch.autograd.grad(
            outputs, wanted, weights, allow_unused=True, retain_graph=True
        )
        for tensor, value in zip(wanted, found, strict=True):
            if value is None:
                continue
            number = position.get(id(tensor))
            if number is not None:
                before = adjoints[number]
                adjoints[number] = value if before is None else before + value
            else:
                known = gradients.get(id(tensor))
                gradients[id(tensor)] = (tensor, value if known is None else known[1] + value)

    def parameters(*outputs: Tensor) -> list[Tensor]:
        return [leaf for leaf in graph_leaves(*outputs) if id(leaf) not in position]

    for sum_, through, past in ((both, True, True), (through_draws, True, False), (past_draws, False, True)):
        if isinstance(sum_, Tensor) and sum_.requires_grad:
            collect([sum_], [*(points if through else ()), *(parameters(sum_) if past else ())])
    drawn, weights, start = [], [], len(points)
    for cut in reversed(cuts):
        start -= len(cut.drawn)
        for number in reversed(range(len(cut.drawn))):  # a draw may depend on those before it
            adjoint = adjoints[start + number]
            if adjoint is not None:
                value = cut.drawn[number][0]
                collect([value], [leaf for _, leaf in cut.drawn[:number]], [adjoint])
                drawn.append(value)
                weights.append(adjoint)
    if drawn:
        collect(drawn, parameters(*drawn), weights)
    total: Tensor | float = 0.0
    for leaf, gradient in gradients.values():
        total = total + (leaf * gradient).sum()
    return total
