"""The structure of a Pyro model: its sites, their shapes, supports and plates, read from a few runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.torch_distribution import MaskedDistribution, TorchDistributionMixin
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import constraints
from torch.utils import _pytree as pytree

from pyro_vi_lab.change_of_variables import (
    FromUnconstrained,
    bijection,
    distribution_name,
    is_discrete,
    same_support,
)
from pyro_vi_lab.errors import DataError, ModelError
from pyro_vi_lab.isolation import model_run
from pyro_vi_lab.user_errors import is_indefinite, user_errors

Kind = Literal["latent", "discrete", "observed", "deterministic", "factor"]

STRUCTURE_RADIUS = 2.0
"""Half-width of the uniform distribution of the runs that check it, as Stan's and Pyro's ``init_to_uniform``."""
STRUCTURE_RUNS = 5
"""Runs at random points whose sites are compared with those of the first run."""
MIN_RADIUS = 0.01
"""Half-width below which a run that fails is not tried again."""


@dataclass(frozen=True, eq=False)
class Site:
    """One ``pyro.sample``, ``pyro.deterministic`` or ``pyro.factor`` statement.

    Args:
        name: Name of the site.
        kind: What the site is to an inference.
        shape: Shape of the value, batch and event dimensions together.
        event_dim: Number of event dimensions at the right of ``shape``.
        support: Constraint of the values; for a latent site the one of the first run.
        unconstrained_shape: Shape of a latent site's value on the unconstrained scale.
        plates: ``(name, size)`` of the plate along each batch dimension, or ``None`` where there is none.
        distribution: Name of the distribution.
    """

    name: str
    kind: Kind
    shape: torch.Size
    event_dim: int
    support: constraints.Constraint
    unconstrained_shape: torch.Size
    plates: tuple[tuple[str, int] | None, ...]
    distribution: str

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of the pointwise log density."""
        return self.shape[: len(self.shape) - self.event_dim]

    @property
    def dims(self) -> tuple[str, ...]:
        """A name for each axis of ``shape``: its plate, or ArviZ's ``<site>_dim_<i>``."""
        names = [plate[0] if plate else f"{self.name}_dim_{i}" for i, plate in enumerate(self.plates)]
        return tuple(names + [f"{self.name}_dim_{i}" for i in range(len(names), len(self.shape))])


@dataclass(frozen=True, eq=False)
class Structure:
    """What a few runs of a model say about it.

    Args:
        sites: Every site in the order of the run.
        observed: Values of the observed sites.
        max_plate_nesting: Number of batch dimensions that plates use.
        subsampled: Names of the plates that see a part of their rows only.
        sizes: How many rows each of these sees, and how many it has.
    """

    sites: Mapping[str, Site]
    observed: Mapping[str, Tensor]
    max_plate_nesting: int
    subsampled: tuple[str, ...]
    sizes: Mapping[str, tuple[int, int]]


def read_structure(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    name: str,
    dtype: torch.dtype,
    num_runs: int = STRUCTURE_RUNS,
) -> Structure:
    """Run the model at different points, with Pyro's validation on, and describe its sites.

    Args:
        model: The Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        name: What to call it in messages.
        dtype: Type of the latent sites' values.
        num_runs: Runs at random points, whose sites have to be those of the first run; at least 1.

    Raises:
        ModelError: The model cannot be run, has a site of a kind that is not supported, has no latent sites, or
            changes its structure from run to run.
        DataError: An observed site has a missing or infinite value, or one outside its support.
    """
    generator = torch.Generator().manual_seed(1)
    radius = STRUCTURE_RADIUS

    tensors = (leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor))
    device = next((leaf.device for leaf in tensors), torch.device("cpu"))

    def zeros(_: str, shape: torch.Size) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def uniform(_: str, shape: torch.Size) -> Tensor:
        return ((torch.rand(shape, generator=generator, dtype=dtype) * 2 - 1) * radius).to(device)

    first = _run(model, args, kwargs, zeros, name=name, dtype=dtype, seed=0)
    sites = {key: _site(node) for key, node in first.items()}
    runs = 0
    while runs < num_runs:
        try:
            other = _run(model, args, kwargs, uniform, name=name, dtype=dtype, seed=1 + runs)
        except ModelError as error:
            # a covariance need not be positive definite everywhere: come closer to the first run, which went well
            if radius < MIN_RADIUS or not is_indefinite(error.__cause__):
                raise
            radius /= 2
        else:
            _check_same(name, sites, {key: _site(node) for key, node in other.items()})
            runs += 1
    if not any(site.kind == "latent" for site in sites.values()):
        discrete = [site.name for site in sites.values() if site.kind == "discrete"]
        why = f"only discrete ones ({', '.join(discrete)}), which are summed out" if discrete else "none"
        raise ModelError(f"model {name} has no continuous latent sites to infer: it has {why}")
    observed = {key: first[key]["value"] for key, site in sites.items() if site.kind == "observed"}
    for key, value in observed.items():
        _check_finite(key, value)
        _check_support(key, value, first[key], other[key])
    frames = [frame for node in first.values() for frame in node["cond_indep_stack"] if frame.vectorized]
    sizes = {f.name: (f.size, f.full_size) for f in frames if f.full_size is not None and f.full_size != f.size}
    return Structure(
        sites=sites,
        observed=observed,
        max_plate_nesting=max((-frame.dim for frame in frames), default=0),
        subsampled=tuple(sizes),
        sizes=sizes,
    )


