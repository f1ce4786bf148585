"""What draws of a mixture of normals say of rows: their components, their density, new rows; and one order for all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.isolation import seeded
from pyro_vi_lab.labels import matched, normal_divergences, reordered
from pyro_vi_lab.missing_moments import observed_log_densities
from pyro_vi_lab.mixture_moments import Covariance, Normals, log_densities
from pyro_vi_lab.mixture_prior import sticks_of_weights
from pyro_vi_lab.models.normal_mixture import scaled
from pyro_vi_lab.posterior import Posterior

PASSES = 20
"""Most passes of aligning draws with their own mean; one or two are usual."""
AXES: dict[Covariance, int | None] = {"full": 1, "tied": None, "diag": 1, "spherical": 1}
"""Axis of the components in the draws of the precisions, (S, ...)."""


def sites(posterior: Posterior) -> dict[str, Tensor]:
    """Draws of weights, loc and precision, ``(S, ...)``; of a fit of a point one.

    Raises:
        ArgumentError: One of them is missing.
    """
    for name in ("weights", "loc", "precision"):
        if name not in posterior.draws:
            raise ArgumentError(
                f"the posterior has no draws of the site {name!r} of a GaussianMixture; it has "
                f"{', '.join(posterior.draws)}"
            )
    flat = posterior.flat()
    return {key: value[:1] if posterior.info.get("point") else value for key, value in flat.items()}


def each_draw(posterior: Posterior, kind: Covariance) -> Iterator[Normals]:
    """The normal components of each draw."""
    draws = sites(posterior)
    factor = draws["precision"].sqrt() if kind in ("diag", "spherical") else torch.linalg.cholesky(draws["precision"])
    for s in range(len(factor)):
        yield Normals(draws["weights"][s].log(), draws["loc"][s], factor[s], kind)


def responsibilities(posterior: Posterior, X: Tensor, observed: Tensor | None, kind: Covariance) -> Tensor:
    """Probability of each component for each row, averaged over the draws, ``(N, K)``."""
    total, number = X.new_zeros(()), 0
    for normals in each_draw(posterior, kind):
        total, number = total + _log_joint(X, observed, normals).softmax(1), number + 1
    return total / number


def score_samples(posterior: Posterior, X: Tensor, observed: Tensor | None, kind: Covariance) -> Tensor:
    """Log of the density of each row averaged over the draws, ``(N,)``."""
    total, number = X.new_full((len(X),), -torch.inf), 0
    for normals in each_draw(posterior, kind):
        total, number = torch.logaddexp(total, _log_joint(X, observed, normals).logsumexp(1)), number + 1
    return total - torch.tensor(float(number)).log().to(total)


def sample(posterior: Posterior, num_rows: int, kind: Covariance, *, seed: int) -> tuple[Tensor, Tensor]:
    """New rows, each of a draw of its own, and their components: ``(N, D)`` and ``(N,)``."""
    draws = sites(posterior)
    weights, loc, precision = draws["weights"], draws["loc"], draws["precision"]
    with seeded(seed):
        draw = torch.randint(len(weights), (num_rows,))
        component = torch.distributions.Categorical(weights[draw]).sample()
        noise = torch.randn(num_rows, loc.shape[-1], dtype=loc.dtype)
    if kind == "tied":
        return loc[draw, component] + scaled(noise, precision, "full", draw), component
    chosen = precision[draw, component]
    return loc[draw, component] + scaled(noise, chosen, kind, torch.arange(num_rows)), component


def align(posterior: Posterior, kind: Covariance, *, reference: Posterior | None = None) -> Posterior:
    """Draws with their components in one order.

    The components of each draw are matched with those of the reference so that the sum of the symmetric divergences
    between matched normals is least. Without a reference they are matched with the last draw, and then with the mean of
    all, until nothing changes. Of a Dirichlet process the sticks become those of the weights in the new order.

    Args:
        posterior: Draws.
        kind: Of the covariances.
        reference: Whose order to take.

    References:
        Stephens 2000, "Dealing with label switching in mixture models", JRSS B 62(4), Section 4, for the iteration.
        Papastamoulis 2016, "label.switching", Journal of Statistical Software 69.
    """
    draws = {key: value.flatten(0, 1) for key, value in posterior.draws.items()}
    sites(posterior)
    loc, covariance = draws["loc"], _covariances(draws, kind)
    number = loc.shape[1]
    if reference is None:
        center, spread = loc[-1], covariance[-1]
    else:
        other = sites(reference)
        if other["loc"].shape[1:] != loc.shape[1:]:
            raise ArgumentError(
                f"the reference has {other['loc'].shape[1]} components of {other['loc'].shape[2]} columns, the "
                f"posterior {number} of {loc.shape[2]}"
            )
        center, spread = other["loc"].mean(0), _covariances(other, kind).mean(0)
    order = matched(normal_divergences(loc, covariance, center, spread))
    for _ in range(0 if reference is not None else PASSES):
        center = reordered(loc, order, 1).mean(0)
        spread = reordered(covariance, order, 1).mean(0)
        before, order = order, matched(normal_divergences(loc, covariance, center, spread))
        if torch.equal(before, order):
            break
    axes = {"weights": 1, "loc": 1, "precision": AXES[kind]}
    moved = {}
    for key, value in draws.items():
        axis = axes.get(key)
        if key == "assignment":
            moved[key] = order.argsort(1).gather(1, value.long()).to(value.dtype)
        else:
            moved[key] = value if axis is None else reordered(value, order, axis)
    if "stick" in draws:
        moved["stick"] = sticks_of_weights(moved["weights"])
    shape = (posterior.num_chains, posterior.num_draws)
    back = {key: value.reshape(*shape, *value.shape[1:]) for key, value in moved.items()}
    return replace(posterior, draws=back, unconstrained=None)


def _log_joint(X: Tensor, observed: Tensor | None, normals: Normals) -> Tensor:
    return log_densities(X, normals) if observed is None else observed_log_densities(X, observed, normals)


def _covariances(draws: dict[str, Tensor], kind: Covariance) -> Tensor:
    """Covariance matrices of all components, ``(S, K, D, D)``."""
    precision, loc = draws["precision"], draws["loc"]
    if kind in ("full", "tied"):
        inverse = torch.linalg.inv(precision)
        return inverse if kind == "full" else inverse[:, None].expand(*loc.shape, loc.shape[-1])
    variance = precision.reciprocal() if kind == "diag" else precision.reciprocal().unsqueeze(-1).expand(loc.shape)
    return torch.diag_embed(variance)
