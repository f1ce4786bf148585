from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch import Tensor

from pyro_vi_lab.density_engine import Record, Result, Status, ascend
from pyro_vi_lab.families import FAMILIES, Dense, Family, Params
from pyro_vi_lab.natural_step import tolerance

each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


class Target:
    """What the engine asks of a density: its values and gradients, its type, its device, the size of its work."""

    device, work = torch.device("cpu"), 1

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, Tensor]], dtype: torch.dtype = torch.float64) -> None:
        self.function, self.dtype = function, dtype
        self.rows = 0

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        assert z.dtype == self.dtype
        self.rows += z[..., 0].numel()
        return self.function(z)

    def traceable(self) -> None:
        return None

    def chosen(self, index: Tensor) -> Target:
        return self


def gaussian(loc: Tensor, precision: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def function(z: Tensor) -> tuple[Tensor, Tensor]:
        grad = -(z - loc) @ precision
        return (grad * (z - loc)).sum(-1) / 2, grad

    return function


def skewed(z: Tensor) -> tuple[Tensor, Tensor]:
    """Independent log-gamma densities with shape 2: log p = 2z - exp z."""
    return (2 * z - z.exp()).sum(-1), 2 - z.exp()


def two_modes(z: Tensor) -> tuple[Tensor, Tensor]:
    """A mixture of N(-4, 1) with weight 1/4 and N(4, 1) with weight 3/4."""
    parts = torch.stack([math.log(0.25) - (z + 4) ** 2 / 2, math.log(0.75) - (z - 4) ** 2 / 2])
    grads = torch.stack([-(z + 4), -(z - 4)])
    return parts.logsumexp(0).sum(-1), (parts.softmax(0) * grads).sum(0)


def half_line(z: Tensor) -> tuple[Tensor, Tensor]:
    """Not a number below -3, with much of the mass beside that edge."""
    good = z > -3
    value = torch.where(good, -((z + 3) ** 2) / 2, torch.nan)
    return value.sum(-1), torch.where(good, -(z + 3), torch.nan)


def run(
    function: Callable[[Tensor], tuple[Tensor, Tensor]],
    family: Family,
    loc: Any,
    *,
    size: float = 0.1,
    seed: int = 0,
    **options: Any,
) -> Result:
    loc = torch.as_tensor(loc, dtype=torch.float64)
    settings: dict[str, Any] = {
        "lr": 1.0,
        "max_kl": 8.0,
        "num_particles": None,
        "max_steps": 500,
        "generator": torch.Generator().manual_seed(seed),
        "on_step": lambda step, record: None,
    }
    target = function if isinstance(function, Target) else Target(function)
    return ascend(target, family, family.initial(loc, size), **{**settings, **options})


def problem(dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(dim, dim, generator=generator) / dim**0.5
    return torch.randn(dim, generator=generator), root @ root.T + torch.eye(dim) / 2


# Where it ends


@pytest.mark.parametrize("dim", [1, 5, 40])
def test_gaussian_target_exactly(dim: int) -> None:
    """Full rank on a correlated target, mean field on a product, both to rounding error in a dozen steps."""
    loc, precision = problem(dim)
    for family, target in (
        (FAMILIES["full_rank"], precision),
        (FAMILIES["mean_field"], torch.diag(precision.diagonal())),
    ):
        result = run(gaussian(loc, target), family, torch.zeros(2, dim))
        assert result.status == [Status.CONVERGED] * 2
        assert len(result.records) <= 20
        assert result.gap.max() < 1e3 * dim * torch.finfo(torch.float64).eps
        expected = torch.linalg.inv(target).expand(2, -1, -1)
        # a gap of g nats is a distance of √2g standard deviations
        torch.testing.assert_close(result.params.loc, loc.expand(2, -1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(family.scale.covariance(result.params.scale), expected, rtol=1e-6, atol=1e-6)


@each_family
@pytest.mark.parametrize("dim", [1, 3, 20])
@pytest.mark.parametrize("seed", range(3))
def test_skewed_target_within_the_tolerance(family: Family, dim: int, seed: int) -> None:
    """Of log p = 2z - exp z the best normal is known: E exp z = 2 and s² E exp z = 1, so s² = 1/2, m = log 2 - 1/4."""
    result = run(skewed, family, torch.zeros(1, dim), seed=seed)
    assert result.status == [Status.CONVERGED]
    best = Params(torch.full((1, dim), math.log(2) - 0.25), family.initial(torch.zeros(1, dim), 0.5**0.5).scale)

    def bound(params: Params) -> float:
        variance = family.scale.variance(params.scale)
        expected = 2 * params.loc - (params.loc + variance / 2).exp()
        return float(expected.sum() + family.entropy(params))

    gap = bound(best) - bound(result.params)
    assert -1e-12 <= gap <= tolerance(dim)


@each_family
def test_mean_field_of_a_correlated_target(family: Family) -> None:
    """The best diagonal of a normal target is 1 / Λᵢᵢ: by definition for the gap, not by luck of the particles."""
    loc, precision = problem(6)
    result = run(gaussian(loc, precision), family, torch.zeros(1, 6))
    assert result.status == [Status.CONVERGED]
    if not isinstance(family.scale, Dense):
        torch.testing.assert_close(result.params.scale[0], precision.diagonal().rsqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(result.params.loc[0], loc, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e9])
def test_steps_of_mean_field_do_not_grow_with_the_condition_number(condition: float) -> None:
    """Where the target is narrow in one direction, all coordinates are, and the location is far off in another."""
    dim = 20
    directions, _ = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(1)))
    precision = (directions * torch.logspace(0, math.log10(condition), dim)) @ directions.T
    loc = torch.full((dim,), 3.0)
    result = run(gaussian(loc, precision), FAMILIES["mean_field"], torch.zeros(1, dim))
    assert result.status == [Status.CONVERGED]
    assert len(result.records) <= 40
    shift = result.params.loc[0] - loc
    assert float(shift @ precision @ shift) < 1e-4
    torch.testing.assert_close(result.params.scale[0], precision.diagonal().rsqrt(), rtol=1e-3, atol=0)


def test_far_and_badly_scaled_start() -> None:
    """A million standard deviations away, standard deviations over six orders of magnitude."""
    scale = torch.logspace(-3, 3, 7)
    loc, precision = problem(7)
    loc, precision = 1e4 * loc, precision / scale / scale.unsqueeze(-1)
    result = run(gaussian(loc, precision), FAMILIES["full_rank"], torch.zeros(1, 7))
    assert result.status == [Status.CONVERGED]
    assert len(result.records) <= 100
    deviation = torch.linalg.inv(precision).diagonal().sqrt()
    assert ((result.params.loc[0] - loc) / deviation).abs().max() < 1e-4


@each_family
def test_path_is_affinely_invariant(family: Family) -> None:
    """With the target and the start both moved by a map that keeps the family, every step is moved by it too."""
    matrix = (
        torch.tensor([[100.0, 0.0], [-30.0, 0.02]])
        if isinstance(family.scale, Dense)
        else torch.diag(torch.tensor([100.0, 0.02]))
    )
    offset, inverse = torch.tensor([7.0, -3.0]), torch.linalg.inv(matrix)

    def moved(z: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = skewed((z - offset) @ inverse.T)
        return value, grad @ inverse

    start = family.initial(torch.zeros(1, 2), 0.1)
    scale = matrix @ start.scale if isinstance(family.scale, Dense) else start.scale * matrix.diagonal()
    options: dict[str, Any] = {
        "lr": 1.0,
        "max_kl": 8.0,
        "num_particles": None,
        "max_steps": 30,
        "on_step": lambda step, record: None,
    }
    plain = ascend(Target(skewed), family, start, generator=torch.Generator().manual_seed(0), **options)
    other = ascend(
        Target(moved), family, Params(offset.unsqueeze(0), scale), generator=torch.Generator().manual_seed(0), **options
    )
    assert len(plain.records) == len(other.records)
    torch.testing.assert_close(other.params.loc, plain.params.loc @ matrix.T + offset, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(
        family.scale.covariance(other.params.scale),
        matrix @ family.scale.covariance(plain.params.scale) @ matrix.T,
        rtol=1e-8,
        atol=1e-8,
    )
    shift = float(torch.linalg.slogdet(matrix).logabsdet)  # of the entropy
    assert history(other, "negative_elbo") == pytest.approx(history(plain, "negative_elbo") - shift, rel=1e-8, abs=1e-8)
    assert history(other, "kl") == pytest.approx(history(plain, "kl"), rel=1e-7, abs=1e-12)


def history(result: Result, name: str, fit: int = 0) -> np.ndarray:
    return np.array([float(getattr(record, name)[fit]) for record in result.records])


# Batches


@each_family
def test_batch_of_fits_is_the_fits_one_by_one(family: Family) -> None:
    """Each ends at its own optimum: the basins are the same, with other particles the noise is not."""
    starts = torch.tensor([[-5.0], [-3.0], [3.0], [5.0], [6.0]])
    together = run(two_modes, family, starts)
    assert together.status == [Status.CONVERGED] * 5
    for i, start in enumerate(starts):
        alone = run(two_modes, family, start.unsqueeze(0), seed=i + 1)
        assert alone.status == [Status.CONVERGED]
        kl = family.kl(Params(*(value[i : i + 1] for value in together.params)), alone.params)
        # both within the tolerance of the optimum: the distance of one to the other is at most the sum of the two
        assert float(kl) <= 4 * tolerance(1)
    assert together.params.loc.squeeze().sign().tolist() == starts.squeeze().sign().tolist()


@each_family
def test_fits_of_a_batch_converge_alike(family: Family) -> None:
    """Thirty fits at once from one start scatter as thirty single ones."""
    at_once = run(skewed, family, torch.zeros(30, 2)).params.loc[:, 0]
    single = torch.cat([run(skewed, family, torch.zeros(1, 2), seed=seed + 1).params.loc[:, 0] for seed in range(30)])
    assert stats.ks_2samp(at_once.numpy(), single.numpy()).pvalue > 1e-4


@each_family
def test_bad_start_does_not_spoil_the_batch(family: Family) -> None:
    result = run(half_line_and_skewed, family, torch.tensor([[0.0], [-5.0], [1.0]]))
    assert result.status == [Status.CONVERGED, Status.DIVERGED, Status.CONVERGED]
    assert torch.equal(result.params.loc[1], torch.tensor([-5.0]))
    torch.testing.assert_close(result.params.loc[0], result.params.loc[2], rtol=0, atol=0.1)


def half_line_and_skewed(z: Tensor) -> tuple[Tensor, Tensor]:
    good = z > -4.5
    value, grad = 2 * z - z.exp(), 2 - z.exp()
    return torch.where(good, value, torch.nan).sum(-1), torch.where(good, grad, torch.nan)


def test_finished_fits_cost_nothing() -> None:
    """The gradients are those of the fits that still go on, and they are counted."""
    target = Target(two_modes)
    result = run(target, FAMILIES["full_rank"], torch.tensor([[4.0], [-900.0]]))
    assert result.num_gradients == target.rows
    assert target.rows < sum(2 * record.num_particles for record in result.records)


# Steps


@each_family
def test_same_seed_same_numbers(family: Family) -> None:
    one, other = (run(skewed, family, torch.zeros(2, 3), seed=5) for _ in range(2))
    assert torch.equal(one.params.loc, other.params.loc)
    assert torch.equal(one.params.scale, other.params.scale)
    assert [replace(r, seconds=0.0).num_particles for r in one.records] == [r.num_particles for r in other.records]
    assert not torch.equal(one.params.loc, run(skewed, family, torch.zeros(2, 3), seed=6).params.loc)


@each_family
@pytest.mark.parametrize("max_kl", [0.01, 0.5])
def test_first_step_is_within_the_trust_region(family: Family, max_kl: float) -> None:
    result = run(gaussian(torch.tensor([50.0]), torch.eye(1)), family, torch.zeros(1, 1), max_kl=max_kl, max_steps=1)
    assert 0 < history(result, "kl")[1] <= max_kl
    assert history(result, "step_size")[1] < 1
    assert result.status == [Status.OUT_OF_STEPS]


@each_family
def test_lr_is_the_largest_step(family: Family) -> None:
    result = run(skewed, family, torch.zeros(1, 2), lr=0.3)
    assert history(result, "step_size").max() == pytest.approx(0.3, rel=1e-12)
    assert result.status == [Status.CONVERGED]


@each_family
def test_bound_never_falls_beyond_its_noise(family: Family) -> None:
    """Whatever is proposed: the estimates of kept steps fall by no more than a few of their standard errors."""
    for function, start in ((half_line, 4.0), (two_modes, 0.3), (skewed, 8.0)):
        result = run(function, family, torch.full((1, 1), start))
        elbo = -history(result, "negative_elbo")
        assert np.isfinite(elbo).all()
        falls = np.maximum.accumulate(elbo) - elbo
        assert falls.max() < 1.0
        assert elbo[-1] >= elbo[0]


def test_rejected_steps_change_nothing() -> None:
    """A density that is finite at the start alone: 40 halvings of the radius, then it gives up where it began."""

    def needle(z: Tensor) -> tuple[Tensor, Tensor]:
        # finite as long as q is the first one: all particles of one evaluation
        needle.calls += 1  # type: ignore[attr-defined]
        return (2 * z - z.exp()).sum(-1) + (0.0 if needle.calls == 1 else math.nan), 2 - z.exp()

    needle.calls = 0  # type: ignore[attr-defined]
    result = run(needle, FAMILIES["full_rank"], torch.ones(1, 2))
    assert result.status == [Status.DIVERGED]
    assert torch.equal(result.params.loc, torch.ones(1, 2))
    assert (history(result, "kl") == 0).all()
    assert len(result.records) == 41


def test_out_of_steps() -> None:
    result = run(skewed, FAMILIES["full_rank"], torch.full((2, 2), 9.0), max_steps=3)
    assert result.status == [Status.OUT_OF_STEPS] * 2
    assert len(result.records) == 4


@each_family
def test_flat_target_diverges(family: Family) -> None:
    result = run(lambda z: (0.0 * z.sum(-1), 0.0 * z), family, torch.zeros(1, 1))
    assert result.status == [Status.DIVERGED]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_start_without_a_density(bad: float) -> None:
    result = run(lambda z: (z.sum(-1) * 0 + bad, z), FAMILIES["mean_field"], torch.zeros(2, 1))
    assert result.status == [Status.DIVERGED] * 2
    assert len(result.records) == 1


# Particles


@each_family
def test_particles_grow_with_the_noise(family: Family) -> None:
    """A skewed target needs more of them than a normal one, which has no noise at all; both start with the default."""
    few = run(gaussian(*problem(3)), FAMILIES["full_rank"], torch.zeros(1, 3))
    many = run(lambda z: (-(z.cosh()).sum(-1) * 30 + z.sum(-1) * 25, -z.sinh() * 30 + 25), family, torch.zeros(1, 3))
    assert {record.num_particles for record in few.records} == {64}
    counts = [record.num_particles for record in many.records]
    assert counts[0] == 64
    assert counts == sorted(counts)


@pytest.mark.parametrize(("asked", "used"), [(4, 4), (7, 8), (100, 100)])
def test_particles_as_asked(asked: int, used: int) -> None:
    """Rounded up to pairs; with too few of them for a covariance the step size is smaller, and it still converges."""
    result = run(gaussian(*problem(3)), FAMILIES["full_rank"], torch.zeros(1, 3), num_particles=asked)
    assert result.records[0].num_particles == used
    assert result.status == [Status.CONVERGED]


def test_large_work_limits_the_particles() -> None:
    target = Target(skewed)
    target.work = 2**25 // 100
    assert run(target, FAMILIES["mean_field"], torch.zeros(1, 2)).records[-1].num_particles <= 100


def test_every_step_is_told() -> None:
    told: list[tuple[int, Record]] = []
    result = run(skewed, FAMILIES["mean_field"], torch.zeros(2, 3), on_step=lambda *one: told.append(one))
    assert [step for step, _ in told] == list(range(len(result.records)))
    assert [record for _, record in told] == result.records
    for record in result.records:
        assert all(getattr(record, name).shape == (2,) for name in ("negative_elbo", "gap", "step_size", "kl"))
    seconds = [record.seconds for record in result.records]
    assert seconds == sorted(seconds)


def test_single_precision() -> None:
    loc, precision = (value.float() for value in problem(3))
    family = FAMILIES["full_rank"]
    target = Target(gaussian(loc, precision), torch.float32)
    result = ascend(
        target,
        family,
        family.initial(torch.zeros(1, 3, dtype=torch.float32), 0.1),
        lr=1.0,
        max_kl=8.0,
        num_particles=None,
        max_steps=100,
        generator=torch.Generator().manual_seed(0),
        on_step=lambda step, record: None,
    )
    assert result.status == [Status.CONVERGED]
    assert result.params.loc.dtype == torch.float32
    best = Params(loc.unsqueeze(0), torch.linalg.cholesky(torch.linalg.inv(precision)).unsqueeze(0))
    assert float(family.kl(result.params, best)) < tolerance(3)


def test_tolerance() -> None:
    assert [tolerance(dim) for dim in (1, 10, 20, 1000)] == pytest.approx([5e-4, 5e-3, 1e-2, 1e-2])


# The stop


@each_family
@pytest.mark.parametrize("seed", range(10))
def test_it_does_not_stop_before_the_optimum(family: Family, seed: int) -> None:
    """A start whose first steps overshoot by thousands of nats and turn against each other."""

    def cliff(z: Tensor) -> tuple[Tensor, Tensor]:
        # a Poisson regression far from its data: log p = 30 η - exp η for three rates, η = X z
        eta = z @ X.T
        return (30 * eta - eta.exp()).sum(-1), (30 - eta.exp()) @ X

    X = torch.tensor([[1.0, -2.0], [1.0, 0.5], [1.0, 3.0]])
    result = run(cliff, family, torch.tensor([[0.0, 2.5]]), seed=seed)
    assert result.status == [Status.CONVERGED]

    def negative_bound(x: np.ndarray) -> float:
        loc, root = torch.tensor(x[:2]), torch.tensor([[math.exp(x[2]), 0.0], [x[4], math.exp(x[3])]])
        return -exact_bound(loc, root)

    def exact_bound(loc: Tensor, root: Tensor) -> float:
        mean, variance = X @ loc, (X @ root).square().sum(-1)
        entropy = math.log(2 * math.pi * math.e) + float(root.diagonal().log().sum())
        return float((30 * mean - (mean + variance / 2).exp()).sum()) + entropy

    dense = isinstance(family.scale, Dense)
    start = np.array([3.4, 0.0, -2.0, -2.0, 0.0])
    free = 5 if dense else 4
    best = optimize.minimize(
        lambda x: negative_bound(np.append(x, 0.0)[:5]), start[:free], method="BFGS", options={"gtol": 1e-8}
    )
    scale = result.params.scale[0]
    reached = exact_bound(result.params.loc[0], scale if dense else scale.diag())
    assert -best.fun - reached <= tolerance(2)
