"""Location and scale among the parameters of a guide, read as a member of a family and written back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_vi_lab.families import FAMILIES, Family, Params
from pyro_vi_lab.guides import FamilyGuide
from pyro_vi_lab.natural_parts.leaf import Leaf, UnitTrilLeaf


class Member(ABC):
    """A member of a family among the parameters of a guide.

    Args:
        family: The family.
        loc: Parameter of the location.
        scales: Parameters of the scale.
    """

    def __init__(self, family: Family, loc: Leaf, scales: Sequence[Leaf]) -> None:
        self.family, self.loc, self.scales = family, loc, scales

    @abstractmethod
    def join(self, values: Sequence[Tensor]) -> Tensor:
        """The scale, from the values of its parameters."""

    @abstractmethod
    def split(self, scale: Tensor) -> list[Tensor]:
        """The values of the parameters of a scale."""

    def join_grads(self, grads: Sequence[Tensor]) -> Tensor:
        """The gradient with respect to the scale, from those with respect to its parameters."""
        return self.join(grads)

    @property
    def tensors(self) -> list[Tensor]:
        """All of its parameters."""
        return [self.loc.tensor, *(leaf.tensor for leaf in self.scales)]

    def read(self) -> Params:
        """The present member."""
        return Params(self.loc.value().reshape(-1), self.join([leaf.value() for leaf in self.scales]))

    def grads(self) -> Params:
        """The gradient of the ELBO with respect to location and scale."""
        return Params(self.loc.grad().reshape(-1), self.join_grads([leaf.grad() for leaf in self.scales]))

    def write(self, params: Params) -> None:
        """Put a member of the family into the parameters."""
        self.loc.write(params.loc.reshape(self.loc.tensor.shape))
        for leaf, value in zip(self.scales, self.split(params.scale), strict=True):
            leaf.write(value.reshape(leaf.tensor.shape))


class GuideMember(Member):
    """That of one of our guides."""

    def __init__(self, guide: FamilyGuide) -> None:
        super().__init__(guide.family, Leaf(guide, "loc"), [Leaf(guide, name) for name in guide.scale_constraints])
        self.guide = guide

    def join(self, values: Sequence[Tensor]) -> Tensor:
        """As the guide does."""
        return self.guide.join_scale(values)

    def split(self, scale: Tensor) -> list[Tensor]:
        """As the guide does."""
        return self.guide.split_scale(scale)


class MeanFieldMember(Member):
    """That of one of Pyro's diagonal guides, or of one site of it, of any shape."""

    def __init__(self, locs: nn.Module, loc: str, scales: nn.Module, scale: str) -> None:
        super().__init__(FAMILIES["mean_field"], Leaf(locs, loc), [Leaf(scales, scale)])

    def join(self, values: Sequence[Tensor]) -> Tensor:
        """All elements in a row."""
        return values[0].reshape(-1)

    def split(self, scale: Tensor) -> list[Tensor]:
        """The same."""
        return [scale]


class UnitTrilMember(Member):
    """That of an ``AutoMultivariateNormal``, whose L = diag(s)·T with T unit lower triangular."""

    def __init__(self, guide: nn.Module) -> None:
        scales = [Leaf(guide, "scale"), UnitTrilLeaf(guide, "scale_tril")]
        super().__init__(FAMILIES["full_rank"], Leaf(guide, "loc"), scales)

    def join(self, values: Sequence[Tensor]) -> Tensor:
        """L."""
        size, unit = values
        return size.unsqueeze(-1) * (unit.tril(-1) + torch.eye(len(size), dtype=size.dtype, device=size.device))

    def join_grads(self, grads: Sequence[Tensor]) -> Tensor:
        """Gradient with respect to L: the chain rule inverted, row by row."""
        size, unit = self.scales[0].value(), self.scales[1].tensor
        below = grads[1].tril(-1) / size.unsqueeze(-1)
        return below + torch.diag_embed(grads[0] - (below * unit.tril(-1)).sum(-1))

    def split(self, scale: Tensor) -> list[Tensor]:
        """The sizes and the unit triangle."""
        size = scale.diagonal()
        return [size, scale / size.unsqueeze(-1)]
