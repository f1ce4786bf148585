r"""Natural gradients of the ELBO for a family: the estimate, and a Pyro optimizer that takes the step.

In whitened coordinates (:math:`z = \mu + \sigma\varepsilon`) the natural gradient costs no more than the gradient: with
:math:`h = \sigma^\top \nabla_z (\log p - \log q)(z)`,

.. math:: \delta = E[h], \qquad M = \mathrm{sym}\, E[h \varepsilon^\top],

and :meth:`pyro_vi_lab.families.Family.step` moves along it inside a trust region in KL.

References:
    Amari 1998, "Natural gradient works efficiently in learning", Neural Computation 10. Khan & Rue 2023, "The Bayesian
    learning rule", JMLR 24. Roeder, Wu & Duvenaud 2017, "Sticking the landing", NeurIPS (no variance where q = p).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from pyro.optim.optim import PyroOptim
from torch import Tensor, nn
from torch.distributions import transform_to

from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.families import FAMILIES, Dense, Family, Params, Tangent
from pyro_vi_lab.guides.family_guide import FamilyGuide


class Estimate(NamedTuple):
    r"""The ELBO and its natural gradient at a batch of members, from K particles.

    Args:
        elbo: Mean of log p - log q, ``(*R)``.
        error: Its Monte Carlo standard error.
        tangent: The natural gradient.
        length: Half its squared Fisher length in nats: to first order the gain of a full step.
        gap: Newton decrement in nats: what the bound is below its optimum, to second order.
        noise: Expected part of ``gap`` that is Monte Carlo noise.
    """

    elbo: Tensor
    error: Tensor
    tangent: Tangent
    length: Tensor
    gap: Tensor
    noise: Tensor


def estimate(family: Family, params: Params, eps: Tensor, log_p: Tensor, grad: Tensor, *, newton: bool) -> Estimate:
    r"""Sticking-the-landing estimate of the ELBO's natural gradient.

    The noise is that of the regression of h on ε, whose slope is M: its residuals do not depend on how far q is from a
    Gaussian target, so neither does the noise.

    Args:
        family: The family.
        params: Its members.
        eps: Antithetic noise.
        log_p: Log density of the target at z.
        grad: Its gradient.
        newton: Whether the location of a family with a diagonal scale shall use the full mean Hessian.

    Shape:
        eps and grad ``(K, *R, D)``, log_p ``(K, *R)``.

    References:
        Salimans & Knowles 2013, "Fixed-form variational posterior approximation through stochastic linear regression",
        Bayesian Analysis 8, Section 3 (the regression).
    """
    num_pairs, dim = len(eps) // 2, eps.shape[-1]
    values = log_p - family.noise.log_prob(eps) + family.scale.log_det(params.scale)
    pairs = (values[:num_pairs] + values[num_pairs:]) / 2
    h = family.scale.multiply_transposed(params.scale, grad) + eps
    shift = h.mean(0)
    dense = isinstance(family.scale, Dense)
    if dense or newton:
        outer = torch.einsum("k...d,k...e->...de", h, eps) / len(eps)
        full = (outer + outer.mT) / 2
        stretch = full if dense else full.diagonal(dim1=-2, dim2=-1)
        tangent = Tangent(shift, stretch, None if dense else full)
        residual = h - shift - torch.einsum("...de,k...e->k...d", full, eps)
        curvatures, vectors = _eigh(full)
        shift = torch.einsum("...ij,...i->...j", vectors, shift)
        turned = torch.einsum("...ij,k...i->k...j", vectors, residual)
    else:
        stretch = (h * eps).mean(0)
        tangent = Tangent(shift, stretch)
        residual = turned = h - shift - stretch * eps
        curvatures = stretch
    # along each eigenvector of the mean Hessian: the Newton decrement where it is negative, the gradient's length
    # elsewhere
    precision = torch.where(
        curvatures < 1, (1 - curvatures).clamp_min(torch.finfo(h.dtype).eps), torch.ones_like(curvatures)
    )
    gap = (shift.square() / precision).sum(-1) / 2 + family.scale.squared_norm(stretch) / 4
    location_noise = (turned.square().mean(0) / precision).sum(-1) / (2 * len(eps))
    if dense:
        scale_noise = (residual.square().sum(-1) * eps.square().sum(-1)).mean(0) / (8 * len(eps))
    else:
        scale_noise = (residual * eps).square().sum(-1).mean(0) / (4 * len(eps))
    # residuals of a regression on D variables from n pairs are too small by (n - D) / n
    freedom = max(1 - dim / num_pairs, 0.25) if dense or newton else 1.0
    return Estimate(
        elbo=values.mean(0),
        error=pairs.std(0) / num_pairs**0.5,
        tangent=tangent,
        length=family.squared_norm(tangent) / 2,
        gap=gap,
        noise=(location_noise + scale_noise) / freedom,
    )


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigendecomposition; NaN for the matrices of a batch that are not finite (LAPACK would refuse the whole batch)."""
    finite = torch.isfinite(matrix).all(-1).all(-1)
    safe = torch.where(finite[..., None, None], matrix, torch.zeros_like(matrix))
    values, vectors = torch.linalg.eigh(safe)
    return torch.where(finite[..., None], values, torch.full_like(values, torch.nan)), vectors


