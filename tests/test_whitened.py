from __future__ import annotations

import pytest
import torch

import pyro_vi_lab as vl
from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.families import Params
from pyro_vi_lab.models import build
from pyro_vi_lab.native import compiler
from pyro_vi_lab.whitened import Whitened


@pytest.mark.parametrize("guide", ["mean_field", "full_rank"])
def test_the_density_of_the_standard_coordinates(guide: str) -> None:
    problem = build("eight_schools")
    fit = vl.fit(problem, guide, progress=False)
    target = Whitened(problem.density(), fit.family, Params(fit.params.loc[0], fit.params.scale[0]))
    u = torch.randn(target.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    value, grad = target.value_and_grad(u.detach())
    assert value == problem.density().log_prob(target.to_z(u.detach()))
    expected = torch.autograd.functional.jacobian(lambda v: target.to_z(v), u.detach()).T
    torch.testing.assert_close(grad, expected @ problem.density().value_and_grad(target.to_z(u.detach()))[1])
    ways = [target.bound(u.detach()), target.pointwise()(u.detach())]
    ways += [target.native(u.detach())] if compiler() else []
    for other in ways:
        torch.testing.assert_close(tuple(other), (value, grad))


def test_nuts_from_a_fit_agrees_and_is_cheaper_on_a_correlated_posterior() -> None:
    problem = build("linear_regression")
    fit = vl.fit(problem, progress=False)
    settings = {"num_chains": 2, "num_warmup": 300, "num_draws": 500, "progress": False}
    cold, warm = vl.nuts(problem, **settings), vl.nuts(problem, start=fit, **settings)
    assert warm.info["start"] == "full_rank"
    assert warm.info["num_gradients"] < cold.info["num_gradients"]
    for name, sd in cold.sd().items():
        assert float(((warm.mean()[name] - cold.mean()[name]) / sd).abs().max()) < 0.5  # 5 MCSE of 100 effective draws


def test_a_fit_that_has_no_covariance() -> None:
    from pyro.infer.autoguide import AutoDelta

    problem = build("eight_schools")
    fit = vl.fit(problem, AutoDelta, max_steps=10, progress=False)
    with pytest.raises(ArgumentError, match="a fit of the guide AutoDelta has no loc"):
        vl.nuts(problem, start=fit, progress=False)
