"""Problems on data in batches: from memory, from disk and from loaders, and what works without all rows at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pyro_vi_lab import data as data_module
from pyro_vi_lab.errors import ArgumentError, LabError, LabWarning, ModelError
from pyro_vi_lab.guides import MeanFieldNormal
from pyro_vi_lab.posterior import Posterior
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.rows import set_up

LEVEL = 5e-7
N = 50
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(N, 2, generator=GENERATOR, dtype=torch.float64)
Y = X @ torch.tensor([1.0, -2.0], dtype=torch.float64) + torch.randn(N, generator=GENERATOR, dtype=torch.float64)


def regression(x: Tensor, y: Tensor, scale: float = 1.0) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.Normal(x @ beta, scale), obs=y)


def local(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.deterministic("twice", 2 * mu)
    with pyro.plate("row", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 0.5))
        pyro.deterministic("shifted", z + 1)
        pyro.sample("y", dist.Normal(z, 1.0).expand([len(y)]), obs=y)


def local_drawing(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.deterministic("twice", 2 * mu)
    with pyro.plate("row", len(y), subsample_size=8) as index:
        z = pyro.sample("z", dist.Normal(mu, 0.5))
        pyro.deterministic("shifted", z + 1)
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data of more than ten numbers are large."""
    monkeypatch.setattr(data_module, "WHOLE_NUMBERS", 10)


def saved(path: Path, *arrays: Any) -> list[Any]:
    """Memory-mapped files of the arrays."""
    maps = []
    for i, array in enumerate(arrays):
        np.save(path / f"{i}.npy", np.asarray(array))
        maps.append(np.load(path / f"{i}.npy", mmap_mode="r"))
    return maps


# --- data in any form ---------------------------------------------------------------------------------------

FORMS: dict[str, Callable[[Path], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "tensors": lambda path: ((X, Y), {}),
    "float32": lambda path: ((X.float(), Y.float()), {}),
    "arrays": lambda path: ((X.numpy(), Y.numpy()), {}),
    "pandas": lambda path: ((pd.DataFrame(X.numpy()), pd.Series(Y.numpy())), {}),
    "on disk": lambda path: (tuple(saved(path, X, Y)), {}),
    "by name": lambda path: ((X,), {"y": saved(path, Y)[0]}),
}


@pytest.mark.parametrize("name", FORMS)
def test_batches_of_data_in_any_form(name: str, tmp_path: Path) -> None:
    args, kwargs = FORMS[name](tmp_path)
    problem = Problem(regression, *args, minibatch=8, **kwargs)
    assert (problem.minibatch, problem.num_rows, problem.row_plates, problem.subsamples) == (8, N, ("row",), True)
    assert problem.sites["y"].shape == (N,)
    seen = []
    for batch in problem.batches(seed=1).epoch():
        x, y = (*batch.args, *batch.kwargs.values())
        assert batch.index is not None
        assert x.dtype == y.dtype == torch.float64
        rtol = 1e-6 if name == "float32" else 0
        torch.testing.assert_close(x, X[batch.index], rtol=rtol, atol=0)
        torch.testing.assert_close(y, Y[batch.index], rtol=rtol, atol=0)
        seen += batch.index.tolist()
    assert sorted(seen) == list(range(N))


def test_batches_depend_on_the_seed_alone() -> None:
    problem = Problem(regression, X, Y, minibatch=8)
    one, two, other = (
        [batch.index.tolist() for batch in itertools.islice(problem.batches(seed), 12)] for seed in (3, 3, 4)
    )
    assert one == two != other


def test_labels_of_the_rows_are_kept() -> None:
    frame = pd.DataFrame(X.numpy(), index=[f"r{i}" for i in range(N)])
    assert Problem(regression, frame, Y, minibatch=8).coords["row"][:2] == ["r0", "r1"]


def test_all_rows_as_one_batch() -> None:
    """More rows than there are mean all of them."""
    problem = Problem(regression, X, Y, minibatch=1000)
    batch = next(problem.batches())
    assert (problem.minibatch, batch.size, batch.scale) == (N, N, 1.0)
    assert torch.equal(batch.args[0], X)


def test_the_example_is_a_batch() -> None:
    example = Problem(regression, X, Y, minibatch=8).example
    assert example is not None
    assert example.index is not None
    assert example.index.tolist() == list(range(8))
    assert torch.equal(example.args[1], Y[:8])
    assert Problem(regression, X, Y).example is None


def test_a_float32_network_gets_float32_batches() -> None:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 1)

        def forward(self, x: Tensor, y: Tensor) -> None:
            scale = pyro.sample("scale", dist.HalfNormal(1.0))
            with pyro.plate("row", len(x)):
                pyro.sample("y", dist.Normal(self.net(x)[:, 0], scale), obs=y)

    with pytest.warns(LabWarning, match="model Model holds torch.float32 tensors") as caught:
        problem = Problem(Model(), X, Y, minibatch=8)
    assert [warning.filename for warning in caught] == [__file__]
    assert problem.dtype == next(problem.batches()).args[0].dtype == torch.float32


