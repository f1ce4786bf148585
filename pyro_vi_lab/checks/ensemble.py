"""Many short Hamiltonian chains that start at the draws of an approximation: does anything move?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

ValueAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]

TARGET_ACCEPT = 0.8
"""Acceptance rate that the step size adapts to (Hoffman & Gelman 2014, Section 3.2)."""
TRAJECTORY = math.pi / 2
"""Longest trajectory where the whitened target is a standard normal: its end is independent of its start."""
MAX_LEAPS = 8
"""Most leapfrog steps of a trajectory."""
PRIOR_WEIGHT = 5
"""Draws that the present whitening counts for when it is estimated anew (Stan's regularization of its metric)."""
MAX_STEP_SIZE = 2.0
"""Largest step at which leapfrog is stable for a standard normal."""
FORGET = 5
"""Iterations of a round after which its step size adapts more slowly."""


@dataclass(frozen=True, eq=False)
class Ensemble:
    r"""The draws of M short chains after their whitening was adapted, and whether they have forgotten their start.

    Args:
        z: Draws on the unconstrained scale.
        start: Where each chain started: draws of the approximation.
        acceptance: Mean acceptance rate of the kept iterations.
        num_gradients: Gradients of the log density.

    Shape:
        z ``(M, T, D)``, start ``(M, D)``.
    """

    z: Tensor
    start: Tensor
    acceptance: float
    num_gradients: int
    _kernel: _Kernel = field(repr=False)

    def more(self, num_draws: int) -> Ensemble:
        """The same chains, gone on for so many iterations."""
        return _kept(self._kernel, self.start, num_draws, self.z, self.acceptance)

    @property
    def memory(self) -> Tensor:
        r"""Correlation across chains of where they started with where they are in the later half, ``(2, D)``.

        First of the coordinates, then of their squared distances from the mean, which a chain may remember that has
        long been on both sides. Zero, within :math:`1/\sqrt M`, for chains that have forgotten their start; near one
        for those that are stuck.
        """
        later, center = self.z[:, self.z.shape[1] // 2 :], self.z.mean((0, 1))
        pairs = (
            (self.start, later.mean(1)),
            ((self.start - center).square(), (later - center).square().mean(1)),
        )
        return torch.stack([_correlation(one, other) for one, other in pairs])

    @property
    def drift(self) -> Tensor:
        """Change of means and of mean squares from the first to the second half, in standard errors, ``(2, D)``."""
        half, center = self.z.shape[1] // 2, self.z.mean((0, 1))
        found = []
        for values in (self.z, (self.z - center).square()):
            change = values[:, half:].mean(1) - values[:, :half].mean(1)
            error = change.std(0) / math.sqrt(len(change))
            found.append(torch.where(error > 0, change.mean(0) / error, torch.zeros_like(error)))
        return torch.stack(found)

    @property
    def memory_se(self) -> float:
        """Standard error of a memory of zero."""
        return 1 / math.sqrt(len(self.start))

    def __repr__(self) -> str:
        chains, kept, dim = self.z.shape
        return (
            f"Ensemble({chains} chains of {kept} draws of {dim} coordinates; acceptance {self.acceptance:.2f}, "
            f"largest memory {float(self.memory.abs().max()):.2f} ± {self.memory_se:.2f})"
        )


def run_ensemble(
    value_and_grad: ValueAndGrad,
    start: Tensor,
    root: Tensor,
    *,
    adapt: Sequence[int] = (10, 10, 10),
    num_draws: int = 40,
    seed: int = 0,
) -> Ensemble:
    r"""Move M draws of an approximation by Hamiltonian Monte Carlo towards the target.

    If the approximation is the target, its draws stay what they are: a sample of it. If it is too narrow, too wide or
    displaced, the chains move at once, long before a single chain would have converged, and the mean over M chains
    shows it with the precision of M independent draws. The kernel adapts to all chains at once: the step size to their
    mean acceptance, the whitening to their pooled covariance after each round.

    Args:
        value_and_grad: Log density and its gradient, ``(M, D)`` to ``(M)`` and ``(M, D)``; a point outside the
            support has the density minus infinity.
        start: Independent draws of the approximation, inside the support of the target.
        root: A factor of its covariance: a lower triangle ``(D, D)``, or standard deviations ``(D,)``.
        adapt: Iterations of each round after which the whitening is estimated anew; not kept.
        num_draws: Iterations kept, T.
        seed: Seed of all randomness.

    Shape:
        start ``(M, D)``.

    References:
        Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari & Gelman 2024, "Nested R-hat: assessing the convergence of
        Markov chain Monte Carlo when running many short chains", Bayesian Analysis. Hoffman & Sountsov 2022,
        "Tuning-free generalized Hamiltonian Monte Carlo", AISTATS (adaptation across chains). Neal 2011, "MCMC using
        Hamiltonian dynamics", Section 3.

    Example:
        >>> start = 0.3 * torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> moved = run_ensemble(lambda z: (-0.5 * z.square().sum(-1), -z), start, torch.full((2,), 0.3).double())
        >>> bool((moved.z.flatten(0, 1).std(0) - 1).abs().max() < 0.1)
        True
    """
    generator = torch.Generator().manual_seed(seed)
    kernel = _Kernel(value_and_grad, start, root, generator)
    for length in adapt:
        draws = []
        for t in range(length):
            kernel.move()
            kernel.adapt_step(0.8 if t < FORGET else 0.4)
            draws.append(kernel.z)
        kernel.whiten(torch.stack(draws[length // 2 :]))
    for _ in range(FORGET):  # the whitening is new; afterwards the kernel is fixed, which leaves the target invariant
        kernel.move()
        kernel.adapt_step(0.4)
    return _kept(kernel, start, num_draws, start[:, None][:, :0], 0.0)


def _kept(kernel: _Kernel, start: Tensor, num_draws: int, before: Tensor, acceptance: float) -> Ensemble:
    draws, rates = [], []
    for _ in range(num_draws):
        rates.append(kernel.move())
        draws.append(kernel.z)
    z = torch.cat([before, torch.stack(draws, 1)], 1)
    acceptance = (acceptance * before.shape[1] + sum(rates)) / z.shape[1]
    return Ensemble(z, start, acceptance, kernel.num_gradients, kernel)


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    one, other = one - one.mean(0), other - other.mean(0)
    norm = (one.square().sum(0) * other.square().sum(0)).sqrt()
    return torch.where(norm > 0, (one * other).sum(0) / norm, torch.zeros_like(norm))


class _Kernel:
    """Hamiltonian Monte Carlo of M chains in shared whitened coordinates."""

    def __init__(self, value_and_grad: ValueAndGrad, start: Tensor, root: Tensor, generator: torch.Generator) -> None:
        self.value_and_grad, self.z, self.root, self.generator = value_and_grad, start, root, generator
        self.value, self.grad = self._evaluate(start)
        self.num_gradients = len(start)
        self.size = start.shape[-1] ** -0.25
        self.rate = TARGET_ACCEPT

    def move(self) -> float:
        """One trajectory of every chain; the mean acceptance rate."""
        size = self.size * (0.7 + 0.3 * self._uniform())
        leaps = math.ceil(TRAJECTORY * (0.5 + 0.5 * self._uniform()) / size)
        leaps = min(max(leaps, 1), MAX_LEAPS)
        momentum = torch.randn(self.z.shape, generator=self.generator, dtype=self.z.dtype).to(self.z.device)
        energy = self.value - momentum.square().sum(-1) / 2
        z, value, grad = self.z, self.value, self.grad
        momentum = momentum + size / 2 * self._pulled(grad)
        for leap in range(leaps):
            z = z + size * self._pushed(momentum)
            value, grad = self._evaluate(z)
            momentum = momentum + (size if leap < leaps - 1 else size / 2) * self._pulled(grad)
        self.num_gradients += leaps * len(z)
        change = value - momentum.square().sum(-1) / 2 - energy
        chance = torch.where(change.isnan(), torch.zeros_like(change), change.clamp_max(0).exp())
        taken = torch.rand(chance.shape, generator=self.generator, dtype=z.dtype).to(z.device) < chance
        self.z = torch.where(taken[:, None], z, self.z)
        self.grad = torch.where(taken[:, None], grad, self.grad)
        self.value = torch.where(taken, value, self.value)
        self.rate = float(chance.mean())
        return self.rate

    def adapt_step(self, gain: float) -> None:
        self.size = min(self.size * math.exp(gain * (self.rate - TARGET_ACCEPT)), MAX_STEP_SIZE)

    def whiten(self, draws: Tensor) -> None:
        """The covariance of draws ``(T, M, D)``, shrunk to the present one as if that were known from a few draws."""
        flat = draws.flatten(0, 1)
        centered = flat - flat.mean(0)
        # draws of one chain within a round hardly count as several
        weight, prior = 2 * draws.shape[1], max(PRIOR_WEIGHT, draws.shape[-1])
        if self.root.dim() == 1:
            variance = (centered / self.root).square().mean(0)
            self.root = self.root * ((weight * variance + PRIOR_WEIGHT) / (weight + PRIOR_WEIGHT)).sqrt()
            return
        white = torch.linalg.solve_triangular(self.root, centered.T, upper=False)
        identity = torch.eye(len(self.root), dtype=white.dtype, device=white.device)
        shrunk = (weight * white @ white.T / white.shape[1] + prior * identity) / (weight + prior)
        self.root = self.root @ torch.linalg.cholesky(shrunk)

    def _evaluate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = self.value_and_grad(z)
        # outside the support the trajectory goes straight on; it is refused at its end if it ends there
        value = torch.where(value.isnan(), torch.full_like(value, -math.inf), value)
        return value, torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0)

    def _uniform(self) -> float:
        return float(torch.rand((), generator=self.generator))

    def _pushed(self, u: Tensor) -> Tensor:
        return u * self.root if self.root.dim() == 1 else u @ self.root.T

    def _pulled(self, x: Tensor) -> Tensor:
        return x * self.root if self.root.dim() == 1 else x @ self.root