def _run(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    choose: Callable[[str, torch.Size], Tensor],
    *,
    name: str,
    dtype: torch.dtype,
    seed: int,
) -> dict[str, Any]:
    with ExitStack() as stack:
        stack.enter_context(user_errors(name, args, kwargs))
        stack.enter_context(model_run(seed=seed, dtype=dtype, validate=True))
        stack.enter_context(torch.no_grad())
        stack.enter_context(poutine.block())
        tracer = stack.enter_context(poutine.trace())
        stack.enter_context(FromUnconstrained(choose))
        model(*args, **kwargs)
    return {
        key: node
        for key, node in tracer.trace.nodes.items()
        if node["type"] == "sample" and not isinstance(node["fn"], _Subsample)
    }


def _site(node: Any) -> Site:
    name, fn = node["name"], node["fn"]
    for frame in node["cond_indep_stack"]:
        if not frame.vectorized:
            raise ModelError(
                f"site {name!r} is inside the sequential plate {frame.name!r} (for ... in pyro.plate); write it as "
                "a vectorized "
                f"plate (with pyro.plate({frame.name!r}, {frame.size}): ...), whose statements run once for all rows"
            )
    kind = _kind(node)
    shape, event_dim = tuple(node["value"].shape), fn.event_dim
    if kind == "observed":
        shape = _data_shape(name, shape, tuple(fn.shape()))
    if kind == "deterministic" and event_dim == len(shape):
        event_dim = 0  # Pyro's default takes all axes as event dimensions; in a plate they are its rows
    unconstrained_shape = torch.Size()
    if kind == "latent":
        unconstrained_shape = bijection(name, fn).inverse_shape(node["value"].shape)
    elif kind == "discrete" and not fn.has_enumerate_support:
        raise ModelError(
            f"site {name!r} ({distribution_name(fn)}) is discrete with the support {fn.support}, which cannot be "
            "summed over; "
            "discrete latent sites must have finitely many values (Bernoulli, Categorical, Binomial, ...)"
        )
    plates: list[tuple[str, int] | None] = [None] * (len(shape) - event_dim)
    for frame in node["cond_indep_stack"]:
        if -frame.dim <= len(plates) and shape[len(plates) + frame.dim] == frame.size:
            plates[frame.dim] = (frame.name, frame.size)
    return Site(
        name=name,
        kind=kind,
        shape=torch.Size(shape),
        event_dim=event_dim,
        support=fn.support,
        unconstrained_shape=torch.Size(unconstrained_shape),
        plates=tuple(plates),
        distribution=distribution_name(fn),
    )


def _is_masked_point(distribution: Any) -> bool:
    """Whether it is what Pyro's reparameterizers leave of a site: a point that is not counted."""
    masked = isinstance(distribution, MaskedDistribution) and distribution._mask is False
    return masked and isinstance(distribution.base_dist, Delta)


def _data_shape(name: str, data: tuple[int, ...], expected: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return tuple(torch.broadcast_shapes(data, expected))
    except RuntimeError as error:
        raise DataError(
            f"observed site {name!r} has data of shape {data}, its distribution has shape {expected}: their lengths "
            "disagree"
        ) from error


def _kind(node: Any) -> Kind:
    if node["infer"].get("_deterministic") or (node["is_observed"] and _is_masked_point(node["fn"])):
        return "deterministic"
    if node["is_observed"]:
        return "factor" if type(node["fn"]).__name__ == "Unit" else "observed"
    if not isinstance(node["fn"], TorchDistributionMixin):
        raise ModelError(
            f"site {node['name']!r} samples from {type(node['fn']).__name__}, which is not a Pyro distribution"
        )
    return "discrete" if is_discrete(node["name"], node["fn"]) else "latent"


def _check_same(model: str, first: Mapping[str, Site], second: Mapping[str, Site]) -> None:
    differing = sorted(set(first) ^ set(second))
    if differing:
        raise ModelError(
            f"the structure of model {model} changes from run to run: site {differing[0]!r} is there in one run and "
            "not in "
            "another; write the choice without Python control flow on sampled values (torch.where, a mask, a mixture)"
        )
    for name, site in first.items():
        other = second[name]
        if (site.shape, site.kind) != (other.shape, other.kind):
            raise ModelError(
                f"the structure of model {model} changes from run to run: site {name!r} is {site.kind} of shape "
                f"{tuple(site.shape)} in one run and {other.kind} of shape {tuple(other.shape)} in another"
            )


def _check_support(name: str, value: Tensor, first: Any, second: Any) -> None:
    """Data outside a support that does not depend on the latent sites, unless they are masked."""
    fn = first["fn"]
    if isinstance(fn, MaskedDistribution) or not same_support(fn.support, second["fn"].support):
        return
    bad = ~torch.as_tensor(fn.support.check(value))
    if isinstance(mask := first["mask"], (bool, Tensor)):
        bad = bad & torch.as_tensor(mask, device=bad.device)
    if not bool(bad.any()):
        return
    index = tuple(bad.nonzero()[0].tolist())
    shown = value[index] if len(index) <= value.dim() else value
    raise DataError(
        f"observed site {name!r} ({distribution_name(fn)}) has {int(bad.sum())} value(s) outside its support "
        f"{fn.support}, the first ({shown.tolist()}) at index {index}; check the data, or the distribution"
    )


def _check_finite(name: str, value: Tensor) -> None:
    if not value.is_floating_point():
        return
    # masked values too: a mask multiplies their gradient by zero, and zero times NaN is NaN
    bad = ~torch.isfinite(value)
    if not bool(bad.any()):
        return
    index = tuple(bad.nonzero()[0].tolist())
    raise DataError(
        f"observed site {name!r} has {int(bad.sum())} missing or infinite value(s) of {value.numel()}, the first "
        f"({float(value[index])}) at index {index}; remove or impute those rows, or put any "
        "value of the support there and mask it with pyro.poutine.mask"
    )
