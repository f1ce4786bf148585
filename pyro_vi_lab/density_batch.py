"""One density for each of many data sets, evaluated together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from pyro_vi_lab.capture import Graph
from pyro_vi_lab.density import LogDensity, Traceable
from pyro_vi_lab.errors import ArgumentError


class DensityBatch:
    r"""The log densities of one model with R data sets, the r-th fit's draws under the r-th data set.

    Args:
        densities: One for each data set; all of the same model, with data of the same shapes and types.

    Raises:
        ArgumentError: There are none, or their dimensions differ.

    Attributes:
        together: Whether all are evaluated in one call: only where one captured graph serves them all.
    """

    def __init__(self, densities: Sequence[LogDensity]) -> None:
        if not densities:
            raise ArgumentError("a batch of densities needs at least one")
        first = densities[0]
        if len({density.dim for density in densities}) > 1:
            raise ArgumentError(f"the densities have different dimensions: {sorted({one.dim for one in densities})}")
        self.densities = list(densities)
        self.dtype, self.device, self.dim, self.work = first.dtype, first.device, first.dim, first.work
        graphs = {id(density.shared_graph()) for density in densities}
        graph = first.shared_graph()
        self._graph: Graph | None = graph if len(graphs) == 1 else None
        self.together = self._graph is not None
        columns = zip(*(density.data for density in densities), strict=True) if self.together else ()
        self._data: tuple[Tensor, ...] = tuple(torch.stack(column) for column in columns)

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log densities and their gradients.

        Shape:
            z ``(K, R, D)``, results ``(K, R)`` and ``(K, R, D)``.
        """
        if self._graph is None:
            parts = [density.value_and_grad(z[:, r]) for r, density in enumerate(self.densities)]
            return torch.stack([value for value, _ in parts], 1), torch.stack([grad for _, grad in parts], 1)
        value, grad = self._graph.each(z, *self._data)
        return value, grad

    def traceable(self) -> Traceable | None:
        """The gradient as a part of larger graphs."""
        if self._graph is None:
            return None
        cache = self._graph.parts.setdefault("each", {})
        return Traceable(self._graph.vectorized_each, self._data, cache)

    def chosen(self, index: Tensor) -> Self:
        """The densities of some of the fits."""
        return type(self)([self.densities[i] for i in index.tolist()])
