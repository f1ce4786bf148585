"""A point as a guide: the mode of the posterior, or of the likelihood."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import register_kl

from pyro_vi_lab.change_of_variables import ChangeOfVariables
from pyro_vi_lab.errors import ModelError
from pyro_vi_lab.guides.continuous_guide import ContinuousGuide


class PointGuide(ContinuousGuide):
    """Base of the guides that are a point: their only parameter is ``loc``, on the unconstrained scale, ``(D,)``.

    Latent sites may lie in a plate of which each call sees some rows: the guide has a value for every row.
    """

    takes_rows: ClassVar = True

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """The point mass at ``loc``."""
        return dist.Delta(self.loc, event_dim=1)

    def _draw(self, plates: Mapping[str, Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        by_row, values, position = self._by_row(plates), {}, 0
        for name, shape in self._unconstrained_shapes.items():
            value = self.loc[position : position + shape.numel()].view(shape)
            position += shape.numel()
            for frame in by_row.get(name, ()):
                index = torch.as_tensor(plates[frame.name].indices, device=value.device)
                value = value.index_select(frame.dim - self._event_dim(name), index)
            values[name] = value
        return values

    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Quantiles of a point mass: all of them are the point.

        Takes the model's ``*args, **kwargs`` where a support depends on other sites.
        """
        number = torch.as_tensor(quantiles).numel()
        return {name: value.expand(number, *value.shape) for name, value in self.median(*args, **kwargs).items()}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Makes the parameter of a guide that has not been run yet."""
        if self.prototype_trace is None and f"{prefix}loc" in state_dict:
            self.loc = nn.Parameter(state_dict[f"{prefix}loc"].detach().clone())
        super()._load_from_state_dict(state_dict, prefix, *args)


class MAP(PointGuide):
    r"""Maximum a posteriori: the mode of the joint density of the constrained sites.

    .. math:: \hat x = \arg\max_x\ \log p(y \mid x) + \log p(x)

    The density is that of the sites as the model has them, as for Pyro's ``AutoDelta`` and Stan's ``optimize`` without
    ``jacobian``: no log determinant of a change of variables. The mode depends on how the model is written (a scale or
    its logarithm); :class:`LaplaceApproximation` has the mode on the unconstrained scale. A density that rises up to
    the edge of a support, as that of a hierarchical scale at zero often does, has no mode inside.

    Improper priors and supports that depend on other sites are taken, and ``state_dict`` goes into a fresh instance.

    Args:
        model: A Pyro model.
        init_loc_fn: Where to start each site; at zero on the unconstrained scale by default.
        create_plates: As in Pyro's guides, plates that guide and model share; not needed in general.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> def model():
        ...     rate = pyro.sample("rate", dist.Gamma(3.0, 1.0))
        ...     pyro.sample("count", dist.Poisson(rate), obs=torch.tensor(4.0))
        >>> guide = MAP(model)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        >>> for _ in range(500):
        ...     loss = svi.step()
        >>> round(float(guide.median()["rate"]), 2)  # (3 - 1 + 4) / 2
        3.0
    """

    def _log_density(self, change: ChangeOfVariables, name: str) -> Tensor | float:
        return 0.0


class MLE(PointGuide):
    r"""Maximum likelihood: the maximum of the density of the observed sites alone.

    .. math:: \hat x = \arg\max_x\ \log p(y \mid x)

    The distributions of the latent sites say where these may lie and nothing else, those of random effects included:
    discrete latent sites are summed out, all others are free. In :class:`pyro.infer.SVI` the guide gives each point
    the prior's density, so that the bound of ``Trace_ELBO`` is the log likelihood; for that it runs the model in each
    call.

    Args:
        model: A Pyro model.
        init_loc_fn: Where to start each site; at zero on the unconstrained scale by default.
        create_plates: As in Pyro's guides, plates that guide and model share; not needed in general.
    """

    @property
    def _why_model(self) -> str:
        return "its likelihood is that of the model" if self._has_model or self._support_depends else ""

    @property
    def _has_model(self) -> bool:
        model: Any = self._model  # a pickled guide has none
        return model is not None

    def _change(self, unconstrained: Mapping[str, Tensor]) -> ChangeOfVariables:
        return _WithPrior(unconstrained)

    def _log_density(self, change: ChangeOfVariables, name: str) -> Tensor | float:
        assert isinstance(change, _WithPrior)
        return change.log_priors[name]

    def _point(self, change: ChangeOfVariables, name: str, event_dim: int) -> Any:
        if self._has_model:
            return super()._point(change, name, event_dim)
        return _PointWithoutModel(change.values[name], event_dim=event_dim)


class _WithPrior(ChangeOfVariables):
    """Keeps the prior's log density at each site's value too."""

    def __init__(self, unconstrained: Mapping[str, Tensor]) -> None:
        super().__init__(unconstrained)
        self.log_priors: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        name, mask = msg["name"], msg["mask"]
        if name in self.log_priors and mask is not None:
            prior = self.log_priors[name]
            self.log_priors[name] = torch.where(torch.as_tensor(mask, device=prior.device), prior, 0.0)

    def visit(self, name: str, fn: Any) -> Tensor:
        """The value of one site whose distribution is ``fn``."""
        value = super().visit(name, fn)
        self.log_priors[name] = fn.log_prob(value)
        return value


class _PointWithoutModel(dist.Delta):
    """A point whose density would have to be asked of a model that is no longer there."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Refused.

        Raises:
            ModelError: Always.
        """
        raise ModelError(
            "this MLE was pickled, which leaves out its model, and its likelihood is that of the model: make the guide "
            "anew from the model and use load_state_dict"
        )


@register_kl(_PointWithoutModel, dist.Distribution)
def _kl_point_without_model(p: _PointWithoutModel, q: Any) -> Tensor:
    return p.log_prob(p.v)
