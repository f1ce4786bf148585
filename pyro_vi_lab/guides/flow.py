"""A normalizing flow over the unconstrained latent vector z."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.distributions import transforms as T
from pyro.nn import AutoRegressiveNN, DenseNN
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from pyro_vi_lab.change_of_variables import ChangeOfVariables, bijection
from pyro_vi_lab.errors import ArgumentError, ModelError, unknown_name
from pyro_vi_lab.guides.initialization import init_to_origin
from pyro_vi_lab.guides.unconstrained_guide import UnconstrainedGuide
from pyro_vi_lab.isolation import seeded

MIN_HIDDEN = 20
NUM_BINS, BOUND = 8, 5.0
"""Of splines: bins, and the half-width of the box beyond which they are the identity, in standard deviations."""
UNIT_SLOPE = math.log(math.expm1(1 - 1e-3))
"""What Pyro's splines turn into a slope of one: 0.001 plus the softplus of it."""
QUANTILE_DRAWS = 10_000
"""Draws for medians and quantiles, which have no closed form."""


def realnvp(dim: int) -> list[Any]:
    """Four affine coupling layers, the halves in turns (Dinh, Sohl-Dickstein & Bengio 2017, ICLR)."""
    return _in_turns([lambda: T.AffineCoupling(dim // 2, _dense(dim // 2, [dim - dim // 2] * 2))] * 4, dim)


def spline_coupling(dim: int) -> list[Any]:
    """Two coupling layers of rational splines, the halves in turns (Durkan et al. 2019, NeurIPS)."""
    rest = dim - dim // 2

    def layer() -> Any:
        sizes = [rest * NUM_BINS, rest * NUM_BINS, rest * (NUM_BINS - 1), rest * NUM_BINS]
        network = _dense(dim // 2, sizes)
        _, _, slopes, _ = network.layers[-1].bias.split(sizes)
        nn.init.constant_(slopes, UNIT_SLOPE)
        coupling = T.SplineCoupling(dim, dim // 2, network, NUM_BINS, BOUND)
        _to_identity(coupling.lower_spline)
        return coupling

    return _in_turns([layer] * 2, dim)


def iaf(dim: int) -> list[Any]:
    """Two inverse autoregressive layers, the order of z reversed between them (Kingma et al. 2016, NeurIPS, eq. 10)."""

    def layer() -> Any:
        network = AutoRegressiveNN(dim, [max(MIN_HIDDEN, 2 * dim)], nonlinearity=nn.Tanh())
        return T.AffineAutoregressive(_starting_at_zero(network))

    return _in_turns([layer] * 2, dim)


FLOWS: dict[str, Callable[[int], list[Any]]] = {
    "realnvp": realnvp,
    "spline_coupling": spline_coupling,
    "iaf": iaf,
}
"""Transforms by name: from D to a list of Pyro's or torch's transforms."""


def _dense(size: int, outputs: Sequence[int]) -> Any:
    hidden = max(MIN_HIDDEN, 2 * size)
    return _starting_at_zero(DenseNN(size, [hidden, hidden], list(outputs), nonlinearity=nn.Tanh()))


def _starting_at_zero(network: Any) -> Any:
    """The last layer at zero, so that a layer of the flow starts at the identity or near it."""
    nn.init.zeros_(network.layers[-1].weight)
    nn.init.zeros_(network.layers[-1].bias)
    return network


def _in_turns(layers: Sequence[Callable[[], Any]], dim: int) -> list[Any]:
    found: list[Any] = []
    for layer in layers:
        found += [layer(), T.Permute(torch.arange(dim).flip(0))]
    return found  # the last permutation puts an even number of layers back in order


class FlowDistribution(TorchDistribution):
    r"""Distribution of :math:`z = c + S\,(m + e^{s} \odot T(\varepsilon))` with standard normal ε.

    Args:
        center: c, ``(D)``.
        spread: S, ``(D)`` for a diagonal matrix or ``(D, D)`` lower triangular.
        shift: m, ``(D)``.
        log_scale: s, ``(D)``.
        transforms: T, one after the other.
        batch_shape: Shape of independent copies.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        center: Tensor,
        spread: Tensor,
        shift: Tensor,
        log_scale: Tensor,
        transforms: Sequence[Transform],
        batch_shape: tuple[int, ...] = (),
    ) -> None:
        self.center, self.spread, self.shift, self.log_scale = center, spread, shift, log_scale
        self.transforms = transforms
        self._last: tuple[Tensor, Tensor] | None = None
        super().__init__(torch.Size(batch_shape), center.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        """Independent copies."""
        parts = (self.center, self.spread, self.shift, self.log_scale, self.transforms)
        return FlowDistribution(*parts, batch_shape=tuple(batch_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Reparameterized draws."""
        shape = (*sample_shape, *self.batch_shape, *self.event_shape)
        x = torch.randn(shape, dtype=self.center.dtype, device=self.center.device)
        log_q = self._log_of_noise(x)
        for transform in self.transforms:
            y = transform(x)
            log_q = log_q - transform.log_abs_det_jacobian(x, y)
            x = y
        x = self.shift + self.log_scale.exp() * x
        z: Tensor = self.center + (self.spread * x if self.spread.dim() == 1 else x @ self.spread.mT)
        self._last = (z, log_q - self._log_det())
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density; of the draw just made without an inverse, which for autoregressive flows takes D passes."""
        if self._last is not None and value is self._last[0]:
            return self._last[1]
        x = value - self.center
        if self.spread.dim() == 1:
            x = x / self.spread
        else:
            x = torch.linalg.solve_triangular(self.spread, x.unsqueeze(-1), upper=False).squeeze(-1)
        y = (x - self.shift) * (-self.log_scale).exp()
        log_det: Tensor | float = 0.0
        for transform in reversed(self.transforms):
            x = transform.inv(y)
            log_det = log_det + transform.log_abs_det_jacobian(x, y)
            y = x
        return self._log_of_noise(y) - log_det - self._log_det()

    @staticmethod
    def _log_of_noise(x: Tensor) -> Tensor:
        return -0.5 * (x.square().sum(-1) + x.shape[-1] * math.log(2 * math.pi))

    def _log_det(self) -> Tensor:
        diagonal = self.spread if self.spread.dim() == 1 else self.spread.diagonal()
        return diagonal.log().sum() + self.log_scale.sum()


class Flow(UnconstrainedGuide):
    r"""Normalizing flow over all latent sites, :math:`z = c + S\,(m + e^{s} \odot T_\phi(\varepsilon))`, ε ~ N(0, I).

    The flow T starts at the identity, so the guide starts as a normal distribution; :func:`pyro_vi_lab.fit` takes the
    center c and the spread S from a fit of the full-rank normal (of the mean-field normal for more than 512 dimensions)
    and trains m, s and T from there. In plain SVI, c is ``init_loc_fn`` and S the identity.

    Args:
        model: A Pyro model.
        init_loc_fn: Where to start each site; at zero on the unconstrained scale by default.
        init_scale: Standard deviation of every coordinate of z at the start.
        transforms: A name of :data:`FLOWS` (``"realnvp"``, ``"spline_coupling"``, ``"iaf"``), or a function from D to a
            list of Pyro's transforms. One dimension has nothing to couple: there all names stand for a spline.
        create_plates: As in Pyro's guides, plates that guide and model share; not needed in general.

    A latent site in a plate of which a call sees some rows only is refused: its rows depend on all others.
    ``median`` and ``quantiles`` are those of 10,000 draws. With ``"iaf"`` the density at a given z takes D passes: use
    ``pyro.infer.Trace_ELBO``, or ``ELBO(gradient="reparam")``.

    Raises:
        ArgumentError: An unknown name, or ``init_scale`` is not a positive number.

    References:
        Rezende & Mohamed 2015, "Variational inference with normalizing flows", ICML. Papamakarios et al. 2021,
        "Normalizing flows for probabilistic modeling and inference", JMLR 22.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def banana():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x * x, 0.5))
        >>> guide = Flow(banana)
        >>> sorted(guide())
        ['x', 'y']
    """

    center: Tensor
    spread: Tensor
    shift: Tensor
    log_scale: Tensor

    def __init__(
        self,
        model: Callable[..., Any],
        init_loc_fn: Callable[..., Any] = init_to_origin,
        init_scale: float = 0.1,
        *,
        transforms: str | Callable[[int], Sequence[Transform]] = "realnvp",
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        if not (isinstance(init_scale, (int, float)) and init_scale > 0):
            raise ArgumentError(f"init_scale must be a positive number, got {init_scale!r}")
        if isinstance(transforms, str) and transforms not in FLOWS:
            raise unknown_name("flow", transforms, FLOWS)
        super().__init__(model, init_loc_fn, create_plates=create_plates)
        self._init_scale, self._of_dim = float(init_scale), transforms

    def _make_parameters(self, by_row: set[str]) -> None:
        loc = self._init_loc()
        if "shift" not in self._parameters:  # not loaded
            self._build(len(loc), loc)
            with torch.no_grad():
                self.center.copy_(loc)
        elif self.shift.shape != loc.shape:
            raise ModelError(
                f"the state that {type(self).__name__} was loaded from has {len(self.shift)} latent dimensions, its "
                f"model has {len(loc)}"
            )

    def _build(self, dim: int, like: Tensor, spread: Tensor | None = None) -> None:
        """Parameters and buffers for D dimensions; the flow is the same every time, whatever the random state."""
        options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.register_buffer("center", torch.zeros(dim, **options))
        self.register_buffer("spread", torch.ones(dim, **options) if spread is None else torch.empty_like(spread))
        self.shift = nn.Parameter(torch.zeros(dim, **options))
        self.log_scale = nn.Parameter(torch.full((dim,), math.log(self._init_scale), **options))
        make = FLOWS[self._of_dim] if isinstance(self._of_dim, str) else self._of_dim
        if dim == 1 and isinstance(self._of_dim, str):
            make = _spline
        with seeded(0):
            made = list(make(dim))
        self.flow = nn.ModuleList([one for one in made if isinstance(one, nn.Module)]).to(**options)
        self._fixed = [None if isinstance(one, nn.Module) else one for one in made]

    def whiten(self, loc: Tensor, spread: Tensor) -> None:
        """Make N(loc, S Sᵀ) the distribution of the guide whose flow is the identity, and start there.

        Args:
            loc: Center, ``(D,)``.
            spread: S, ``(D,)`` or lower triangular ``(D, D)``.
        """
        with torch.no_grad():
            self.register_buffer("center", loc.detach().clone())
            self.register_buffer("spread", spread.detach().clone())
            self.shift.zero_()
            self.log_scale.zero_()

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """The distribution over z."""
        return FlowDistribution(self.center, self.spread, self.shift, self.log_scale, self.transforms)

    @property
    def has_quick_inverse(self) -> bool:
        """Whether the density at a given z takes one pass, as that of a draw does."""
        return self._of_dim in ("realnvp", "spline_coupling")

    @property
    def transforms(self) -> list[Any]:
        """The flow T, one transform after the other."""
        trained = iter(self.flow)
        return [next(trained) if one is None else one for one in self._fixed]

    def _posterior_draws(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        with seeded(0):
            z = self.get_posterior().rsample((QUANTILE_DRAWS,))
        values: dict[str, list[Tensor]] = {}
        for one in z.split(1000):
            for name, value in self._constrained(one, *args, **kwargs).items():
                values.setdefault(name, []).append(value)
        return {name: torch.cat(parts) for name, parts in values.items()}

    def _constrained(self, z: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Every site of draws of z ``(S, D)``, one by one where a support depends on other sites."""
        if not self._support_depends:
            shapes, parts, position = self._unconstrained_shapes, {}, 0
            for name, shape in shapes.items():
                part = z[:, position : position + shape.numel()].reshape(len(z), *shape)
                parts[name] = bijection(name, self._prototype_nodes()[name]["fn"])(part)
                position += shape.numel()
            return parts
        found: list[dict[str, Tensor]] = []
        for one in z:
            change = ChangeOfVariables({site["name"]: value for site, value in self._unpack_latent(one)})
            with poutine.block(), change:
                self._model_of("the support of a site depends on other sites")(*args, **kwargs)
            found.append(change.values)
        return {name: torch.stack([values[name] for values in found]) for name in found[0]}

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Median of each coordinate of every site, from draws that are the same every time."""
        return {name: value.quantile(0.5, 0) for name, value in self._posterior_draws(*args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Quantiles of each coordinate of every site, from draws that are the same every time."""
        drawn = self._posterior_draws(*args, **kwargs)
        like = next(iter(drawn.values()))
        wanted = torch.as_tensor(quantiles, dtype=like.dtype, device=like.device).reshape(-1)
        return {name: value.quantile(wanted.to(value.dtype), 0) for name, value in drawn.items()}

    def __getstate__(self) -> dict[str, Any]:
        for transform in self.transforms if "flow" in self._modules else ():
            _forget(transform)
        return super().__getstate__()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Makes the parameters of a guide that has not been run yet."""
        if self.prototype_trace is None and f"{prefix}shift" in state_dict:
            shift, spread = state_dict[f"{prefix}shift"], state_dict[f"{prefix}spread"]
            self._build(len(shift), shift, spread)
        elif f"{prefix}spread" in state_dict and state_dict[f"{prefix}spread"].shape != self.spread.shape:
            self.register_buffer("spread", torch.empty_like(state_dict[f"{prefix}spread"]))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _spline(dim: int) -> list[Any]:
    spline = T.Spline(dim, NUM_BINS, BOUND)
    _to_identity(spline)
    return [spline]


def _to_identity(spline: Any) -> None:
    for name, parameter in spline.named_parameters():
        nn.init.constant_(parameter, UNIT_SLOPE if name == "unnormalized_derivatives" else 0.0)


def _forget(transform: Any) -> None:
    """Drop what a transform keeps of its last call, which cannot be copied."""
    for one in transform.modules() if isinstance(transform, nn.Module) else (transform,):
        for name in ("_cached_x_y", "_cached_log_scale", "_cache_log_detJ"):
            if hasattr(one, name):
                setattr(one, name, (None, None) if name == "_cached_x_y" else None)
