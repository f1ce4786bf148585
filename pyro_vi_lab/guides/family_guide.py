"""A family over all latent sites as a Pyro autoguide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import pyro.distributions as dist
import torch
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from pyro_vi_lab.change_of_variables import bijection
from pyro_vi_lab.errors import ArgumentError, ModelError
from pyro_vi_lab.families import Family, Params
from pyro_vi_lab.guides.continuous_guide import ContinuousGuide
from pyro_vi_lab.guides.initialization import init_to_origin


class FamilyGuide(ContinuousGuide):
    """Base of the guides θ = μ + σ·ε over the unconstrained latent vector z.

    Args:
        model: A Pyro model.
        init_loc_fn: Where to start each site; at zero on the unconstrained scale by default.
        init_scale: Standard deviation of every coordinate of z at the start.
        create_plates: As in Pyro's guides: takes the model's arguments and returns plates that guide and model share.
            Not needed for a model that says which rows it sees: the guide sees the same.

    Raises:
        ArgumentError: ``init_scale`` is not a positive number.
    """

    family: Family
    """The family of distributions over z; for some guides not known before their first run."""
    scale_constraints: ClassVar[Mapping[str, constraints.Constraint]]
    """Names of the parameters of the scale, as Pyro's guides call them, and their constraints."""

    def __init__(
        self,
        model: Callable[..., Any],
        init_loc_fn: Callable[..., Any] = init_to_origin,
        init_scale: float = 0.1,
        *,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        if not (isinstance(init_scale, (int, float)) and init_scale > 0):
            raise ArgumentError(f"init_scale must be a positive number, got {init_scale!r}")
        self._init_scale = float(init_scale)
        super().__init__(model, init_loc_fn, create_plates=create_plates)

    def _family(self) -> Family:
        """The family for the sites of the first run."""
        return self.family

    def _start_at(self, loc: Tensor, *, loaded: bool) -> None:
        self.family = self._family()
        if not loaded:
            self.params = self.family.initial(loc, self._init_scale)

    def _take_parameters(self, other: Self) -> None:
        self.params = other.params

    @property
    def has_params(self) -> bool:
        """Whether there are parameters: once the guide has been run, or its state was loaded."""
        return "loc" in self._parameters

    @property
    def params(self) -> Params:
        """Present location and scale, detached."""
        values = [getattr(self, name).detach().clone() for name in self.scale_constraints]
        return Params(self.loc.detach().clone(), self.join_scale(values))

    @params.setter
    def params(self, value: Params) -> None:
        self.loc = nn.Parameter(value.loc.detach().clone())
        parts = self.split_scale(value.scale.detach())
        for (name, constraint), part in zip(self.scale_constraints.items(), parts, strict=True):
            setattr(self, name, PyroParam(part.clone(), constraint))

    @staticmethod
    def join_scale(values: Sequence[Tensor]) -> Tensor:
        """The scale as the family has it, from the parameters of the guide, or their gradients."""
        (value,) = values
        return value

    @staticmethod
    def split_scale(scale: Tensor) -> list[Tensor]:
        """The parameters of the guide from the scale of the family."""
        return [scale]

    def get_base_dist(self) -> Any:
        """Standard normal over z."""
        return dist.Normal(torch.zeros_like(self.loc), torch.ones_like(self.loc)).to_event(1)

    def _median_of_z(self) -> Tensor:
        return self._loc_scale()[0].detach()

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
        params = self.params
        found: dict[str, list[Tensor]] = {}
        for probability in torch.as_tensor(quantiles, dtype=torch.float64).reshape(-1).tolist():
            for site, value in self._unpack_latent(self.family.quantile(params, probability)):
                found.setdefault(site["name"], []).append(bijection(site["name"], site["fn"])(value))
        return {name: torch.stack(values) for name, values in found.items()}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Makes the parameters of a guide that has not been run yet."""
        keys = {name: f"{prefix}{name}_unconstrained" for name in self.scale_constraints}
        if self.prototype_trace is None and {f"{prefix}loc", *keys.values()} <= state_dict.keys():
            values = [transform_to(self.scale_constraints[name])(state_dict[key]) for name, key in keys.items()]
            self.params = Params(state_dict[f"{prefix}loc"], self.join_scale(values))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.loc, self.family.variance(self.params).sqrt()
