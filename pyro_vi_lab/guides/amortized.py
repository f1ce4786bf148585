"""Locations and scales of the rows' latent sites, computed from the data by an encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, ClassVar, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_vi_lab.change_of_variables import ChangeOfVariables
from pyro_vi_lab.errors import ArgumentError, ModelError
from pyro_vi_lab.guides.unconstrained_guide import UnconstrainedGuide
from pyro_vi_lab.rows import active_rows, plates_of_call


class Seen(NamedTuple):
    """What an encoder was given in the last call, and the scale of the sites' log densities, N/B in a minibatch."""

    inputs: tuple[Tensor, ...]
    scale: float


class _LastCall:
    """Holds what is no property of the guide: it changes from call to call, and is not copied."""

    def __init__(self) -> None:
        self.seen: Seen | None = None

    def __deepcopy__(self, memo: Any) -> _LastCall:
        return _LastCall()

    def __reduce__(self) -> tuple[Any, ...]:
        return _LastCall, ()


class Amortized(UnconstrainedGuide):
    r"""Normal guide of the latent sites of every row, whose location and scale an encoder computes from the data.

    .. math:: q_\phi(z_1, \dots, z_N \mid x) = \prod_n N(z_n \mid \mu_\phi(x_n), \operatorname{diag} s_\phi(x_n)^2)

    z is the unconstrained value of all latent sites of a row, one after the other in the order of the model. The sites
    must all lie in one plate, the plate of the rows; give sites outside of it, as global parameters, a guide of their
    own in an ``AutoGuideList``. A call draws the rows that the model sees, so minibatches need nothing else.

    Args:
        model: A Pyro model.
        encoder: From inputs with one entry per row to location and (positive) scale: two tensors ``(B, d)``, where d is
            the number of unconstrained values of a row; or a dict of such pairs by site, ``(B, d_site)``.
        inputs: What the encoder is given, from the model's arguments; their first by default. It may return a tuple.
            Inputs of all rows are cut to those of the call where the model's plate draws a subsample.
        plate: Name of the plate of the rows; found by default, where all sites share just one, or the outermost.
        create_plates: As in Pyro's guides, plates that guide and model share; not needed in general.

    Raises:
        ArgumentError: ``encoder`` is no ``nn.Module``.
        ModelError: In the first call: sites lie in no plate or in different ones, or the encoder's result does not fit.

    References:
        Kingma & Welling 2014, "Auto-encoding variational Bayes", ICLR, eq. 9.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from torch import nn
        >>> class Encoder(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.loc, self.log_scale = nn.Linear(3, 2), nn.Linear(3, 2)
        ...
        ...     def forward(self, x):
        ...         return self.loc(x), self.log_scale(x).exp()
        >>> def model(x):
        ...     with pyro.plate("row", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).expand([len(x), 3]).to_event(1), obs=x)
        >>> guide = Amortized(model, Encoder())
        >>> guide(torch.zeros(5, 3))["z"].shape
        torch.Size([5, 2])
    """

    takes_rows: ClassVar[bool] = True

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: nn.Module,
        *,
        inputs: Callable[..., Any] | None = None,
        plate: str | None = None,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        if not isinstance(encoder, nn.Module):
            raise ArgumentError(
                f"encoder must be a torch.nn.Module that gives location and scale, got {type(encoder).__name__}"
            )
        super().__init__(model, create_plates=create_plates)
        self.encoder = encoder
        self.inputs, self.plate = inputs, plate
        self._last = _LastCall()

    @property
    def seen(self) -> Seen | None:
        """What the encoder was given in the last call; ``None`` before the first."""
        return self._last.seen

    def _make_parameters(self, by_row: set[str]) -> None:
        shared = None
        for name, stack in self._stacks.items():
            names = [frame.name for frame in sorted(stack, key=lambda frame: frame.dim)]
            if not names:
                raise ModelError(
                    f"latent site {name!r} lies in no plate, so it has no rows that an encoder could see; give it a "
                    "guide of its own: AutoGuideList with poutine.block(model, hide=[...]) here"
                )
            shared = names if shared is None else [one for one in shared if one in names]
        if not shared:
            raise ModelError(f"the latent sites {', '.join(map(repr, self._stacks))} share no plate of rows")
        if self.plate is None:
            self.plate = shared[0]
        elif self.plate not in shared:
            raise ModelError(f"plate {self.plate!r} does not hold all latent sites; these do: {', '.join(shared)}")
        for name, stack in self._stacks.items():
            outer = [frame.name for frame in stack if frame.dim < self._row_dim(name)]
            if outer:
                raise ModelError(
                    f"site {name!r} lies in plate {outer[0]!r} outside of the plate of the rows, {self.plate!r}: the "
                    "encoder has one result for each row; give plate= the name of the outer one"
                )

    def _row_dim(self, name: str) -> int:
        """Batch dimension of the rows of a site."""
        return int(next(frame.dim for frame in self._stacks[name] if frame.name == self.plate))

    def _shape_in_row(self, name: str) -> torch.Size:
        """Shape of a site on the unconstrained scale, without the rows."""
        return self._unconstrained_shapes[name][self._row_axis(name) + 1 :]

    def _row_axis(self, name: str) -> int:
        shape = self._unconstrained_shapes[name]
        return len(shape) + self._row_dim(name) - self._event_dim(name)

    def see(self, *args: Any, **kwargs: Any) -> None:
        """Take note of a call that somebody else makes, as a captured graph does; arguments as of the model."""
        before = self._last.seen
        if before is not None:
            inputs = tuple(value.detach() for value in self._inputs(None, *args, **kwargs))
            # where the model draws rows by itself, all of them stand for those that the graph has drawn
            self._last.seen = Seen(inputs, before.scale * len(before.inputs[0]) / len(inputs[0]))

    def _inputs(self, index: Tensor | None, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        if self.inputs is not None:
            found = self.inputs(*args, **kwargs)
        elif args or kwargs:
            found = args[0] if args else next(iter(kwargs.values()))
        else:
            raise ModelError("the model has no arguments, so the encoder has no inputs; give Amortized inputs=")
        found = found if isinstance(found, tuple) else (found,)
        for value in found:
            if not isinstance(value, Tensor):
                raise ModelError(
                    f"the encoder's input is a {type(value).__name__}, no tensor; name it by inputs=, a function of "
                    "the model's arguments"
                )
        if index is not None:
            found = tuple(value if len(value) == len(index) else value[index.to(value.device)] for value in found)
        return found

    def encode(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Location and scale of the unconstrained values of every row.

        Takes the model's ``*args, **kwargs``.

        Shape:
            both ``(B, d)``.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return self.joined(self.encoder(*self._inputs(None, *args, **kwargs)))

    def joined(self, result: Any) -> tuple[Tensor, Tensor]:
        """Location and scale of all sites side by side, of whatever form the encoder gave.

        Raises:
            ModelError: It has another form, or another width than the sites of a row.
        """
        sizes = {name: self._shape_in_row(name).numel() for name in self._stacks}
        if isinstance(result, Mapping):
            if set(result) != set(sizes):
                raise ModelError(
                    f"the encoder gave sites {sorted(result)}, the model has the latent sites {sorted(sizes)}"
                )
            flat = [[value.reshape(len(value), sizes[name]) for value in result[name]] for name in sizes]
            loc, scale = (torch.cat([pair[i] for pair in flat], -1) for i in range(2))
        elif isinstance(result, (tuple, list)) and len(result) == 2:
            loc, scale = result
        else:
            raise ModelError(
                f"the encoder must give location and scale, a pair of tensors or a dict of such pairs by site; it gave "
                f"a {type(result).__name__}"
            )
        width = sum(sizes.values())
        for what, value in (("location", loc), ("scale", scale)):
            if not isinstance(value, Tensor) or value.dim() != 2 or value.shape[-1] != width:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                each = ", ".join(f"{name!r} {size}" for name, size in sizes.items())
                raise ModelError(
                    f"the encoder's {what} is {shape}; expected (rows, {width}): the unconstrained values of a row are "
                    f"those of {each}"
                )
        return loc, scale

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The plates of the sites; that of the rows has as many as the encoder's inputs, from call to call."""
        if self.master is not None or self.create_plates is not None:
            return super()._create_plates(*args, **kwargs)
        assert self.plate is not None
        rows, frames = active_rows(), self._prototype_frames
        found: list[Any] = []
        if rows is not None and self.plate in rows.plates:
            # counts the rows of the batch, whichever these are; what stands around the call scales it
            number = rows.size
        else:
            found = plates_of_call(None if self._model is None else self.model, frames, *args, **kwargs)
            number = len(self._inputs(None, *args, **kwargs)[0])
        self.plates = {plate.name: plate for plate in found}
        for name, frame in sorted(frames.items()):
            if name not in self.plates:
                self.plates[name] = pyro.plate(name, number if name == self.plate else frame.size, dim=frame.dim)
        return self.plates

    def _draw(self, plates: Mapping[str, Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        assert self.plate is not None
        plate = plates[self.plate]
        index = torch.as_tensor(plate.indices) if plate.subsample_size != plate.size else None
        inputs = self._inputs(index, *args, **kwargs)
        loc, scale = self.joined(self.encoder(*inputs))
        if len(loc) != plate.subsample_size:
            raise ModelError(
                f"the encoder gave {len(loc)} rows, plate {self.plate!r} has {plate.subsample_size}: its inputs are "
                f"{', '.join(str(tuple(value.shape)) for value in inputs)}; choose them by inputs="
            )
        values, position = {}, 0
        for name in self._stacks:
            shape, event_dim = self._shape_in_row(name), self._event_dim(name)
            part = slice(position, position + shape.numel())
            position = part.stop
            mean, sd = (value[:, part].reshape(len(value), *shape) for value in (loc, scale))
            with ExitStack() as stack:
                for frame in self._stacks[name]:
                    stack.enter_context(plates[frame.name])
                with _ScaleOfSite() as watch:
                    values[name] = pyro.sample(
                        f"{name}_unconstrained",
                        dist.Normal(mean, sd).to_event(event_dim),
                        infer={"is_auxiliary": True},
                    )
        self._last.seen = Seen(tuple(value.detach() for value in inputs), watch.scale)
        return values

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """Normal distribution of the unconstrained values of every row, batch ``(B)`` and event ``(d)``."""
        return dist.Normal(*self.encode(*args, **kwargs)).to_event(1)

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """A draw of the unconstrained values of every row, ``(B, d)``."""
        value: Tensor = self.get_posterior(*args, **kwargs).rsample()
        return value

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Value of each site at the location; takes the model's arguments."""
        return self._constrained(self.encode(*args, **kwargs)[0], *args, **kwargs)

    @torch.no_grad()
    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Quantiles of each site, coordinate by coordinate; takes the model's arguments."""
        loc, scale = self.encode(*args, **kwargs)
        found: dict[str, list[Tensor]] = {}
        for probability in torch.as_tensor(quantiles, dtype=loc.dtype).reshape(-1).tolist():
            place = torch.special.ndtri(torch.tensor(probability, dtype=loc.dtype, device=loc.device))
            for name, value in self._constrained(loc + place * scale, *args, **kwargs).items():
                found.setdefault(name, []).append(value)
        return {name: torch.stack(values) for name, values in found.items()}

    def _constrained(self, z: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        values, position = {}, 0
        for name in self._stacks:
            shape = self._shape_in_row(name)
            values[name] = z[:, position : position + shape.numel()].reshape(len(z), *shape)
            position += shape.numel()
        change = ChangeOfVariables(values)
        if self._support_depends:
            with poutine.block(), change:
                self._model_of("the support of a site depends on other sites")(*args, **kwargs)
        else:
            for name in values:
                change.visit(name, self._prototype_nodes()[name]["fn"])
        return change.values


class _ScaleOfSite(Messenger):
    """Remembers the scale that handlers around it give the site inside."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def _pyro_post_sample(self, msg: Any) -> None:
        self.scale = float(msg["scale"])
