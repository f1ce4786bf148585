"""Independent coordinates on the unconstrained scale: normal, Student-t, Laplace."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import AffineTransform
from torch import Tensor
from torch.distributions import constraints

from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.families import FAMILIES, Diagonal, Laplace, LocationScale, StudentT
from pyro_vi_lab.guides.family_guide import FamilyGuide
from pyro_vi_lab.guides.initialization import init_to_origin


class MeanField(FamilyGuide):
    """Base of the guides with independent coordinates.

    Latent sites may lie in a plate of which each call sees some rows (``pyro.plate(..., subsample_size=...)``, or a
    fit of a :class:`~pyro_vi_lab.Problem` with a minibatch): the guide has a location and a scale for every row, and a
    call draws those that the model sees, and no others.
    """

    scale_constraints: ClassVar = {"scale": constraints.positive}
    takes_rows: ClassVar = True
    scale: Tensor

    def coordinates(self, loc: Tensor, scale: Tensor) -> Any:
        """Independent coordinates with these locations and scales."""
        raise NotImplementedError

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """The distribution over z."""
        return self.coordinates(self.loc, self.scale).to_event(1)

    def get_base_dist(self) -> Any:
        """The distribution of the noise."""
        return self.coordinates(torch.zeros_like(self.loc), torch.ones_like(self.loc)).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> Any:
        """From standard noise to z."""
        return AffineTransform(self.loc, self.scale, event_dim=1)

    def _draw(self, plates: Mapping[str, Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        by_row = self._by_row(plates)
        if not by_row:
            return super()._draw(plates, *args, **kwargs)
        parts, position = {}, 0
        for name, shape in self._unconstrained_shapes.items():
            parts[name] = slice(position, position + shape.numel())
            position += shape.numel()
        values = self._draw_globals({name: part for name, part in parts.items() if name not in by_row})
        loc, scale = self.loc, self.scale
        for name, frames in by_row.items():
            event_dim, shape = self._event_dim(name), self._unconstrained_shapes[name]
            mean, sd = loc[parts[name]].view(shape), scale[parts[name]].view(shape)
            for frame in frames:
                index = torch.as_tensor(plates[frame.name].indices, device=loc.device)
                mean, sd = (value.index_select(frame.dim - event_dim, index) for value in (mean, sd))
            with ExitStack() as stack:
                for frame in self._stacks[name]:
                    stack.enter_context(plates[frame.name])
                values[name] = pyro.sample(
                    f"{name}_unconstrained",
                    self.coordinates(mean, sd).to_event(event_dim),
                    infer={"is_auxiliary": True},
                )
        return {name: values[name] for name in parts}

    def _draw_globals(self, parts: Mapping[str, slice]) -> dict[str, Tensor]:
        """Sites that are not by row, from one vector as :meth:`sample_latent` has it for all sites."""
        if not parts:
            return {}
        loc, scale = (torch.cat([value[part] for part in parts.values()]) for value in (self.loc, self.scale))
        latent = pyro.sample(
            f"_{self._pyro_name}_latent", self.coordinates(loc, scale).to_event(1), infer={"is_auxiliary": True}
        )
        values, position = {}, 0
        for name in parts:
            size = self._unconstrained_shapes[name].numel()
            # particles in a plate of the objective's come as dimensions to the left
            shape = torch.broadcast_shapes(
                self._unconstrained_shapes[name], latent.shape[:-1] + (1,) * self._event_dim(name)
            )
            values[name] = latent[..., position : position + size].view(shape)
            position += size
        return values


class MeanFieldNormal(MeanField):
    r"""Mean-field normal guide, :math:`q(z) = \prod_i N(z_i \mid \mu_i, s_i^2)`.

    As Pyro's ``AutoDiagonalNormal``; made for :class:`~pyro_vi_lab.NaturalGradient`, and it takes improper priors.

    Args:
        model: A Pyro model.
        init_loc_fn: Where to start each site; at zero on the unconstrained scale by default.
        init_scale: Standard deviation of every coordinate of z at the start.
        create_plates: As in Pyro's guides, plates that guide and model share; not needed in general.

    Latent sites may lie in a plate of which each call sees some rows (``pyro.plate(..., subsample_size=...)``, or a
    fit of a :class:`~pyro_vi_lab.Problem` with a minibatch): the guide has a location and a scale for every row, and a
    call draws those that the model sees, and no others.

    References:
        Kucukelbir et al. 2017, "Automatic differentiation variational inference", JMLR 18, Section 2.4.
    """

    family = FAMILIES["mean_field"]

    def coordinates(self, loc: Tensor, scale: Tensor) -> Any:
        """Independent normals."""
        return dist.Normal(loc, scale)


class MeanFieldStudentT(MeanField):
    r"""Mean-field Student-t guide, :math:`q(z) = \prod_i t_\nu(z_i \mid \mu_i, s_i)`: heavier tails than normal.

    Args:
        model: A Pyro model.
        init_loc_fn: Where to start each site; at zero on the unconstrained scale by default.
        init_scale: Standard deviation of every coordinate of z at the start.
        df: Degrees of freedom ν > 2, the same for all coordinates, and not fitted.
        create_plates: As in Pyro's guides, plates that guide and model share; not needed in general.

    Raises:
        ArgumentError: ``df`` is not a number above 2.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        init_loc_fn: Callable[..., Any] = init_to_origin,
        init_scale: float = 0.1,
        *,
        df: float = 5.0,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model, init_loc_fn, init_scale, create_plates=create_plates)
        self.df = check_df(df)
        self.family = LocationScale(Diagonal(), StudentT(self.df))

    def coordinates(self, loc: Tensor, scale: Tensor) -> Any:
        """Independent Student-t distributions."""
        return dist.StudentT(self.df, loc, scale)


class MeanFieldLaplace(MeanField):
    r"""Mean-field Laplace guide, :math:`q(z) = \prod_i e^{-|z_i - \mu_i|/s_i} / (2 s_i)`.

    Args:
        model: A Pyro model.
        init_loc_fn: Where to start each site; at zero on the unconstrained scale by default.
        init_scale: Standard deviation of every coordinate of z at the start.
        create_plates: As in Pyro's guides, plates that guide and model share; not needed in general.
    """

    family = LocationScale(Diagonal(), Laplace())

    def coordinates(self, loc: Tensor, scale: Tensor) -> Any:
        """Independent Laplace distributions."""
        return dist.Laplace(loc, scale)


def check_df(df: float) -> float:
    """Degrees of freedom with which there is a variance.

    Raises:
        ArgumentError: Others.
    """
    if not (isinstance(df, (int, float)) and 2 < df < math.inf):
        raise ArgumentError(f"df must be a number above 2, so that the guide has a variance, got {df!r}")
    return float(df)