class NaturalGradient(PyroOptim):
    r"""Natural-gradient optimizer for normal guides; a drop-in for Pyro's optimizers.

    Takes the joint natural step in location and scale for :class:`~pyro_vi_lab.guides.MeanFieldNormal`,
    :class:`~pyro_vi_lab.guides.FullRankNormal` and Pyro's ``AutoNormal``, ``AutoDiagonalNormal`` and
    ``AutoMultivariateNormal``, also inside an ``AutoGuideList``; every other parameter goes to ``others``. The
    gradients
    that :class:`pyro.infer.SVI` leaves in the parameters are all it needs.

    Args:
        guide: The guide that is fitted.
        lr: Step size ρ in (0, 1]: 1 is exact for a Gaussian target without noise. Noise in the parameters falls with
        it.
        max_kl: Largest KL divergence between successive guides, in nats: the trust region.
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
            known = ", ".join(["MeanFieldNormal", "FullRankNormal", *(kind.__name__ for kind in _READERS)])
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
            params, tangent = parts[0]
            if len(parts) > 1:  # one trust region over all sites of a diagonal guide
                params = Params(*(torch.cat(values) for values in zip(*(part[0] for part in parts), strict=True)))
                shift = torch.cat([part[1].shift for part in parts])
                tangent = Tangent(shift, torch.cat([part[1].stretch for part in parts]))
            if not bool(torch.isfinite(tangent.shift).all() & torch.isfinite(tangent.stretch).all()):
                return  # a step without a direction: stay, the next one draws other particles
            moved = family.step(params, tangent, lr=self.lr, max_kl=self.max_kl).params
            position = 0
            for block, (old, _) in zip(blocks, parts, strict=True):
                size = len(old.loc)
                block.write(Params(moved.loc[position : position + size], moved.scale[position : position + size]))
                position += size

    def get_state(self) -> dict[str, Any]:
        """Everything that :meth:`set_state` needs to go on as if nothing had happened."""
        return {"lr": self.lr, "max_kl": self.max_kl, "others": self.others.get_state()}

    def set_state(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what :meth:`get_state` gave."""
        self.lr, self.max_kl = state_dict["lr"], state_dict["max_kl"]
        self.others.set_state(state_dict["others"])


