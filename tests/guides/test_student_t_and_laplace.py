from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.guides import FullRankStudentT, MeanFieldLaplace, MeanFieldStudentT
from pyro_vi_lab.models import build


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


def tails() -> None:
    """Independent Student-t distributions."""
    pyro.sample("x", dist.StudentT(5.0, torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])).to_event(1))


def common_tail() -> None:
    tril = torch.tensor([[1.0, 0.0], [0.8, 0.5]])
    pyro.sample("x", dist.MultivariateStudentT(5.0, torch.tensor([1.0, -2.0]), tril))


def laplace() -> None:
    pyro.sample("x", dist.Laplace(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])).to_event(1))


@pytest.mark.parametrize(
    ("model", "guide", "normal"),
    [
        (tails, "mean_field_student_t", "mean_field"),
        (common_tail, "full_rank_student_t", "full_rank"),
        (laplace, "mean_field_laplace", "mean_field"),
    ],
)
def test_each_finds_a_target_of_its_own_kind_and_beats_the_normal(model: Any, guide: str, normal: str) -> None:
    problem = vl.Problem(model)
    fit, other = (vl.fit(problem, one, progress=False) for one in (guide, normal))
    assert fit.status is vl.Status.CONVERGED
    value, error = fit.elbo(5000)
    assert value == pytest.approx(0.0, abs=2e-3)  # the log evidence of a prior
    assert value > other.elbo(5000)[0] + 0.01
    torch.testing.assert_close(fit.loc, torch.tensor([1.0, -2.0]), rtol=0.03, atol=0.03)
    assert error < 0.01


@pytest.mark.parametrize("kind", [MeanFieldStudentT, FullRankStudentT])
@pytest.mark.parametrize("df", [2, 0.0, -1.0, float("inf"), "5"])
def test_degrees_of_freedom_with_a_variance(kind: Any, df: Any) -> None:
    with pytest.raises(ArgumentError, match="df must be a number above 2, so that the guide has a variance"):
        kind(tails, df=df)


@pytest.mark.parametrize("kind", [MeanFieldStudentT, FullRankStudentT])
def test_degrees_of_freedom_are_those_of_the_draws(kind: Any) -> None:
    guide = kind(tails, df=3.0)
    guide()
    posterior = guide.get_posterior()
    z = torch.tensor([[30.0, 4.0], [0.0, 0.1]])
    torch.testing.assert_close(posterior.log_prob(z), guide.family.log_prob(guide.params, z))
    assert guide.family.noise.df == 3.0


@pytest.mark.parametrize("kind", [MeanFieldStudentT, MeanFieldLaplace])
@pytest.mark.parametrize("model", [tails, laplace])
def test_svi_with_the_natural_gradient(kind: Any, model: Any) -> None:
    pyro.set_rng_seed(0)
    guide = kind(model, init_scale=1.0)
    elbo = vl.ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, vl.NaturalGradient(guide, lr=0.3), elbo)
    for _ in range(80):
        svi.step()
    assert float(svi.evaluate_loss()) < 0.3
    torch.testing.assert_close(guide.params.loc, torch.tensor([1.0, -2.0]), rtol=0, atol=0.6)


def scale_of_rows() -> None:
    """The log density falls exponentially in the log of the scale."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("row", 3):
        pyro.sample("y", dist.Normal(0.0, scale), obs=torch.tensor([0.1, -0.2, 0.1]))


@pytest.mark.parametrize("guide", ["mean_field_student_t", "full_rank_student_t"])
@pytest.mark.parametrize("seed", range(3))
def test_a_bound_of_minus_infinity_is_explained(guide: str, seed: int) -> None:
    for problem in (vl.Problem(scale_of_rows), build("eight_schools")):
        fit = vl.fit(problem, guide, seed=seed, max_steps=200, progress=False)
        assert fit.status is not vl.Status.CONVERGED
        assert "the bound of a Student-t guide is minus infinity" in fit.message
    normal = vl.fit(vl.Problem(scale_of_rows), "mean_field", progress=False)
    assert normal.status is vl.Status.CONVERGED
