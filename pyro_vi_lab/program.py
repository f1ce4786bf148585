"""The log joint density of a model at one point, as Pyro computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from typing import Any, Literal

import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vi_lab.change_of_variables import ChangeOfVariables, bijection
from pyro_vi_lab.errors import ModelError
from pyro_vi_lab.isolation import model_run
from pyro_vi_lab.sites import Site, Structure

Part = Literal["joint", "constrained", "likelihood"]
"""What a density is of: the joint density of z, that of the constrained sites, without the log determinant of the
change of variables, or the observed sites alone."""


class Program:
    """Functions of one unconstrained vector z ``(D,)`` and of the data, each a tuple of tensors; a run of Pyro each.

    Args:
        model: The Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        structure: Its sites.
        name: What to call it in messages.
        dtype: Type of z and of the results.
        part: What the density is of.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        structure: Structure,
        *,
        name: str,
        dtype: torch.dtype,
        part: Part = "joint",
    ) -> None:
        self.model, self.name, self.dtype, self.part = model, name, dtype, part
        self.sites: dict[str, Site] = {key: site for key, site in structure.sites.items() if site.kind == "latent"}
        self._structure = structure
        self._slices: dict[str, slice] = {}
        position = 0
        for key, site in self.sites.items():
            size = site.unconstrained_shape.numel()
            self._slices[key] = slice(position, position + size)
            position += size
        self.dim = position
        self.leaves, self.spec = pytree.tree_flatten((args, dict(kwargs)))
        self.data = tuple(leaf for leaf in self.leaves if isinstance(leaf, Tensor))
        self.device = self.data[0].device if self.data else torch.empty(0).device
        self.enumerates = any(site.kind == "discrete" for site in structure.sites.values())
        self._evaluator: TraceEinsumEvaluator | None = None

    @cached_property
    def deterministic(self) -> tuple[str, ...]:
        """Deterministic sites that do not depend on a discrete one, which is summed out."""
        names = [key for key, site in self._structure.sites.items() if site.kind == "deterministic"]
        if not names or not self.enumerates:
            return tuple(names)
        trace, _ = self.trace(torch.zeros(self.dim, dtype=self.dtype), self.data, enumerate_discrete=True)
        return tuple(key for key in names if trace.nodes[key]["value"].shape == self._structure.sites[key].shape)

    def trace(self, z: Tensor, data: tuple[Tensor, ...], *, enumerate_discrete: bool) -> tuple[Any, Tensor]:
        """Trace of the model at ``z`` and the log determinant of the change of variables."""
        kind = ChangeOfVariables if self.part != "likelihood" else _WithoutPrior
        change = kind({key: z[part].reshape(self.sites[key].unconstrained_shape) for key, part in self._slices.items()})
        args, kwargs = self.arguments(data)
        model: Callable[..., Any] = self.model
        with ExitStack() as stack:
            stack.enter_context(_quiet(self.dtype))
            stack.enter_context(poutine.block())
            tracer = stack.enter_context(poutine.trace())
            if enumerate_discrete:
                stack.enter_context(poutine.enum(first_available_dim=-1 - self._structure.max_plate_nesting))
                model = config_enumerate(model)
            stack.enter_context(change)
            model(*args, **kwargs)
            # inside the isolation: log_prob may make tensors of the default type
            tracer.trace.compute_log_prob()
        self._check_sites(tracer.trace)
        return tracer.trace, torch.stack([value.sum() for value in change.log_dets.values()]).sum()

    def _check_sites(self, trace: Any) -> None:
        """A site that comes or goes from run to run would be drawn at random, or left out, without a word."""
        for key, node in trace.nodes.items():
            if (
                node["type"] == "sample"
                and type(node["fn"]).__name__ != "_Subsample"
                and key not in self._structure.sites
            ):
                raise ModelError(
                    f"the structure of model {self.name} changes from run to run: site {key!r} is there in one run "
                    "and not "
                    "in another; write the choice without Python control flow on sampled values"
                )
        missing = [key for key in self.sites if key not in trace.nodes]
        if missing:
            raise ModelError(
                f"the structure of model {self.name} changes from run to run: site {missing[0]!r} is not there in "
                "every run"
            )

    def arguments(self, data: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The model's arguments with these tensors among them."""
        remaining = iter(data)
        leaves = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return tuple(args), kwargs

    def value(self, z: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
        """Log density."""
        trace, log_det = self.trace(z, data or self.data, enumerate_discrete=self.enumerates)
        if self.part != "joint":
            log_det = torch.zeros_like(log_det)
        with _quiet(self.dtype):
            if not self.enumerates:
                return (trace.log_prob_sum() + log_det,)
            if self._evaluator is None:
                self._evaluator = TraceEinsumEvaluator(trace, True, self._structure.max_plate_nesting)
            return (self._evaluator.log_prob(trace) + log_det,)

    def value_and_grad(self, z: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
        """Log density and its gradient."""
        with torch.enable_grad():
            z = z.detach().requires_grad_(True)
            (value,) = self.value(z, *data)
            grad = torch.autograd.grad(value, z)[0] if value.requires_grad else torch.zeros_like(z)
        return value.detach(), grad

    def hessian(self, z: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
        """Second derivatives of the log density."""
        with torch.enable_grad():
            z = z.detach().requires_grad_(True)
            (value,) = self.value(z, *data)
            flat = torch.zeros_like(z)
            grad = torch.autograd.grad(value, z, create_graph=True)[0] if value.requires_grad else flat
            rows = [
                torch.autograd.grad(entry, z, retain_graph=True, allow_unused=True)[0] if entry.requires_grad else None
                for entry in grad
            ]
        return (torch.stack([flat if row is None else row for row in rows]).detach(),)

    def hessian_product(self, pair: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
        """Second derivatives times a vector, both in one ``(2D,)``: z and the vector.

        Its graph is of twice the size of the gradient's, whereas that of all second derivatives grows with D.
        """
        with torch.enable_grad():
            z, vector = pair[: self.dim].detach().requires_grad_(True), pair[self.dim :].detach()
            (value,) = self.value(z, *data)
            if not value.requires_grad:
                return (torch.zeros_like(z),)
            (grad,) = torch.autograd.grad(value, z, create_graph=True)
            if not grad.requires_grad:
                return (torch.zeros_like(z),)
            (product,) = torch.autograd.grad(grad, z, vector, allow_unused=True)
        return (torch.zeros_like(z) if product is None else product.detach(),)

    def constrain(self, z: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
        """Values of the latent and the deterministic sites."""
        trace, _ = self.trace(z, data or self.data, enumerate_discrete=self.enumerates)
        return tuple(trace.nodes[key]["value"] for key in (*self.sites, *self.deterministic))

    def unconstrain(self, flat: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
        """The z of the latent sites' values, flattened one after another."""
        values, position = {}, 0
        for key, site in self.sites.items():
            values[key] = flat[position : position + site.shape.numel()].reshape(site.shape)
            position += site.shape.numel()
        inverse = _InverseChange(values)
        args, kwargs = self.arguments(data or self.data)
        model: Callable[..., Any] = self.model
        with ExitStack() as stack:
            stack.enter_context(_quiet(self.dtype))
            stack.enter_context(poutine.block())
            if self.enumerates:  # not drawn: an inverse has no use for chance
                stack.enter_context(poutine.enum(first_available_dim=-1 - self._structure.max_plate_nesting))
                model = config_enumerate(model)
            stack.enter_context(inverse)
            model(*args, **kwargs)
        return (torch.cat([inverse.result[key].reshape(-1) for key in self.sites]),)


class _WithoutPrior(ChangeOfVariables):
    """Leaves the densities of the sites that it sets out of the model's."""

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        if msg["name"] in self.values:
            msg["mask"] = False


class _InverseChange(Messenger):
    """Gives the latent sites their values and records where these lie on the unconstrained scale."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.result: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.values or msg["is_observed"]:
            return
        self.result[name] = bijection(name, msg["fn"]).inv(self.values[name])
        msg["value"] = self.values[name]
        msg["done"] = True


def _quiet(dtype: torch.dtype) -> AbstractContextManager[None]:
    """A run whose sites were checked before: no validation, random state and parameters left as they are."""
    return model_run(seed=None, dtype=dtype, validate=False)
