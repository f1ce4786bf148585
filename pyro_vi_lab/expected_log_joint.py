r"""The expected log joint density of a model under a guide of exponential families, without Monte Carlo error.

A sum of products of sufficient statistics of independent sites has the product of their expectations as its
expectation. Each family has two points (or, for vectors, points by signs) whose average of T is E[T]; over a table of
signs in which all combinations of a few sites occur equally often, the average of log p at such points is its
expectation. Discrete sites are summed over, each along a dimension of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_vi_lab.errors import FitError, ModelError
from pyro_vi_lab.families.exponential import ExponentialFamily, Values, sign_design
from pyro_vi_lab.guides import Conjugate
from pyro_vi_lab.rows import SameRows, active_rows

MIN_LOG = -1e30
"""What an impossible combination of discrete values counts, so that zero times it is zero."""


@dataclass
class Members:
    """The members of a factor that a call sees, and the points that stand for them."""

    family: ExponentialFamily
    eta: Tensor
    sites: tuple[str, ...]
    is_split: bool = False
    """Whether its members have signs of their own, as they depend on each other given all other sites."""

    @property
    def num_columns(self) -> int:
        """Columns of signs."""
        members = self.eta[..., 0].numel() if self.is_split else 1
        return 0 if self.family.is_discrete else self.family.num_signs * members

    def signs(self, row: Tensor) -> Tensor:
        """Signs of its columns in one run, by member."""
        batch = self.eta.shape[:-1]
        shape = batch if self.is_split else (1,) * len(batch)
        return row.reshape(*shape, self.family.num_signs).to(self.eta)

    def probabilities(self) -> Tensor:
        """Of a discrete factor, ``(*batch shape, K)``."""
        logits: Tensor = self.family.logits(self.eta)  # type: ignore[attr-defined]
        return logits.softmax(-1)


class LogJoint:
    """The log joint density of a model where it sees certain rows.

    Args:
        guide: A guide that has been run.
        model: Its model.
        args: Arguments of the model.
        kwargs: Its keyword arguments.

    Attributes:
        members: The members of each factor that the model sees, by the factor's name.
        row_scales: How much the rows of each factor count.
    """

    def __init__(
        self, guide: Conjugate, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self.guide, self.model, self.args, self.kwargs = guide, model, args, kwargs
        plates = guide._create_plates(*args, **kwargs)
        self.index = {
            name: torch.as_tensor(plate.indices) for name, plate in plates.items() if plate.subsample_size != plate.size
        }
        self.members = {
            name: Members(factor.family, guide._rows(name, guide.natural(name), plates), factor.sites)
            for name, factor in guide.factors.items()
        }
        self.row_scales = dict(guide.row_scales)
        self.is_local = {
            name: any(frame.name in self.index for frame in factor.frames) for name, factor in guide.factors.items()
        }
        self._nesting, self._rows = 0, dict[str, Tensor]()
        for name, factor in guide.factors.items():
            if factor.family.is_discrete and factor.event_dims[0]:
                raise ModelError(
                    f"the discrete site {name!r} has event dimensions, over all combinations of which would have to be "
                    "summed; put its elements in a plate instead"
                )
        self._look()

    def _look(self) -> None:
        """Read the plates of the model, and keep the rows that they have drawn."""
        values = {
            site: value
            for members in self.members.values()
            for site, value in zip(members.sites, members.family.sample(members.eta), strict=True)
        }
        nodes = [node for node in self._trace(values).nodes.values() if node["type"] == "sample"]
        frames = [frame for node in nodes for frame in node["cond_indep_stack"] if frame.vectorized]
        self._nesting = max((-frame.dim for frame in frames), default=0)
        drawn = {node["name"]: node["value"] for node in nodes if isinstance(node["fn"], _Subsample)}
        self._rows = {name: index for name, index in drawn.items() if name not in self.index}

    def _trace(self, values: Mapping[str, Tensor]) -> Any:
        rows = active_rows()  # which the block hides
        with ExitStack() as stack:
            stack.enter_context(poutine.block())
            tracer = stack.enter_context(poutine.trace())
            stack.enter_context(copy(rows) if rows else SameRows({**self._rows, **self.index}))
            stack.enter_context(_Values(values))
            self.model(*self.args, **self.kwargs)
            tracer.trace.compute_log_prob()
        return tracer.trace

    def value(self, values: Mapping[str, Tensor], probabilities: Mapping[str, Tensor]) -> Tensor:
        """Log p at values of the continuous sites, averaged over the discrete ones.

        Args:
            values: Of each continuous site.
            probabilities: Of each discrete site.
        """
        given, weights = dict(values), []
        for j, (name, table) in enumerate(probabilities.items()):
            dim = self._nesting + 1 + j
            number = torch.arange(table.shape[-1], device=table.device)
            number = number if type(self.members[name].family).__name__ == "Categorical" else number.to(table)
            given[name] = number.reshape(-1, *([1] * (dim - 1)))
            padding = [1] * (dim - table.dim())
            weights.append((name, dim, table.movedim(-1, 0).reshape(table.shape[-1], *padding, *table.shape[:-1])))
        total: Tensor | None = None
        for node_name, node in self._trace(given).nodes.items():
            if node["type"] != "sample" or isinstance(node["fn"], _Subsample):
                continue
            term = node["log_prob"]
            for name, dim, weight in weights:
                if term.dim() < dim or term.shape[-dim] == 1:
                    continue
                self._check_rows(node_name, term, name, weight)
                term = term.clamp_min(MIN_LOG) * weight
            total = term.sum() if total is None else total + term.sum()
        if total is None:
            raise ModelError("the model has no sites")
        return total

    def _check_rows(self, node: str, term: Tensor, name: str, weight: Tensor) -> None:
        for axis in range(1, self._nesting + 1):
            rows = weight.shape[-axis] if weight.dim() >= axis else 1
            if rows > 1 and (term.dim() < axis or term.shape[-axis] == 1):
                raise ModelError(
                    f"site {node!r} depends on the discrete site {name!r} but is outside of its plate, so that all "
                    "combinations would have to be summed over; put it in the plate"
                )

    # --- averages over points -----------------------------------------------------------------------------------------

    def design(self, strength: int) -> Tensor:
        """Signs of every run, for the columns of all factors one after another."""
        return sign_design(self.num_columns, strength) if self.num_columns else torch.ones(1, 0)

    @property
    def num_columns(self) -> int:
        """Signs that tell all points apart."""
        return sum(members.num_columns for members in self.members.values())

    def expectation(self, design: Tensor) -> Tensor:
        """E[log p], as the average over the runs of a design.

        Raises:
            FitError: It is not finite.
        """
        with torch.no_grad():
            probabilities = self._probabilities()
            values = [self.value(self._points(row, None)[0], probabilities) for row in design]
            total = torch.stack(values).mean(0)
            if not bool(torch.isfinite(total)):
                self._blame(design)
        return total

    def _blame(self, design: Tensor) -> None:
        """Say why an expectation is not finite."""
        values, _ = self._points(design[0], None)
        for name, members in self.members.items():
            points = tuple(values[site] for site in members.sites if site in values)
            if points and not bool(torch.isfinite(members.family.statistics(points)).all()):
                raise FitError(
                    f"an expectation of the logarithm of site {name!r} is beyond what {members.eta.dtype} can hold: it "
                    "has concentrations near zero; give it a prior with larger ones"
                )
        nodes = self._trace(values).nodes.items()
        bad = [name for name, node in nodes if node["type"] == "sample" and not bool(node["log_prob"].isfinite().all())]
        raise FitError(f"the expected log density is not finite, of site {', '.join(map(repr, bad)) or 'none alone'}")

    def message(self, design: Tensor, name: str) -> Tensor:
        r""":math:`E[\eta^*]` of each member of a factor, from gradients over the runs of a design.

        Args:
            design: From :meth:`design`.
            name: Of the factor.
        """
        members = self.members[name]
        runs: list[tuple[Tensor, Values, Values]] = []
        for row in design:
            with torch.no_grad():
                values, signs = self._points(row, name)
                probabilities = self._probabilities()
            leaves = (
                (probabilities[name],) if members.family.is_discrete else tuple(values[site] for site in members.sites)
            )
            with torch.enable_grad():
                for leaf in leaves:
                    leaf.requires_grad_(True)
                grads = torch.autograd.grad(self.value(values, probabilities), leaves, allow_unused=True)
            filled = tuple(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True))
            runs.append((signs, tuple(leaf.detach() for leaf in leaves), filled))
        signs = torch.stack([run[0] for run in runs])
        points, grads = (
            tuple(torch.stack(parts) for parts in zip(*(run[k] for run in runs), strict=True)) for k in (1, 2)
        )
        if members.family.is_discrete:
            return members.family.from_scores(grads[0].mean(0))  # type: ignore[attr-defined]
        return members.family.message(members.family.tamed(members.eta), signs, points, grads)

    def _probabilities(self) -> dict[str, Tensor]:
        return {key: members.probabilities() for key, members in self.members.items() if members.family.is_discrete}

    def _points(self, row: Tensor, wanted: str | None) -> tuple[dict[str, Tensor], Tensor]:
        """Values of the continuous sites in one run, and the signs of the factor that is wanted."""
        values: dict[str, Tensor] = {}
        position, wanted_signs = 0, row[:0]
        for name, members in self.members.items():
            columns = row[position : position + members.num_columns]
            position += members.num_columns
            if members.family.is_discrete:
                continue
            signs = members.signs(columns)
            eta = members.eta
            if name == wanted:
                # any points do for itself, as log p is linear in its T; those whose average is E[T] are for the others
                eta, wanted_signs = members.family.tamed(eta), signs
            values.update(zip(members.sites, members.family.point(eta, signs), strict=True))
        return values, wanted_signs


class _Values(Messenger):
    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True
