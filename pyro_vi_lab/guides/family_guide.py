"""A family over all latent sites as a Pyro autoguide."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar, Self

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import AutoContinuous
from pyro.nn import PyroParam
from pyro.ops.tensor_utils import periodic_repeat
from torch import Tensor, nn
from torch.distributions import constraints, register_kl, transform_to

from pyro_vi_lab.change_of_variables import ChangeOfVariables, bijection, same_support
from pyro_vi_lab.errors import ArgumentError, ModelError
from pyro_vi_lab.families import Family, Params
from pyro_vi_lab.guides.initialization import init_to_origin
from pyro_vi_lab.rows import SameRows, active_rows, is_part, model_on, plates_of_call, refuse_part_of_rows, subsamples


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
        create_plates: As in Pyro's guides: takes the model's arguments and returns plates that guide and model share.
            Not needed for a model that says which rows it sees: the guide sees the same.

    Raises:
        ArgumentError: ``init_scale`` is not a positive number.
    """

    family: Family
    """The family of distributions over z; for some guides not known before their first run."""
    takes_rows: ClassVar[bool] = False
    """Whether latent sites may lie in a plate of which a call sees some rows only."""
    scale_constraints: ClassVar[Mapping[str, constraints.Constraint]]
    """Names of the parameters of the scale, as Pyro's guides call them, and their constraints."""

    loc: Tensor

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
        self.starts_at_origin = init_loc_fn is init_to_origin
        super().__init__(model, init_loc_fn=init_loc_fn)
        self.create_plates = create_plates

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        loaded = self.prototype_trace is None and self.has_params
        with model_on(self, active_rows()):
            super()._setup_prototype(*args, **kwargs)
        try:
            by_row = self._rows_of_prototype(*args, **kwargs)
        except ModelError:
            self.prototype_trace = None  # not set up
            raise
        self.family = self._family()
        loc = self._init_loc()
        if not loaded:
            self.params = self.family.initial(loc, self._init_scale)
        elif self.loc.shape != loc.shape:
            raise ModelError(
                f"the state that {type(self).__name__} was loaded from has {len(self.loc)} latent dimensions, its "
                f"model has {len(loc)}"
            )

        # Pyro's autoguides keep the supports of the first run; a support that depends on sites before it, or differs
        # from row to row of which other calls see others, has to be read anew.
        prototype = self._prototype_nodes()
        run = ChangeOfVariables(
            {name: bijection(name, prototype[name]["fn"]).inv(prototype[name]["value"]) + 1 for name in self._stacks}
        )
        with torch.no_grad(), poutine.block(), run:
            self.model(*args, **kwargs)
        self._support_depends = not all(
            same_support(prototype[name]["fn"].support, support)
            and not (name in by_row and differs_by_element(support))
            for name, support in run.supports.items()
        )

    def _family(self) -> Family:
        """The family for the sites of the first run."""
        return self.family

    def _prototype_nodes(self) -> Any:
        assert self.prototype_trace is not None
        return self.prototype_trace.nodes

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site; the same ``*args, **kwargs`` as the model's."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        unconstrained = self._draw(plates, *args, **kwargs)
        change = ChangeOfVariables(unconstrained)
        if self._support_depends:
            rows = active_rows()
            same = SameRows({name: _indices(plate) for name, plate in plates.items() if _sees_part(plate)})
            with poutine.block(), copy.copy(rows) if rows else same, change:
                self._model_of("the support of a site depends on other sites")(*args, **kwargs)
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
                for frame in self._stacks[name]:
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

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Value of each site at the median of z, coordinate by coordinate: at the location, where q is symmetric.

        Takes the model's ``*args, **kwargs`` where a support depends on other sites.
        """
        if not self._support_depends:
            return dict(super().median(*args, **kwargs))
        change = ChangeOfVariables(
            {site["name"]: value for site, value in self._unpack_latent(self._loc_scale()[0].detach())}
        )
        with poutine.block(), change:
            self._model_of("the support of a site depends on other sites")(*args, **kwargs)
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
        params = self.params
        found: dict[str, list[Tensor]] = {}
        for probability in torch.as_tensor(quantiles, dtype=torch.float64).reshape(-1).tolist():
            for site, value in self._unpack_latent(self.family.quantile(params, probability)):
                found.setdefault(site["name"], []).append(bijection(site["name"], site["fn"])(value))
        return {name: torch.stack(values) for name, values in found.items()}

    def _model_of(self, why: str) -> Callable[..., Any]:
        if self._model is None:
            raise ModelError(
                f"this {type(self).__name__} was pickled, which leaves out its model, and {why}: make the guide anew "
                "from the model and use load_state_dict"
            )
        return self._model[0]

    # --- some of the rows -------------------------------------------------------------------------------------------

    @property
    def _stacks(self) -> dict[str, Any]:
        """Plates around each latent site, as frames of the first run."""
        return self._cond_indep_stacks

    def _event_dim(self, name: str) -> int:
        """Event dimensions of a site on the unconstrained scale."""
        site = self._prototype_nodes()[name]
        return int(site["fn"].event_dim + len(self._unconstrained_shapes[name]) - site["value"].dim())

    def _rows_of_prototype(self, *args: Any, **kwargs: Any) -> set[str]:
        """Make room for all rows of sites of which the first run saw some; names of these sites."""
        frames = {frame.name: frame for stack in self._stacks.values() for frame in stack if is_part(frame)}
        by_row = {name for name, stack in self._stacks.items() if any(frame.name in frames for frame in stack)}
        if not by_row:
            return by_row
        if not self.takes_rows:
            refuse_part_of_rows(self, frames)
        for name in by_row:
            shape = list(self._unconstrained_shapes[name])
            for frame in self._stacks[name]:
                if frame.name in frames:
                    shape[frame.dim - self._event_dim(name)] = frame.full_size
            self._unconstrained_shapes[name] = torch.Size(shape)
        self.latent_dim = sum(shape.numel() for shape in self._unconstrained_shapes.values())
        if active_rows() is None:
            self._check_rows_of_model(frames, *args, **kwargs)
        return by_row

    def _check_rows_of_model(self, frames: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Refuse a model whose rows cannot be known beforehand, so that the guide would see others."""
        one, two = (subsamples(self.model, frames, *args, **kwargs) for _ in range(2))
        for name, (_, index) in one.items():
            other = two[name][1]
            if index is None or other is None:
                continue
            if not torch.equal(torch.as_tensor(index), torch.as_tensor(other)):
                raise ModelError(
                    f"the model draws the rows of plate {name!r} itself (subsample=), so that a guide cannot know "
                    "which these are: draw them outside and pass them as an argument, or let the plate draw them "
                    "(subsample_size=)"
                )
            if self.master is not None and self.master().create_plates is None:
                raise ModelError(
                    f"the model says which rows of plate {name!r} it sees (subsample=), but "
                    f"{type(self.master()).__name__} draws others; give it create_plates=, with this plate"
                )

    def _init_loc(self) -> Tensor:
        parts = []
        for name in self._stacks:
            site = self._prototype_nodes()[name]
            value = bijection(name, site["fn"]).inv(site["value"].detach())
            for frame in self._stacks[name]:
                if is_part(frame):
                    dim = frame.dim - self._event_dim(name)
                    value = periodic_repeat(value, frame.full_size, dim)
            parts.append(value.reshape(-1))
        return torch.cat(parts)

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The plates of the latent sites, with the rows that the model sees in this call."""
        if self.master is not None or self.create_plates is not None:
            return dict(super()._create_plates(*args, **kwargs))
        model = None if self._model is None else self.model
        self.plates = {plate.name: plate for plate in plates_of_call(model, self._prototype_frames, *args, **kwargs)}
        for name, frame in sorted(self._prototype_frames.items()):
            if name not in self.plates:
                self.plates[name] = pyro.plate(name, frame.full_size or frame.size, dim=frame.dim)
        return self.plates

    def _by_row(self, plates: Mapping[str, Any]) -> dict[str, list[Any]]:
        """The sites of which this call sees some rows, and the plates along which it does."""
        parts = {
            name: [frame for frame in stack if _sees_part(plates[frame.name])] for name, stack in self._stacks.items()
        }
        return {name: frames for name, frames in parts.items() if frames}

    def _draw(self, plates: Mapping[str, Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site on the unconstrained scale."""
        if frames := self._by_row(plates):
            refuse_part_of_rows(self, {frame.name for stack in frames.values() for frame in stack})
        return {site["name"]: value for site, value in self._unpack_latent(self.sample_latent(*args, **kwargs))}

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
        keys = {name: f"{prefix}{name}_unconstrained" for name in self.scale_constraints}
        if self.prototype_trace is None and {f"{prefix}loc", *keys.values()} <= state_dict.keys():
            values = [transform_to(self.scale_constraints[name])(state_dict[key]) for name, key in keys.items()]
            self.params = Params(state_dict[f"{prefix}loc"], self.join_scale(values))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.loc, self.family.variance(self.params).sqrt()


def differs_by_element(constraint: Any) -> bool:
    """Whether a constraint has bounds of its own for each element."""
    if isinstance(constraint, Tensor):
        return constraint.numel() > 1
    if isinstance(constraint, (list, tuple)):
        return any(differs_by_element(part) for part in constraint)
    return isinstance(constraint, constraints.Constraint) and any(
        differs_by_element(part) for part in vars(constraint).values()
    )


def _sees_part(plate: Any) -> bool:
    return bool(plate.subsample_size != plate.size)


def _indices(plate: Any) -> Tensor:
    return torch.as_tensor(plate.indices)
