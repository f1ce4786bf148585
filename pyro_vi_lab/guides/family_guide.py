"""A family over all latent sites as a Pyro autoguide."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, ClassVar, Self

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import AutoContinuous
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import constraints, register_kl, transform_to

from pyro_vi_lab.change_of_variables import ChangeOfVariables, same_support
from pyro_vi_lab.errors import ArgumentError, ModelError
from pyro_vi_lab.families import Family, Params
from pyro_vi_lab.guides.initialization import init_to_origin


class DensityDelta(dist.Delta):
    """A point with a density, as Pyro's autoguides use it, whose KL divergence keeps that density.

    Pyro's own rule for ``Delta`` drops ``log_density``, so that ``TraceMeanField_ELBO`` loses the change of
    variables of every
    constrained site.
    """


@register_kl(DensityDelta, dist.Distribution)
def _kl_density_delta(p: DensityDelta, q: Any) -> Tensor:
    return p.log_density - q.log_prob(p.v)


class FamilyGuide(AutoContinuous):
    """Base of the guides θ = μ + σ·ε over the unconstrained latent vector z.

    Args:
        model: A Pyro model.
        init_loc_fn: Where to start each site; at zero on the unconstrained scale by default.
        init_scale: Standard deviation of every coordinate of z at the start.

    Raises:
        ArgumentError: ``init_scale`` is not a positive number.
    """

    family: ClassVar[Family]
    """The family of distributions over z."""
    scale_name: ClassVar[str]
    """Name of the scale parameter, as Pyro's guides call it."""
    scale_constraint: ClassVar[constraints.Constraint]

    loc: Tensor

    def __init__(
        self,
        model: Callable[..., Any],
        init_loc_fn: Callable[..., Any] = init_to_origin,
        init_scale: float = 0.1,
    ) -> None:
        if not (isinstance(init_scale, (int, float)) and init_scale > 0):
            raise ArgumentError(f"init_scale must be a positive number, got {init_scale!r}")
        self._init_scale = float(init_scale)
        super().__init__(model, init_loc_fn=init_loc_fn)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        loaded = self.prototype_trace is None and "loc" in self._parameters
        super()._setup_prototype(*args, **kwargs)
        loc = self._init_loc()
        if not loaded:
            self.params = self.family.initial(loc, self._init_scale)
        elif self.loc.shape != loc.shape:
            raise ModelError(
                f"the state that {type(self).__name__} was loaded from has {len(self.loc)} latent dimensions, its "
                f"model has {len(loc)}"
            )

        # Pyro's autoguides keep the supports of the first run; a support that depends on sites before it has to be
        # read anew.
        run = ChangeOfVariables({site["name"]: value + 1 for site, value in self._unpack_latent(loc.detach())})
        with torch.no_grad(), poutine.block(), run:
            self.model(*args, **kwargs)
        prototype = self._prototype_nodes()
        self._support_depends = not all(same_support(prototype[k]["fn"].support, s) for k, s in run.supports.items())

    def _prototype_nodes(self) -> Any:
        assert self.prototype_trace is not None
        return self.prototype_trace.nodes

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site; the same ``*args, **kwargs`` as the model's."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        latent = self.sample_latent(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        unconstrained = {site["name"]: value for site, value in self._unpack_latent(latent)}
        change = ChangeOfVariables(unconstrained)
        if self._support_depends:
            with poutine.block(), change:
                self._model_of_supports()(*args, **kwargs)
        else:
            for name in unconstrained:
                change.visit(name, self._prototype_nodes()[name]["fn"])
        result = {}
        for name, value in change.values.items():
            event_dim = self._prototype_nodes()[name]["fn"].event_dim
            log_density = 0.0 if poutine.get_mask() is False else -change.log_dets[name]
            if isinstance(log_density, Tensor):
                log_density = sum_rightmost(log_density, log_density.dim() - value.dim() + event_dim)
            with ExitStack() as stack:
                for frame in self._cond_indep_stacks[name]:
                    stack.enter_context(plates[frame.name])
                result[name] = pyro.sample(name, DensityDelta(value, log_density=log_density, event_dim=event_dim))
        return result

    def twin(self) -> Self:
        """A guide of the same model with parameters of its own, equal to the present ones."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        for name in ("_parameters", "_pyro_params"):
            other.__dict__[name] = self.__dict__[name].copy()
        # with the context of this one, new parameters of the other would take this one's out of the param store
        other.__dict__["_pyro_context"] = type(self._pyro_context)()
        if self.prototype_trace is not None:
            other.params = self.params
        return other

    @property
    def params(self) -> Params:
        """Present location and scale, detached."""
        return Params(self.loc.detach().clone(), getattr(self, self.scale_name).detach().clone())

    @params.setter
    def params(self, value: Params) -> None:
        self.loc = nn.Parameter(value.loc.detach().clone())
        setattr(self, self.scale_name, PyroParam(value.scale.detach().clone(), self.scale_constraint))

    def get_base_dist(self) -> Any:
        """Standard normal over z."""
        return dist.Normal(torch.zeros_like(self.loc), torch.ones_like(self.loc)).to_event(1)

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Value of each site at the location.

        Takes the model's ``*args, **kwargs`` where a support depends on other sites.
        """
        if not self._support_depends:
            return dict(super().median(*args, **kwargs))
        change = ChangeOfVariables({site["name"]: value for site, value in self._unpack_latent(self.loc.detach())})
        with poutine.block(), change:
            self._model_of_supports()(*args, **kwargs)
        return change.values

    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Quantiles of each site, coordinate by coordinate.

        Raises:
            ModelError: A support depends on other sites, so that quantiles of z are not those of the site.
        """
        if self._support_depends:
            raise ModelError(
                f"{type(self).__name__} has no quantiles where the support of a site depends on other sites; take them "
                "of draws: pyro.infer.Predictive(guide, num_samples=1000)(...)"
            )
        return dict(super().quantiles(quantiles, *args, **kwargs))

    def _model_of_supports(self) -> Callable[..., Any]:
        if self._model is None:
            raise ModelError(
                f"this {type(self).__name__} was pickled, which leaves out its model, and the support of a site "
                "depends "
                "on other sites: make the guide anew from the model and use load_state_dict"
            )
        return self._model[0]

    def __getstate__(self) -> dict[str, Any]:
        model = self._model
        state = dict(super().__getstate__())  # Pyro leaves out the model, of the guide itself too
        self._model = model
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> FamilyGuide:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        copied._model = self._model
        return copied

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Makes the parameters of a guide that has not been run yet."""
        loc, scale = f"{prefix}loc", f"{prefix}{self.scale_name}_unconstrained"
        if self.prototype_trace is None and loc in state_dict and scale in state_dict:
            self.params = Params(state_dict[loc], transform_to(self.scale_constraint)(state_dict[scale]))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.loc, self.family.scale.variance(getattr(self, self.scale_name)).sqrt()
