"""The variational online Newton step: by hand, at its fixed points, and under gradients that mean harm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDiagonalNormal, AutoGuideList, AutoMultivariateNormal, AutoNormal, init_to_value
from torch import Tensor

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.guides import FullRankNormal, MeanFieldNormal, MeanFieldStudentT
from pyro_vi_lab.natural_parts import Settings, part_of

STANDARD_ERRORS = 5  # fails a right answer once in two million
GUIDES: dict[str, Callable[..., Any]] = {
    "MeanFieldNormal": MeanFieldNormal,
    "AutoNormal": AutoNormal,
    "AutoDiagonalNormal": AutoDiagonalNormal,
}
each_guide = pytest.mark.parametrize("name", GUIDES)


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


def two_sites() -> None:
    """Independent normals."""
    pyro.sample("x", dist.Normal(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])).to_event(1))
    pyro.sample("y", dist.Normal(3.0, 0.2))


def read(guide: Any) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of all sites."""
    with torch.no_grad():
        if isinstance(guide, AutoNormal):
            names = [name for name, _ in guide.prototype_trace.iter_stochastic_nodes()]
            loc, scale = (torch.cat([getattr(of, n).reshape(-1) for n in names]) for of in (guide.locs, guide.scales))
            return loc, scale
        return guide.loc.clone(), guide.scale.clone()


def put(guide: Any, loc_grad: Tensor, scale_grad: Tensor) -> None:
    """Leave these gradients of the ELBO, with respect to means and standard deviations, in a guide of one site."""
    guide.zero_grad()
    locs, scales = (guide.locs.x, guide.scales.x) if isinstance(guide, AutoNormal) else (guide.loc, guide.scale)
    (-(loc_grad * locs).sum() - (scale_grad * scales).sum()).backward()


def one_site(dim: int = 2) -> Callable[[], None]:
    return lambda: pyro.sample("x", dist.Normal(torch.zeros(dim), 1.0).to_event(1))


def started(name: str, dim: int = 2, *, scale: float = 0.5) -> Any:
    guide = GUIDES[name](one_site(dim), init_loc_fn=init_to_value(values={"x": torch.zeros(dim)}), init_scale=scale)
    guide()
    return guide


# The step


@each_guide
def test_two_steps_by_hand(name: str) -> None:
    """In the letters of the papers: P, ĥ, ḡ; the first weights of a curvature are 4/41 and 4/42."""
    guide = started(name)
    optimizer = vl.NaturalGradient(guide, lr=0.25, momentum=0.8, curvature_momentum=0.9)
    loc, scale = read(guide)
    precision, average, seen = scale**-2, torch.zeros(2), 0.0
    grads = [([0.6, -1.5], [0.9, -2.0]), ([-0.1, 4.0], [3.0, 0.5])]
    for number, (loc_grad, scale_grad) in enumerate(grads, start=1):
        g_m, g_s = torch.tensor(loc_grad), torch.tensor(scale_grad)
        sd = precision**-0.5
        before = g_m if number == 1 else average / seen
        weight = max(1 - 0.9, 4 / (number + 40)) / (sd * before).square().clamp(min=1)
        curvature = (1 / sd - g_s) / sd
        precision = (
            (1 - weight) * precision + weight * curvature + weight**2 * (curvature - precision) ** 2 / precision / 2
        )
        average, seen = 0.8 * average + 0.2 * g_m, 0.8 * seen + 0.2
        loc = loc + 0.25 * average / seen / precision
        put(guide, g_m, g_s)
        optimizer(list(guide.parameters()))
        torch.testing.assert_close(read(guide), (loc, precision**-0.5), rtol=1e-12, atol=1e-12)


