"""One call for all parameters gives the numbers of one optimizer for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_vi_lab.fused_adam import FusedAdam

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.05},
    "betas": {"lr": 0.05, "betas": (0.5, 0.9), "eps": 1e-3},
    "weight_decay": {"lr": 0.05, "weight_decay": 0.1},
    "amsgrad": {"lr": 0.05, "amsgrad": True},
    "maximize": {"lr": 0.05, "maximize": True},
    "decoupled": {"lr": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True},
}


def parameters(dtype: torch.dtype) -> list[Tensor]:
    """Of several shapes, one not contiguous, and one that gets no gradient at some steps."""
    torch.manual_seed(0)
    made = [torch.randn(shape, dtype=dtype) for shape in ((), (3,), (40,), (4, 5))]
    made += [torch.randn(5, 4, dtype=dtype).t()]
    return [
        pyro.get_param_store().setdefault(f"p{i}", value).unconstrained()
        if value.is_contiguous()
        else value.requires_grad_()
        for i, value in enumerate(made)
    ]


def train(optim: Any, dtype: torch.dtype, num_steps: int = 20, last: int = 5) -> list[Tensor]:
    pyro.clear_param_store()
    params = parameters(dtype)[:last]
    for step in range(num_steps):
        for number, param in enumerate(params):
            # strided gradients, and some that are missing
            param.grad = (param.detach() * (number + 1) + torch.randn(param.shape, dtype=dtype)).clone()
            if number == 3:
                param.grad = param.grad.t().contiguous().t()
            if number == 1 and step % 3 == 0:
                param.grad = None
        optim({*params} if step > 4 else {*params[:3]})
    return [param.detach() for param in params]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPTIONS)
def test_steps_are_those_of_adam(name: str, dtype: torch.dtype) -> None:
    expected = train(pyro.optim.Adam(OPTIONS[name]), dtype)
    got = train(FusedAdam(OPTIONS[name]), dtype)
    for a, b in zip(expected, got, strict=True):
        # some tens of roundings; eps of the denominators magnifies none of them here
        torch.testing.assert_close(b, a, rtol=200 * torch.finfo(dtype).eps, atol=200 * torch.finfo(dtype).eps)


def test_options_and_clips_by_name() -> None:
    def options(name: str) -> dict[str, Any]:
        return {"lr": 0.1 if name == "p0" else 0.02}

    def clips(module: str, name: str) -> dict[str, Any]:
        return {"p0": {"clip_value": 0.1}, "p2": {"clip_norm": 0.3}}.get(name, {})

    expected = train(pyro.optim.Adam(options, clips), torch.float64, last=4)
    got = train(FusedAdam(options, clips), torch.float64, last=4)
    torch.testing.assert_close(got, expected)


def test_a_changed_learning_rate_is_used() -> None:
    results = []
    for make in (pyro.optim.Adam, FusedAdam):
        optim = make({"lr": 0.1})
        param = torch.ones(3, requires_grad=True)
        for step in range(6):
            param.grad = param.detach().clone()
            optim({param})
            for group in optim.optim_objs[param].param_groups:
                group["lr"] = 0.1 / (step + 2)
        results.append(param.detach())
    torch.testing.assert_close(*results)


def model() -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("row", 3):
        pyro.sample("y", dist.Normal(0.0, scale), obs=torch.tensor([1.0, -2.0, 0.5]))


@pytest.mark.parametrize(
    ("writer", "reader"), [(FusedAdam, FusedAdam), (pyro.optim.Adam, FusedAdam), (FusedAdam, pyro.optim.Adam)]
)
def test_a_saved_state_goes_on(writer: Any, reader: Any, tmp_path: Path) -> None:
    pyro.set_rng_seed(1)
    optim = writer({"lr": 0.03})
    svi = SVI(model, AutoNormal(model), optim, Trace_ELBO())
    for _ in range(5):
        svi.step()
    optim.save(str(tmp_path / "optim"))
    pyro.get_param_store().save(str(tmp_path / "params"))
    pyro.set_rng_seed(2)
    expected = [svi.step() for _ in range(5)]
    pyro.clear_param_store()
    pyro.get_param_store().load(str(tmp_path / "params"))
    resumed = reader({"lr": 0.03})
    resumed.load(str(tmp_path / "optim"))
    guide = AutoNormal(model)
    svi = SVI(model, guide, resumed, Trace_ELBO())
    pyro.set_rng_seed(9)
    with torch.no_grad():
        guide()  # reads the parameters that were loaded
    pyro.set_rng_seed(2)
    assert [svi.step() for _ in range(5)] == pytest.approx(expected, rel=1e-5)


def test_a_parameter_that_comes_later_has_its_own_count() -> None:
    results = []
    for make in (pyro.optim.Adam, FusedAdam):
        optim = make({"lr": 0.1})
        old, new = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
        for step in range(8):
            old.grad, new.grad = old.detach() ** 2, new.detach() ** 2
            optim([old] if step < 4 else [old, new])
        results.append([old.detach(), new.detach()])
        counts = [float(optim.optim_objs[param].state[param]["step"]) for param in (old, new)]
        assert counts == [8, 4]
    torch.testing.assert_close(*results)
