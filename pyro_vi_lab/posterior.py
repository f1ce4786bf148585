"""The exchange value: draws of every site, whoever made them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vi_lab import arviz_bridge
from pyro_vi_lab.archive import write_archive
from pyro_vi_lab.errors import ArgumentError, DataError

MAX_RHAT = 1.01
"""Largest rank-normalised R-hat of a usable reference (Vehtari et al. 2021, Section 4)."""
MIN_ESS = 400.0
"""Smallest bulk and tail effective sample size of a usable reference (Vehtari et al. 2021, Section 4)."""
MAX_TREE_DEPTH = 10
"""Doublings of a trajectory at which nutpie, Pyro and Stan stop by default."""
MIN_EBFMI = 0.3
"""Smallest energy Bayesian fraction of missing information (Betancourt 2016; Stan warns below 0.3)."""


@dataclass(frozen=True, eq=False)
class Posterior:
    r"""Draws of every latent and deterministic site.

    Fits, NUTS, exact solutions and published draws all become this. It is checked when it is built: every site
    has the same number of chains and draws.

    Args:
        draws: Site name to draws.
        stats: Name to one number per draw; NUTS gives ``diverging``, ``energy``, ``lp``, ``step_size``,
            ``tree_depth``, ``acceptance_rate``, ``n_steps``; fits give ``log_p`` and ``log_q``.
        method: How the draws were made: ``"nuts"``, ``"full_rank"``, ``"exact"``, ...
        unconstrained: The same draws as vectors of the unconstrained space, where the method has them.
        info: Plain values worth keeping: seed, seconds, number of gradients, versions.

    Shape:
        draws ``(C, S, *site shape)``, stats ``(C, S)``, unconstrained ``(C, S, D)``.

    Raises:
        DataError: No sites, or sites whose numbers of chains and draws disagree.

    Example:
        >>> posterior = Posterior({"mu": torch.arange(8.0).reshape(2, 4)}, method="exact")
        >>> posterior.num_chains, posterior.num_draws, posterior.mean()["mu"].item()
        (2, 4, 3.5)
    """

    draws: Mapping[str, Tensor]
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    method: str = ""
    unconstrained: Tensor | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.draws:
            raise DataError("a posterior needs the draws of at least one site")
        first = next(iter(self.draws))
        expected = tuple(self.draws[first].shape[:2])
        parts = {**self.draws, **{f"stats[{name}]": value for name, value in self.stats.items()}}
        if self.unconstrained is not None:
            parts["unconstrained"] = self.unconstrained
        for name, value in parts.items():
            if value.dim() < 2 or tuple(value.shape[:2]) != expected:
                raise DataError(
                    f"draws of {name!r} have shape {tuple(value.shape)}; expected (chains, draws, ...) beginning with "
                    f"{expected}, as those of {first!r}"
                )
        if 0 in expected:
            raise DataError(f"a posterior needs at least one chain and one draw, got (chains, draws) = {expected}")

    def __repr__(self) -> str:
        sites = ", ".join(f"{name} {tuple(value.shape[2:])}" for name, value in self.draws.items())
        return f"Posterior({self.method or 'draws'}: {self.num_chains} chains of {self.num_draws} draws; {sites})"

    @property
    def num_chains(self) -> int:
        """Number of chains, C."""
        return int(next(iter(self.draws.values())).shape[0])

    @property
    def num_draws(self) -> int:
        """Number of draws per chain, S."""
        return int(next(iter(self.draws.values())).shape[1])

    def save(self, path: str | Path) -> None:
        """Write the draws to one file, whole or not at all; :func:`pyro_vi_lab.load` reads it.

        Raises:
            FileError: It cannot be written there.
        """
        header, arrays = self.parts()
        write_archive(Path(path), {"kind": "posterior", **header}, arrays)

    def parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a file of it holds: plain values, and arrays by name."""
        arrays = {f"draws/{name}": value.detach() for name, value in self.draws.items()}
        arrays |= {f"stats/{name}": value.detach() for name, value in self.stats.items()}
        if self.unconstrained is not None:
            arrays["unconstrained"] = self.unconstrained.detach()
        kept = {key: value for key, value in self.info.items() if isinstance(value, (str, int, float, list))}
        return {"method": self.method, "info": kept}, arrays

    def flat(self) -> dict[str, Tensor]:
        """Draws of all chains after one another: site name to ``(C * S, *site shape)``."""
        return {name: value.flatten(0, 1) for name, value in self.draws.items()}

    def thinned(self, num_draws: int) -> Posterior:
        """Every k-th draw of each chain, for about ``num_draws`` of all chains; all of them if there are no more."""
        step = max(1, self.num_chains * self.num_draws // num_draws)

        def chosen(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: value[:, ::step] for name, value in values.items()}

        unconstrained = None if self.unconstrained is None else self.unconstrained[:, ::step]
        return replace(self, draws=chosen(self.draws), stats=chosen(self.stats), unconstrained=unconstrained)

    def mean(self) -> dict[str, Tensor]:
        """Mean of every site over chains and draws, in the site's shape."""
        return {name: value.mean((0, 1)) for name, value in self._floating().items()}

    def sd(self) -> dict[str, Tensor]:
        """Standard deviation of every site over chains and draws (divisor C·S - 1), in the site's shape."""
        return {name: value.flatten(0, 1).std(0) for name, value in self._floating().items()}

    def quantile(self, q: float) -> dict[str, Tensor]:
        """Quantile ``q`` of every site over chains and draws, in the site's shape.

        Raises:
            ArgumentError: ``q`` outside [0, 1].
        """
        if not 0 <= q <= 1:
            raise ArgumentError(f"q is a probability in [0, 1], got {q!r}")
        # torch.quantile refuses more than 2**24 values; NumPy does not.
        return {
            name: torch.as_tensor(np.quantile(value.numpy(force=True), q, axis=(0, 1)))
            for name, value in self.draws.items()
        }

    def problems(self) -> list[str]:
        r"""Why these draws are unfit as a reference; empty if they are fit.

        Rank-normalised :math:`\hat R < 1.01`, bulk and tail ESS of at least 400 for every scalar of every site, no
        divergent transitions, and an energy Bayesian fraction of missing information of at least 0.3 in every
        chain. Independent draws (exact solutions, fits) pass with one chain too. Trajectories that reached the largest
        tree depth make chains slow and not wrong: they are named where R-hat or an ESS fails.

        References:
            Vehtari, Gelman, Simpson, Carpenter, Bürkner 2021, "Rank-normalization, folding, and localization",
            Bayesian Analysis 16(2). Betancourt 2016, "Diagnosing suboptimal cotangent disintegrations", eq. 5. Stan
        Development Team 2022, "Runtime warnings and convergence problems", Section "Maximum treedepth".
        """
        return list(self._problems)

    @cached_property
    def _problems(self) -> tuple[str, ...]:
        found = [
            f"{count} draws of {name} are not finite"
            for name, value in self.draws.items()
            if (
                count := int(
                    (
                        ~torch.isfinite(value)
                        .flatten(0, 1)
                        .reshape(self.num_chains * self.num_draws, math.prod(value.shape[2:]))
                        .all(-1)
                    ).sum()
                )
            )
        ]
        convergence, before = self.convergence(), len(found)
        if self.num_chains > 1:
            name, value = _extreme(convergence["rhat"], largest=True)
            if not value < MAX_RHAT:
                found.append(f"R-hat of {name} is {value:.3f} (must be below {MAX_RHAT})")
        for kind in ("bulk", "tail"):
            name, value = _extreme(convergence[f"ess_{kind}"], largest=False)
            if not value >= MIN_ESS:
                found.append(f"{kind} ESS of {name} is {value:.0f} (must be at least {MIN_ESS:.0f})")
        if len(found) > before and (saturated := self.saturated()):
            found.append(
                f"{saturated} of {self.num_chains * self.num_draws} trajectories reached the largest tree depth "
                f"({MAX_TREE_DEPTH}): they are too short for this posterior (start NUTS from a fit, or reparameterize)"
            )
        if "diverging" in self.stats and (count := int(self.stats["diverging"].sum())):
            found.append(f"{count} divergent transitions after warm-up (must be 0)")
        ebfmi = self.ebfmi()
        if ebfmi is not None and not bool((ebfmi >= MIN_EBFMI).all()):
            found.append(f"E-BFMI of chain {int(ebfmi.argmin())} is {ebfmi.min():.2f} (must be at least {MIN_EBFMI})")
        return tuple(found)

    def saturated(self) -> int | None:
        """Trajectories of NUTS that reached the largest tree depth, 10; ``None`` without tree depths."""
        return int((self.stats["tree_depth"] >= MAX_TREE_DEPTH).sum()) if "tree_depth" in self.stats else None

    def ebfmi(self) -> Tensor | None:
        r"""Energy Bayesian fraction of missing information of each chain, ``(C,)``; ``None`` without energies.

        .. math:: \frac{\sum_n (E_n - E_{n-1})^2}{\sum_n (E_n - \bar E)^2}
        """
        if "energy" not in self.stats:
            return None
        energy = self.stats["energy"].double()
        return energy.diff(dim=1).square().mean(1) / energy.var(1, correction=0)

    def convergence(self) -> dict[str, dict[str, Tensor]]:
        """Rank-normalised R-hat, bulk and tail ESS of every scalar.

        Returns:
            ``"rhat"``, ``"ess_bulk"`` and ``"ess_tail"``, each a dict of site to value.

        Shape:
            each value has the site's shape; a scalar whose draws are all equal gives NaN.
        """
        result: dict[str, dict[str, Tensor]] = {"rhat": {}, "ess_bulk": {}, "ess_tail": {}}
        for name, value in self.draws.items():
            array = value.numpy(force=True).astype(float)
            for key, numbers in arviz_bridge.convergence(array).items():
                result[key][name] = torch.as_tensor(numbers)
        return result

    def _floating(self) -> dict[str, Tensor]:
        return {name: value if value.is_floating_point() else value.double() for name, value in self.draws.items()}


def _extreme(values: Mapping[str, Tensor], *, largest: bool) -> tuple[str, float]:
    """Name and value of the worst scalar; constant scalars (NaN) are passed over unless there is nothing else."""
    found = ("", float("nan"))
    for name, tensor in values.items():
        for index in np.ndindex(tuple(tensor.shape)):
            value = float(tensor[index])
            if np.isnan(found[1]) or (value > found[1] if largest else value < found[1]):
                found = (element_name(name, index), value)
    return found


def element_name(site: str, index: tuple[int, ...]) -> str:
    """Name of one scalar of a site.

    Example:
        >>> element_name("theta", (2,)), element_name("mu", ())
        ('theta[2]', 'mu')
    """
    return f"{site}[{', '.join(map(str, index))}]" if index else site
