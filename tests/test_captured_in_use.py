"""Captured objectives in the ways in which Pyro's are used: what changes is noticed, what cannot be captured is said."""

from __future__ import annotations

import gc
import random
import resource
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from pyro_vi_lab import captured
from pyro_vi_lab.captured import Captured
from pyro_vi_lab.errors import ArgumentError, LabWarning
from pyro_vi_lab.fused_adam import FusedAdam
from tests.programs import Autoencoder, Regression, numbers, schools
from tests.test_captured import captures

SCALE = 1.0
HERE = Path(__file__).name


def model(y: Tensor, scale: float = 1.0) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mean, scale), obs=y)


def guide(y: Tensor, scale: float = 1.0) -> None:
    loc = pyro.param("loc", torch.tensor(0.3))
    spread = pyro.param("spread", torch.tensor(0.5), constraint=dist.constraints.positive)
    pyro.sample("mean", dist.Normal(loc, spread))


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def grads() -> dict[str, Tensor]:
    """Gradients of the param store, which are then cleared."""
    found = {}
    for name, leaf in pyro.get_param_store()._params.items():
        if leaf.grad is not None:
            found[name] = leaf.grad.clone()
        leaf.grad = None
    return found


def assert_as_pyro(loss: Captured, model: Any, guide: Any, *args: Any, **kwargs: Any) -> None:
    """Value and gradients from the same random state equal those of Pyro."""
    state = torch.get_rng_state()
    got = loss.loss_and_grads(model, guide, *args, **kwargs), grads()
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    expected = loss.objective.loss_and_grads(model, guide, *args, **kwargs), grads()
    assert got[0] == pytest.approx(expected[0], rel=1e-10)
    torch.testing.assert_close(got[1], expected[1])
    assert torch.equal(after, torch.get_rng_state())


def used_as_pyro(loss: Captured, model: Any, guide: Any, *args: Any, times: int = 4, **kwargs: Any) -> None:
    for _ in range(times):
        assert_as_pyro(loss, model, guide, *args, **kwargs)


def line_of(function: Callable[..., Any], text: str) -> int:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    first = function.__code__.co_firstlineno
    return next(number for number in range(first, len(lines)) if text in lines[number - 1])


# --- what cannot be captured ------------------------------------------------------------------------------------------


