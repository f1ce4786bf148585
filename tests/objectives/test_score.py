"""The score function estimator: exact means, less noise by plates, order and baselines, and no state that leaks."""

from __future__ import annotations

import copy
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ArgumentError, LabWarning, ModelError
from tests.objectives.programs import STANDARD_ERRORS, Y, assert_same_mean, gradient, gradients, positive


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


def probability(name: str, *values: float) -> Tensor:
    return pyro.param(name, torch.tensor(values).squeeze(), constraint=constraints.unit_interval)


def switches(y: Tensor = Y) -> None:
    """A switch for all rows, and one for each that depends on it."""
    all_on = pyro.sample("all_on", dist.Bernoulli(0.3))
    with pyro.plate("row", len(y)):
        on = pyro.sample("on", dist.Bernoulli(0.2 + 0.5 * all_on))
        pyro.sample("y", dist.Normal(2 * on - 1, positive("noise", 0.9)), obs=y)


def switches_guide(y: Tensor = Y) -> None:
    all_on = pyro.sample("all_on", dist.Bernoulli(probability("p", 0.4)))
    with pyro.plate("row", len(y)):
        probs = probability("probs", 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
        pyro.sample("on", dist.Bernoulli(probs * (0.5 + 0.4 * all_on)))


def exact(model: Any, guide: Any) -> Tensor:
    """The gradient by enumeration."""
    objective, marked = TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(guide)
    objective.loss(model, marked)
    return gradient(objective, model, marked, seed=0)


def assert_has_mean(sample: Tensor, mean: Tensor) -> None:
    error = sample.std(0) / len(sample) ** 0.5
    assert ((sample.mean(0) - mean).abs() <= STANDARD_ERRORS * error + 1e-12).all()


@pytest.mark.parametrize(
    "options",
    [
        {"num_particles": 1},
        {"num_particles": 3},
        {"num_particles": 3, "vectorize_particles": True},
        {"num_particles": 2, "analytic_kl": True, "vectorize_particles": True},
        {"num_particles": 2, "analytic_entropy": True},
        {"num_particles": 2, "gradient": "reparam"},
    ],
    ids=str,
)
def test_the_mean_is_the_gradient_by_enumeration(options: dict[str, Any]) -> None:
    expected = exact(switches, switches_guide)
    found = gradients(vl.ELBO(**{"gradient": "score", **options}), switches, switches_guide, num=80)
    assert_has_mean(found[20:], expected)


def noise(objective: Any, model: Any = switches, guide: Any = switches_guide, num: int = 80) -> float:
    """Sum of the variances of the gradient per draw."""
    return gradients(objective, model, guide, num=num)[20:].var(0).sum().item() * objective.num_particles


def test_baselines_and_closed_forms_take_noise_away() -> None:
    pyro_s = noise(Trace_ELBO())
    average, others = noise(vl.ELBO(gradient="score")), noise(vl.ELBO(4, gradient="score"))
    closed = noise(vl.ELBO(4, gradient="score", analytic_kl=True))
    assert average < 0.7 * pyro_s
    assert others < 0.7 * pyro_s
    assert closed < others


def test_rows_are_their_own_costs() -> None:
    """The gradient of a row has no noise of other rows: it is the same without them."""
    found = []
    for num_rows in (1, 6):

        def model(y: Tensor = Y[:num_rows]) -> None:
            with pyro.plate("row", len(y)):
                pyro.sample("y", dist.Normal(pyro.sample("on", dist.Bernoulli(0.3)), 1.0), obs=y)

        def guide(y: Tensor = Y[:num_rows]) -> None:
            with pyro.plate("row", len(y)):
                pyro.sample("on", dist.Bernoulli(probability("probs", 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)[: len(y)]))

        for num_particles in (1, 2):
            pyro.clear_param_store()
            objective = vl.ELBO(num_particles, gradient="score", vectorize_particles=True)
            found.append(gradients(objective, model, guide, num=100)[20:, 0].var())
    torch.testing.assert_close(found[2] / found[0], torch.tensor(1.0), rtol=0.7, atol=0)
    torch.testing.assert_close(found[3] / found[1], torch.tensor(1.0), rtol=0.7, atol=0)


def test_terms_before_a_draw_are_no_costs_of_it() -> None:
    """A likelihood of an earlier site with enormous noise does not reach a later one."""

    def model() -> None:
        first = pyro.sample("first", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(first, 1e-3), obs=torch.tensor(0.0))
        second = pyro.sample("second", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(second, 1.0), obs=torch.tensor(1.0))

    def guide() -> None:
        pyro.sample("first", dist.Normal(0.0, 1.0))
        pyro.sample("second", dist.Bernoulli(probability("p", 0.6)))

    found = gradients(vl.ELBO(2, gradient="score"), model, guide, num=50)
    assert found.abs().max() < 5  # the cost of "x" is a million


def test_mixed_guides_have_paths_and_scores() -> None:
    """A draw with a path that a discrete one depends on, which another with a path depends on."""

    def model() -> None:
        rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
        on = pyro.sample("on", dist.Bernoulli(logits=rate))
        x = pyro.sample("x", dist.Normal(on, 1.0))
        pyro.sample("y", dist.Normal(x + rate, 0.5), obs=torch.tensor(1.5))

    def guide() -> None:
        rate = pyro.sample("rate", dist.Normal(pyro.param("rate_loc", torch.tensor(0.2)), positive("rate_scale", 0.5)))
        weight = pyro.param("weight", torch.tensor(0.7))
        on = pyro.sample("on", dist.Bernoulli(logits=weight * rate))
        pyro.sample("x", dist.Normal(pyro.param("slope", torch.tensor(0.8)) * on, positive("x_scale", 0.6)))

    options = {"num_particles": 300, "vectorize_particles": True, "max_plate_nesting": 0}
    enumerated = TraceEnum_ELBO(**options)
    marked = config_enumerate(guide)
    expected = gradients(enumerated, model, marked, num=25)
    found = gradients(vl.ELBO(gradient="score", **options), model, guide, num=25)
    assert_same_mean(found, expected)
    assert found.var(0).sum() < gradients(Trace_ELBO(**options), model, guide, num=25).var(0).sum()


def test_a_subsampled_plate() -> None:
    def model(size: int | None = 2) -> None:
        with pyro.plate("row", 6, subsample_size=size) as index:
            on = pyro.sample("on", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal(2 * on - 1, 1.0), obs=Y[index])

    def guide(size: int | None = 2) -> None:
        with pyro.plate("row", 6, subsample_size=size) as index:
            pyro.sample("on", dist.Bernoulli(probability("probs", 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)[index]))

    expected = exact(lambda: model(None), lambda: guide(None))
    for num_particles in (1, 2):
        assert_has_mean(gradients(vl.ELBO(num_particles, gradient="score"), model, guide, num=150)[20:], expected)


def test_a_factor_of_the_guide_with_a_score() -> None:
    """A draw by hand, whose log density is a factor."""

    def model() -> None:
        on = pyro.sample("on", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(on, 1.0), obs=torch.tensor(1.4))

    def plain() -> None:
        pyro.sample("on", dist.Bernoulli(probability("p", 0.6)))

    def by_hand() -> None:
        probs = probability("p", 0.6)
        on = torch.bernoulli(probs.detach())
        pyro.factor("log_q", dist.Bernoulli(probs).log_prob(on), has_rsample=False)
        pyro.sample("on", dist.Delta(on))

    expected = exact(model, plain)
    assert_has_mean(gradients(vl.ELBO(2, gradient="score"), model, by_hand, num=150), expected)


# --- state ------------------------------------------------------------------------------------------------------------


def test_the_average_belongs_to_one_objective() -> None:
    switches(), switches_guide()
    fresh = gradient(vl.ELBO(gradient="score"), switches, switches_guide, seed=0)
    used = vl.ELBO(gradient="score")
    first = gradient(used, switches, switches_guide, seed=0)
    second = gradient(used, switches, switches_guide, seed=0)
    again = gradient(vl.ELBO(gradient="score"), switches, switches_guide, seed=0)
    torch.testing.assert_close(fresh, first)
    torch.testing.assert_close(fresh, again)
    assert (second - first).abs().max() > 0.01
    assert not any("baseline" in name for name in pyro.get_param_store())
    twin = copy.deepcopy(used)
    gradient(twin, switches, switches_guide, seed=1)
    torch.testing.assert_close(
        gradient(used, switches, switches_guide, seed=2),
        gradient(_trained(), switches, switches_guide, seed=2),
    )


def _trained() -> Any:
    objective = vl.ELBO(gradient="score")
    for _ in range(2):
        gradient(objective, switches, switches_guide, seed=0)
    return objective


def test_the_loss_alone_does_not_teach_the_average() -> None:
    switches(), switches_guide()
    objective = vl.ELBO(gradient="score")
    objective.loss(switches, switches_guide)
    torch.testing.assert_close(
        gradient(objective, switches, switches_guide, seed=0),
        gradient(vl.ELBO(gradient="score"), switches, switches_guide, seed=0),
    )


def test_captured_steps_leave_an_average_to_pyro() -> None:
    several, one = vl.Captured(vl.ELBO(2, gradient="score")), vl.Captured(vl.ELBO(gradient="score"))
    switches(), switches_guide()
    plain = gradient(vl.ELBO(2, gradient="score"), switches, switches_guide, seed=4)
    gradient(several, switches, switches_guide, seed=3)
    torch.testing.assert_close(gradient(several, switches, switches_guide, seed=4), plain)
    assert several._graphs
    with pytest.warns(LabWarning, match="baseline of site 'all_on' changes from step to step"):
        gradient(one, switches, switches_guide, seed=3)
    assert not one._graphs


# --- what it cannot take ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [vl.ELBO(), vl.ELBO(gradient="score"), vl.IWAE(2), vl.PerSiteELBO()])
@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_enumerated_sites_are_named(objective: Any, kind: str) -> None:
    with pytest.raises(ModelError, match=r"site 'all_on' is to be enumerated.*TraceEnum_ELBO"):
        objective.loss(switches, config_enumerate(switches_guide, default=kind))
    hidden = poutine.block(switches_guide, hide=["on"])
    with pytest.raises(ModelError, match="site 'on' is to be enumerated"):
        objective.loss(poutine.infer_config(switches, lambda site: {"enumerate": "parallel"}), hidden)


def test_a_missing_site_is_named() -> None:
    with pytest.raises(ModelError, match="latent site 'on' of the model is missing in the guide"):
        vl.ELBO(gradient="score").loss(switches, poutine.block(switches_guide, hide=["on"]))


@pytest.mark.parametrize("decay", [-0.1, 1.0, None, "slow"])
def test_wrong_decays(decay: Any) -> None:
    with pytest.raises(ArgumentError, match="baseline_decay must be a number from 0 to below 1"):
        vl.ELBO(gradient="score", baseline_decay=decay)
