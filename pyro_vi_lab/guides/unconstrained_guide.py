"""What all guides over the unconstrained latent vector z share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, ClassVar, Self

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.ops.tensor_utils import periodic_repeat
from torch import Tensor
from torch.distributions import constraints, register_kl

from pyro_vi_lab.change_of_variables import ChangeOfVariables, bijection, same_support, to_support
from pyro_vi_lab.errors import ModelError
from pyro_vi_lab.guides.initialization import init_to_origin
from pyro_vi_lab.guides.plates import check_rows_of_model, plates_for_call
from pyro_vi_lab.rows import SameRows, active_rows, is_part, model_on, refuse_part_of_rows


class DensityDelta(dist.Delta):
    """A point with a density, as Pyro's autoguides use it, whose KL divergence keeps that density.

    Pyro's own rule for ``Delta`` drops ``log_density``, so that ``TraceMeanField_ELBO`` loses the change of
    variables of every
    constrained site.
    """


@register_kl(DensityDelta, dist.Distribution)
def _kl_density_delta(p: DensityDelta, q: Any) -> Tensor:
    return p.log_density - q.log_prob(p.v)


class UnconstrainedGuide(AutoContinuous):
    """Base of guides that draw the latent sites on the unconstrained scale.

    Knows the plates and rows that the model sees in each call, supports that depend on other sites, pickling and
    copying; a subclass makes its parameters (:meth:`_make_parameters`) and draws (:meth:`_draw`).

    Args:
        model: A Pyro model.
        init_loc_fn: Where to start each site; at zero on the unconstrained scale by default.
        create_plates: As in Pyro's guides: takes the model's arguments and returns plates that guide and model share.
            Not needed for a model that says which rows it sees: the guide sees the same.
    """

    takes_rows: ClassVar[bool] = False
    """Whether latent sites may lie in a plate of which a call sees some rows only."""

    def __init__(
        self,
        model: Callable[..., Any],
        init_loc_fn: Callable[..., Any] = init_to_origin,
        *,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        self.starts_at_origin = init_loc_fn is init_to_origin
        super().__init__(model, init_loc_fn=init_loc_fn)
        self.create_plates = create_plates

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        with model_on(self, active_rows()):
            # not that of AutoContinuous, which knows no positive definite matrices
            super(AutoContinuous, self)._setup_prototype(*args, **kwargs)
        self._read_sites()
        try:
            by_row = self._rows_of_prototype(*args, **kwargs)
        except ModelError:
            self.prototype_trace = None  # not set up
            raise
        self._make_parameters(by_row)

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

    def _read_sites(self) -> None:
        """Shapes on the unconstrained scale, and plates, as ``AutoContinuous`` keeps them."""
        self._unconstrained_shapes, self._cond_indep_stacks = {}, {}
        for name, site in self.prototype_trace.iter_stochastic_nodes():  # type: ignore[union-attr]
            with helpful_support_errors(site):
                self._unconstrained_shapes[name] = to_support(site["fn"]).inv(site["value"]).shape
            self._cond_indep_stacks[name] = site["cond_indep_stack"]
        self.latent_dim = sum(shape.numel() for shape in self._unconstrained_shapes.values())
        if self.latent_dim == 0:
            raise RuntimeError(f"{type(self).__name__} found no latent variables; use an empty guide instead")

    def _make_parameters(self, by_row: set[str]) -> None:
        """Make the parameters, once the sites are known; ``by_row`` are those of which the first run saw some rows."""
        raise NotImplementedError

    def _prototype_nodes(self) -> Any:
        assert self.prototype_trace is not None
        return self.prototype_trace.nodes

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site; the same ``*args, **kwargs`` as the model's."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        unconstrained = self._draw(plates, *args, **kwargs)
        change = self._change(unconstrained)
        if self._why_model:
            rows = active_rows()
            same = SameRows({name: _indices(plate) for name, plate in plates.items() if _sees_part(plate)})
            with poutine.block(), copy.copy(rows) if rows else same, change:
                self._model_of(self._why_model)(*args, **kwargs)
        else:
            for name in unconstrained:
                change.visit(name, self._prototype_nodes()[name]["fn"])
        result = {}
        for name in change.values:
            event_dim = self._prototype_nodes()[name]["fn"].event_dim
            with ExitStack() as stack:
                for frame in self._stacks[name]:
                    stack.enter_context(plates[frame.name])
                result[name] = pyro.sample(name, self._point(change, name, event_dim))
        return result

    @property
    def _why_model(self) -> str:
        """Why each call has to run the model; empty if it need not."""
        return "the support of a site depends on other sites" if self._support_depends else ""

    def _change(self, unconstrained: Mapping[str, Tensor]) -> ChangeOfVariables:
        """The change of variables of one call."""
        return ChangeOfVariables(unconstrained)

    def _point(self, change: ChangeOfVariables, name: str, event_dim: int) -> Any:
        """The distribution of a site's value, given z."""
        value = change.values[name]
        log_density = 0.0 if poutine.get_mask() is False else self._log_density(change, name)
        if isinstance(log_density, Tensor):
            log_density = sum_rightmost(log_density, log_density.dim() - value.dim() + event_dim)
        return DensityDelta(value, log_density=log_density, event_dim=event_dim)

    def _log_density(self, change: ChangeOfVariables, name: str) -> Tensor | float:
        """Log density of a site's value, given z: of the change of variables alone."""
        return -change.log_dets[name]

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
            check_rows_of_model(self, frames, *args, **kwargs)
        return by_row

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
        return plates_for_call(self, *args, **kwargs)

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

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        copied._model = self._model
        return copied


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
