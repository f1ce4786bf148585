"""A model and its data as log p(z, data) on R^D."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from pyro_vi_lab.capture import Graph, capture
from pyro_vi_lab.errors import ArgumentError, CaptureError, CompileError, LabWarning, ModelError
from pyro_vi_lab.isolation import default_dtype
from pyro_vi_lab.native import NativeFunction, compile_native
from pyro_vi_lab.posterior import element_name
from pyro_vi_lab.program import Part, Program
from pyro_vi_lab.sites import Structure
from pyro_vi_lab.user_errors import is_indefinite, user_errors

Tier = Literal["graph", "eager"]


class Traceable(NamedTuple):
    """A density's gradient as a function that can be captured as a part of something larger.

    Args:
        function: Log density ``(K, R)`` and gradient ``(K, R, D)`` at z ``(K, R, D)``, then of the data.
        data: The present data.
        cache: Where to keep what is made of it; shared by all data sets of one shape.
    """

    function: Callable[..., tuple[Tensor, ...]]
    data: tuple[Tensor, ...]
    cache: dict[Any, Any]


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
        part: ``"joint"`` for the density above, ``"constrained"`` for :math:`\log p(T(z), \text{data})`, without the
            log determinant, ``"likelihood"`` for :math:`\log p(\text{data} \mid T(z))`.

    Attributes:
        dim: D, the length of z.
        labels: A name for every coordinate of z.
        tier: ``"graph"`` if the density runs as a captured graph, ``"eager"`` if Pyro runs at every call.
        reason: Why it runs in the eager tier; empty if it does not, or has not been run yet.

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
        part: Part = "joint",
    ) -> None:
        if structure.subsampled:
            raise ModelError(
                f"plate {structure.subsampled[0]!r} of model {name} sees a random part of its rows "
                "(subsample_size); the density "
                "needs all of them: give the plate no subsample_size"
            )
        program = Program(model, args, kwargs, structure, name=name, dtype=dtype, part=part)
        self._program, self._structure, self._data = program, structure, program.data
        self.name, self.dtype, self.device, self.dim, self.sites = (
            name,
            dtype,
            program.device,
            program.dim,
            program.sites,
        )
        self.labels = [
            element_name(key, tuple(map(int, index))) if site.unconstrained_shape else key
            for key, site in self.sites.items()
            for index in np.ndindex(tuple(site.unconstrained_shape))
        ]
        self.reason = ""
        self._lifted = True
        self._graphs: dict[str, Graph | None] = {}
        self._source: LogDensity | None = None
        self._check_source = True

    @property
    def tier(self) -> Tier:
        """How the gradient runs: ``"graph"`` or ``"eager"``."""
        return "eager" if self._graph("value_and_grad") is None else "graph"

    def with_data(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], structure: Structure, *, check: bool = True
    ) -> LogDensity:
        """The same density with other data; graphs are kept where shapes, types and all else agree.

        Args:
            args: Positional arguments of the model.
            kwargs: Its keyword arguments.
            structure: Its sites.
            check: Whether a graph that is kept is compared with eager Pyro on these data.
        """
        options: dict[str, Any] = {"name": self.name, "dtype": self.dtype, "part": self._program.part}
        other = LogDensity(self._program.model, args, kwargs, structure, **options)
        if self._lifted and _same_but_data(self._program, other._program):
            other._source, other._check_source = self, check
        return other

    def of_part(self, part: Part) -> LogDensity:
        """The density of another part of the same model and data."""
        args, kwargs = self._program.arguments(self._data)
        return LogDensity(
            self._program.model, args, kwargs, self._structure, name=self.name, dtype=self.dtype, part=part
        )

    def observed(self) -> dict[str, Tensor]:
        """Values of the observed sites, by a run of the model."""
        with user_errors(self.name):
            origin = torch.zeros(self.dim, dtype=self.dtype, device=self.device)
            trace, _ = self._program.trace(origin, self._data, enumerate_discrete=self._program.enumerates)
        return {
            key: trace.nodes[key]["value"] for key, site in self._structure.sites.items() if site.kind == "observed"
        }

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

    @cached_property
    def bound(self) -> Graph | None:
        """The graph of the gradient at one point ``(D,)`` with the data as constants; ``None`` in the eager tier."""
        graph = self._graph("value_and_grad")
        return graph.bind(*self._data) if graph is not None and self._lifted else graph

    @cached_property
    def native(self) -> NativeFunction:
        """Value and gradient at one point ``(D,)`` as machine code, compiled when it is first asked for.

        Raises:
            CompileError: The density runs in the eager tier, has an operator that cannot be compiled, or there is no
                compiler.
        """
        if self.bound is None:
            raise CompileError(f"model {self.name} runs in the eager tier: there is no graph to compile")
        return compile_native(self.bound.module, self.bound.example)

    def pointwise(self) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Value and gradient at one point ``(D,)`` with the data bound: fastest for the many calls of NUTS."""
        if self.bound is None:
            return self.value_and_grad
        bound = self.bound.scripted

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

    @property
    def data(self) -> tuple[Tensor, ...]:
        """The tensors among the model's arguments."""
        return self._data

    def shared_graph(self) -> Graph | None:
        """The graph of the gradient whose data are inputs; ``None`` if there is none."""
        graph = self._graph("value_and_grad")
        return graph if self._lifted else None

    def traceable(self) -> Traceable | None:
        """The gradient as a part of larger graphs; ``None`` in the eager tier."""
        graph = self._graph("value_and_grad")
        if graph is None:
            return None
        return Traceable(graph.vectorized, self._data if self._lifted else (), graph.parts)

    def chosen(self, index: Tensor) -> Self:
        """The density of some of a batch of fits: the same for all of them."""
        return self

    def hessian(self, z: Tensor) -> Tensor:
        """Second derivatives of the log density.

        Shape:
            z ``(..., D)``, result ``(..., D, D)``.
        """
        self._check_width(z, self.dim)
        if self._graph("hessian_product") is None:
            z = z.detach().to(self.device, self.dtype)
            (rows,) = self._one_by_one("hessian", self._program.hessian, z.reshape(-1, self.dim), self._data)
            return rows.reshape((*z.shape, self.dim))
        shape = (*z.shape, self.dim)
        identity = torch.eye(self.dim, dtype=self.dtype, device=self.device)
        pairs = torch.cat([z.to(identity).unsqueeze(-2).expand(shape), identity.expand(shape)], -1)
        return self._rows("hessian_product", pairs)[0]

    def hessian_product(self, z: Tensor, vector: Tensor) -> Tensor:
        """Second derivatives of the log density times a vector.

        Shape:
            z and vector ``(..., D)``, result the same.
        """
        self._check_width(z, self.dim)
        if self._graph("hessian_product") is None:
            return torch.einsum("...ij,...j->...i", self.hessian(z), vector.to(self.device, self.dtype))
        return self._rows("hessian_product", torch.cat(torch.broadcast_tensors(z, vector), -1))[0]

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """Values of the latent and the deterministic sites.

        Shape:
            z ``(..., D)``, each result ``(..., *site shape)``.
        """
        values = self._rows("constrain", z)
        return dict(zip((*self.sites, *self._program.deterministic), values, strict=True))

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
        trace, log_det = self._traced(z)
        for key, node in trace.nodes.items():
            if node["type"] == "sample" and not bool(torch.isfinite(node["log_prob"]).all()):
                return str(key)
        return "" if bool(torch.isfinite(log_det)) else "the change of variables"

    def trace(self, z: Tensor) -> Any:
        """Pyro's trace of a run of the model at one point ``(D,)``."""
        return self._traced(z)[0]

    def _traced(self, z: Tensor) -> tuple[Any, Tensor]:
        with user_errors(self.name):
            return self._program.trace(z, self._data, enumerate_discrete=self._program.enumerates)

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

    # --- many rows, captured where possible
    # ----------------------------------------------------------------------------

    def _rows(self, what: str, rows: Tensor) -> tuple[Tensor, ...]:
        widths = {
            "unconstrain": sum(site.shape.numel() for site in self.sites.values()),
            "hessian_product": 2 * self.dim,
        }
        width = widths.get(what, self.dim)
        self._check_width(rows, width)
        rows = rows.detach().to(self.device, self.dtype)
        graph, data = self._graph(what), self._data if self._lifted else ()
        try:
            if rows.dim() == 1 and graph is not None:
                return graph(rows, *data)
            if graph is not None:
                results = graph.batched(rows.reshape(-1, width), *data)
            else:
                results = self._one_by_one(what, getattr(self._program, what), rows.reshape(-1, width), data)
        except RuntimeError as error:
            if not is_indefinite(error):
                raise
            # one row whose matrix has no Cholesky factor stops the whole batch: give the others their values
            function = graph or getattr(self._program, what)
            results = self._one_by_one(what, function, rows.reshape(-1, width), data)
        return tuple(value.reshape((*rows.shape[:-1], *value.shape[1:])) for value in results)

    def _check_width(self, rows: Tensor, width: int) -> None:
        if rows.shape[-1:] != (width,):
            raise ArgumentError(
                f"expected vectors of length {width} ({self.name}), got a tensor of shape {tuple(rows.shape)}"
            )

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
            names = (*self.sites, *self._program.deterministic)
            return [tuple(self._structure.sites[key].shape) for key in names]
        shapes: dict[str, list[tuple[int, ...]]] = {
            "value": [()],
            "value_and_grad": [(), (self.dim,)],
            "hessian": [(self.dim, self.dim)],
            "hessian_product": [(self.dim,)],
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
        if graph is not None and not source._lifted:
            return
        if graph is not None and self._check_source:
            try:
                # a model may read its data past the tracer (y.numpy()): then the graph holds the old ones
                checks = self._checks("value_and_grad", self._program.value_and_grad)[:1]
                self._check(graph, checks, self._data)
            except CaptureError:
                return
        self._graphs = source._graphs

    def _captured(self, what: str) -> Graph | None:
        """The graph of one function, or ``None`` if Pyro has to run at every call; says so once."""
        if what != "value_and_grad" and self._graph("value_and_grad") is None:
            return None
        function = getattr(self._program, what)
        try:
            checks = self._checks(what, function)
            graph = self._capture(what, function, checks[0][0])
            self._check(graph, checks, self._data if self._lifted else ())
        except CaptureError as error:
            self.reason = self.reason or str(error)
            warnings.warn(
                f"model {self.name} runs in the eager tier, which is slower: its {what.replace('_', ' ')} cannot be "
                f"captured ({error})",
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
                    z = torch.cat(
                        [value.reshape(-1) for value in self._program.constrain(z)[: len(self.sites)]]
                    ).detach()
                if what == "hessian_product":
                    z = torch.cat([z, torch.randn(self.dim, generator=generator, dtype=self.dtype).to(z)])
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


def _same_but_data(one: Program, other: Program) -> bool:
    if one.spec != other.spec or len(one.leaves) != len(other.leaves):
        return False
    for a, b in zip(one.leaves, other.leaves, strict=True):
        if isinstance(a, Tensor) != isinstance(b, Tensor):
            return False
        same = (
            (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) if isinstance(a, Tensor) else a is b or a == b
        )
        if not same:
            return False
    return True
