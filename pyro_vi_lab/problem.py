"""A Pyro model together with its data."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pyro_vi_lab.density import LogDensity
from pyro_vi_lab.errors import ArgumentError, DataError, LabWarning, ModelError
from pyro_vi_lab.isolation import model_run
from pyro_vi_lab.posterior import Posterior
from pyro_vi_lab.sites import Site, Structure, read_structure
from pyro_vi_lab.user_errors import user_errors

CHUNK_NUMBERS = 2**24
"""Numbers that one vectorized run of the model may return (128 MiB in float64)."""


class Problem:
    """A Pyro model and its data, checked once.

    Tensors, NumPy arrays and pandas columns may be given; floating-point data are taken to float64, in which the
    density
    is computed (float32 where the model itself holds float32 tensors that do not mix).

    Args:
        model: Any Pyro model: a function or a PyroModule.
        *args: Its positional arguments.
        dims: Names for the axes of a site, ``{"beta": ["feature"]}``; plates name their own.
        coords: Labels along a dimension, ``{"school": ["A", "B"]}``.
        name: What to call the problem; the model's name by default.
        **kwargs: The model's keyword arguments.

    Raises:
        ModelError: The model cannot be run or has a site that is not supported; the message names it.
        DataError: An observed value is missing or infinite, or an argument is not numeric.

    Example:
        >>> import pyro.distributions as dist
        >>> def coin(y):
        ...     p = pyro.sample("p", dist.Beta(1.0, 1.0))
        ...     with pyro.plate("toss", len(y)):
        ...         pyro.sample("y", dist.Bernoulli(p), obs=y)
        >>> import pyro
        >>> problem = Problem(coin, torch.tensor([1.0, 0.0, 1.0]))
        >>> problem
        Problem(coin: latent p; observed y (toss))
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *args: Any,
        dims: Mapping[str, Sequence[str]] | None = None,
        coords: Mapping[str, Sequence[Any]] | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        if not callable(model):
            raise ArgumentError(f"model must be a Pyro model (a function or a PyroModule), got {type(model).__name__}")
        self.model = model
        self.name = name or str(getattr(model, "__name__", type(model).__name__))
        index_coords: dict[int, list[Any]] = {}
        tensors = {
            id(leaf): _as_tensor(key + pytree.keystr(path), leaf, index_coords)
            for key, value in _argument_names(model, args, kwargs).items()
            for path, leaf in pytree.tree_flatten_with_path(value)[0]
        }
        self.dtype, self._structure, self.args, self.kwargs = self._read(args, kwargs, tensors)
        self._dims = {key: tuple(value) for key, value in (dims or {}).items()}
        self._check_dims()
        self.coords: dict[str, list[Any]] = {key: list(value) for key, value in (coords or {}).items()}
        self._own_coords = frozenset(self.coords)
        for size, labels in index_coords.items():
            plates = {plate for site in self.sites.values() for plate in site.plates if plate and plate[1] == size}
            if len(plates) == 1:
                self.coords.setdefault(plates.pop()[0], labels)
        self._check_coords()

    def __repr__(self) -> str:
        parts = []
        for kind in ("latent", "discrete", "deterministic", "observed"):
            names = [
                f"{site.name} ({', '.join(self.dims(site.name))})" if site.shape else site.name
                for site in self.sites.values()
                if site.kind == kind
            ]
            if names:
                parts.append(f"{kind} {', '.join(names)}")
        return f"Problem({self.name}: {'; '.join(parts)})"

    @property
    def sites(self) -> Mapping[str, Site]:
        """Every site of the model by name, in the order of the run."""
        return self._structure.sites

    @property
    def observed(self) -> Mapping[str, Tensor]:
        """Data of the observed sites."""
        return self._structure.observed

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The tensors among the model's arguments, by the model's own names."""
        bound = _argument_names(self.model, self.args, self.kwargs)
        return {key: value for key, value in bound.items() if isinstance(value, Tensor)}

    def dims(self, site: str) -> tuple[str, ...]:
        """A name for every axis of a site: the user's, the plate's, or ``<site>_dim_<i>``."""
        return self._dims.get(site, self.sites[site].dims)

    def density(self) -> LogDensity:
        """The problem as log p(z, data) on R^D; made once."""
        return self._density

    @cached_property
    def _density(self) -> LogDensity:
        return LogDensity(self.model, self.args, self.kwargs, self._structure, name=self.name, dtype=self.dtype)

    def with_data(self, *args: Any, **kwargs: Any) -> Problem:
        """The same model with other data; a captured density is kept where shapes and types agree."""
        other = Problem(self.model, *args, dims=self._dims, name=self.name, **kwargs)
        sizes = {name: size for site in other.sites.values() for name, size in other.sizes(site).items()}
        for key, labels in self.coords.items():
            # the new data's own index goes before the old one's, what the user said before both
            if sizes.get(key) == len(labels) and (key in self._own_coords or key not in other.coords):
                other.coords[key] = labels
        other._own_coords = self._own_coords & other.coords.keys()
        other.__dict__["_density"] = self._density.with_data(other.args, other.kwargs, other._structure)
        return other

    def prior(self, num_draws: int = 1000, seed: int = 0) -> Posterior:
        """Draws of the latent and deterministic sites from the prior.

        Raises:
            ModelError: A prior is improper (``ImproperUniform``), so that there is nothing to draw.
        """
        names = [key for key, site in self.sites.items() if site.kind in ("latent", "deterministic")]
        for key in names:
            if self.sites[key].distribution == "ImproperUniform":
                raise ModelError(
                    f"site {key!r} has an improper prior (ImproperUniform), from which nothing can be drawn"
                )

        draws = self._repeat(_Given([], {}), [], names, num_draws, seed=seed)
        return Posterior({key: value[None] for key, value in draws.items()}, method="prior", info={"seed": seed})

    def predictive(self, posterior: Posterior, seed: int = 0) -> dict[str, Tensor]:
        """Draws of the observed sites given each draw of the latent ones.

        Shape:
            each result ``(C, S, *site shape)``.

        Raises:
            ArgumentError: ``posterior`` lacks a latent site of this problem.
        """
        names, latent = self._latent_of(posterior)
        given = _Given(names, {key: self.sites[key].batch_shape for key in self.observed})
        return _by_chain(posterior, self._repeat(given, latent, list(self.observed), len(latent[0]), seed=seed))

    def log_likelihood(self, posterior: Posterior) -> dict[str, Tensor]:
        """Log density of every observed row given each draw of the latent sites; zero where a row is masked.

        Shape:
            each result ``(C, S, *batch shape of the site)``.

        Raises:
            ArgumentError: ``posterior`` lacks a latent site of this problem.
            ModelError: The model has discrete latent sites, over which each row would have to be summed.
        """
        discrete = [site.name for site in self.sites.values() if site.kind == "discrete"]
        if discrete:
            raise ModelError(
                f"model {self.name} has the discrete latent site {discrete[0]!r}: the log likelihood of a single "
                "row given the "
                "continuous sites is not available for models with discrete sites"
            )
        names, latent = self._latent_of(posterior)
        given = _Given(names, {}, log_prob=True)
        return _by_chain(posterior, self._repeat(given, latent, list(self.observed), len(latent[0]), seed=0))

    # --- many runs of the model -------------------------------------------------------------------------------------

    def _latent_of(self, posterior: Posterior) -> tuple[list[str], list[Tensor]]:
        names = [key for key, site in self.sites.items() if site.kind == "latent"]
        flat = posterior.flat()
        for key in names:
            if key not in flat:
                raise ArgumentError(f"the posterior has no draws of the latent site {key!r}; it has {', '.join(flat)}")
            if flat[key].shape[1:] != self.sites[key].shape:
                raise ArgumentError(
                    f"draws of site {key!r} have shape {tuple(flat[key].shape[1:])}; this problem's site has "
                    f"{tuple(self.sites[key].shape)}"
                )
        return names, [flat[key].to(self.dtype) for key in names]

    def _repeat(
        self, given: _Given, latent: list[Tensor], wanted: list[str], num_draws: int, *, seed: int
    ) -> dict[str, Tensor]:
        """Run the model once per draw, vectorized by ``torch.vmap`` where its operators allow it, else one by one."""
        if not wanted:
            return {}

        def once(zero: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
            with _OwnMemory(zero):
                return given.run(self.model, self.args, self.kwargs, values, [self.sites[key] for key in wanted])

        size = sum(self.sites[key].shape.numel() for key in wanted) + 1
        inputs = (torch.zeros(num_draws), *latent)
        with user_errors(self.name), model_run(seed=seed, dtype=self.dtype, validate=False), torch.no_grad():
            try:
                with warnings.catch_warnings():
                    # torch says that an operator has no batching rule and is run row by row: right, only slower; and
                    # that its own rule for binomial draws resizes their memory
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    warnings.filterwarnings("ignore", message="An output with one or more elements was resized")
                    chunk = max(1, CHUNK_NUMBERS // size)
                    parts = torch.vmap(once, randomness="different", chunk_size=chunk)(*inputs)
            except (RuntimeError, NotImplementedError, ValueError, TypeError):
                # the model looks into its values, or shapes them by hand: the same runs, one after another
                each = [once(*(value[i] for value in inputs)) for i in range(num_draws)]
                parts = tuple(torch.stack(values) for values in zip(*each, strict=True))
        return dict(zip(wanted, parts, strict=True))

    # --- reading the arguments ----------------------------------------------------------------------------------------

    def _read(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], data: Mapping[int, Any]
    ) -> tuple[torch.dtype, Structure, tuple[Any, ...], dict[str, Any]]:
        """Convert the data, in float64 if the model's own tensors mix with it, else in the default type."""
        own = torch.get_default_dtype()
        dtypes = [torch.float64] if own == torch.float64 else [torch.float64, own]
        for i, dtype in enumerate(dtypes):
            converted = pytree.tree_map(
                lambda leaf, to=dtype: _to_dtype(data.get(id(leaf), leaf), to), (args, dict(kwargs))
            )
            try:
                structure = read_structure(self.model, *converted, name=self.name, dtype=dtype)
            except ModelError as error:
                if i + 1 < len(dtypes) and _mixes_types(error):
                    continue
                raise
            if dtype != torch.float64:
                warnings.warn(
                    f"model {self.name} holds {dtype} tensors of its own, so it runs in {dtype}; pass them as "
                    "arguments, or make "
                    "them float64, for the full precision",
                    LabWarning,
                    stacklevel=3,
                )
            return dtype, structure, *converted
        raise AssertionError("unreachable")

    def _check_dims(self) -> None:
        for key, names in self._dims.items():
            if key not in self.sites:
                raise ArgumentError(
                    f"dims names site {key!r}, which model {self.name} lacks; its sites: {', '.join(self.sites)}"
                )
            if len(names) != len(self.sites[key].shape):
                raise ArgumentError(
                    f"dims of site {key!r} are {list(names)}; it has {len(self.sites[key].shape)} axes of sizes "
                    f"{tuple(self.sites[key].shape)}"
                )

    def _check_coords(self) -> None:
        sizes = {name: size for site in self.sites.values() for name, size in self.sizes(site).items()}
        for key, labels in self.coords.items():
            if key in sizes and sizes[key] != len(labels):
                raise ArgumentError(
                    f"coords of {key!r} have {len(labels)} labels; that dimension has size {sizes[key]}"
                )

    def sizes(self, site: Site) -> dict[str, int]:
        """Size of every dimension of a site."""
        return dict(zip(self.dims(site.name), site.shape, strict=True))


