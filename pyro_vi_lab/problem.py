"""A Pyro model together with its data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vi_lab.arguments import argument_names
from pyro_vi_lab.batches import Batch, Batches, checked_size
from pyro_vi_lab.data import read_arrays, read_loader
from pyro_vi_lab.density import LogDensity
from pyro_vi_lab.errors import ArgumentError, DataError, ModelError
from pyro_vi_lab.loader import LoaderBatches
from pyro_vi_lab.many_runs import many_runs
from pyro_vi_lab.posterior import Posterior
from pyro_vi_lab.rows import Rows
from pyro_vi_lab.sites import Site


class Problem:
    """A Pyro model and its data, checked once.

    Tensors, NumPy arrays and pandas columns may be given; floating-point data are taken to float64, in which the
    density
    is computed (float32 where the model itself holds float32 tensors that do not mix), or to ``dtype``.

    Args:
        model: Any Pyro model: a function or a PyroModule.
        *args: Its positional arguments.
        dims: Names for the axes of a site, ``{"beta": ["feature"]}``; plates name their own.
        coords: Labels along a dimension, ``{"school": ["A", "B"]}``.
        name: What to call the problem; the model's name by default.
        minibatch: Rows in a batch for a fit on some of the rows at a time (more than there are mean all): the model is
            run on slices of the arguments that have a row for each row of the data, and its plates of the rows are
            scaled to all of them. Of memory-mapped arrays only the rows of a batch are read, and only the first ones
            are checked here. Not needed for a model
            whose plate takes some rows itself (``subsample_size=``, or ``subsample=`` with an argument).
        rows: Names of the arguments by row (``["x", "y"]``), if others have the same length by chance.
        loader: A ``DataLoader``, or another iterable of batches that can be gone through more than once: tuples of
            positional or dicts of keyword arguments. It takes the place of the data.
        num_rows: Rows of the data behind ``loader``; by default the length of its data set.
        dtype: Type of floating-point data and of the latent sites, such as that of a network in the model.
        **kwargs: The model's keyword arguments.

    Raises:
        ModelError: The model cannot be run or has a site that is not supported; the message names it.
        DataError: An observed value is missing or infinite, or an argument is not numeric.
        ArgumentError: An option makes no sense, or it is not clear which arguments are by row.

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

        A fit on batches of two rows, of which one epoch has two:

        >>> problem = Problem(coin, torch.tensor([1.0, 0.0, 1.0]), minibatch=2)
        >>> problem.row_plates, [batch.scale for batch in problem.batches().epoch()]
        (('toss',), [1.5, 3.0])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *args: Any,
        dims: Mapping[str, Sequence[str]] | None = None,
        coords: Mapping[str, Sequence[Any]] | None = None,
        name: str | None = None,
        minibatch: int | None = None,
        rows: Sequence[str] | Mapping[str, int] | None = None,
        loader: Iterable[Any] | None = None,
        num_rows: int | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        if not callable(model):
            raise ArgumentError(f"model must be a Pyro model (a function or a PyroModule), got {type(model).__name__}")
        self.model = model
        self.name = name or str(getattr(model, "__name__", type(model).__name__))
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ArgumentError(f"dtype must be a floating-point type such as torch.float32, got {dtype!r}")
        self._asked = {"minibatch": minibatch, "rows": rows, "dtype": dtype}
        if minibatch is not None:
            checked_size(minibatch, "minibatch")
        index_coords: dict[int, list[Any]] = {}
        if loader is None:
            if num_rows is not None:
                raise ArgumentError("num_rows is for a data loader; arrays have as many rows as they have")
            self._data, index_coords = read_arrays(
                model, args, kwargs, minibatch=minibatch, rows=rows, name=self.name, dtype=dtype
            )
        elif args:
            raise ArgumentError(
                "the positional arguments of the model come from the loader; give others by name: "
                "Problem(model, loader=loader, scale=2.0)"
            )
        else:
            self._data = read_loader(
                model, loader, kwargs, minibatch=minibatch, rows=rows, num_rows=num_rows, name=self.name, dtype=dtype
            )
        self._dims = {key: tuple(value) for key, value in (dims or {}).items()}
        self._check_dims()
        self.coords: dict[str, list[Any]] = {key: list(value) for key, value in (coords or {}).items()}
        self._own_coords = frozenset(self.coords)
        for size, labels in index_coords.items():
            plates = {plate for site in self.sites.values() for plate in site.plates if plate and plate[1] == size}
            if len(plates) == 1:
                self.coords.setdefault(plates.pop()[0], labels)
        self._check_coords()
        self._observed_anew = False
        self.kept: dict[Any, Any] = {}
        """What inferences made of this problem and may need again, such as guides before they are fitted."""

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
        return self._data.structure.sites

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments of the model: tensors, or the arrays as given where these are not held as a whole."""
        return self._data.args

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the model, in the same way."""
        return self._data.kwargs

    @property
    def dtype(self) -> torch.dtype:
        """Type of floating-point data and of the latent sites."""
        return self._data.dtype

    @property
    def observed(self) -> Mapping[str, Tensor]:
        """Data of the observed sites; none if the data are not held as a whole."""
        if not self._data.whole or (self._data.layout and self._data.layout.why_not):
            return {}
        if self._observed_anew:
            return self._density.observed()
        return self._observed_of_pieces if self._data.by_part else self._data.structure.observed

    @cached_property
    def _observed_of_pieces(self) -> Mapping[str, Tensor]:
        """Data of the observed sites of a model that sees some of its rows at a time."""
        return {key: value[0] for key, value in self._repeat({}, self._observed_sites, 1, seed=0).items()}

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The tensors among the model's arguments, by the model's own names; none of a data loader."""
        if self._data.loader is not None:
            return {}
        bound = argument_names(self.model, self.args, self.kwargs)
        return {key: value for key, value in bound.items() if isinstance(value, Tensor)}

    def dims(self, site: str) -> tuple[str, ...]:
        """A name for every axis of a site: the user's, the plate's, or ``<site>_dim_<i>``."""
        return self._dims.get(site, self.sites[site].dims)

    def density(self) -> LogDensity:
        """The problem as log p(z, data) on R^D; made once.

        Raises:
            ModelError: The data are not held as a whole, or the model sees only some of its rows at a time.
        """
        return self._density

    @cached_property
    def _density(self) -> LogDensity:
        data = self._data
        if not data.whole:
            where = "are read batch by batch" if data.loader is None else "come from a data loader"
            raise ModelError(f"the density of model {self.name} needs all rows of its data at once, which {where}")
        return LogDensity(self.model, data.args, data.kwargs, data.structure, name=self.name, dtype=data.dtype)

    def with_data(self, *args: Any, **kwargs: Any) -> Problem:
        """The same model with other data; a captured density is kept where shapes and types agree."""
        other = Problem(self.model, *args, dims=self._dims, name=self.name, **{**self._asked, **kwargs})
        sizes = {name: size for site in other.sites.values() for name, size in other.sizes(site).items()}
        for key, labels in self.coords.items():
            # the new data's own index goes before the old one's, what the user said before both
            if sizes.get(key) == len(labels) and (key in self._own_coords or key not in other.coords):
                other.coords[key] = labels
        other._own_coords = self._own_coords & other.coords.keys()
        if not (self._data.by_part or other._data.by_part):
            other.__dict__["_density"] = self._density.with_data(other.args, other.kwargs, other._data.structure)
        return other

    def each(self, data: Mapping[str, Tensor]) -> list[Problem]:
        """The same model with each of R data sets of the same shapes, as for a calibration run.

        Only the first and the last are compared with eager Pyro, and none is read again for its structure, so this is
        much faster than :meth:`with_data`.

        Args:
            data: Argument name to a value for each data set; arguments that are not named stay as they are.

        Shape:
            each value ``(R, *shape of the argument)``.

        Raises:
            ArgumentError: An unknown name, or a shape that does not fit.
            DataError: A value is not finite.
            ModelError: The model does not see all of its rows at once.
        """
        density, named = self.density(), argument_names(self.model, self.args, self.kwargs)
        values = {key: self._checked_each(key, value, named) for key, value in data.items()}
        numbers = {key: len(value) for key, value in values.items()}
        if len(set(numbers.values())) != 1:
            raise ArgumentError(f"data must have the same number of data sets for every argument, got {numbers}")
        number = next(iter(numbers.values()))
        problems = []
        for r in range(number):
            new = {id(named[key]): value[r] for key, value in values.items()}
            args, kwargs = pytree.tree_map(lambda leaf, new=new: new.get(id(leaf), leaf), (self.args, self.kwargs))
            other = copy(self)
            other._data = replace(self._data, args=args, kwargs=kwargs)
            other.kept = {}
            structure = self._data.structure
            check = r in (0, number - 1)
            other.__dict__["_density"] = density.with_data(args, kwargs, structure, check=check)
            other._observed_anew = True
            problems.append(other)
        return problems

    def _checked_each(self, key: str, value: Any, named: Mapping[str, Any]) -> Tensor:
        if not isinstance(named.get(key), Tensor):
            tensors = [name for name, one in named.items() if isinstance(one, Tensor)]
            raise ArgumentError(f"data names {key!r}; the tensors among the arguments are {', '.join(tensors)}")
        like = named[key]
        tensor = torch.as_tensor(value).to(like.device, like.dtype)
        if tensor.dim() != like.dim() + 1 or tensor.shape[1:] != like.shape:
            raise ArgumentError(
                f"data for {key!r} have shape {tuple(tensor.shape)}; expected (data sets, "
                f"{', '.join(map(str, like.shape))}), as the argument has shape {tuple(like.shape)}"
            )
        bad = ~torch.isfinite(tensor.flatten(1)).all(1) & bool(torch.isfinite(like).all())
        if bool(bad.any()):
            raise DataError(f"data set {int(bad.nonzero()[0])} of argument {key!r} has values that are not finite")
        return tensor

    # --- batches ------------------------------------------------------------------------------------------------------

    @property
    def minibatch(self) -> int | None:
        """Rows in a batch, B; ``None`` if the model sees all rows at once."""
        return self._data.layout.batch_size if self._data.layout else None

    @property
    def num_rows(self) -> int | None:
        """Rows of the data, N; ``None`` if the model sees all rows at once."""
        return self._data.layout.num_rows if self._data.layout else None

    @property
    def row_plates(self) -> tuple[str, ...]:
        """Names of the plates that stand for the rows; none if the model sees all rows at once."""
        return self._data.layout.plates if self._data.layout else ()

    @property
    def subsamples(self) -> bool:
        """Whether the model sees some of its rows at a time."""
        return self._data.layout is not None

    @property
    def has_local_sites(self) -> bool:
        """Whether a latent site lies along the rows of which the model sees some at a time."""
        axes = self._data.layout.axes if self._data.layout else {}
        return any(site.kind in ("latent", "discrete") for key, site in self.sites.items() if key in axes)

    @property
    def max_plate_nesting(self) -> int:
        """Number of batch dimensions that plates use."""
        return self._data.structure.max_plate_nesting

    @property
    def example(self) -> Batch | None:
        """A batch to set up guides and to capture with: the first rows, or the first batch of a loader.

        ``None`` if the model sees all rows at once.
        """
        return self._data.example

    def all_rows(self) -> tuple[tuple[Any, ...], dict[str, Any], Callable[[], AbstractContextManager[Any]]]:
        """Arguments with which model and guide see all rows at once, and what makes the context to run them in.

        Raises:
            ModelError: The data are not held as a whole, or a plate of the model takes only a part of its rows.
        """
        return self._data.all_rows()

    def batches(self, seed: int = 0, *, fixed_size: bool = False) -> Batches | LoaderBatches:
        """Batches of rows without end, each epoch in a random order that visits every row once.

        Args:
            seed: Seed of the orders.
            fixed_size: Whether all batches have the same size: rows that are left at the end of an epoch are then
                filled up with the first ones of the next. Always so for a model whose plate has a ``subsample_size``.
                A data loader makes its batches itself.

        Raises:
            ArgumentError: The problem has no minibatch.
            ModelError: The rows of the model cannot be chosen from outside.
        """
        return self._data.batches(seed, fixed_size=fixed_size)

    def pieces(self) -> Iterator[tuple[Batch, int]]:
        """All rows in their order, batch by batch, each with the number of its rows that count.

        A model that takes no smaller batch gets the last rows filled up with others, which do not count.

        Raises:
            ModelError: The rows come from a data loader, in no order, or cannot be chosen from outside.
        """
        return self._data.pieces()

    def row_axis(self, site: str) -> int | None:
        """Axis of a site that lies along the rows of which the model sees some at a time; ``None`` if it has none."""
        return self._data.layout.axes.get(site) if self._data.layout else None

    def rows(self, index: Tensor | None, size: int | None = None) -> Rows:
        """What model and guide have to be run in to see the rows ``index`` of a batch and no others.

        Args:
            index: Rows of the batch; ``None`` for those of a data loader.
            size: Rows in the batch; the length of ``index`` by default.
        """
        return self._data.rows(index, size)

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

        draws = self._repeat({}, [self.sites[key] for key in names], num_draws, seed=seed)
        return Posterior({key: value[None] for key, value in draws.items()}, method="prior", info={"seed": seed})

    def predictive(self, posterior: Posterior, seed: int = 0) -> dict[str, Tensor]:
        """Draws of the observed sites given each draw of the latent ones.

        Shape:
            each result ``(C, S, *site shape)``.

        Raises:
            ArgumentError: ``posterior`` lacks a latent site of this problem.
        """
        given, observed = self._latent_of(posterior), self._observed_sites
        draws = posterior.num_chains * posterior.num_draws
        return _by_chain(posterior, self._repeat(given, observed, draws, seed=seed, redraw=observed))

    def log_likelihood(self, posterior: Posterior) -> dict[str, Tensor]:
        """Log density of every observed row given each draw of the latent sites; zero where a row is masked.

        Discrete latent sites are summed out: a row that depends on them gets its log density given all other data that
        depend on them too, which for rows with discrete sites of their own is the log likelihood of the row.

        Shape:
            each result ``(C, S, *batch shape of the site)``.

        Raises:
            ArgumentError: ``posterior`` lacks a latent site of this problem.
            ModelError: The discrete latent sites of the model cannot be summed out row by row.
        """
        return self.log_densities(posterior, ("observed",))

    def log_prior(self, posterior: Posterior) -> dict[str, Tensor]:
        """Log prior density of every latent site at each draw, on the scale of the site.

        Sites whose prior depends on a discrete site are left out: it is summed out together with the data.

        Shape:
            each result ``(C, S, *batch shape of the site)``.

        Raises:
            ArgumentError: ``posterior`` lacks a latent site of this problem.
        """
        return self.log_densities(posterior, ("latent",))

    def log_densities(self, posterior: Posterior, kinds: Sequence[str]) -> dict[str, Tensor]:
        """Log densities of the sites of some kinds, ``"latent"`` and ``"observed"``, in one run of the model per draw.

        See :meth:`log_prior` and :meth:`log_likelihood`.
        """
        draws = posterior.num_chains * posterior.num_draws
        wanted = [site for site in self.sites.values() if site.kind in kinds]
        summed = any(site.kind == "discrete" for site in self.sites.values())
        values = self._repeat(
            self._latent_of(posterior),
            wanted,
            draws,
            seed=0,
            log_prob=True,
            enumerated=self.max_plate_nesting if summed else None,
        )
        return _by_chain(posterior, values)

    # --- many runs of the model -------------------------------------------------------------------------------------

    @property
    def _observed_sites(self) -> list[Site]:
        return [site for site in self.sites.values() if site.kind == "observed"]

    def _latent_of(self, posterior: Posterior) -> dict[str, Tensor]:
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
        return {key: flat[key].to(self.dtype) for key in names}

    def _repeat(
        self, given: Mapping[str, Tensor], wanted: list[Site], num_draws: int, *, seed: int, **how: Any
    ) -> dict[str, Tensor]:
        """Run the model once per draw; piece by piece of the rows where it is not run on all of them at once."""
        how |= {"num_runs": num_draws, "name": self.name, "dtype": self.dtype}
        if not self._data.by_part:
            return many_runs(self.model, self.args, self.kwargs, given=given, wanted=wanted, seed=seed, **how)
        layout = self._data.rows_of_batches
        seeds = torch.Generator().manual_seed(seed)
        pieces: dict[str, list[Tensor]] = {site.name: [] for site in wanted}
        for batch, kept in self._data.pieces():
            values = self._repeat_piece(
                given, wanted, batch, seed=int(torch.randint(2**31, (), generator=seeds)), **how
            )
            for site in wanted:
                if site.name not in values:
                    continue  # a latent site without a log density of its own
                along = layout.axes.get(site.name)
                if along is not None:
                    pieces[site.name].append(values[site.name].narrow(along + 1, 0, kept))
                elif not pieces[site.name]:
                    pieces[site.name].append(values[site.name])
                    if site.kind == "latent":
                        given = {**given, site.name: values[site.name]}  # drawn once for all rows
        return {
            key: torch.cat(parts, layout.axes[key] + 1) if key in layout.axes else parts[0]
            for key, parts in pieces.items()
            if parts
        }

    def _repeat_piece(
        self, given: Mapping[str, Tensor], wanted: list[Site], batch: Batch, *, redraw: Sequence[Site] = (), **how: Any
    ) -> dict[str, Tensor]:
        layout, index = self._data.rows_of_batches, batch.index
        assert index is not None
        return many_runs(
            self.model,
            batch.args,
            batch.kwargs,
            given={
                key: value.index_select(layout.axes[key] + 1, index) if key in layout.axes else value
                for key, value in given.items()
            },
            wanted=[layout.site(site, batch.size) for site in wanted],
            redraw=[layout.site(site, batch.size) for site in redraw],
            around=lambda: self.rows(index),
            **how,
        )

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


def _by_chain(posterior: Posterior, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    shape = (posterior.num_chains, posterior.num_draws)
    return {key: value.reshape(*shape, *value.shape[1:]) for key, value in flat.items()}