class _Block:
    """One pair (location, scale) of unconstrained parameters, read as a member of a family and written back."""

    def __init__(
        self, module: nn.Module, loc: str, scale: str, family: Family, *, unit_tril: str | None = None
    ) -> None:
        self.family = family
        self.loc, self.scale = _leaf(module, loc), _leaf(module, scale)
        self.constraint = _constraint(module, scale)
        self.unit_tril = None if unit_tril is None else _leaf(module, unit_tril)
        self.tensors = [t for t in (self.loc, self.scale, self.unit_tril) if t is not None]

    def read(self) -> tuple[Params, Tangent]:
        """The present member and the natural gradient of the ELBO there, from the loss's gradients."""
        if any(tensor.grad is None for tensor in self.tensors):
            nan = torch.full_like(self.loc, torch.nan).reshape(-1)
            return Params(nan, nan), Tangent(nan, nan)
        loc, grad_loc = self.loc.reshape(-1), -_grad(self.loc).reshape(-1)
        scale, grad_scale = self._constrained()
        shift = self.family.scale.multiply_transposed(scale, grad_loc)
        if not isinstance(self.family.scale, Dense):
            return Params(loc, scale), Tangent(shift, scale * grad_scale)
        lower = (scale.mT @ grad_scale).tril()
        return Params(loc, scale), Tangent(shift, lower + lower.tril(-1).mT)

    def _constrained(self) -> tuple[Tensor, Tensor]:
        """The scale and the gradient of minus the loss with respect to its free entries."""
        transform = transform_to(self.constraint)
        grad = -_grad(self.scale)
        if self.unit_tril is not None:
            # L = diag(s)·T with T unit lower triangular: invert the chain rule, row by row
            size = transform(self.scale)
            unit = self.unit_tril.tril(-1) + torch.eye(len(size), dtype=size.dtype, device=size.device)
            below = (-_grad(self.unit_tril)).tril(-1) / size.unsqueeze(-1)
            diagonal = grad / _derivative(transform, self.scale) - (below * unit).sum(-1)
            return size.unsqueeze(-1) * unit, below + torch.diag_embed(diagonal)
        scale = transform(self.scale)
        if isinstance(self.family.scale, Dense):
            # LowerCholesky: strictly lower entries as they are, the diagonal by exp
            diagonal = grad.diagonal() / scale.diagonal()
            return scale, grad.tril(-1) + torch.diag_embed(diagonal)
        return scale.reshape(-1), (grad / _derivative(transform, self.scale)).reshape(-1)

    def write(self, params: Params) -> None:
        """Put a member of the family into the parameters."""
        self.loc.data.copy_(params.loc.reshape(self.loc.shape))
        transform = transform_to(self.constraint)
        if self.unit_tril is None:
            shape = params.scale.shape if isinstance(self.family.scale, Dense) else self.scale.shape
            self.scale.data.copy_(transform.inv(params.scale.reshape(shape)))
        else:
            size = params.scale.diagonal()
            self.scale.data.copy_(transform.inv(size))
            self.unit_tril.data.copy_(params.scale / size.unsqueeze(-1))


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _derivative(transform: Any, x: Tensor) -> Tensor:
    """Derivative of an elementwise transform."""
    return transform.log_abs_det_jacobian(x, transform(x)).exp()


def _leaf(module: nn.Module, name: str) -> Tensor:
    """The unconstrained leaf tensor of a (Pyro) parameter."""
    values = dict(module.named_parameters(recurse=False))
    return values[f"{name}_unconstrained"] if f"{name}_unconstrained" in values else values[name]


def _constraint(module: nn.Module, name: str) -> Any:
    return module._pyro_params[name][0]  # type: ignore[index]


def _is_ours(part: nn.Module) -> bool:
    return isinstance(part, FamilyGuide)


def _normal_blocks(part: Any) -> list[_Block]:
    names = [name for name, site in part.prototype_trace.iter_stochastic_nodes()] if part.prototype_trace else []
    found = []
    for name in names:
        module_path, _, leaf = name.rpartition(".")
        locs, scales = part.locs, part.scales
        for step in module_path.split(".") if module_path else ():
            locs, scales = getattr(locs, step), getattr(scales, step)
        found.append(_SiteBlock(locs, scales, leaf))
    return list(found)


class _SiteBlock(_Block):
    """The parameters of one site of an ``AutoNormal``, kept in two sub-modules."""

    def __init__(self, locs: nn.Module, scales: nn.Module, name: str) -> None:
        self.family = FAMILIES["mean_field"]
        self.loc, self.scale, self.unit_tril = _leaf(locs, name), _leaf(scales, name), None
        self.constraint = _constraint(scales, name)
        self.tensors = [self.loc, self.scale]


_READERS: dict[type, Any] = {
    AutoNormal: _normal_blocks,
    AutoDiagonalNormal: lambda part: [_Block(part, "loc", "scale", FAMILIES["mean_field"])],
    AutoMultivariateNormal: lambda part: [_Block(part, "loc", "scale", FAMILIES["full_rank"], unit_tril="scale_tril")],
}
"""How to find the parameters in Pyro's guides."""


def _blocks(part: nn.Module) -> list[_Block]:
    if not (_is_ours(part) or type(part) in _READERS) or getattr(part, "prototype_trace", None) is None:
        return []
    if _is_ours(part):
        return [_Block(part, "loc", part.scale_name, part.family)]  # type: ignore[arg-type]
    return list(_READERS[type(part)](part))
