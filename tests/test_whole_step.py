from __future__ import annotations

import pytest
import torch

import pyro_vi_lab as vl
from pyro_vi_lab.models import build
from pyro_vi_lab.native import compiler

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C compiler")


@needs_compiler
@pytest.mark.parametrize(
    "guide",
    [
        # normal noise in the fast tests: the step of the others is many operators, which take half a minute to compile
        pytest.param(name, marks=() if name in ("mean_field", "full_rank") else pytest.mark.slow)
        for name in vl.guides.FAMILY_GUIDES
        if name not in ("low_rank", "mixture")
    ],
)
@pytest.mark.parametrize("num_restarts", [1, 3])
def test_a_whole_step_is_the_same_step(guide: str, num_restarts: int) -> None:
    """Up to rounding: the same draws, decisions, number of steps and parameters as step by step."""
    problem = build("linear_regression_simulated")
    options = {"num_restarts": num_restarts, "seed": 3, "progress": False}
    plain = vl.fit(problem, guide, compile=False, **options)
    whole = vl.fit(problem, guide, compile=True, **options)
    assert (whole.num_steps, whole.num_gradients, whole.statuses) == (
        plain.num_steps,
        plain.num_gradients,
        plain.statuses,
    )
    for one, other in zip(whole.params, plain.params, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        torch.from_numpy(whole.history["negative_elbo"]),
        torch.from_numpy(plain.history["negative_elbo"]),
        rtol=1e-6,
        atol=1e-6,
    )
    cache = problem.density().traceable().cache
    assert {runner.tier for runner in cache.values()} == {"native"}


@needs_compiler
def test_a_whole_step_takes_other_data() -> None:
    """The graph of the step has the data as inputs: it serves another data set of the same shapes."""
    problem = build("eight_schools")
    vl.fit(problem, compile=True, progress=False)
    y = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], dtype=torch.float64)
    other = problem.each({"y": y[None]})[0]
    known = set(problem.density().traceable().cache)
    whole = vl.fit(other, compile=True, progress=False)
    assert known <= set(other.density().traceable().cache)
    plain = vl.fit(other, compile=False, progress=False)
    torch.testing.assert_close(whole.loc, plain.loc, rtol=1e-6, atol=1e-8)


def test_the_same_seed_gives_the_same_bits() -> None:
    """Interpreted, whatever ran before in this process."""
    problem = build("eight_schools")
    first = vl.fit(problem, seed=5, progress=False)
    for seed in range(3):
        vl.fit(problem, seed=seed, progress=False)
    assert torch.equal(vl.fit(problem, seed=5, progress=False).loc, first.loc)