# --- what is known of all rows ------------------------------------------------------------------------------


def test_the_density_of_all_rows_is_there_where_they_are_held() -> None:
    one, two = Problem(regression, X, Y, minibatch=8), Problem(regression, X, Y)
    z = torch.tensor([0.3, -0.4], dtype=torch.float64)
    assert float(one.density().log_prob(z)) == float(two.density().log_prob(z))
    assert torch.equal(one.observed["y"], Y)
    args, kwargs, around = one.all_rows()
    with around(), poutine.condition(data={"beta": z}):
        trace = poutine.trace(regression).get_trace(*args, **kwargs)
    assert trace.nodes["y"]["scale"] == 1.0
    assert float(trace.log_prob_sum()) == pytest.approx(float(one.density().log_prob(z)), rel=1e-12)


@pytest.mark.parametrize("what", ["density", "all_rows"])
def test_what_needs_all_rows_at_once(what: str, tmp_path: Path) -> None:
    x, y = saved(tmp_path, X, Y)
    loader = DataLoader(TensorDataset(X, Y), batch_size=8)
    for problem, reason in (
        (Problem(regression, x, y, minibatch=8), "which are read batch by batch"),
        (Problem(regression, loader=loader), "which come from a data loader"),
    ):
        with pytest.raises(ModelError, match=reason):
            getattr(problem, what)()
        assert problem.observed == {}
        assert problem.inputs == {}
    with pytest.raises(ModelError, match=r"plate 'row'.*subsample_size"):
        getattr(Problem(local_drawing, Y), what)()


def test_data_on_disk_are_not_read_as_a_whole(tmp_path: Path) -> None:
    x, y = saved(tmp_path, X, Y)
    problem = Problem(regression, x, y, minibatch=8)
    assert problem.args[0] is x


# --- predictions and log likelihoods, batch by batch -----------------------------------------------------------


def posterior(num_draws: int = 5) -> Posterior:
    generator = torch.Generator().manual_seed(3)
    mu = torch.randn(2, num_draws, generator=generator, dtype=torch.float64)
    return Posterior(
        {"mu": mu, "z": mu[..., None] + torch.randn(2, num_draws, N, generator=generator, dtype=torch.float64)}
    )


def by_pieces() -> dict[str, Problem]:
    return {"cut": Problem(local, Y, minibatch=8), "drawing": Problem(local_drawing, Y)}


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("name", ["cut", "drawing"])
def test_log_likelihood_of_every_row(name: str) -> None:
    problem, draws = by_pieces()[name], posterior()
    assert problem._data.by_part
    found = problem.log_likelihood(draws)["y"]
    expected = dist.Normal(draws.draws["z"], 1.0).log_prob(Y)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("name", ["cut", "drawing"])
def test_predictions_of_every_row(name: str) -> None:
    problem, draws = by_pieces()[name], posterior(400)
    residuals = (problem.predictive(draws, seed=1)["y"] - draws.draws["z"]).reshape(-1, N).numpy()
    assert stats.kstest(residuals.reshape(-1), stats.norm.cdf).pvalue > LEVEL
    assert np.abs(np.corrcoef(residuals.T) - np.eye(N)).max() < 5 / np.sqrt(len(residuals))


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("name", ["cut", "drawing"])
def test_the_prior_of_all_rows_has_the_same_global_sites(name: str) -> None:
    prior = by_pieces()[name].prior(1000, seed=2).flat()
    assert {key: value.shape[1:] for key, value in prior.items()} == {
        "mu": (),
        "twice": (),
        "z": (N,),
        "shifted": (N,),
    }
    torch.testing.assert_close(prior["twice"], 2 * prior["mu"])
    torch.testing.assert_close(prior["shifted"], prior["z"] + 1)
    residuals = ((prior["z"] - prior["mu"][:, None]) / 0.5).numpy()
    assert stats.kstest(residuals.reshape(-1), stats.norm.cdf).pvalue > LEVEL
    assert np.abs(np.corrcoef(residuals.T) - np.eye(N)).max() < 5 / np.sqrt(1000)


