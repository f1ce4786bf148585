"""The bound site by site: its sum, its elements, and where a fit is bad."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

import pyro_vi_lab as vl
from pyro_vi_lab.guides import FullRankNormal, MeanFieldNormal
from tests.objectives.programs import NORMAL, PROGRAMS, WITHOUT_PATH, Autoencoder, Y, gradient, subsampled_model


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("normal", [NORMAL, WITHOUT_PATH])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_particles": 3, "vectorize_particles": True}, {"analytic_kl": True}, {"analytic_entropy": True}],
    ids=str,
)
def test_terms_sum_to_the_bound(name: str, normal: Any, options: dict[str, Any]) -> None:
    program = PROGRAMS[name]
    guide = program.guide(normal)
    objective = vl.PerSiteELBO(**options)
    objective.loss(program.model, guide)
    pyro.set_rng_seed(1)
    loss = objective.loss(program.model, guide)
    pyro.set_rng_seed(1)
    terms = objective.terms(program.model, guide)
    assert sum(terms.values()).item() == pytest.approx(-loss, rel=1e-12)
    assert all(value.shape == () and not value.requires_grad for value in terms.values())


def test_elements_have_the_shape_of_the_plates() -> None:
    program = PROGRAMS["nested"]
    for vectorize in (False, True):
        objective = vl.PerSiteELBO(num_particles=4, vectorize_particles=vectorize)
        elements = objective.elements(program.model, program.guide(NORMAL))
        assert {name: value.shape for name, value in elements.items()} == {
            "mean": (2, 1),
            "z": (2, 3),
            "y": (2, 3),
        }
    pyro.clear_param_store()
    rows = vl.PerSiteELBO(3).elements(subsampled_model, PROGRAMS["subsampled"].guide(NORMAL))
    assert rows["y"].shape == (2,)


def test_values_are_those_by_hand() -> None:
    def model() -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        twice = pyro.deterministic("twice", 2 * mean)
        with pyro.plate("row", 3):
            pyro.sample("y", dist.Normal(twice, 1.0), obs=Y[:3])

    objective = vl.PerSiteELBO(analytic_kl=True)
    p, q = dist.Normal(0.0, 1.0), dist.Normal(0.5, 1e-6)
    elements = objective.elements(model, lambda: pyro.sample("mean", q))
    assert list(elements) == ["mean", "y"]
    assert elements["mean"].item() == pytest.approx(-torch.distributions.kl_divergence(q, p).item())
    torch.testing.assert_close(elements["y"], dist.Normal(1.0, 1.0).log_prob(Y[:3]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [MeanFieldNormal, FullRankNormal])
def test_the_joint_draw_of_an_autoguide_has_its_own_term(kind: Any) -> None:
    model = PROGRAMS["global"].model
    guide = kind(model)
    terms = vl.PerSiteELBO(5).terms(model, guide)
    (joint,) = terms.keys() - {"mean", "width", "y"}
    assert joint.endswith("_latent")


def test_it_shows_the_row_that_is_not_explained() -> None:
    y = torch.tensor([0.1, -0.3, 8.0, 0.2])

    def model() -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 0.1))
        with pyro.plate("row", 4):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    elements = vl.PerSiteELBO(20).elements(model, lambda: pyro.sample("mean", dist.Normal(0.0, 0.1)))
    assert elements["y"].argmin() == 2
    assert elements["mean"].abs() < 1e-10


def test_it_is_the_elbo_in_svi() -> None:
    program = PROGRAMS["local"]
    guide = program.guide(NORMAL)
    program.model(), guide()
    torch.testing.assert_close(
        gradient(vl.PerSiteELBO(3), program.model, guide, seed=1),
        gradient(vl.ELBO(3), program.model, guide, seed=1),
    )
    vae = Autoencoder()
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.05}), vl.PerSiteELBO(2))
    losses = [svi.step(Y) for _ in range(40)]
    assert sum(losses[-5:]) < sum(losses[:5])
