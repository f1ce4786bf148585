from __future__ import annotations

import sys

import pytest
import torch

from pyro_vi_lab.errors import ArgumentError, ExtraError
from pyro_vi_lab.models import MODELS, build

DIMENSIONS = {
    "autoencoder": 1797 * 8,
    "bayesian_neural_network": 98,
    "eight_schools": 10,
    "eight_schools_centered": 10,
    "gaussian_mixture": 17,
    "linear_regression": 12,
    "linear_regression_known_noise": 11,
    "linear_regression_simulated": 7,
    "logistic_regression": 31,
    "logistic_regression_simulated": 21,
    "robust_regression_simulated": 7,
    "multinomial_regression": 10,
    "poisson_regression_simulated": 5,
    "negative_binomial_regression_simulated": 6,
    "hierarchical_regression_simulated": 31,
    "univariate_normal": 2,
}
WITHOUT_COORDS = {"bayesian_neural_network", "univariate_normal"}
FROM_SCIKIT_LEARN = {
    "autoencoder",
    "bayesian_neural_network",
    "linear_regression",
    "linear_regression_known_noise",
    "logistic_regression",
    "multinomial_regression",
}


def test_the_table_of_models() -> None:
    assert MODELS.keys() == DIMENSIONS.keys()
    for example in MODELS.values():
        assert "\n" not in example.description
        assert 0 < len(example.description) <= 100


@pytest.mark.parametrize("name", MODELS)
def test_every_example_builds_a_problem(name: str) -> None:
    if name in FROM_SCIKIT_LEARN:
        pytest.importorskip("sklearn")
    state = torch.get_rng_state()
    problem, again = build(name), MODELS[name].build()
    assert torch.equal(state, torch.get_rng_state())
    assert problem.name == name
    assert problem.dtype == torch.float64
    density = problem.density()
    assert density.tier == "graph"
    assert density.dim == DIMENSIONS[name]
    value, gradient = density.value_and_grad(torch.zeros(density.dim, dtype=torch.float64))
    assert bool(torch.isfinite(value))
    assert bool(torch.isfinite(gradient).all())
    for key, observed in problem.observed.items():
        assert torch.equal(observed, again.observed[key])
    for site in problem.sites.values():
        for dim, size in problem.sizes(site).items():
            assert len(problem.coords.get(dim, range(size))) == size
    assert {"school", "feature", "column"} & problem.coords.keys() or name in WITHOUT_COORDS


@pytest.mark.parametrize("name", MODELS)
def test_every_example_predicts_and_scores(name: str) -> None:
    if name in FROM_SCIKIT_LEARN:
        pytest.importorskip("sklearn")
    problem = build(name)
    prior = problem.prior(num_draws=3, seed=1)
    ((site, data),) = problem.observed.items()
    predicted = problem.predictive(prior, seed=1)[site]
    assert predicted.shape == (1, 3, *data.shape)
    if any(one.kind == "discrete" for one in problem.sites.values()):
        return  # over which each row would have to be summed
    scores = problem.log_likelihood(prior)[site]
    assert scores.shape == predicted.shape[: scores.dim()]
    assert bool(torch.isfinite(scores).all())


@pytest.mark.parametrize("name", sorted(FROM_SCIKIT_LEARN))
def test_without_scikit_learn_the_others_still_build(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ExtraError, match=r"pip install 'pyro-vi-lab\[examples\]'"):
        build(name)
    assert build("eight_schools").name == "eight_schools"


def test_a_wrong_name_suggests_the_nearest() -> None:
    with pytest.raises(ArgumentError, match="unknown model 'eigth_schools': did you mean 'eight_schools'"):
        build("eigth_schools")
