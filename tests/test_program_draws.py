from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal, AutoNormalMessenger
from pyro.infer.importance import vectorized_importance_weights
from torch import Tensor, nn
from torch.distributions import constraints

import pyro_vi_lab as vl
from pyro_vi_lab.checks import importance
from pyro_vi_lab.errors import ArgumentError, ModelError
from pyro_vi_lab.guides import Amortized
from pyro_vi_lab.isolation import default_dtype
from pyro_vi_lab.program_draws import program_draws

Y = torch.randn(12, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 1.0


def mean_of(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def posterior_of_mean() -> tuple[float, float]:
    precision = len(Y) + 1 / 4
    return float(Y.sum()) / precision, precision**-0.5


def exact_guide(*args: Any, **kwargs: Any) -> None:
    pyro.sample("mu", dist.Normal(*map(torch.tensor, posterior_of_mean())))


def log_evidence() -> float:
    covariance = torch.eye(len(Y), dtype=torch.float64) + 4 * torch.ones(len(Y), len(Y), dtype=torch.float64)
    return float(torch.distributions.MultivariateNormal(torch.zeros_like(Y), covariance).log_prob(Y))


def check_exact(problem: vl.Problem, guide: Callable[..., Any]) -> None:
    stats = program_draws(problem, guide, 200, 0, weigh=True).stats
    check = importance(stats["log_p"], stats["log_q"])
    assert check.khat == -math.inf
    assert check.log_mean_weight == pytest.approx(log_evidence(), abs=1e-9)


def test_weights_of_an_exact_guide_are_the_evidence() -> None:
    check_exact(vl.Problem(mean_of, Y), exact_guide)


class ExactMessenger(AutoNormalMessenger):
    def get_posterior(self, name: str, prior: Any) -> Any:
        return dist.Normal(*map(torch.tensor, posterior_of_mean()))


def test_a_messenger_guide_is_weighed_rightly_where_pyro_is_wrong() -> None:
    """Pyro traces the guide from outside, so that the likelihood of the data counts for the guide as well."""
    guide = ExactMessenger(mean_of)
    guide(Y)
    check_exact(vl.Problem(mean_of, Y), guide)
    with torch.no_grad(), pyro.validation_enabled(False):  # which would warn that y is in the guide
        weights, *_ = vectorized_importance_weights(mean_of, guide, Y, num_samples=200, max_plate_nesting=1)
    assert float(weights.std()) > 0.1  # all weights of an exact guide are equal
    with pytest.raises(TypeError), pyro.validation_enabled(False):
        vectorized_importance_weights(mean_of, guide, Y, num_samples=20, max_plate_nesting=1, normalized=True)


@pytest.mark.parametrize("size", [5, 12])
def test_minibatches_are_weighed_by_all_rows(size: int) -> None:
    check_exact(vl.Problem(mean_of, Y, minibatch=size), exact_guide)


def test_plates_that_take_a_part_of_their_rows_are_weighed_by_all_of_them() -> None:
    def subsampled(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("row", len(y), subsample_size=5) as index:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])

    check_exact(vl.Problem(subsampled, Y), exact_guide)


def test_memory_mapped_rows_are_gone_through_batch_by_batch(tmp_path: Any) -> None:
    path = tmp_path / "y.npy"
    np.save(path, Y.numpy())
    check_exact(vl.Problem(mean_of, np.load(path, mmap_mode="r"), minibatch=5), exact_guide)


def test_rows_of_a_data_loader_cannot_be_weighed() -> None:
    problem = vl.Problem(mean_of, loader=[(Y[:6],), (Y[6:],)], num_rows=12)
    with pytest.raises(ModelError, match="data loader"):
        program_draws(problem, exact_guide, 50, 0, weigh=True)
    assert program_draws(problem, exact_guide, 50, 0).stats == {}


def components(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    with pyro.plate("row", len(y)):
        which = pyro.sample("which", dist.Bernoulli(share))
        pyro.sample("y", dist.Normal(loc[which.long()], 1.0), obs=y)


def guide_of_components(y: Tensor) -> None:
    pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0]), 0.5).to_event(1))
    pyro.sample("share", dist.Uniform(0.1, 0.9))