def test_the_observed_data_of_a_model_that_draws_its_rows_are_all_of_them() -> None:
    assert torch.equal(Problem(local_drawing, Y).observed["y"], Y)


# --- loaders -----------------------------------------------------------------------------------------------------


class Named(Dataset[Any]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": X[i], "y": Y[i]}


LOADERS: dict[str, Callable[[], dict[str, Any]]] = {
    "tuples": lambda: {"loader": DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True)},
    "dicts": lambda: {"loader": DataLoader(Named(), batch_size=8, shuffle=True)},
    "drop_last": lambda: {"loader": DataLoader(TensorDataset(X, Y), batch_size=8, drop_last=True)},
    "a list": lambda: {"loader": [(X[i : i + 8], Y[i : i + 8]) for i in range(0, N, 8)], "num_rows": N},
    "constants": lambda: {"loader": DataLoader(TensorDataset(X, Y), batch_size=8), "scale": 1.0},
    "the same minibatch": lambda: {"loader": DataLoader(TensorDataset(X, Y), batch_size=8), "minibatch": 8},
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_takes_the_place_of_the_data(name: str) -> None:
    problem = Problem(regression, **LOADERS[name]())
    assert (problem.minibatch, problem.num_rows, problem.row_plates) == (8, N, ("row",))
    assert problem.sites["y"].shape == (N,)
    beta = torch.tensor([0.2, 0.4], dtype=torch.float64)
    total = torch.tensor(0.0, dtype=torch.float64)
    rows = 0
    for batch in problem.batches(seed=3).epoch():
        with poutine.condition(data={"beta": beta}), problem.rows(batch.index, batch.size):
            trace = poutine.trace(regression).get_trace(*batch.args, **batch.kwargs)
        trace.compute_log_prob()
        total += trace.nodes["y"]["log_prob_sum"] * batch.size / N
        rows += batch.size
    if name == "drop_last":
        assert rows == 48
        return
    torch.testing.assert_close(total, dist.Normal(X @ beta, 1.0).log_prob(Y).sum(), rtol=1e-12, atol=0)


def test_a_loader_may_say_which_rows_it_gives() -> None:
    """Then there can be latent sites by row."""

    def model(y: Tensor, index: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", N, subsample=index):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    loader = DataLoader(TensorDataset(Y, torch.arange(N)), batch_size=8, shuffle=True)
    problem = Problem(model, loader=loader)
    assert problem.sites["z"].shape == (N,)
    guide: Any = MeanFieldNormal(model)
    example = problem.example
    assert example is not None
    set_up(guide, problem.rows(example.args[1]), *example.args)
    for batch in problem.batches().epoch():
        assert batch.index is not None
        guide.zero_grad()
        with problem.rows(batch.index, batch.size):
            Trace_ELBO().loss_and_grads(model, guide, *batch.args)
        assert guide.loc.grad[1:].nonzero()[:, 0].tolist() == sorted(batch.index.tolist())


def test_parameters_by_row_need_a_loader_that_says_which_rows_it_gives() -> None:
    problem = Problem(local, loader=DataLoader(TensorDataset(Y), batch_size=8))
    guide, example = MeanFieldNormal(local), problem.example
    assert example is not None
    rows = problem.rows(example.index, example.size)
    set_up(guide, rows, *example.args)
    with rows, pytest.raises(ModelError, match="data loader does not say which rows"):
        guide(*example.args)


def test_an_amortized_guide_sees_the_rows_of_the_loader() -> None:
    """z has the posterior N((y + mu / 0.25) / 5, 1/5): the encoder's line has slope 1/5 whatever mu is."""
    encoder = nn.Linear(1, 1, dtype=torch.float64)

    def guide(y: Tensor) -> None:
        pyro.module("encoder", encoder)
        pyro.sample("mu", dist.Delta(pyro.param("mu_at", torch.tensor(0.0, dtype=torch.float64))))
        scale = pyro.param("z_scale", torch.tensor(1.0, dtype=torch.float64), constraint=dist.constraints.positive)
        with pyro.plate("row", len(y)):
            pyro.sample("z", dist.Normal(encoder(y[..., None])[..., 0], scale))

    problem = Problem(local, loader=DataLoader(TensorDataset(Y), batch_size=16, shuffle=True))
    svi = SVI(local, guide, pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.99}), Trace_ELBO())
    pyro.set_rng_seed(0)
    for batch in itertools.islice(problem.batches(), 400):
        with problem.rows(batch.index, batch.size):
            svi.step(*batch.args)
    assert float(encoder.weight.detach()) == pytest.approx(0.2, abs=0.05)
    assert float(pyro.param("z_scale").detach()) == pytest.approx(0.2**0.5, abs=0.05)


