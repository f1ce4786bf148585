r"""A Pyro optimizer that takes natural-gradient steps of the guides over a family.

In whitened coordinates (:math:`z = \mu + \sigma\varepsilon`) the natural gradient costs no more than the gradient: with
:math:`h = \sigma^\top \nabla_z (\log p - \log q)(z)`,

.. math:: \delta = E[h], \qquad M = \mathrm{sym}\, E[h \varepsilon^\top],

and :meth:`pyro_vi_lab.families.Family.step` moves along it inside a trust region in KL.

References:
    Amari 1998, "Natural gradient works efficiently in learning", Neural Computation 10. Khan & Rue 2023, "The Bayesian
    learning rule", JMLR 24. Roeder, Wu & Duvenaud 2017, "Sticking the landing", NeurIPS (no variance where q = p).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from pyro.optim.optim import PyroOptim
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.families import FAMILIES, Params
from pyro_vi_lab.guides import GUIDES, FamilyGuide


class NaturalGradient(PyroOptim):
    r"""Natural-gradient optimizer for guides over a family; a drop-in for Pyro's optimizers.

    Takes the joint natural step in location and scale for the guides of :data:`pyro_vi_lab.guides.GUIDES` and Pyro's
    ``AutoNormal``, ``AutoDiagonalNormal`` and
    ``AutoMultivariateNormal``, also inside an ``AutoGuideList``; every other parameter goes to ``others``. The
    gradients
    that :class:`pyro.infer.SVI` leaves in the parameters are all it needs.

    Args:
        guide: The guide that is fitted.
        lr: Step size ρ in (0, 1]: 1 is exact for a Gaussian target without noise. Noise in the parameters falls with
        it.
        max_kl: Largest KL divergence between successive guides, in nats: the trust region. For a low-rank guide it is
            no more than 0.5.
        others: Optimizer of all other parameters; ``pyro.optim.Adam({"lr": 0.01})`` by default.

    Raises:
        ArgumentError: ``guide`` holds none of the guides above, or a number is out of range.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_vi_lab.guides import FullRankNormal
        >>> from pyro_vi_lab.objectives import ELBO
        >>> pyro.set_rng_seed(0)
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(2.0))
        >>> guide = FullRankNormal(model)
        >>> svi = pyro.infer.SVI(model, guide, NaturalGradient(guide, lr=1.0), ELBO(num_particles=16))
        >>> for _ in range(20):
        ...     loss = svi.step()
        >>> round(guide.median()["x"].item(), 3)
        1.0
    """

    def __init__(
        self, guide: nn.Module, *, lr: float = 0.5, max_kl: float = 8.0, others: PyroOptim | None = None
    ) -> None:
        if not 0 < lr <= 1:
            raise ArgumentError(f"lr is a step size in (0, 1], got {lr!r}")
        if not max_kl > 0:
            raise ArgumentError(f"max_kl is a KL divergence in nats and must be positive, got {max_kl!r}")
        parts: Iterable[nn.Module] = getattr(guide, "modules", tuple)()  # a plain function has none
        if not any(type(part) in _READERS or _is_ours(part) for part in parts):
            known = ", ".join(kind.__name__ for kind in (*GUIDES.values(), *_READERS))
            raise ArgumentError(f"NaturalGradient cannot handle the guide {type(guide).__name__}; it knows {known}")
        super().__init__(
            torch.optim.SGD, {"lr": lr}
        )  # for the base class's bookkeeping; no such optimizer is ever made
        self.guide, self.lr, self.max_kl = guide, lr, max_kl
        self.others = others if others is not None else PyroOptim(torch.optim.Adam, {"lr": 0.01})

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Take one step from the gradients in ``params`` (unconstrained leaf tensors), as SVI calls it."""
        remaining = {id(tensor): tensor for tensor in params}
        for part in self.guide.modules():
            blocks = _blocks(part)
            if not blocks or not all(id(t) in remaining for block in blocks for t in block.tensors):
                continue
            self._step(blocks)
            for block in blocks:
                for tensor in block.tensors:
                    remaining.pop(id(tensor))
        if remaining:
            self.others(list(remaining.values()), *args, **kwargs)

    def _step(self, blocks: list[_Block]) -> None:
        with torch.no_grad():
            family = blocks[0].family
            parts = [block.read() for block in blocks]
            # one trust region over all sites of a diagonal guide
            params, grads = (
                Params(*(torch.cat(values) if len(values) > 1 else values[0] for values in zip(*members, strict=True)))
                for members in zip(*parts, strict=True)
            )
            if not all(bool(torch.isfinite(grad).all()) for grad in grads):
                return  # a step without a direction: stay, the next one draws other particles
            tangent = family.tangent(params, *grads)
            moved = family.step(params, tangent, lr=self.lr, max_kl=min(self.max_kl, family.safe_kl)).params
            if len(blocks) == 1:
                blocks[0].write(moved)
                return
            sizes = [len(old.loc) for old, _ in parts]
            for block, loc, scale in zip(blocks, *(value.split(sizes) for value in moved), strict=True):
                block.write(Params(loc, scale))

    def get_state(self) -> dict[str, Any]:
        """Everything that :meth:`set_state` needs to go on as if nothing had happened."""
        return {"lr": self.lr, "max_kl": self.max_kl, "others": self.others.get_state()}

    def set_state(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what :meth:`get_state` gave."""
        self.lr, self.max_kl = state_dict["lr"], state_dict["max_kl"]
        self.others.set_state(state_dict["others"])


class _Leaf:
    """An unconstrained parameter, read and written as its constrained value."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.tensor = _leaf(module, name)
        registered = getattr(module, "_pyro_params", {})
        self.transform = transform_to(registered[name][0] if name in registered else constraints.real)
        self.is_tril = self.transform.codomain is constraints.lower_cholesky

    def value(self) -> Tensor:
        """The constrained value."""
        return self.transform(self.tensor)

    def grad(self) -> Tensor:
        """Gradient of minus the loss with respect to the constrained value."""
        assert self.tensor.grad is not None
        grad = -self.tensor.grad
        if self.is_tril:  # strictly lower entries as they are, the diagonal by exp
            diagonal = grad.diagonal(dim1=-2, dim2=-1) / self.value().diagonal(dim1=-2, dim2=-1)
            return grad.tril(-1) + torch.diag_embed(diagonal)
        return grad / self.derivative()

    def derivative(self) -> Tensor:
        """Derivative of an elementwise transform."""
        return self.transform.log_abs_det_jacobian(self.tensor, self.value()).exp()

    def write(self, value: Tensor) -> None:
        """Set the constrained value."""
        self.tensor.data.copy_(self.transform.inv(value))


class _UnitTril(_Leaf):
    """A unit lower triangular matrix, of whose leaf only the part below the diagonal matters."""

    def grad(self) -> Tensor:
        """Gradient of minus the loss."""
        assert self.tensor.grad is not None
        return -self.tensor.grad

    def write(self, value: Tensor) -> None:
        """Set the matrix."""
        self.tensor.data.copy_(value)


class _Block:
    """Location and scale among the parameters of a guide, read as a member of a family and written back."""

    def __init__(self, guide: FamilyGuide) -> None:
        self.family = guide.family
        self.join: Callable[[Sequence[Tensor]], Tensor] = guide.join_scale
        self.split: Callable[[Tensor], list[Tensor]] = guide.split_scale
        self.loc = _Leaf(guide, "loc")
        self.scales = [_Leaf(guide, name) for name in guide.scale_constraints]

    @property
    def tensors(self) -> list[Tensor]:
        """All of its parameters."""
        return [self.loc.tensor, *(leaf.tensor for leaf in self.scales)]

    def read(self) -> tuple[Params, Params]:
        """The present member, and the gradient of the ELBO there with respect to location and scale."""
        if any(tensor.grad is None for tensor in self.tensors):
            nothing = [torch.full_like(leaf.value(), torch.nan) for leaf in self.scales]
            return self.member(), Params(torch.full_like(self.member().loc, torch.nan), self.join(nothing))
        return self.member(), Params(self.loc.grad().reshape(-1), self.join([leaf.grad() for leaf in self.scales]))

    def member(self) -> Params:
        """The present member."""
        return Params(self.loc.value().reshape(-1), self.join([leaf.value() for leaf in self.scales]))

    def write(self, params: Params) -> None:
        """Put a member of the family into the parameters."""
        self.loc.write(params.loc.reshape(self.loc.tensor.shape))
        for leaf, value in zip(self.scales, self.split(params.scale), strict=True):
            leaf.write(value.reshape(leaf.tensor.shape))


class _MeanFieldBlock(_Block):
    """Location and scale of one of Pyro's diagonal guides, or of one site of it, of any shape."""

    def __init__(self, locs: nn.Module, loc: str, scales: nn.Module, scale: str) -> None:
        self.family = FAMILIES["mean_field"]
        self.join = lambda values: values[0].reshape(-1)
        self.split = lambda value: [value]
        self.loc, self.scales = _Leaf(locs, loc), [_Leaf(scales, scale)]


class _UnitTrilBlock(_Block):
    """Those of an ``AutoMultivariateNormal``, whose L = diag(s)·T with T unit lower triangular."""

    def __init__(self, guide: nn.Module) -> None:
        self.family, self.join, self.split = FAMILIES["full_rank"], self._join, self._split
        self.loc, self.scales = _Leaf(guide, "loc"), [_Leaf(guide, "scale"), _UnitTril(guide, "scale_tril")]

    def member(self) -> Params:
        """The present member."""
        size, unit = self._size_and_unit()
        return Params(self.loc.value(), size.unsqueeze(-1) * unit)

    def _size_and_unit(self) -> tuple[Tensor, Tensor]:
        size, unit = self.scales[0].value(), self.scales[1].tensor
        return size, unit.tril(-1) + torch.eye(len(size), dtype=size.dtype, device=size.device)

    def _join(self, grads: Sequence[Tensor]) -> Tensor:
        """Gradient with respect to L: the chain rule inverted, row by row."""
        size, unit = self._size_and_unit()
        below = grads[1].tril(-1) / size.unsqueeze(-1)
        return below + torch.diag_embed(grads[0] - (below * unit).sum(-1))

    def _split(self, tril: Tensor) -> list[Tensor]:
        size = tril.diagonal()
        return [size, tril / size.unsqueeze(-1)]


def _leaf(module: nn.Module, name: str) -> Tensor:
    """The unconstrained leaf tensor of a (Pyro) parameter."""
    values = dict(module.named_parameters(recurse=False))
    return values[f"{name}_unconstrained"] if f"{name}_unconstrained" in values else values[name]


def _is_ours(part: nn.Module) -> bool:
    return isinstance(part, FamilyGuide)


def _normal_blocks(part: Any) -> list[_Block]:
    found: list[_Block] = []
    for name, _ in part.prototype_trace.iter_stochastic_nodes() if part.prototype_trace else []:
        module_path, _, leaf = name.rpartition(".")
        locs, scales = part.locs, part.scales
        for step in module_path.split(".") if module_path else ():
            locs, scales = getattr(locs, step), getattr(scales, step)
        found.append(_MeanFieldBlock(locs, leaf, scales, leaf))
    return found


_READERS: dict[type, Callable[[Any], list[_Block]]] = {
    AutoNormal: _normal_blocks,
    AutoDiagonalNormal: lambda part: [_MeanFieldBlock(part, "loc", part, "scale")],
    AutoMultivariateNormal: lambda part: [_UnitTrilBlock(part)],
}
"""How to find the parameters in Pyro's guides."""


def _blocks(part: nn.Module) -> list[_Block]:
    if not (_is_ours(part) or type(part) in _READERS) or getattr(part, "prototype_trace", None) is None:
        return []
    if isinstance(part, FamilyGuide):
        return [_Block(part)]
    return _READERS[type(part)](part)
