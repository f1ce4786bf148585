"""The evidence lower bound, site by site."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from pyro_vi_lab.objectives.elbo import ELBO, Gradient
from pyro_vi_lab.objectives.plates import PARTICLES, sum_to
from pyro_vi_lab.objectives.runs import Program
from pyro_vi_lab.objectives.terms import Term


class PerSiteELBO(ELBO):
    r"""The evidence lower bound as a sum over sites, to see where a fit is bad.

    .. math:: \mathcal L = \sum_{\text{observed}} E_q[\log p(x_s \mid \cdot)]
        + \sum_{\text{latent}} E_q[\log p(z_s \mid \cdot) - \log q(z_s \mid \cdot)]

    The same loss as :class:`ELBO` of the same arguments, and a gradient in which each draw only sees the terms
    downstream of it: by the chain rule for sites that are reparameterized, by their costs for all others
    (``gradient="score"``, which is the default here as it takes any guide). :meth:`terms` gives the sum of every site,
    :meth:`elements` what each row of a plate adds: a datum that the posterior does not explain, a latent site whose
    draws the prior finds unlikely.

    Args:
        num_particles: Draws per step, or per call of :meth:`terms`.
        gradient: As of :class:`ELBO`.
        **kwargs: As of :class:`ELBO` (``analytic_kl``, ``max_plate_nesting``, ``vectorize_particles``, ...).

    Raises:
        ArgumentError: As of :class:`ELBO`.
        ModelError: As of :class:`ELBO`.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("row", len(y)):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> def guide(y):
        ...     pyro.sample("mean", dist.Normal(0.5, 0.5))
        >>> y = torch.tensor([0.5, 0.2, 9.0])
        >>> objective = PerSiteELBO(num_particles=100)
        >>> {site: round(value.item()) for site, value in objective.terms(model, guide, y).items()}
        {'mean': 0, 'y': -40}
        >>> objective.elements(model, guide, y)["y"].argmin().item()  # the row that is explained worst
        2
    """

    def __init__(self, num_particles: int = 1, *, gradient: Gradient = "score", **kwargs: Any) -> None:
        super().__init__(num_particles, gradient=gradient, **kwargs)

    def terms(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """What every site adds to the bound; the sum of all is an estimate of it.

        Observed sites add log p, latent ones log p - log q, or -KL where it is closed. Sites of the guide alone, such
        as the joint draw of an autoguide, add -log q; what their parts become on the way to the sites of the model
        (the change of variables) belongs to those.

        Args:
            model: The model.
            guide: The guide.
            *args: Arguments of both.
            **kwargs: Keyword arguments of both.

        Returns:
            Numbers by name of the site, model first, in the order of the run.
        """
        return {name: value.sum() for name, value in self.elements(model, guide, *args, **kwargs).items()}

    def elements(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """What every element of every site adds to the bound.

        Args:
            model: The model.
            guide: The guide.
            *args: Arguments of both.
            **kwargs: Keyword arguments of both.

        Returns:
            Mean over the particles, by name of the site, one number for each element of its plates; with subsampling
            those of the rows that the call sees, times N/B.
        """
        totals: dict[str, Tensor] = {}
        for run in self._runs(model, guide, args, kwargs, cut=False, same_rows=True):
            skipped = {name for name, site in run.model.items() if site["infer"].get("_deterministic")}
            of_site: dict[str, list[Term]] = {name: [] for name in run.model}
            for term in self._terms(run):
                of_site.setdefault(term.site, []).append(term)
            for name, terms in of_site.items():
                if terms and name not in skipped:
                    value = sum(self._by_element(terms)) / self.num_particles
                    totals[name] = totals[name] + value if name in totals else value
        return totals

    @staticmethod
    def _by_element(terms: list[Term]) -> Iterator[Tensor]:
        frames = frozenset.intersection(*(term.frames for term in terms))
        frames = frozenset(frame for frame in frames if frame.name != PARTICLES)
        for term in terms:
            yield sum_to(term.value.detach(), frames)