BAD: dict[str, tuple[Callable[[], Any], type[LabError], str]] = {
    "a loader among the arguments": (
        lambda: Problem(regression, DataLoader(TensorDataset(X, Y), batch_size=8)),
        ArgumentError,
        r"Problem\(model, loader=...\)",
    ),
    "arguments and a loader": (
        lambda: Problem(regression, X, loader=DataLoader(TensorDataset(X, Y), batch_size=8)),
        ArgumentError,
        "positional arguments of the model come from the loader",
    ),
    "another minibatch": (
        lambda: Problem(regression, loader=DataLoader(TensorDataset(X, Y), batch_size=8), minibatch=9),
        ArgumentError,
        "minibatch is 9, but the loader's batches have 8 rows",
    ),
    "a generator": (
        lambda: Problem(regression, loader=((X, Y) for _ in range(3)), num_rows=N),
        ArgumentError,
        "can be gone through only once",
    ),
    "no number of rows": (lambda: Problem(regression, loader=[(X, Y)]), ArgumentError, "give num_rows="),
    "a number of rows of arrays": (lambda: Problem(regression, X, Y, num_rows=3), ArgumentError, "for a data loader"),
    "too many arguments": (
        lambda: Problem(local, loader=DataLoader(TensorDataset(X, Y), batch_size=8)),
        ModelError,
        "too many|takes 1 positional",
    ),
    "a plate that draws from a batch": (
        lambda: Problem(local_drawing, loader=DataLoader(TensorDataset(Y), batch_size=16)),
        LabError,
        "plate 'row'",
    ),
    "batches of a loader as arrays": (
        lambda: Problem(local, loader=DataLoader(TensorDataset(Y), batch_size=8)).log_likelihood(posterior()),
        ModelError,
        "come from a data loader, which does not say which ones",
    ),
    **{
        f"minibatch {size!r}": (
            lambda size=size: Problem(regression, X, Y, minibatch=size),
            ArgumentError,
            "minibatch must be a positive whole number of rows, got",
        )
        for size in (0, -3, 2.5, "8", True)
    },
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named(name: str) -> None:
    make, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        make()


# --- other data --------------------------------------------------------------------------------------------------


def test_other_data_keep_the_minibatch() -> None:
    problem = Problem(regression, X, Y, minibatch=8)
    other = problem.with_data(X[:20], 2 * Y[:20])
    assert (other.minibatch, other.num_rows) == (8, 20)
    assert problem.with_data(X[:5], Y[:5]).minibatch == 5
    assert problem.with_data(X[:5], Y[:5]).with_data(X, Y).minibatch == 8


def test_other_data_from_a_loader() -> None:
    problem = Problem(regression, loader=DataLoader(TensorDataset(X, Y), batch_size=8))
    other = problem.with_data(loader=DataLoader(TensorDataset(X[:20], Y[:20]), batch_size=8))
    assert (other.minibatch, other.num_rows) == (8, 20)


def test_what_is_known_of_the_sites() -> None:
    assert Problem(local, Y, minibatch=8).has_local_sites
    assert not Problem(regression, X, Y, minibatch=8).has_local_sites
    assert not Problem(local, Y).has_local_sites
    assert Problem(local, Y).max_plate_nesting == 1
    problem = Problem(local, Y, minibatch=8)
    assert [problem.row_axis(site) for site in ("mu", "z", "y")] == [None, 0, 0]
    assert Problem(local, Y).row_axis("z") is None


@pytest.mark.parametrize("name", ["cut", "drawing"])
def test_pieces_are_all_rows_in_their_order(name: str) -> None:
    rows: list[int] = []
    for batch, kept in by_pieces()[name].pieces():
        assert batch.index is not None
        assert batch.size == 8 or name == "cut"
        rows += batch.index[:kept].tolist()
    assert rows == list(range(N))
