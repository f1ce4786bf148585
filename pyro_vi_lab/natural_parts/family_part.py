r"""The natural step of a guide over a family, in closed form.

In whitened coordinates (:math:`z = \mu + \sigma\varepsilon`) the natural gradient costs no more than the gradient: with
:math:`h = \sigma^\top \nabla_z (\log p - \log q)(z)`,

.. math:: \delta = E[h], \qquad M = \mathrm{sym}\, E[h \varepsilon^\top],

and :meth:`pyro_vi_lab.families.Family.step` moves along it inside a trust region in KL.

References:
    Amari 1998, "Natural gradient works efficiently in learning", Neural Computation 10. Khan & Rue 2023, "The Bayesian
    learning rule", JMLR 24. Roeder, Wu & Duvenaud 2017, "Sticking the landing", NeurIPS (no variance where q = p).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from torch import Tensor

from pyro_vi_lab.families import Params, Tangent
from pyro_vi_lab.natural_parts.member import MeanFieldMember, Member, UnitTrilMember
from pyro_vi_lab.natural_parts.part import NaturalPart, Settings, averaged


class FamilyPart(NaturalPart):
    """Members of one family, whose parameters move together.

    Args:
        members: One, or those of the sites of a diagonal guide, for which there is one trust region.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        self.family = members[0].family

    @property
    def tensors(self) -> list[Tensor]:
        """All of their parameters."""
        return [tensor for member in self.members for tensor in member.tensors]

    def step(self, settings: Settings, state: dict[str, Any]) -> None:
        """Take the natural step."""
        params = _joined([member.read() for member in self.members])
        tangent = self.family.tangent(params, *_joined([member.grads() for member in self.members]))
        # the metric is enlarged by the factor 1 + λ: the same as a step that is shorter by it
        shrunk = 1 / (1 + settings.damping)
        shift = averaged(state, "shift", tangent.shift, settings.momentum) * shrunk
        stretch = averaged(state, "stretch", tangent.stretch, settings.momentum) * shrunk
        max_kl = min(settings.max_kl, self.family.safe_kl)
        self._write(self.family.step(params, Tangent(shift, stretch), lr=settings.lr, max_kl=max_kl).params)

    def _write(self, params: Params) -> None:
        if len(self.members) == 1:
            self.members[0].write(params)
            return
        sizes = [member.loc.tensor.numel() for member in self.members]
        for member, loc, scale in zip(self.members, *(value.split(sizes) for value in params), strict=True):
            member.write(Params(loc, scale))


def _joined(members: Sequence[Params]) -> Params:
    if len(members) == 1:
        return members[0]
    return Params(*(torch.cat(values) for values in zip(*members, strict=True)))


def _sites_of_auto_normal(guide: Any) -> list[Member]:
    found: list[Member] = []
    for name, _ in guide.prototype_trace.iter_stochastic_nodes():
        module_path, _, leaf = name.rpartition(".")
        locs, scales = guide.locs, guide.scales
        for step in module_path.split(".") if module_path else ():
            locs, scales = getattr(locs, step), getattr(scales, step)
        found.append(MeanFieldMember(locs, leaf, scales, leaf))
    return found


PYRO_GUIDES: dict[type, Callable[[Any], list[Member]]] = {
    AutoNormal: _sites_of_auto_normal,
    AutoDiagonalNormal: lambda guide: [MeanFieldMember(guide, "loc", guide, "scale")],
    AutoMultivariateNormal: lambda guide: [UnitTrilMember(guide)],
}
"""How to find the parameters in Pyro's guides."""
