"""Guides over the unconstrained latent vector z that start at a point, their parameter ``loc``."""

from __future__ import annotations

from typing import Any, Self

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vi_lab.change_of_variables import ChangeOfVariables, bijection
from pyro_vi_lab.errors import ModelError
from pyro_vi_lab.guides.unconstrained_guide import UnconstrainedGuide


class ContinuousGuide(UnconstrainedGuide):
    """Base of the guides over z that have a location.

    Args:
        model: A Pyro model.
        init_loc_fn: Where to start each site; at zero on the unconstrained scale by default.
        create_plates: As in Pyro's guides: takes the model's arguments and returns plates that guide and model share.
            Not needed for a model that says which rows it sees: the guide sees the same.
    """

    loc: Tensor

    def _make_parameters(self, by_row: set[str]) -> None:
        loc, loaded = self._init_loc(), "loc" in self._parameters
        self._start_at(loc, loaded=loaded)
        if loaded and self.loc.shape != loc.shape:
            raise ModelError(
                f"the state that {type(self).__name__} was loaded from has {len(self.loc)} latent dimensions, its "
                f"model has {len(loc)}"
            )

    def _start_at(self, loc: Tensor, *, loaded: bool) -> None:
        """Make the parameters, at the start ``loc (D,)``, unless they have been loaded from a state."""
        if not loaded:
            self.loc = nn.Parameter(loc.detach().clone())

    def twin(self) -> Self:
        """A guide of the same model with parameters of its own, equal to the present ones."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        for name in ("_parameters", "_pyro_params"):
            other.__dict__[name] = self.__dict__[name].copy()
        # with the context of this one, new parameters of the other would take this one's out of the param store
        other.__dict__["_pyro_context"] = type(self._pyro_context)()
        if self.prototype_trace is not None:
            other._take_parameters(self)
        return other

    def _take_parameters(self, other: Self) -> None:
        """Parameters of its own, equal to those of another guide of this class."""
        self.loc = nn.Parameter(other.loc.detach().clone())

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Value of each site at the median of z, coordinate by coordinate: at the location, where q is symmetric.

        Takes the model's ``*args, **kwargs`` where a support depends on other sites.
        """
        if not self._support_depends:
            parts = self._unpack_latent(self._median_of_z())
            return {site["name"]: bijection(site["name"], site["fn"])(value) for site, value in parts}
        change = ChangeOfVariables({site["name"]: value for site, value in self._unpack_latent(self._median_of_z())})
        with poutine.block(), change:
            self._model_of(self._why_model)(*args, **kwargs)
        return change.values

    def _median_of_z(self) -> Tensor:
        return self.loc.detach()
