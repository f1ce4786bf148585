"""Every estimator has the mean of the plain gradient of its bound; their noise is what it is said to be."""

from __future__ import annotations

import copy
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vi_lab as vl
from pyro_vi_lab.families import LowRank, Params
from pyro_vi_lab.guides import FAMILY_GUIDES, Flow, Mixture
from tests.objectives.programs import (
    NORMAL,
    PROGRAMS,
    WITHOUT_PATH,
    assert_same_mean,
    gradient,
    gradients,
)


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


def many(objective: Any, num_particles: int, **options: Any) -> Any:
    return objective(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=2, **options)


# --- (a) the noise at q = p -------------------------------------------------------------------------------------------

LOC = torch.tensor([1.0, -2.0, 0.3, 5.0], dtype=torch.float64)
SCALE = torch.tensor([2.0, 0.1, 5.0, 0.7], dtype=torch.float64)


def blocks() -> Tensor:
    """A covariance of two blocks of two."""
    block = torch.tensor([[2.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
    return torch.block_diag(block, 3 * block)


def dense() -> Tensor:
    return blocks() + 0.3


def low_rank() -> tuple[Tensor, Tensor]:
    return SCALE, torch.tensor([[0.5], [0.2], [-1.0], [0.4]], dtype=torch.float64)


def low_rank_normal() -> Any:
    scale, factor = low_rank()
    covariance = LowRank(1).covariance(Params(LOC, torch.cat([scale.unsqueeze(-1), factor], -1)))
    return dist.MultivariateNormal(LOC, covariance)


EXACT: dict[str, tuple[Any, Any]] = {
    "mean_field": (lambda: dist.Normal(LOC, SCALE).to_event(1), lambda guide: SCALE),
    "mean_field_student_t": (lambda: dist.StudentT(5.0, LOC, SCALE).to_event(1), lambda guide: SCALE),
    "mean_field_laplace": (lambda: dist.Laplace(LOC, SCALE).to_event(1), lambda guide: SCALE),
    "full_rank": (lambda: dist.MultivariateNormal(LOC, dense()), lambda guide: torch.linalg.cholesky(dense())),
    "full_rank_student_t": (
        lambda: dist.MultivariateStudentT(5.0, LOC, torch.linalg.cholesky(dense())),
        lambda guide: torch.linalg.cholesky(dense()),
    ),
    "low_rank": (low_rank_normal, lambda guide: torch.cat([low_rank()[0].unsqueeze(-1), low_rank()[1]], -1)),
    "block": (
        lambda: dist.MultivariateNormal(LOC[:2], blocks()[:2, :2]),
        lambda guide: torch.linalg.cholesky(torch.stack([blocks()[:2, :2], blocks()[2:, 2:]])),
    ),
}


def test_every_guide_has_an_exact_target() -> None:
    assert EXACT.keys() | {"mixture"} == FAMILY_GUIDES.keys()


@pytest.mark.parametrize("name", EXACT)
def test_the_stl_gradient_has_no_noise_at_the_posterior(name: str) -> None:
    target, scale = EXACT[name]

    def model() -> None:
        pyro.sample("x", target())
        if name == "block":
            pyro.sample("w", dist.MultivariateNormal(LOC[2:], blocks()[2:, 2:]))

    guide = FAMILY_GUIDES[name](model, **({"rank": 1} if name == "low_rank" else {}))
    guide()
    guide.params = Params(LOC, scale(guide))
    guide()
    for kind in ("stl", "score"):
        for seed in range(4):
            stl, reparam = (gradient(vl.ELBO(gradient=one), model, guide, seed=seed) for one in (kind, "reparam"))
            assert stl.norm() <= 1e5 * torch.finfo(torch.float64).eps * reparam.norm()
            assert reparam.norm() > 0.1
    # with a closed form on one side only, the noise of the other stays
    closed = gradient(vl.ELBO(gradient="stl", analytic_entropy=True), model, guide, seed=0)
    assert closed.norm() > 0.1 or name == "full_rank_student_t"  # which has no entropy in PyTorch


@pytest.mark.parametrize("kind", [Mixture, Flow])
def test_the_stl_gradient_has_no_noise_where_the_target_is_another_such_guide(kind: Any) -> None:
    def prior() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    own = kind(prior, init_scale=0.8)
    own()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in own.parameters():
            value += 0.3 * torch.randn(value.shape, generator=generator)
    target = copy.deepcopy(own).requires_grad_(False).get_posterior()
    pyro.clear_param_store()  # both have the same names

    def model() -> None:
        pyro.sample("x", target)

    guide = kind(model)
    guide.load_state_dict(own.state_dict())
    guide()
    for seed in range(4):
        stl, reparam = (gradient(vl.ELBO(gradient=one), model, guide, seed=seed) for one in ("stl", "reparam"))
        assert stl.norm() <= 1e6 * torch.finfo(torch.float64).eps * reparam.norm()
        assert reparam.norm() > 0.1


# --- (c) means --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize(
    "options",
    [
        {"gradient": "stl"},
        {"gradient": "reparam", "analytic_kl": True},
        {"gradient": "stl", "analytic_kl": True, "analytic_entropy": True},
        {"gradient": "score", "analytic_kl": True},
    ],
    ids=str,
)
def test_gradients_have_the_mean_of_the_reparam_gradient(name: str, options: dict[str, Any]) -> None:
    program = PROGRAMS[name]
    guide = program.guide(NORMAL)
    found = gradients(many(vl.ELBO, 200, **options), program.model, guide, num=20)
    plain = gradients(many(vl.ELBO, 200, gradient="reparam"), program.model, guide, num=20)
    # on the same draws, so that what is compared is the difference of the two alone
    difference = found - plain
    assert_same_mean(difference, torch.zeros_like(difference))
    assert (difference.abs() > 1e-3).any()


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_analytic_entropy_of_a_normal_has_its_reparam_gradient(name: str) -> None:
    """Draw by draw: log q is log s plus a function of the noise."""
    program = PROGRAMS[name]
    guide = program.guide(NORMAL)
    program.model(), guide()
    found, plain = (
        gradient(vl.ELBO(gradient="reparam", analytic_entropy=closed), program.model, guide, seed=0)
        for closed in (True, False)
    )
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("analytic_kl", [False, True])
def test_score_gradients_have_the_mean_of_the_reparam_gradient(name: str, analytic_kl: bool) -> None:
    program = PROGRAMS[name]
    objective = many(vl.ELBO, 1000, gradient="score", analytic_kl=analytic_kl)
    found = gradients(objective, program.model, program.guide(WITHOUT_PATH), num=20)
    plain = gradients(many(vl.ELBO, 1000, gradient="reparam"), program.model, program.guide(NORMAL), num=20)
    assert_same_mean(found, plain)
    assert (plain.mean(0).abs() > 0.01).any()


@pytest.mark.parametrize("name", ["global", "subsampled", "nested"])
@pytest.mark.parametrize("num_particles", [1, 3])
def test_looped_score_gradients_have_the_mean_of_the_reparam_gradient(name: str, num_particles: int) -> None:
    program = PROGRAMS[name]
    objective = vl.ELBO(num_particles, gradient="score")
    found = gradients(objective, program.model, program.guide(WITHOUT_PATH), num=80)
    plain = gradients(many(vl.ELBO, 1000, gradient="reparam"), program.model, program.guide(NORMAL), num=20)
    if num_particles == 1:
        found = found[10:]  # the average of the steps before has little to go by at first
    assert_same_mean(found, plain)


@pytest.mark.parametrize("name", [name for name, program in PROGRAMS.items() if program.local])
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_dreg_has_the_mean_of_the_plain_gradient_of_the_bound(name: str, alpha: float) -> None:
    program = PROGRAMS[name]
    guide = program.guide(NORMAL)
    dreg, plain = (
        gradients(vl.RenyiELBO(alpha, 4, vectorize_particles=True, gradient=kind), program.model, guide, num=80)
        for kind in ("dreg", "reparam")
    )
    difference = dreg - plain
    assert_same_mean(difference, torch.zeros_like(difference))
    assert (difference.abs() > 1e-3).any()


def test_dreg_with_joint_weights() -> None:
    """A second site that depends on the first, and both outside of the plate."""
    program = PROGRAMS["global"]
    guide = program.guide(NORMAL)
    dreg, plain = (
        gradients(vl.IWAE(5, vectorize_particles=True, gradient=kind), program.model, guide, num=100)
        for kind in ("dreg", "reparam")
    )
    difference = dreg - plain
    assert_same_mean(difference, torch.zeros_like(difference))
    assert dreg.var(0).sum() < plain.var(0).sum()


# --- (f) vectorized and looped ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["global", "subsampled", "nested"])
@pytest.mark.parametrize("objective", [vl.ELBO, vl.IWAE, vl.RenyiELBO, vl.PerSiteELBO])
def test_vectorized_and_looped_particles_agree(name: str, objective: Any) -> None:
    nesting = {} if name == "nested" else {"max_plate_nesting": 3}  # guessed, given
    program = PROGRAMS[name]
    guide = program.guide(NORMAL)
    at_once, looped = objective(num_particles=2, vectorize_particles=True, **nesting), objective(num_particles=2)
    assert_same_mean(*(gradients(kind, program.model, guide, num=20) for kind in (at_once, looped)))
    assert_same_mean(
        *(torch.tensor([kind.loss(program.model, guide) for _ in range(20)]) for kind in (at_once, looped))
    )


# --- single precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [vl.ELBO, vl.IWAE, vl.PerSiteELBO])
def test_single_precision_stays_single(objective: Any) -> None:
    torch.set_default_dtype(torch.float32)

    def model() -> None:
        with pyro.plate("row", 3):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))

    def guide() -> None:
        with pyro.plate("row", 3):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.ones(3)), 1.0))

    loss = objective(num_particles=2).differentiable_loss(model, guide)
    assert loss.dtype is torch.float32
    loss.backward()
    assert pyro.param("loc").grad.dtype is torch.float32