def test_both_gradients_of_the_bound_hold_the_mean_curvature() -> None:
    """ĥ = (1/σ - ĝ)/σ of log p = -cosh z has the mean E[cosh z], by sticking the landing too."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("cosh", 0.5 * z**2 - z.cosh())

    m, sd = 0.4, 0.7
    guide = MeanFieldNormal(model, init_loc_fn=init_to_value(values={"z": torch.tensor(m)}), init_scale=sd)
    guide()
    expected = math.cosh(m) * math.exp(sd**2 / 2)
    for gradient in ("stl", "reparam"):
        found = []
        for _ in range(100):
            guide.zero_grad()
            vl.ELBO(200, gradient=gradient, vectorize_particles=True, max_plate_nesting=0).loss_and_grads(model, guide)
            found.append((1 / sd + guide.scale_unconstrained.grad.item() / sd) / sd)
        sample = torch.tensor(found)
        assert abs(sample.mean() - expected) < STANDARD_ERRORS * sample.std() / len(sample) ** 0.5


@each_guide
def test_it_reaches_a_gaussian_target(name: str) -> None:
    """Draw by draw the gradient vanishes there, so that nothing but the start is left: (1 - ρ)ᵗ and (40/t)⁴ of it."""
    guide = GUIDES[name](two_sites, init_scale=1.0)
    optimizer = vl.NaturalGradient(guide, lr=0.5, momentum=0.5, curvature_momentum=0.999)
    svi = SVI(two_sites, guide, optimizer, vl.ELBO())
    for _ in range(200):
        svi.step()
    loc, scale = read(guide)
    torch.testing.assert_close(loc, torch.tensor([1.0, -2.0, 3.0]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scale, torch.tensor([0.5, 2.0, 0.2]), rtol=1e-2, atol=0)


@pytest.mark.parametrize("init_scale", [0.01, 0.1, 1.0])
def test_correlated_target_gives_the_best_independent_normals(init_scale: float) -> None:
    """Means of the target, precisions Λᵢᵢ, from noisy gradients: averages over the end of a long run."""
    root = torch.tensor([[1.0, 0.0, 0.0], [0.7, 1.0, 0.0], [-0.5, 0.4, 1.5]])
    precision, mean = root @ root.T, torch.tensor([0.5, -1.0, 2.0])
    guide = started("MeanFieldNormal", 3, scale=init_scale)
    optimizer = vl.NaturalGradient(guide, lr=0.1, momentum=0.9, curvature_momentum=0.99)
    leaves = list(guide.parameters())
    locs, log_precisions = [], []
    for step in range(1400):
        loc, scale = read(guide)
        eps = torch.randn(10, 3)
        grad = -(loc + scale * eps - mean) @ precision
        guide.loc.grad = -grad.mean(0)
        guide.scale_unconstrained.grad = -scale * ((grad * eps).mean(0) + 1 / scale)
        optimizer(leaves)
        if step >= 400:
            locs.append(loc)
            log_precisions.append(-2 * scale.log())
    for values, expected in ((locs, mean), (log_precisions, precision.diagonal().log())):
        blocks = torch.stack(values).reshape(10, 100, 3).mean(1)  # longer than the memory of curvatures
        error = blocks.std(0) / len(blocks) ** 0.5
        # the logarithm of an average whose variance is v, is low by v/2, where v = (1 - β₂)/2 · var(ĥ/P) < 0.01
        assert ((blocks.mean(0) - expected).abs() < STANDARD_ERRORS * error + 0.01).all()
        assert (error < 0.1).all()


def test_minibatches_of_a_logistic_regression_end_near_the_optimum_of_all_rows() -> None:
    """Step sizes 1/t average T gradients, whose whitened components have a variance of at most N/B + 1."""
    rows, batch, steps = 400, 100, 240
    generator = torch.Generator().manual_seed(5)
    X = torch.randn(rows, 4, generator=generator) @ torch.diag(torch.tensor([1.0, 0.3, 3.0, 1.0]))
    y = torch.bernoulli(torch.sigmoid(X @ torch.tensor([0.5, -1.0, 0.3, 0.0])), generator=generator)

    def model(subsample_size: int | None = None) -> None:
        beta = pyro.sample("beta", dist.Normal(torch.zeros(4), 2.0).to_event(1))
        with pyro.plate("row", rows, subsample_size=subsample_size) as index:
            pyro.sample("y", dist.Bernoulli(logits=X[index] @ beta), obs=y[index])

    best = vl.fit(vl.Problem(model), "mean_field", progress=False).params
    guide = MeanFieldNormal(model)
    optimizer = vl.NaturalGradient(guide, lr=0.3, momentum=0.5, curvature_momentum=0.999)
    svi = SVI(model, guide, optimizer, vl.ELBO())
    for step in range(60 + steps):
        optimizer.lr = 0.3 if step < 60 else 1 / (step - 56)
        svi.step(subsample_size=batch)
    noise = rows / batch + 1
    loc, scale = read(guide)
    assert ((loc - best.loc[0]).abs() / best.scale[0] < STANDARD_ERRORS * (noise / steps) ** 0.5).all()
    last_weight = 4 / (60 + steps + 40)
    assert ((scale / best.scale[0]).log().abs() < STANDARD_ERRORS * (last_weight * noise / 2) ** 0.5 / 2).all()


# What no gradient can do


finite = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=40)
@given(
    grads=st.lists(st.tuples(finite, finite), min_size=1, max_size=4),
    curvature_momentum=st.floats(0, 1, exclude_max=True),
    name=st.sampled_from(sorted(GUIDES)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_precisions_stay_positive_numbers(
    grads: list[tuple[float, float]], curvature_momentum: float, name: str, dtype: torch.dtype
) -> None:
    pyro.clear_param_store()
    torch.set_default_dtype(dtype)
    guide = started(name, 1)
    part = part_of(guide, online_newton=True)
    assert part is not None
    limit = torch.finfo(dtype).max
    reach, state = Settings(1.0, math.inf, 0.5, 0.0, curvature_momentum), dict[str, Any]()
    for pair in grads:
        for tensor, value in zip(part.tensors, pair, strict=True):
            tensor.grad = torch.full_like(tensor, max(-limit, min(limit, value)))
        before = read(guide)
        with torch.no_grad():
            part.step(reach, state)
        loc, scale = read(guide)
        assert (scale > 0).all()
        assert (scale**-2).isfinite().all()
        assert (scale**-2 > 0).all()
        assert loc.isfinite().all()
        assert ((loc - before[0]).abs() <= 2 * scale * (1 + 1e-5) + 1e-5 * loc.abs()).all()


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_precisions_that_are_pushed_for_ever_stay_numbers(sign: float) -> None:
    """Each step by the largest factor there is, until the type has no more numbers."""
    torch.set_default_dtype(torch.float32)
    guide = started("MeanFieldNormal")
    part = part_of(guide, online_newton=True)
    assert part is not None
    state: dict[str, Any] = {}
    for _ in range(300):
        guide.loc.grad, guide.scale_unconstrained.grad = torch.zeros(2), torch.full((2,), sign * 1e30)
        with torch.no_grad():
            part.step(Settings(1.0, math.inf, 0.9, 0.0, 0.0), state)
    precision = read(guide)[1] ** -2
    assert ((precision > 1e30) if sign > 0 else (precision < 1e-30)).all()
    assert (precision.isfinite() & (precision > 0)).all()


@each_guide
def test_each_coordinate_has_a_trust_region_of_its_own(name: str) -> None:
    """A huge gradient in one coordinate holds up no other; ``max_kl`` bounds each."""
    for max_kl in (8.0, 1e-3):
        pyro.clear_param_store()
        guide = started(name)
        loc, scale = read(guide)
        put(guide, torch.tensor([1e9, 0.02]), torch.tensor([0.0, 0.0]))
        vl.NaturalGradient(guide, lr=0.5, max_kl=max_kl, curvature_momentum=0.99)(list(guide.parameters()))
        moved = (read(guide)[0] - loc) / scale
        assert float(moved[0]) == pytest.approx(1.0 if max_kl == 8 else math.sqrt(2e-3), rel=1e-9)
        assert float(moved[1]) == pytest.approx(0.5 * 0.02 * 0.5, rel=1e-9)


def test_damping_shortens_both_steps() -> None:
    steps = []
    for damping in (0.0, 1.0):
        pyro.clear_param_store()
        guide = started("MeanFieldNormal")
        loc, scale = read(guide)
        put(guide, torch.full((2,), 1e-6), torch.full((2,), 1e-6))
        vl.NaturalGradient(guide, lr=0.5, damping=damping, curvature_momentum=0.9)(list(guide.parameters()))
        steps.append((read(guide)[0] - loc, read(guide)[1].log() - scale.log()))
    for whole, half in zip(*steps, strict=True):
        torch.testing.assert_close(half, whole / 2, rtol=1e-5, atol=0)


def test_a_part_of_a_list_beside_other_parameters() -> None:
    guide = AutoGuideList(two_sites)
    guide.append(AutoNormal(pyro.poutine.block(two_sites, expose=["x"])))
    guide.append(pyro.infer.autoguide.AutoDelta(pyro.poutine.block(two_sites, expose=["y"])))
    optimizer = vl.NaturalGradient(guide, lr=0.5, curvature_momentum=0.9, others=pyro.optim.Adam({"lr": 0.1}))
    svi = SVI(two_sites, guide, optimizer, vl.ELBO())
    for _ in range(150):
        svi.step()
    assert guide.median()["x"].tolist() == pytest.approx([1.0, -2.0], abs=1e-3)
    assert guide.median()["y"].item() == pytest.approx(3.0, abs=0.02)


# Arguments


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
def test_curvature_momentum_out_of_range(value: float) -> None:
    with pytest.raises(ArgumentError, match=r"curvature_momentum is a weight in \[0, 1\), or None, got"):
        vl.NaturalGradient(MeanFieldNormal(two_sites), curvature_momentum=value)


@pytest.mark.parametrize("kind", [FullRankNormal, AutoMultivariateNormal, MeanFieldStudentT])
def test_other_guides_are_named(kind: Callable[..., Any]) -> None:
    message = rf"independent normals \(MeanFieldNormal, AutoNormal, AutoDiagonalNormal\), not for {kind.__name__}"
    with pytest.raises(ArgumentError, match=message):
        vl.NaturalGradient(kind(two_sites), curvature_momentum=0.999)
    beside = AutoGuideList(two_sites)
    beside.append(AutoNormal(pyro.poutine.block(two_sites, expose=["x"])))
    beside.append(kind(pyro.poutine.block(two_sites, expose=["y"])))
    with pytest.raises(ArgumentError, match=message):
        vl.NaturalGradient(beside, curvature_momentum=0.999)
    optimizer = vl.NaturalGradient(kind(two_sites))
    state = vl.NaturalGradient(MeanFieldNormal(two_sites), curvature_momentum=0.9).get_state()
    with pytest.raises(ArgumentError, match=message):
        optimizer.set_state(state)
