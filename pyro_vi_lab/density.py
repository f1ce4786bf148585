"""A model and its data as log p(z, data) on R^D."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Literal

import numpy as np
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vi_lab.capture import Graph, capture
from pyro_vi_lab.errors import ArgumentError, CaptureError, LabWarning, ModelError
from pyro_vi_lab.isolation import default_dtype, model_run
from pyro_vi_lab.posterior import element_name
from pyro_vi_lab.sites import ChangeOfVariables, Site, Structure, bijection, is_indefinite, user_errors

Tier = Literal["graph", "eager"]

CHECK_POINTS = 2
"""Random points at which a captured graph is compared with eager Pyro."""
CHECK_ATTEMPTS = 20
"""Random points tried for them, ever closer to zero: a covariance need not have a Cholesky factor everywhere."""
CHECK_POWER = 0.5
"""The check points may differ by the square root of the dtype's epsilon, relative to the largest value: sums are
added up and
linear systems solved in another order, a wrong program differs by far more."""


class LogDensity:
    r"""The log joint density of a model and its data, on the unconstrained scale.

    .. math:: \log p(z) = \log p(T(z), \text{data}) + \log |\det \partial T / \partial z|

    with :math:`T` torch's ``biject_to`` of every site's support, taken at run time: a support may depend on sites
    before it.
    Discrete latent sites are summed out. Parameters (``pyro.param``, modules) keep the values they have now.

    Args:
        model: The Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        structure: Its sites.
        name: What to call it in messages.
        dtype: Type of z and of the result.

    Attributes:
        dim: D, the length of z.
        labels: A name for every coordinate of z.
        tier: ``"graph"`` if the density runs as a captured graph, ``"eager"`` if Pyro runs at every call.

    Raises:
        ModelError: A plate is subsampled, so that the density of all rows is not known.
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
    ) -> None:
        if structure.subsampled:
            raise ModelError(
                f"plate {structure.subsampled[0]!r} of model {name} sees a random part of its rows "
                "(subsample_size); the density "
                "needs all of them: give the plate no subsample_size"
            )
        self.model, self.name, self.dtype = model, name, dtype
        self.sites: dict[str, Site] = {key: site for key, site in structure.sites.items() if site.kind == "latent"}
        self._structure = structure
        self._slices: dict[str, slice] = {}
        position = 0
        for key, site in self.sites.items():
            size = site.unconstrained_shape.numel()
            self._slices[key] = slice(position, position + size)
            position += size
        self.dim = position
        self.labels = [
            element_name(key, tuple(map(int, index))) if site.unconstrained_shape else key
            for key, site in self.sites.items()
            for index in np.ndindex(tuple(site.unconstrained_shape))
        ]
        leaves, self._spec = pytree.tree_flatten((args, dict(kwargs)))
        self._leaves = leaves
        self._data = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        self.device = self._data[0].device if self._data else torch.empty(0).device
        self._enumerates = any(site.kind == "discrete" for site in structure.sites.values())
        self._evaluator: TraceEinsumEvaluator | None = None
        self._lifted = True
        self._graphs: dict[str, Graph | None] = {}
        self._source: LogDensity | None = None

    @property
    def tier(self) -> Tier:
        """How the gradient runs: ``"graph"`` or ``"eager"``."""
        return "eager" if self._graph("value_and_grad") is None else "graph"

    @property
    def deterministic(self) -> tuple[str, ...]:
        """Deterministic sites that do not depend on a discrete one, which is summed out."""
        names = [key for key, site in self._structure.sites.items() if site.kind == "deterministic"]
        if not names or not self._enumerates:
            return tuple(names)
        trace, _ = self._trace(torch.zeros(self.dim, dtype=self.dtype), self._data, enumerate_discrete=True)
        return tuple(key for key in names if trace.nodes[key]["value"].shape == self._structure.sites[key].shape)

    def with_data(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], structure: Structure) -> LogDensity:
        """The same density with other data; graphs are kept where shapes, types and all else agree."""
        other = LogDensity(self.model, args, kwargs, structure, name=self.name, dtype=self.dtype)
        if self._lifted and _same_but_data(self, other):
            other._source = self
        return other

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density.

        Shape:
            z ``(..., D)``, result ``(...)``.
        """
        return self._rows("value", z)[0]

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log density and its gradient.

        Shape:
            z ``(..., D)``, results ``(...)`` and ``(..., D)``.
        """
        value, grad = self._rows("value_and_grad", z)
        return value, grad

    def pointwise(self) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Value and gradient at one point ``(D,)`` with the data bound: fastest for the many calls of NUTS."""
        graph = self._graph("value_and_grad")
        if graph is None:
            return self.value_and_grad
        bound = (graph.bind(*self._data) if self._lifted else graph).scripted

        def value_and_grad(z: Tensor) -> tuple[Tensor, Tensor]:
            try:
                with torch.no_grad(), default_dtype(self.dtype):
                    value, grad = bound(z)
            except RuntimeError as error:
                if not is_indefinite(error):
                    raise
                return torch.full((), torch.nan, dtype=self.dtype), torch.full_like(z, torch.nan)
            return value, grad

        return value_and_grad

    def hessian(self, z: Tensor) -> Tensor:
        """Second derivatives of the log density.

        Shape:
            z ``(..., D)``, result ``(..., D, D)``.
        """
        return self._rows("hessian", z)[0]

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """Values of the latent and the deterministic sites.

        Shape:
            z ``(..., D)``, each result ``(..., *site shape)``.
        """
        values = self._rows("constrain", z)
        return dict(zip((*self.sites, *self._constrained_names()), values, strict=True))

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """The z of given values of the latent sites; other names in ``values`` are ignored.

        Shape:
            each value ``(..., *site shape)``, result ``(..., D)``.

        Raises:
            ArgumentError: A latent site is missing, or its shape is wrong.
        """
        parts, batch = [], None
        for key, site in self.sites.items():
            if key not in values:
                raise ArgumentError(f"no value for latent site {key!r}; the latent sites are {', '.join(self.sites)}")
            value = torch.as_tensor(values[key]).to(self.device, self.dtype)
            split = value.dim() - len(site.shape)
            if split < 0 or value.shape[split:] != site.shape:
                raise ArgumentError(
                    f"values of site {key!r} have shape {tuple(value.shape)}; expected (..., "
                    f"{', '.join(map(str, site.shape))})"
                )
            batch = value.shape[:split] if batch is None else batch
            if value.shape[:split] != batch:
                raise ArgumentError(
                    f"values of site {key!r} come in a batch {tuple(value.shape[:split])}, others {tuple(batch)}"
                )
            parts.append(value.reshape(*batch, -1))
        return self._rows("unconstrain", torch.cat(parts, -1))[0]

    def blame(self, z: Tensor) -> str:
        """Name of the site whose log density is not finite at one point ``(D,)``; empty if all are finite."""
        with user_errors(self.name):
            trace, log_det = self._trace(z, self._data, enumerate_discrete=self._enumerates)
            trace.compute_log_prob()
        for key, node in trace.nodes.items():
            if node["type"] == "sample" and not bool(torch.isfinite(node["log_prob"]).all()):
                return str(key)
        return "" if bool(torch.isfinite(log_det)) else "the change of variables"

    @property
    def work(self) -> int:
        """Numbers in the intermediate results of one gradient: how large this density is."""
        graph = self._graph("value_and_grad")
        return graph.numbers_per_row if graph else 1

    @property
    def num_nodes(self) -> int:
        """Operators in the graph of the gradient; 0 in the eager tier."""
        graph = self._graph("value_and_grad")
        return graph.num_nodes if graph else 0

    # --- one row, eagerly -------------------------------------------------------------------------------------------

    def _trace(self, z: Tensor, data: tuple[Tensor, ...], *, enumerate_discrete: bool) -> tuple[Any, Tensor]:
        """Trace of the model at ``z`` and the log determinant of the change of variables."""
        change = ChangeOfVariables(
            {key: z[part].reshape(self.sites[key].unconstrained_shape) for key, part in self._slices.items()}
        )
        args, kwargs = self._arguments(data)
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
                    f"the structure of model {self.name} changes from run to run: site {key!r} is there in one run and not "
                    "in another; write the choice without Python control flow on sampled values"
                )
        missing = [key for key in self.sites if key not in trace.nodes]
        if missing:
            raise ModelError(
                f"the structure of model {self.name} changes from run to run: site {missing[0]!r} is not there in every run"
            )

    def _arguments(self, data: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        remaining = iter(data)
        leaves = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return tuple(args), kwargs

    def _eager_value(self, z: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
        trace, log_det = self._trace(z, data or self._data, enumerate_discrete=self._enumerates)
        with _quiet(self.dtype):
            if not self._enumerates:
                return (trace.log_prob_sum() + log_det,)
            if self._evaluator is None:
                self._evaluator = TraceEinsumEvaluator(trace, True, self._structure.max_plate_nesting)
            return (self._evaluator.log_prob(trace) + log_det,)

    def _eager_value_and_grad(self, z: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            z = z.detach().requires_grad_(True)
            (value,) = self._eager_value(z, *data)
            grad = torch.autograd.grad(value, z)[0] if value.requires_grad else torch.zeros_like(z)
        return value.detach(), grad

    def _eager_hessian(self, z: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            z = z.detach().requires_grad_(True)
            (value,) = self._eager_value(z, *data)
            flat = torch.zeros_like(z)
            grad = torch.autograd.grad(value, z, create_graph=True)[0] if value.requires_grad else flat
            rows = [
                torch.autograd.grad(entry, z, retain_graph=True, allow_unused=True)[0] if entry.requires_grad else None
                for entry in grad
            ]
        return (torch.stack([flat if row is None else row for row in rows]).detach(),)

    def _eager_constrain(self, z: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
        trace, _ = self._trace(z, data or self._data, enumerate_discrete=self._enumerates)
        return tuple(trace.nodes[key]["value"] for key in (*self.sites, *self._constrained_names()))

    def _eager_unconstrain(self, flat: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
        values, position = {}, 0
        for key, site in self.sites.items():
            values[key] = flat[position : position + site.shape.numel()].reshape(site.shape)
            position += site.shape.numel()
        inverse = _InverseChange(values)
        args, kwargs = self._arguments(data or self._data)
        model: Callable[..., Any] = self.model
        with ExitStack() as stack:
            stack.enter_context(_quiet(self.dtype))
            stack.enter_context(poutine.block())
            if self._enumerates:  # not drawn: an inverse has no use for chance
                stack.enter_context(poutine.enum(first_available_dim=-1 - self._structure.max_plate_nesting))
                model = config_enumerate(model)
            stack.enter_context(inverse)
            model(*args, **kwargs)
        return (torch.cat([inverse.result[key].reshape(-1) for key in self.sites]),)

    def _constrained_names(self) -> tuple[str, ...]:
        if not hasattr(self, "_deterministic_names"):
            self._deterministic_names = self.deterministic
        return self._deterministic_names

    # --- many rows, captured where possible
    # ----------------------------------------------------------------------------

    def _rows(self, what: str, rows: Tensor) -> tuple[Tensor, ...]:
        width = sum(site.shape.numel() for site in self.sites.values()) if what == "unconstrain" else self.dim
        if rows.shape[-1:] != (width,):
            raise ArgumentError(
                f"expected vectors of length {width} ({self.name}), got a tensor of shape {tuple(rows.shape)}"
            )
        rows = rows.detach().to(self.device, self.dtype)
        graph, data = self._graph(what), self._data if self._lifted else ()
        try:
            if rows.dim() == 1 and graph is not None:
                return graph(rows, *data)
            if graph is not None:
                results = graph.batched(rows.reshape(-1, width), *data)
            else:
                results = self._one_by_one(what, getattr(self, f"_eager_{what}"), rows.reshape(-1, width), data)
        except RuntimeError as error:
            if not is_indefinite(error):
                raise
            # one row whose matrix has no Cholesky factor stops the whole batch: give the others their values
            function = graph or getattr(self, f"_eager_{what}")
            results = self._one_by_one(what, function, rows.reshape(-1, width), data)
        return tuple(value.reshape((*rows.shape[:-1], *value.shape[1:])) for value in results)

    def _one_by_one(
        self, what: str, function: Callable[..., Any], rows: Tensor, data: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Results row by row; NaN where a matrix of the model has no Cholesky factor or no inverse."""
        each: list[tuple[Tensor, ...]] = []
        for row in rows:
            try:
                with user_errors(self.name):
                    each.append(tuple(value.detach() for value in function(row, *data)))
            except (ModelError, RuntimeError) as error:
                if not is_indefinite(error.__cause__ or error):
                    raise
                each.append(tuple(rows.new_full(shape, torch.nan) for shape in self._shapes(what)))
        return tuple(torch.stack(values) for values in zip(*each, strict=True))

    def _shapes(self, what: str) -> list[tuple[int, ...]]:
        """Shapes of the results at one point."""
        if what == "constrain":
            names = (*self.sites, *self._constrained_names())
            return [tuple(self._structure.sites[key].shape) for key in names]
        shapes: dict[str, list[tuple[int, ...]]] = {
            "value": [()],
            "value_and_grad": [(), (self.dim,)],
            "hessian": [(self.dim, self.dim)],
            "unconstrain": [(self.dim,)],
        }
        return shapes[what]

    def _graph(self, what: str) -> Graph | None:
        if self._source is not None:
            self._adopt()
        if what not in self._graphs:
            self._graphs[what] = self._captured(what)
        return self._graphs[what]

    def _adopt(self) -> None:
        """Take over the graphs of the density that this one was made from, if they are right for these data too."""
        source, self._source = self._source, None
        assert source is not None
        graph = source._graph("value_and_grad")
        if graph is not None:
            if not source._lifted:
                return
            try:
                # a model may read its data past the tracer (y.numpy()): then the graph holds the old ones
                checks = self._checks("value_and_grad", self._eager_value_and_grad)[:1]
                self._check(graph, checks, self._data)
            except CaptureError:
                return
        self._graphs = source._graphs

    def _captured(self, what: str) -> Graph | None:
        """The graph of one function, or ``None`` if Pyro has to run at every call; says so once."""
        if what != "value_and_grad" and self._graph("value_and_grad") is None:
            return None
        function = getattr(self, f"_eager_{what}")
        try:
            checks = self._checks(what, function)
            graph = self._capture(what, function, checks[0][0])
            self._check(graph, checks, self._data if self._lifted else ())
        except CaptureError as error:
            warnings.warn(
                f"model {self.name} runs in the eager tier, which is slower: its {what.replace('_', ' ')} cannot be "
                "captured "
                f"({error})",
                LabWarning,
                stacklevel=2,
            )
            return None
        return graph

    def _capture(self, what: str, function: Callable[..., Any], point: Tensor) -> Graph:
        if self._lifted:
            try:
                return capture(function, (point, *self._data))
            except CaptureError:
                if what != "value_and_grad":
                    raise
        # the model may look into its data (sizes, masks, a maximum): keep them as constants
        graph = capture(lambda z: function(z, *self._data), (point,), evaluate_constants=True)
        self._lifted = False
        return graph

    def _checks(self, what: str, function: Callable[..., Any]) -> list[tuple[Tensor, list[Tensor]]]:
        """Points at which the model can be run, and the eager results there."""
        generator = torch.Generator().manual_seed(0)
        checks: list[tuple[Tensor, list[Tensor]]] = []
        reason = ""
        for attempt in range(CHECK_ATTEMPTS):
            z = torch.randn(self.dim, generator=generator, dtype=self.dtype).to(self.device) / 2 ** (1 + attempt // 2)
            try:
                if what == "unconstrain":
                    z = torch.cat([value.reshape(-1) for value in self._eager_constrain(z)[: len(self.sites)]]).detach()
                checks.append((z, [value.detach() for value in function(z)]))
            except RuntimeError as error:
                if not is_indefinite(error):
                    raise
                reason = str(error).splitlines()[0]
            if len(checks) == CHECK_POINTS:
                return checks
        raise CaptureError(f"no points were found at which it can be run: {reason}")

    def _check(self, graph: Graph, checks: list[tuple[Tensor, list[Tensor]]], data: tuple[Tensor, ...]) -> None:
        for point, expected in checks:
            try:
                single, batch = graph(point, *data), graph.batched(torch.stack([point, point]), *data)
            except (RuntimeError, NotImplementedError) as error:
                raise CaptureError(f"the captured graph cannot be run: {str(error).splitlines()[0]}") from error
            for wanted, one, two in zip(expected, single, batch, strict=True):
                scale = float(wanted.abs().max()) if wanted.numel() and bool(torch.isfinite(wanted).all()) else 1.0
                atol = torch.finfo(self.dtype).eps ** CHECK_POWER * max(scale, 1.0)
                for got in (one, two[0]):
                    if got.shape != wanted.shape or not torch.allclose(got, wanted, rtol=0, atol=atol, equal_nan=True):
                        raise CaptureError("the captured graph disagrees with eager Pyro at a check point")


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


def _same_but_data(one: LogDensity, other: LogDensity) -> bool:
    if one._spec != other._spec or len(one._leaves) != len(other._leaves):
        return False
    for a, b in zip(one._leaves, other._leaves, strict=True):
        if isinstance(a, Tensor) != isinstance(b, Tensor):
            return False
        same = (
            (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) if isinstance(a, Tensor) else a is b or a == b
        )
        if not same:
            return False
    return True
