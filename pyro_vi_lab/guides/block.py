"""Normals with a dense covariance in every block of coordinates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.distributions import constraints

from pyro_vi_lab.errors import ArgumentError, unknown_name
from pyro_vi_lab.families import BlockDiagonal, Family, LocationScale, Normal, Params
from pyro_vi_lab.guides.family_distribution import FamilyDistribution, FamilyTransform
from pyro_vi_lab.guides.family_guide import FamilyGuide
from pyro_vi_lab.guides.initialization import init_to_origin

Blocks = Literal["site", "plate"] | Sequence[Sequence[str]]


class BlockNormal(FamilyGuide):
    r"""Block-diagonal normal guide, :math:`q(z) = \prod_b N(z_b \mid \mu_b, L_b L_b^\top)`.

    Between :class:`MeanFieldNormal` and :class:`FullRankNormal`: dependence inside a block, none between blocks.

    Args:
        model: A Pyro model.
        init_loc_fn: Where to start each site; at zero on the unconstrained scale by default.
        init_scale: Standard deviation of every coordinate of z at the start.
        blocks: ``"site"``: one block for each site. ``"plate"``: one for each index of a plate, with everything of all
            sites that lie in the same plates there, and one for the sites in no plate. Or lists of names of sites, each
            list a block; sites that are not named have one each.
        create_plates: As in Pyro's guides, plates that guide and model share; not needed in general.

    ``scale_tril`` has the shape ``(B, b, b)``, b the size of the largest block; smaller ones are filled up with rows of
    the identity, on which nothing depends.

    Raises:
        ArgumentError: ``blocks`` is none of these; when the guide is first run, a name in it is no latent site, or is
            there twice.
    """

    scale_constraints: ClassVar = {"scale_tril": constraints.lower_cholesky}
    scale_tril: Tensor

    def __init__(
        self,
        model: Callable[..., Any],
        init_loc_fn: Callable[..., Any] = init_to_origin,
        init_scale: float = 0.1,
        *,
        blocks: Blocks = "site",
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        if isinstance(blocks, str) and blocks not in ("site", "plate"):
            raise ArgumentError(f"blocks must be 'site', 'plate' or lists of names of sites, got {blocks!r}")
        super().__init__(model, init_loc_fn, init_scale, create_plates=create_plates)
        self.blocks: Blocks = blocks if isinstance(blocks, str) else [list(block) for block in blocks]

    def _family(self) -> Family:
        groups: dict[Any, list[int]] = {}
        of_site = None if isinstance(self.blocks, str) else self._named_blocks(self.blocks)
        position = 0
        for name, shape in self._unconstrained_shapes.items():
            for place in range(shape.numel()):
                if of_site is not None:
                    key: Any = of_site[name]
                else:
                    key = name if self.blocks == "site" else self._indices_in_plates(name, place)
                groups.setdefault(key, []).append(position + place)
            position += shape.numel()
        return LocationScale(BlockDiagonal(tuple(map(tuple, groups.values()))), Normal())

    def _named_blocks(self, blocks: Sequence[Sequence[str]]) -> dict[str, Any]:
        result: dict[str, Any] = {name: name for name in self._unconstrained_shapes}
        for number, block in enumerate(blocks):
            for name in block:
                if name not in result:
                    raise unknown_name("site", name, result)
                if isinstance(result[name], int):
                    raise ArgumentError(f"site {name!r} is in two of the blocks")
                result[name] = number
        return result

    def _indices_in_plates(self, name: str, place: int) -> tuple[Any, ...]:
        """The plates of a coordinate of a site, and its index in each."""
        shape, event_dim = self._unconstrained_shapes[name], self._event_dim(name)
        index: list[int] = []
        for size in reversed(shape):
            place, rest = divmod(place, size)
            index.insert(0, rest)
        frames = sorted(self._stacks[name], key=lambda frame: frame.dim)
        return tuple((frame.name, index[frame.dim - event_dim]) for frame in frames)

    def get_posterior(self, *args: Any, **kwargs: Any) -> FamilyDistribution:
        """The normal distribution over z."""
        return FamilyDistribution(self.family, Params(self.loc, self.scale_tril))

    def get_transform(self, *args: Any, **kwargs: Any) -> FamilyTransform:
        """From standard normal u to z."""
        return FamilyTransform(self.family, Params(self.loc, self.scale_tril))
