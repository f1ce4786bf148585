from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vi_lab as vl
from pyro_vi_lab.density_batch import DensityBatch
from pyro_vi_lab.errors import ArgumentError, DataError, LabWarning
from pyro_vi_lab.models import build

GENERATOR = torch.Generator().manual_seed(0)
Y = torch.randn(20, 8, generator=GENERATOR, dtype=torch.float64) * 10


def test_each_fit_sees_its_own_data() -> None:
    problem = build("eight_schools")
    problems = problem.each({"y": Y})
    batch = DensityBatch([one.density() for one in problems])
    assert batch.together
    z = torch.randn(6, len(Y), batch.dim, generator=GENERATOR, dtype=torch.float64)
    value, grad = batch.value_and_grad(z)
    for r in (0, 7, 19):
        own = problem.with_data(*(Y[r] if name == "y" else leaf for name, leaf in problem.inputs.items())).density()
        expected = own.value_and_grad(z[:, r])
        torch.testing.assert_close(value[:, r], expected[0])
        torch.testing.assert_close(grad[:, r], expected[1])
    chosen = batch.chosen(torch.tensor([3, 1]))
    torch.testing.assert_close(chosen.value_and_grad(z[:, [3, 1]])[0], value[:, [3, 1]])


def conjugate(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


@pytest.mark.parametrize("guide", ["mean_field", "full_rank"])
def test_fits_of_many_data_sets_are_exact(guide: str) -> None:
    """The posterior of the mean of n normals with prior N(0, 4) is N(Σy / (n + 1/4), 1 / (n + 1/4))."""
    fits = vl.fit_each(vl.Problem(conjugate, Y[0]), {"y": Y}, guide, progress=False)
    assert len(fits) == len(Y)
    for fit, y in zip(fits, Y, strict=True):
        assert fit.status is vl.Status.CONVERGED
        precision = len(y) + 0.25
        torch.testing.assert_close(fit.loc, (y.sum() / precision)[None], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            fit.covariance(), torch.full((1, 1), 1 / precision, dtype=torch.float64), rtol=1e-5, atol=0
        )
        assert torch.equal(fit.problem.observed["y"], y)
        assert fit.posterior(100).draws["mean"].shape == (1, 100)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"x": Y}, ArgumentError, "data names 'x'; the tensors among the arguments are y"),
        ({"y": Y[0]}, ArgumentError, r"data for 'y' have shape \(8,\); expected \(data sets, 8\)"),
        ({"y": Y[:, :3]}, ArgumentError, r"data for 'y' have shape \(20, 3\)"),
        ({"y": torch.where(Y > 20, torch.nan, Y)}, DataError, "of argument 'y' has values that are not finite"),
    ],
    ids=["name", "no data sets", "shape", "not finite"],
)
def test_data_that_do_not_fit(data: dict[str, Tensor], error: type[Exception], message: str) -> None:
    assert bool((Y > 20).any())
    with pytest.raises(error, match=message):
        vl.fit_each(vl.Problem(conjugate, Y[0]), data, progress=False)


def test_a_model_that_reads_its_data_runs_one_by_one() -> None:
    """Data that are constants of the graph: every data set has its own, which is said."""

    def looks(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(float(y.max()) * 0.0, 2.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    with pytest.warns(
        LabWarning, match="3 data sets|the data sets of model looks are fitted with a run of their own each"
    ):
        fits = vl.fit_each(vl.Problem(looks, Y[0]), {"y": Y[:3]}, progress=False)
    for fit, y in zip(fits, Y[:3], strict=True):
        torch.testing.assert_close(fit.loc, (y.sum() / 8.25)[None], rtol=1e-6, atol=1e-6)