class _OwnMemory(TorchFunctionMode):
    """Gives every row of a vmap memory of its own where new memory is asked for.

    torch's distributions draw with ``torch.empty(shape).normal_()``; vmap refuses to write draws that differ by row
    into
    memory that all rows share.

    Args:
        zero: A zero for each row.
    """

    def __init__(self, zero: Tensor) -> None:
        super().__init__()
        self.zero = zero

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _NEW_MEMORY and isinstance(result, Tensor):
            return torch.zeros_like(result) + self.zero.to(result)
        return result


_NEW_MEMORY = (torch.empty, torch.empty_like, Tensor.new, Tensor.new_empty)


class _Given:
    """One run of a model with some sites given and others drawn anew."""

    def __init__(self, names: Sequence[str], redraw: Mapping[str, torch.Size], *, log_prob: bool = False) -> None:
        self.names, self.redraw, self.log_prob = names, redraw, log_prob

    def run(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        values: Sequence[Tensor],
        wanted: Sequence[Site],
    ) -> tuple[Tensor, ...]:
        substitute = _Substitute(dict(zip(self.names, values, strict=True)), self.redraw)
        with poutine.block(), poutine.trace() as tracer, substitute:
            model(*args, **kwargs)
        nodes: dict[str, Any] = tracer.trace.nodes
        if not self.log_prob:
            return tuple(nodes[site.name]["value"].expand(site.shape) for site in wanted)
        # rows that are masked are not observed: they say nothing
        return tuple(
            scale_and_mask(node["fn"].log_prob(node["value"]).expand(site.batch_shape), mask=node["mask"])
            for site, node in ((site, nodes[site.name]) for site in wanted)
        )


