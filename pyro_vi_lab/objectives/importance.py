"""Bounds that weigh several draws: of importance-weighted autoencoders and of Rényi divergences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError, ModelError
from pyro_vi_lab.objectives.cut import path_gradient, refuse_score_function
from pyro_vi_lab.objectives.objective import Objective, Part
from pyro_vi_lab.objectives.plates import (
    Frames,
    common_frames,
    expansion,
    frames_of,
    is_subsampled,
    particle_frame,
    sum_to,
)
from pyro_vi_lab.objectives.runs import Run
from pyro_vi_lab.objectives.terms import Term, elbo_terms

Gradient = Literal["dreg", "reparam"]


class RenyiELBO(Objective):
    r"""The variational Rényi bound, with weights of its own for every data point.

    .. math:: \mathcal L_\alpha = \sum_n \frac{1}{1-\alpha} \log \frac1K \sum_k w_{nk}^{1-\alpha},
        \qquad w_{nk} = \frac{p(x_n, z_{nk})}{q_\phi(z_{nk})}

    α = 0 is the bound of importance-weighted autoencoders (:class:`IWAE`) and α = 1 the :class:`ELBO`; in between it
    is in between, and α < 0 gives no lower bound any more.

    **Data points.** n runs over the elements of the vectorized plates that *every* latent site lies in, with all that
    the model has after its first latent site. The factor N/B of a subsampled plate is outside of the logarithm, and
    all particles see the same rows, so a minibatch is unbiased for the bound of all data. A latent site outside of a
    plate belongs to all of its elements: then the weights are joint, one for each particle, which is a bound as well,
    but a far looser one where there are local latent sites too, and none that a part of the rows can estimate: it
    is refused with subsampling. The same holds for a guide that draws local latent sites as one vector
    (``AutoDiagonalNormal``, the guides of this package with all rows in sight): use one with the model's plates, such
    as ``AutoNormal`` or an amortized guide. Pyro's own ``RenyiELBO`` takes N/B inside of the logarithm and lets every
    looped particle draw rows of its own.

    **Gradients.** With normalized weights :math:`\hat w_{nk} \propto w_{nk}^{1-\alpha}`, ``"dreg"`` is

    .. math:: \sum_{n,k} \hat w_{nk} \nabla_\theta \log p_\theta(x_n, z_{nk}) + \big(\alpha \hat w_{nk} + (1 - \alpha)
        \hat w_{nk}^2\big) \frac{\partial \log w_{nk}}{\partial z_{nk}} \frac{d z_{nk}}{d\phi}

    for the parameters θ of the model and φ of the guide: doubly reparameterized for α = 0, sticking the landing for
    α = 1. Its signal-to-noise ratio for φ grows with K, while that of ``"reparam"``, the plain gradient of the
    bound, falls (Rainforth et al. 2018).

    **Scales.** A ``poutine.scale`` by one number around all sites of model and guide is outside of the logarithm;
    others temper their sites inside, and where they scale :math:`\log q_i` by :math:`s_i`, ``"dreg"`` has
    :math:`\hat w - s_i (1 - \alpha) (\hat w - \hat w^2)` in the brackets.

    Args:
        alpha: Order α of the divergence.
        num_particles: Draws per step, K.
        gradient: ``"dreg"`` or ``"reparam"``.
        **kwargs: As of :class:`pyro.infer.ELBO` (``max_plate_nesting``, ``vectorize_particles``, ...).

    Raises:
        ArgumentError: An argument is none of these.
        ModelError: In use: a site of the guide is not reparameterized, is to be enumerated, or is missing in the
            guide; latent sites lie outside of a plate of which a call sees some rows only. The message names it.

    References:
        Li & Turner 2016, "Rényi divergence variational inference", NeurIPS, eq. 6.
        Tucker, Lawson, Gu & Maddison 2019, "Doubly reparameterized gradient estimators for Monte Carlo objectives",
        ICLR, eq. 8; for other α the same step gives the above.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     with pyro.plate("row", len(y)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> def guide(y):
        ...     slope = pyro.param("slope", torch.tensor(0.0))
        ...     with pyro.plate("row", len(y)):
        ...         pyro.sample("z", dist.Normal(slope * y, 0.5**0.5))
        >>> y = torch.tensor([0.5, -1.0, 2.0])
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), RenyiELBO(0.5, num_particles=8))
        >>> losses = [svi.step(y) for _ in range(200)]
        >>> print(f"{pyro.param('slope').item():.1f}")  # of the posterior
        0.5
    """

    gradients: ClassVar = ("dreg", "reparam")
    same_rows: ClassVar = True

    def __init__(
        self, alpha: float = 0.5, num_particles: int = 2, *, gradient: Gradient = "dreg", **kwargs: Any
    ) -> None:
        if isinstance(alpha, bool) or not (isinstance(alpha, (int, float)) and math.isfinite(alpha)):
            raise ArgumentError(f"alpha must be a finite number, got {alpha!r}")
        super().__init__(num_particles, gradient, **kwargs)
        self.alpha = float(alpha)

    def _parts(self, runs: Iterable[Run], *, differentiate: bool) -> Iterator[Part]:
        runs = list(runs)
        name = type(self).__name__
        for site in (site for run in runs for site in run.guide.values()):
            advice = f"{name} takes none; use ELBO(gradient='score'), or enumerate it with pyro.infer.TraceEnum_ELBO"
            refuse_score_function(site, self.gradient, advice)
        weights = _log_weights(runs, name)
        outside = weights.outside
        constant = outside.detach() if isinstance(outside, Tensor) else outside
        value = constant + weights.scale * self._bound(weights.log_w.detach()).sum()
        if not differentiate:
            yield Part(-value, 0.0)
            return
        share = torch.softmax((1 - self.alpha) * weights.log_w.detach(), 0)
        if self.cuts:
            # the score of a site, times its own scale and mask, is taken into the path (1 - α) (ŵ - ŵ²)
            factors = [_scales(run, weights.scale) for run in runs]
            alike = all(factor == 1 for by_site in factors for factor in by_site.values() if isinstance(factor, float))
            alike = alike and not any(isinstance(factor, Tensor) for by_site in factors for factor in by_site.values())
            score = (1 - self.alpha) * (share - share.square())
            gradient = path_gradient(
                [run.cut for run in runs if run.cut is not None],
                through_draws=weights.scale * ((share - score if alike else share) * weights.log_w).sum(),
                by_site=0.0 if alike else -weights.scale * (score * weights.log_w).sum(),
                factors=factors,
                past_draws=weights.scale * (share * weights.log_w_without_q).sum() + outside,
            )
        else:
            gradient = weights.scale * (share * weights.log_w).sum() + outside
        yield Part(-value, -gradient)

    def _bound(self, log_w: Tensor) -> Tensor:
        """The bound of every data point, ``(K, *points)`` to ``(*points)``."""
        if self.alpha == 1:
            return log_w.mean(0)
        order = 1 - self.alpha
        return (torch.logsumexp(order * log_w, 0) - math.log(len(log_w))) / order


class IWAE(RenyiELBO):
    r"""The bound of importance-weighted autoencoders, with weights of its own for every data point.

    .. math:: \mathcal L_K = \sum_n \log \frac1K \sum_k w_{nk}, \qquad w_{nk} = \frac{p(x_n, z_{nk})}{q_\phi(z_{nk})}

    It grows with K from the ELBO to the log evidence. What the data points are, what becomes of latent sites outside
    of their plate, and the two gradients: as of :class:`RenyiELBO`, of which it is the case α = 0.

    Args:
        num_particles: Draws per step, K.
        gradient: ``"dreg"``, doubly reparameterized, or ``"reparam"``.
        **kwargs: As of :class:`pyro.infer.ELBO` (``max_plate_nesting``, ``vectorize_particles``, ...).

    Raises:
        ArgumentError: An argument is none of these.
        ModelError: As of :class:`RenyiELBO`.

    References:
        Burda, Grosse & Salakhutdinov 2016, "Importance weighted autoencoders", ICLR, eq. 8.
        Tucker, Lawson, Gu & Maddison 2019, "Doubly reparameterized gradient estimators for Monte Carlo objectives",
        ICLR, eq. 8.
        Rainforth et al. 2018, "Tighter variational bounds are not necessarily better", ICML, Theorem 1.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     with pyro.plate("row", len(y)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> def guide(y):
        ...     with pyro.plate("row", len(y)):
        ...         pyro.sample("z", dist.Normal(0.5 * y, 0.5**0.5))
        >>> y = torch.tensor([0.5, -1.0, 2.0])
        >>> exact = -dist.Normal(0.0, 2**0.5).log_prob(y).sum()  # the guide is the posterior
        >>> print(f"{IWAE(4).loss(model, guide, y) - exact.item():.3f}")
        0.000
    """

    def __init__(self, num_particles: int = 2, *, gradient: Gradient = "dreg", **kwargs: Any) -> None:
        super().__init__(0.0, num_particles, gradient=gradient, **kwargs)


class _LogWeights(NamedTuple):
    """Log weights ``(K, *points)``, without log q of proper draws too; what is outside of the logarithm."""

    log_w: Tensor
    log_w_without_q: Tensor
    scale: float
    outside: Tensor | float


def _log_weights(runs: Sequence[Run], objective: str) -> _LogWeights:
    """Log weights of every data point, from the sites of model and guide."""
    for name, site in runs[0].guide.items():
        if site["infer"].get("has_no_log_weight"):
            raise ModelError(
                f"guide site {name!r} has a divergence in closed form in place of its density, of which {objective} "
                "can make no weights: use MeanFieldNormal, or the objective ELBO"
            )
    first = runs[0]
    before = _before_latents(first)
    sites = [site for name, site in first.model.items() if name not in before] + list(first.guide.values())
    points = common_frames(sites)
    _refuse_part_of_rows(first, sites, points, objective)
    scale = expansion(points) * _common_scale(sites, points)
    particles = particle_frame((*first.model.values(), *first.guide.values()))
    kept = points | ({particles} if particles else frozenset())
    log_w, without_q = [], []
    outside: Tensor | float = 0.0
    for run in runs:
        terms = elbo_terms(run)
        inside = [term for term in terms if term.site not in before]
        log_w.append(_total(inside, kept))
        without_q.append(_total([term for term in inside if not term.is_log_q], kept))
        outside = outside + _total([term for term in terms if term.site in before], frozenset())
    num = particles.size if particles else len(runs)
    weights, parts = ((torch.as_tensor(one[0]) if particles else _stacked(one)) / scale for one in (log_w, without_q))
    return _LogWeights(weights, parts, scale, outside / num)


def _scales(run: Run, scale: float) -> dict[str, Tensor | float]:
    """Scale and mask of log q of every site inside of the logarithm, with the dimensions of its draw."""
    scales: dict[str, Tensor | float] = {}
    for name, site in run.guide.items():
        value, masks = site["scale"], [site["mask"]]
        if isinstance(site["fn"], MaskedDistribution):
            masks.append(site["fn"]._mask)
        value = value / scale if isinstance(value, Tensor) else 1.0 if math.isclose(value, scale) else value / scale
        for mask in masks:
            if mask is not None and mask is not True:
                value = value * mask
        if isinstance(value, Tensor) and value.dim():
            value = value.reshape(*value.shape, *(1,) * site["fn"].event_dim)
        scales[name] = value if isinstance(value, Tensor) else float(value)
    return scales


def _before_latents(run: Run) -> frozenset[str]:
    """Observed sites that the model comes to before its first latent one, so that they are the same for all draws."""
    names = []
    for name, site in run.model.items():
        if not site["is_observed"]:
            break
        names.append(name)
    return frozenset(names) - run.guide.keys()


def _total(terms: Sequence[Term], kept: Frames) -> Tensor | float:
    return sum((sum_to(term.value, term.frames & kept) for term in terms), start=0.0)


def _stacked(values: Sequence[Tensor | float]) -> Tensor:
    return torch.stack([torch.as_tensor(value) for value in values])


def _refuse_part_of_rows(run: Run, sites: Sequence[Any], points: Frames, objective: str) -> None:
    """The bound of jointly weighted draws is of all rows.

    Raises:
        ModelError: A plate that the bound does not factorize over is subsampled.
    """
    frames = {frame for site in sites for frame in site["cond_indep_stack"]} - points
    for frame in sorted(filter(is_subsampled, frames), key=lambda frame: str(frame.name)):
        seen, why = "some", "it is a loop of Python"
        if frame.vectorized:
            seen = f"{frame.size}"
            why = f"site {next(site['name'] for site in sites if frame not in frames_of(site))!r} lies outside of it"
        raise ModelError(
            f"a call sees {seen} of the {frame.full_size} rows of plate {frame.name!r}, and {why}: the bound of "
            f"{objective} weighs draws by all rows jointly then, which a part of them cannot estimate; use ELBO, let "
            "calls see all rows, or give guide and model a vectorized plate that every latent site lies in"
        )


def _common_scale(sites: Sequence[Any], points: Frames) -> float:
    """The number by which all of the sites are scaled besides subsampling, 1 if they are not scaled alike."""
    factor = expansion(points)
    scales = [site["scale"] for site in sites]
    if not scales or not all(isinstance(scale, (int, float)) for scale in scales):
        return 1.0
    first = scales[0] / factor
    alike = all(math.isclose(scale, scales[0], rel_tol=1e-9) for scale in scales)
    return first if alike and first > 0 else 1.0