def branches(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    scale = 1.0 if mean > 0 else 2.0  # looks
    pyro.sample("y", dist.Normal(mean, scale).expand([len(y)]).to_event(1), obs=y)


def calls_item(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(y.mean().item(), 3.0))  # looks
    pyro.sample("y", dist.Normal(mean, 1.0).expand([len(y)]).to_event(1), obs=y)


def calls_float(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    scale = 1.0 + abs(float(mean.detach()))  # looks
    pyro.sample("y", dist.Normal(mean, scale).expand([len(y)]).to_event(1), obs=y)


def calls_numpy(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    scale = torch.as_tensor(np.exp(mean.detach().numpy()))  # looks
    pyro.sample("y", dist.Normal(mean, scale).expand([len(y)]).to_event(1), obs=y)


def calls_tolist(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    scale = 1.0 + abs(mean.tolist())  # looks
    pyro.sample("y", dist.Normal(mean, scale).expand([len(y)]).to_event(1), obs=y)


def makes_array(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    scale = 1.0 + float(np.asarray(mean.detach()) ** 2)  # looks
    pyro.sample("y", dist.Normal(mean, scale).expand([len(y)]).to_event(1), obs=y)


@pytest.mark.parametrize("looking", [branches, calls_item, calls_float, calls_numpy, calls_tolist, makes_array])
def test_a_look_into_a_tensor_is_left_to_pyro_with_one_warning(looking: Any) -> None:
    loss = Captured(Trace_ELBO())
    svi = SVI(looking, guide, pyro.optim.Adam({"lr": 0.01}), loss=loss)
    with pytest.warns(LabWarning) as record:
        svi.step(numbers(5))
    (warning,) = record
    assert f"{HERE}:{line_of(looking, '# looks')}" in str(warning.message)
    assert warning.filename == __file__
    for size in (5, 6, 7):  # not a second time
        svi.step(numbers(size))
        svi.evaluate_loss(numbers(size))
    assert f"{looking.__name__} with guide" in loss.explain()
    assert "run by Pyro" in loss.explain()
    used_as_pyro(loss, looking, guide, numbers(5), times=2)


def pops_list(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(STACK.pop(), 3.0))
    pyro.sample("y", dist.Normal(mean, 1.0).expand([len(y)]).to_event(1), obs=y)


def draws_from_python(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(random.random(), 3.0))
    pyro.sample("y", dist.Normal(mean, 1.0).expand([len(y)]).to_event(1), obs=y)


def draws_from_numpy(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(float(np.random.standard_normal()), 3.0))  # noqa: NPY002
    pyro.sample("y", dist.Normal(mean, 1.0).expand([len(y)]).to_event(1), obs=y)


def draws_from_generator(y: Tensor) -> None:
    noise = torch.randn(len(y), generator=GENERATOR)
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    pyro.sample("y", dist.Normal(mean + noise, 1.0).to_event(1), obs=y)


STACK = [float(value) for value in range(100)]
GENERATOR = torch.Generator()


@pytest.mark.parametrize("changing", [pops_list, draws_from_python, draws_from_numpy, draws_from_generator])
def test_a_graph_that_would_disagree_is_not_used(changing: Any) -> None:
    loss = Captured(Trace_ELBO())
    with pytest.warns(LabWarning, match="run by Pyro"):
        loss.loss_and_grads(changing, guide, numbers(5))
    assert captures(loss) == 0


class Counting:
    """Counts its runs, as some models do to anneal."""

    def __init__(self) -> None:
        self.runs = 0

    def model(self, y: Tensor) -> None:
        self.runs += 1
        with poutine.scale(scale=min(1.0, self.runs / 20)):
            model(y)


def test_a_program_that_changes_itself_is_left_to_pyro() -> None:
    counting = Counting()
    loss = Captured(Trace_ELBO())
    with pytest.warns(LabWarning, match=r"running it changes Counting\.runs"):
        loss.loss_and_grads(counting.model, guide, numbers(5))


def test_an_argument_that_requires_a_gradient_is_left_to_pyro() -> None:
    y = numbers(5).requires_grad_()
    loss = Captured(Trace_ELBO())
    with pytest.warns(LabWarning, match="an argument requires a gradient"):
        loss.loss_and_grads(model, guide, y)
    y.grad = None
    loss.loss_and_grads(model, guide, y)
    assert y.grad is not None


def test_constants_may_be_looked_into() -> None:
    kinds = torch.tensor([0, 1, 1, 2, 0])

    def by_kind(y: Tensor) -> None:
        with pyro.plate("kind", int(kinds.max()) + 1):
            mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mean[kinds], 1.0), obs=y)

    def by_kind_guide(y: Tensor) -> None:
        with pyro.plate("kind", 3):
            pyro.sample("mean", dist.Normal(pyro.param("loc", torch.zeros(3)), 1.0))

    loss = Captured(Trace_ELBO())
    used_as_pyro(loss, by_kind, by_kind_guide, numbers(5))
    assert captures(loss) == 1
    kinds[0] = 2
    used_as_pyro(loss, by_kind, by_kind_guide, numbers(5))
    assert captures(loss) == 2


# --- what changes between calls ---------------------------------------------------------------------------------------


def test_new_data_of_one_shape_need_no_capture_and_other_shapes_do() -> None:
    loss = Captured(Trace_ELBO())
    for _ in range(3):
        for size in (8, 8, 8, 3):  # the last batch is smaller
            assert_as_pyro(loss, model, guide, torch.randn(size))
    assert captures(loss) == 2
    assert_as_pyro(loss, model, guide, torch.randn(8, 2)[:, 0])  # other strides
    used_as_pyro(loss, model, guide, numbers(8), scale=2.0)
    used_as_pyro(loss, model, guide, numbers(8), scale=0.5)
    used_as_pyro(loss, model, guide, numbers(8), scale=torch.tensor(0.7))
    used_as_pyro(loss, model, guide, numbers(8), scale=torch.tensor(0.9))
    assert captures(loss) == 6


def reads_global(y: Tensor) -> None:
    model(y, SCALE)


def test_a_global_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = Captured(Trace_ELBO())
    used_as_pyro(loss, reads_global, guide, numbers(5))
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    used_as_pyro(loss, reads_global, guide, numbers(5))
    monkeypatch.setitem(globals(), "SCALE", 1.0)
    used_as_pyro(loss, reads_global, guide, numbers(5))
    assert captures(loss) == 2


CHANGES: dict[str, tuple[Any, Callable[[Any], float], Callable[[Any], None]]] = {
    "list": ([1.0, 2.0], lambda held: held[0], lambda held: held.__setitem__(0, 4.0)),
    "length": ([1.0, 2.0], lambda held: float(len(held)), lambda held: held.append(0.0)),
    "dictionary": ({"a": {"b": 1.0}}, lambda held: held["a"]["b"], lambda held: held["a"].update(b=4.0)),
    "namespace": (SimpleNamespace(a=1.0), lambda held: held.a, lambda held: setattr(held, "a", 4.0)),
    "nested": (
        SimpleNamespace(a=SimpleNamespace(b=1.0)),
        lambda held: held.a.b,
        lambda held: setattr(held.a, "b", 4.0),
    ),
    "tensor": (
        SimpleNamespace(a=torch.tensor(1.0)),
        lambda held: held.a,
        lambda held: setattr(held, "a", torch.tensor(4.0)),
    ),
    "in_place": (torch.tensor([1.0]), lambda held: held, lambda held: held.fill_(4.0)),
    "list_of_tensors": ([torch.tensor([1.0])], lambda held: held[0], lambda held: held[0].fill_(4.0)),
    "set": ({1.0}, lambda held: max(held), lambda held: held.add(4.0)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_closure_refers_to(name: str) -> None:
    held, read, change = CHANGES[name]

    def closing(y: Tensor) -> None:
        model(y, read(held))  # type: ignore[arg-type]

    loss = Captured(Trace_ELBO())
    used_as_pyro(loss, closing, guide, numbers(5))
    change(held)
    used_as_pyro(loss, closing, guide, numbers(5))
    assert captures(loss) == 2


class Settings(nn.Module):
    """Attributes that a model reads."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.options = 1.0, {"shift": 0.0}
        self.register_buffer("offset", torch.tensor(0.5))
        self.dropout = nn.Dropout(0.5)

    def shifted(self, y: Tensor) -> Tensor:
        return self.dropout(y) + self.options["shift"] + self.offset

    def model(self, y: Tensor) -> None:
        model(self.shifted(y), self.scale)

    def forward(self, y: Tensor) -> None:
        self.model(y)


@pytest.mark.parametrize("as_method", [True, False])
def test_attributes_and_modes_of_a_module(as_method: bool) -> None:
    module = Settings()
    program = module.model if as_method else module
    loss = Captured(Trace_ELBO())

    def check(expected: int) -> None:
        used_as_pyro(loss, program, guide, numbers(5), times=3)
        assert captures(loss) == expected

    check(1)
    module.scale = 2.0
    check(2)
    module.options["shift"] = 1.0
    check(3)
    module.eval()
    check(4)
    module.train()
    check(4)  # the graph is still there
    module.dropout.p = 0.1
    check(5)
    module.offset = torch.tensor(2.0)  # a buffer is an input
    check(5)
    module.load_state_dict({"offset": torch.tensor(-1.0)})
    check(5)
    module.dropout = nn.Identity()  # type: ignore[assignment]
    check(6)


def test_too_many_captures_are_left_to_pyro_by_name() -> None:
    loss = Captured(Trace_ELBO())

    def calls() -> None:
        for step in range(3 * captured.MAX_UNUSED):
            loss.loss_and_grads(model, guide, numbers(5), 1 + step / 100)

    message = r"argument 1 is \d\.\d+ after \d\.\d+.*pass numbers that change as tensors"
    with pytest.warns(LabWarning, match=message) as record:
        calls()
    assert len(record) == 1
    assert captures(loss) == captured.MAX_UNUSED
    grads()
    used_as_pyro(loss, model, guide, numbers(5), 1.0)  # a graph that is there is used
    used_as_pyro(loss, model, guide, numbers(5), 99.0)


def test_functions_made_anew_are_left_to_pyro() -> None:
    loss = Captured(Trace_ELBO())

    def calls() -> None:
        for _ in range(captured.MAX_UNUSED + 5):
            loss.loss_and_grads(lambda y: model(y), guide, numbers(5))

    with pytest.warns(LabWarning, match="the model is another object") as record:
        calls()
    assert len(record) == 1


# --- parameters -------------------------------------------------------------------------------------------------------


def test_a_cleared_param_store_starts_anew() -> None:
    loss = Captured(Trace_ELBO())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss=loss)
    for _ in range(3):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        losses = [svi.step(numbers(5)) for _ in range(4)]
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        plain = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss=Trace_ELBO())
        assert losses == pytest.approx([plain.step(numbers(5)) for _ in range(4)])
    assert captures(loss) == 1


def test_loaded_parameters_are_used(tmp_path: Path) -> None:
    loss = Captured(Trace_ELBO())
    regression = Regression()
    auto = AutoNormal(regression)
    data = numbers(8, 2), numbers(8)
    svi = SVI(regression, auto, pyro.optim.Adam({"lr": 0.1}), loss=loss)
    svi.step(*data)
    pyro.get_param_store().save(str(tmp_path / "store"))
    states = {key: value.clone() for key, value in regression.state_dict().items()}
    for _ in range(3):
        svi.step(*data)
    pyro.get_param_store().load(str(tmp_path / "store"))
    used_as_pyro(loss, regression, auto, *data)
    svi.step(*data)
    regression.load_state_dict(states)
    used_as_pyro(loss, regression, auto, *data)
    assert captures(loss) <= 2


def test_frozen_and_replaced_parameters() -> None:
    vae = Autoencoder()
    loss = Captured(Trace_ELBO())
    x = numbers(5, 3)

    def step() -> dict[str, Tensor]:
        state = torch.get_rng_state()
        found = []
        for objective in (loss, loss.objective):
            torch.set_rng_state(state)
            vae.zero_grad()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*requires_grad=False")
                objective.loss_and_grads(vae.model, vae.guide, x)
            found.append({name: value.grad.clone() for name, value in vae.named_parameters() if value.grad is not None})
        torch.testing.assert_close(*found)
        return found[0]

    assert len(step()) == len(step()) == 8
    vae.decoder[0].requires_grad_(False)
    assert len(step()) == len(step()) == 6
    with torch.no_grad():
        vae.decoder[0].weight.add_(1.0)  # a frozen weight that is changed by hand
    step()
    vae.decoder[0].requires_grad_(True)
    assert len(step()) == 8
    vae.encoder[0].weight = nn.Parameter(torch.ones_like(vae.encoder[0].weight))
    step()
    vae.encoder[0].weight.data = -torch.ones_like(vae.encoder[0].weight)
    step()
    assert captures(loss) <= 3


def test_gradients_accumulate_and_losses_leave_them_alone() -> None:
    loss = Captured(Trace_ELBO())
    used_as_pyro(loss, model, guide, numbers(5), times=2)
    pyro.set_rng_seed(0)
    single = []
    for _ in range(2):
        loss.loss_and_grads(model, guide, numbers(5))
        single.append(grads())
    pyro.set_rng_seed(0)
    for _ in range(2):
        loss.loss_and_grads(model, guide, numbers(5))
    both = grads()
    for name, value in both.items():
        torch.testing.assert_close(value, single[0][name] + single[1][name])
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss=loss)
    for _ in range(3):
        state = torch.get_rng_state()
        value = svi.evaluate_loss(numbers(5))
        assert grads() == {}
        torch.set_rng_state(state)
        assert value == pytest.approx(Trace_ELBO().loss(model, guide, numbers(5)))
    assert "loss alone" in loss.explain()


def test_differentiable_loss_and_elbo_module() -> None:
    regression = Regression()
    auto = AutoNormal(regression)
    data = numbers(8, 2), numbers(8)
    results = []
    for objective in (Trace_ELBO(), Captured(Trace_ELBO())):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        regression = Regression()
        auto = AutoNormal(regression)
        elbo = objective(regression, auto)
        elbo(*data)
        pyro.set_rng_seed(1)
        optim = torch.optim.Adam(elbo.parameters(), lr=0.05)
        losses = []
        for _ in range(5):
            optim.zero_grad()
            loss = 2 * elbo(*data)
            loss.backward()
            optim.step()
            losses.append(loss.item())
        with torch.no_grad():
            losses.append(elbo(*data).item())
        results.append((losses, {name: value.detach() for name, value in elbo.named_parameters()}))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("step", ["svi", "module"])
def test_parameters_that_modules_keep_to_themselves(step: str) -> None:
    class Local(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale = PyroParam(torch.tensor(2.0), constraint=dist.constraints.positive)
            # SVI of Pyro 1.9 cannot step plain parameters of such a module
            self.loc = PyroParam(torch.tensor(0.5)) if step == "svi" else nn.Parameter(torch.tensor(0.5))

        def forward(self, y: Tensor) -> None:
            mean = pyro.sample("mean", dist.Normal(self.loc, 3.0))
            with pyro.plate("row", len(y)):
                pyro.sample("y", dist.Normal(mean, self.scale), obs=y)

    results = []
    with pyro.settings.context(module_local_params=True):
        for objective in (Trace_ELBO(), Captured(Trace_ELBO())):
            pyro.set_rng_seed(0)
            local = Local()
            auto = AutoNormal(local)
            auto(numbers(5))
            pyro.set_rng_seed(1)
            if step == "svi":
                svi = SVI(local, auto, pyro.optim.Adam({"lr": 0.1}), loss=objective)
                losses = [svi.step(numbers(5)) for _ in range(5)]
            else:
                elbo = objective(local, auto)
                optim = torch.optim.SGD(elbo.parameters(), lr=0.01)
                losses = []
                for _ in range(5):
                    optim.zero_grad()
                    loss = elbo(numbers(5))
                    loss.backward()
                    optim.step()
                    losses.append(loss.item())
            parameters = {name: value.detach() for name, value in (*local.named_parameters(), *auto.named_parameters())}
            results.append((losses, parameters))
            assert len(pyro.get_param_store()) == 0
    torch.testing.assert_close(results[0], results[1])


# --- around and inside ------------------------------------------------------------------------------------------------


def test_handlers_around_a_step_are_left_to_pyro() -> None:
    loss = Captured(Trace_ELBO())
    used_as_pyro(loss, model, guide, numbers(5), times=2)
    with poutine.scale(scale=3.0):
        used_as_pyro(loss, model, guide, numbers(5), times=2)
    assert "2 calls inside other handlers" in loss.explain()
    with poutine.trace(param_only=True) as tracer:
        loss.loss_and_grads(model, guide, numbers(5))
    assert set(tracer.trace.nodes) == {"loc", "spread"}
    assert tracer.trace.nodes["spread"]["value"] > 0
    assert tracer.trace.nodes["spread"]["value"].unconstrained() is pyro.get_param_store()._params["spread"]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda f: partial(f, scale=0.5),
        lambda f: poutine.scale(f, scale=0.5),
        lambda f: poutine.block(f, hide=["nothing"]),
        lambda f: poutine.mask(f, mask=torch.tensor(True)),
    ],
)
def test_wrapped_functions(wrap: Any) -> None:
    loss, wrapped, wrapped_guide = Captured(Trace_ELBO()), wrap(model), wrap(guide)
    used_as_pyro(loss, wrapped, wrapped_guide, numbers(5))
    assert captures(loss) == 1


def test_one_objective_for_several_models() -> None:
    loss = Captured(Trace_ELBO())
    guides = [AutoNormal(schools), AutoDiagonalNormal(schools)]
    for auto in guides:
        auto(numbers(8), 1.0)
    for _ in range(3):
        for auto in guides:
            used_as_pyro(loss, schools, auto, numbers(8), 1.0, times=2)
        used_as_pyro(loss, model, guide, numbers(8), times=1)
    assert captures(loss) == 3


def test_a_loss_that_is_nan_warns_as_pyro_does() -> None:
    loss = Captured(Trace_ELBO())
    used_as_pyro(loss, model, guide, numbers(5), times=2)
    with pytest.warns(UserWarning, match="Encountered NaN: loss"):
        loss.loss_and_grads(model, guide, torch.full((5,), torch.nan))


def test_schedulers_of_pyro() -> None:
    results = []
    for objective in (Trace_ELBO(), Captured(Trace_ELBO())):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        scheduler = pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.5})
        svi = SVI(model, guide, scheduler, loss=objective)
        losses = []
        for _ in range(5):
            losses.append(svi.step(numbers(5)))
            scheduler.step()
        results.append(losses)
    assert results[1] == pytest.approx(results[0])


def test_a_fused_step_is_that_of_pyro() -> None:
    results = []
    for objective, optim in ((Trace_ELBO(), pyro.optim.Adam), (Captured(Trace_ELBO()), FusedAdam)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = SVI(schools, AutoNormal(schools), optim({"lr": 0.05}), loss=objective)
        results.append([svi.step(numbers(8), 1.0) for _ in range(20)])
    assert results[1] == pytest.approx(results[0], rel=1e-9)


def test_the_state_of_the_program_is_left_alone_by_a_capture() -> None:
    vae = Autoencoder(partial(nn.BatchNorm1d, 4))
    states = []
    for objective in (Trace_ELBO(), Captured(Trace_ELBO())):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        vae = Autoencoder(partial(nn.BatchNorm1d, 4))
        objective.loss_and_grads(vae.model, vae.guide, numbers(5, 3))
        states.append({**vae.state_dict(), "rng": torch.get_rng_state()})
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_wrong_objectives_are_named() -> None:
    with pytest.raises(ArgumentError, match="takes a Pyro objective"):
        Captured(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"give Captured the plain objective, such as pyro\.infer\.Trace_ELBO"):
        Captured(JitTrace_ELBO())
    with pytest.raises(ArgumentError, match="compiled already"):
        Captured(Captured(Trace_ELBO()))
    with pytest.raises(ArgumentError, match="compile must be"):
        Captured(Trace_ELBO(), compile="always")  # type: ignore[arg-type]


def test_explain() -> None:
    loss = Captured(TraceGraph_ELBO(num_particles=2))
    assert loss.num_particles == 2
    assert "nothing has been captured" in loss.explain()
    used_as_pyro(Captured(TraceGraph_ELBO()), model, guide, numbers(5), times=2)
    loss.loss_and_grads(model, guide, numbers(5))
    loss.loss_and_grads(model, guide, numbers(5))
    first, second = loss.explain().splitlines()[:2]
    assert first.startswith("model with guide: graph of ")
    assert "tier graph" in second


# --- memory -----------------------------------------------------------------------------------------------------------


def memory() -> int:
    """Resident memory in KiB."""
    gc.collect()
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages * resource.getpagesize() // 1024


def growth_of_steps(num_steps: int) -> int:
    loss = Captured(Trace_ELBO(num_particles=2))
    svi = SVI(model, guide, FusedAdam({"lr": 0.001}), loss=loss)
    data = numbers(2000)
    for _ in range(100):
        svi.step(data)
    before = memory()
    for _ in range(num_steps):
        svi.step(data)
    return memory() - before


def growth_of_captures(number: int) -> int:
    def capture(seed: int) -> None:
        loss = Captured(Trace_ELBO(), compile=False)
        pyro.clear_param_store()
        for _ in range(2):
            loss.loss_and_grads(model, guide, numbers(20 + seed % 5))

    for seed in range(5):
        capture(seed)
    before = memory()
    for seed in range(number):
        capture(seed)
    return memory() - before


def test_memory_does_not_grow() -> None:
    assert growth_of_steps(300) < 2_000
    assert growth_of_captures(5) < 10_000


@pytest.mark.slow
def test_memory_does_not_grow_in_the_long_run() -> None:
    assert growth_of_steps(10_000) < 2_000
    first, second = growth_of_captures(100), growth_of_captures(100)
    assert min(first, second) < 10_000


@pytest.fixture
def _few_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(captured, "MAX_GRAPHS", 3)
    return


@pytest.mark.usefixtures("_few_graphs")
def test_graphs_that_were_used_longest_ago_are_let_go() -> None:
    loss = Captured(Trace_ELBO())
    for size in (2, 3, 4, 2, 5):
        used_as_pyro(loss, model, guide, numbers(size), times=2)
    assert captures(loss) == 3
    assert len(loss._used) == 3
    number = captures(loss)
    used_as_pyro(loss, model, guide, numbers(2), times=1)
    assert captures(loss) == number