class _Substitute(Messenger):
    """Gives latent sites their values; draws observed ones anew, in the batch shape that is given."""

    def __init__(self, values: Mapping[str, Tensor], redraw: Mapping[str, torch.Size]) -> None:
        super().__init__()
        self.values, self.redraw = values, redraw

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.redraw:
            msg["is_observed"], msg["value"], msg["done"] = False, None, False
            if msg["fn"].batch_shape != self.redraw[msg["name"]]:
                # data without a plate are broadcast over: each value is a draw of its own
                msg["fn"] = msg["fn"].expand(self.redraw[msg["name"]])
        elif msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


def _by_chain(posterior: Posterior, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    shape = (posterior.num_chains, posterior.num_draws)
    return {key: value.reshape(*shape, *value.shape[1:]) for key, value in flat.items()}


def _argument_names(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by the model's own names, positions where it has none."""
    try:
        signature = inspect.signature(getattr(model, "forward", model))
        bound = signature.bind(*args, **kwargs)
    except (TypeError, ValueError) as error:
        if isinstance(error, TypeError):
            raise ModelError(
                f"model {getattr(model, '__name__', type(model).__name__)} cannot take these arguments: {error}"
            ) from error
        return {**{f"argument {i}": value for i, value in enumerate(args)}, **kwargs}
    names: dict[str, Any] = {}
    for key, value in bound.arguments.items():
        kind = signature.parameters[key].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            names.update({f"{key}[{i}]": item for i, item in enumerate(value)})
        elif kind is inspect.Parameter.VAR_KEYWORD:
            names.update(value)
        else:
            names[key] = value
    return names


def _as_tensor(name: str, value: Any, index_coords: dict[int, list[Any]]) -> Any:
    """NumPy and pandas data as tensors, all else as it is; remembers the index of pandas data by its length."""
    module = type(value).__module__.partition(".")[0]
    if module == "pandas" and hasattr(value, "to_numpy"):
        columns = {str(key): value[key] for key in value.columns} if hasattr(value, "columns") else {name: value}
        for key, column in columns.items():
            if column.dtype.kind not in "biuf":
                raise DataError(
                    f"column {key!r} of argument {name!r} is not numeric (dtype {column.dtype}); encode it as numbers"
                )
        if type(value.index).__name__ != "RangeIndex":
            index_coords[len(value)] = value.index.tolist()
        return torch.as_tensor(value.to_numpy().copy())
    if module == "numpy" and hasattr(value, "dtype") and getattr(value, "ndim", 0) > 0:
        if value.dtype.kind not in "biuf":
            raise DataError(f"argument {name!r} is not numeric (dtype {value.dtype}); encode it as numbers")
        return torch.as_tensor(value.copy())
    return value


def _mixes_types(error: ModelError) -> bool:
    """Whether torch refused to mix float32 with float64."""
    text = str(error).lower()
    return "dtype" in text or "scalar type" in text


def _to_dtype(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