def log_joint_of_components(values: dict[str, Tensor]) -> Tensor:
    loc, share = values["loc"], values["share"]
    three, two = torch.tensor(3.0, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    prior = dist.Normal(0 * three, three).log_prob(loc).sum(-1) + dist.Beta(two, two).log_prob(share)
    each = dist.Normal(loc[:, None, :], two / 2).log_prob(Y[:, None])
    parts = torch.stack([(1 - share).log()[:, None] + each[..., 0], share.log()[:, None] + each[..., 1]])
    return prior + parts.logsumexp(0).sum(-1)


@pytest.mark.parametrize("minibatch", [None, 5])
def test_discrete_sites_are_summed_out(minibatch: int | None) -> None:
    problem = vl.Problem(components, Y, minibatch=minibatch)
    drawn = program_draws(problem, guide_of_components, 100, 0, weigh=True)
    torch.testing.assert_close(drawn.stats["log_p"], log_joint_of_components(drawn.values), rtol=1e-10, atol=1e-8)
    values = drawn.values
    expected = dist.Normal(torch.tensor([-1.0, 1.0], dtype=torch.float64), 0.5).log_prob(values["loc"]).sum(-1)
    expected = expected - math.log(0.8)
    torch.testing.assert_close(drawn.stats["log_q"], expected, rtol=1e-10, atol=1e-8)


def test_discrete_sites_that_the_guide_draws_are_weighed_as_drawn() -> None:
    def draws_which(y: Tensor) -> None:
        guide_of_components(y)
        with pyro.plate("row", len(y)):
            pyro.sample("which", dist.Bernoulli(torch.full((len(y),), 0.3)))

    stats = program_draws(vl.Problem(components, Y), draws_which, 500, 0).stats
    summed = program_draws(vl.Problem(components, Y), guide_of_components, 500, 0, weigh=True).stats
    evidence = [importance(one["log_p"], one["log_q"]) for one in (stats, summed)]
    error = math.hypot(*(one.ess**-0.5 for one in evidence))
    assert abs(evidence[0].log_mean_weight - evidence[1].log_mean_weight) < 5 * error
    assert evidence[0].ess < evidence[1].ess  # that much is lost by drawing them


def test_a_site_that_is_a_point_is_named() -> None:
    def half_a_point(y: Tensor) -> None:
        pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("share", dist.Delta(torch.tensor(0.5)))

    problem = vl.Problem(components, Y)
    with pytest.raises(ArgumentError, match=r"half_a_point of components has .* site 'share' is a point \(Delta\)"):
        program_draws(problem, half_a_point, 50, 0, weigh=True)
    assert program_draws(problem, half_a_point, 50, 0).stats == {}
    with pytest.raises(ArgumentError, match="site 'mu' is a point"):
        Fake(vl.Problem(mean_of, Y), AutoDelta(mean_of)).importance(50)


def test_transforms_of_draws_are_no_points() -> None:
    problem, guide = vl.Problem(components, Y), AutoNormal(pyro.poutine.block(components, hide=["which"]))
    with default_dtype(torch.float64):
        guide(Y)
    drawn = program_draws(problem, guide, 100, 0, weigh=True)
    torch.testing.assert_close(drawn.stats["log_p"], log_joint_of_components(drawn.values), rtol=1e-10, atol=1e-8)
    assert math.isfinite(Fake(problem, guide).importance(100).khat)


# --- rows -----------------------------------------------------------------------------------------------------------


def local(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("row", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def guide_of_rows(y: Tensor) -> None:
    """Exact given mu, but for the first row of all, which is too narrow: weights with k = 1 - 0.02² / 0.2."""
    mu = pyro.sample("mu", dist.Normal(1.0, 0.5))
    sd = torch.where(y == Y[0], 0.02, 0.2**0.5)
    with pyro.plate("row", len(y)):
        pyro.sample("z", dist.Normal((4 * y + mu) / 5, sd))


class Fake:
    """A fit that has been made by hand."""

    def __new__(cls, problem: vl.Problem, guide: Any) -> Any:
        return vl.Fit(
            problem=problem,
            method="by hand",
            guide=guide,
            params=None,
            statuses=(vl.Status.CONVERGED,),
            message="",
            num_steps=0,
            num_gradients=0,
            seconds=0.0,
            seed=0,
            history={},
        )


@pytest.mark.parametrize("minibatch", [None, 4])
def test_each_row_is_weighed_by_itself(minibatch: int | None) -> None:
    found = Fake(vl.Problem(local, Y, minibatch=minibatch), guide_of_rows).row_importance(2000)
    assert sorted(found.rows) == list(range(12))
    assert found.worst == 0
    by_row = dict(zip(found.rows, found.khat, strict=True))
    assert by_row[0] > 0.7
    assert {khat for row, khat in by_row.items() if row} == {-math.inf}
    assert found.share_above == pytest.approx(1 / 12)
    assert "largest" in repr(found)
    assert found.to_dict()["worst"] == 0


def test_some_of_the_rows_are_enough() -> None:
    found = Fake(vl.Problem(local, Y, minibatch=4), guide_of_rows).row_importance(200, num_rows=5)
    assert len(found.rows) == len(set(found.rows)) == 8


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.8, dtype=torch.float64))

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return (self.slope * y)[:, None], torch.full((len(y), 1), 0.2**0.5, dtype=torch.float64)


def test_rows_of_an_amortized_guide_and_of_a_data_loader() -> None:
    def centered(y: Tensor) -> None:
        with pyro.plate("row", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    whole = Fake(vl.Problem(centered, Y), Amortized(centered, Encoder())).row_importance(100)
    assert set(whole.khat) == {-math.inf}  # the encoder is exact
    problem = vl.Problem(centered, loader=[(Y[:6],), (Y[6:],)], num_rows=12)
    some = Fake(problem, Amortized(centered, Encoder())).row_importance(100)
    assert set(some.khat) == {-math.inf}
    assert some.rows == tuple(range(12))


def test_a_row_with_mass_outside_of_the_support_is_reported() -> None:
    def positive(y: Tensor) -> None:
        with pyro.plate("row", len(y)):
            z = pyro.sample("z", dist.HalfNormal(torch.ones(())))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    def crosses(y: Tensor) -> None:
        with pyro.plate("row", len(y)):
            pyro.sample("z", dist.Normal(y.new_zeros(len(y)), 1.0))

    found = Fake(vl.Problem(positive, Y), crosses).row_importance(1000)
    assert np.abs(found.support_mismatch - 0.5).max() < 5 * math.sqrt(0.25 / 1000)


def test_what_has_no_rows_is_told() -> None:
    with pytest.raises(ArgumentError, match="no latent site of mean_of lies in a plate"):
        Fake(vl.Problem(mean_of, Y), exact_guide).row_importance(50)
    with pytest.raises(ArgumentError, match="no latent site of local lies in plate 'column'"):
        Fake(vl.Problem(local, Y), guide_of_rows).row_importance(50, plate="column")

    def together(y: Tensor) -> None:
        pyro.sample("mu", dist.Normal(1.0, 0.5))
        pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0).to_event(1))

    with pytest.raises(ArgumentError, match="draws site 'z' for all rows together"):
        Fake(vl.Problem(local, Y), together).row_importance(50)
    with pytest.raises(ArgumentError, match="discrete local site 'which' is not drawn"):
        Fake(vl.Problem(components, Y), guide_of_components).row_importance(50, plate="row")
    fit = vl.fit(vl.Problem(local, Y), "mean_field", max_steps=2, progress=False)
    with pytest.raises(ArgumentError, match="mean_field draws all latent sites as one vector"):
        fit.row_importance(50)


def test_a_local_point_is_named() -> None:
    def point(y: Tensor) -> None:
        pyro.sample("mu", dist.Normal(1.0, 0.5))
        with pyro.plate("row", len(y)):
            pyro.sample("z", dist.Delta(pyro.param("at", torch.zeros(len(y)), constraint=constraints.real)))

    with pytest.raises(ArgumentError, match="site 'z' is a point"):
        Fake(vl.Problem(local, Y), point).row_importance(50)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    pyro.clear_param_store()
