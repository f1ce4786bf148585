from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vi_lab as vl
from pyro_vi_lab import Fit, Problem, Status
from pyro_vi_lab.callbacks import Callback
from pyro_vi_lab.fit_progress import ProgressLine, fit_progress, in_notebook, words
from pyro_vi_lab.models import GaussianMixture

Y = torch.tensor([1.0, 2.0, 4.0, 3.0, 2.5, 0.5])


def normal(y: torch.Tensor) -> None:
    scale = pyro.sample("scale", dist.HalfNormal(2.0))
    mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mean, scale), obs=y)


def coins(y: torch.Tensor) -> None:
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    with pyro.plate("toss", len(y)):
        pyro.sample("y", dist.Bernoulli(p), obs=y)


def hand_written(y: torch.Tensor) -> None:
    loc = pyro.param("loc", torch.zeros(()))
    pyro.sample("mean", dist.Normal(loc, 0.5))
    pyro.sample("scale", dist.LogNormal(pyro.param("spread", torch.zeros(())), 0.3))


def mixture(**options: Any) -> Problem:
    X = torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return GaussianMixture(num_components=3).problem(X, **options)


# Every way in which a fit goes; the options are such that none converges before the third step.
WAYS: dict[str, Callable[..., Fit]] = {
    "density": lambda **more: vl.fit(Problem(normal, Y), "full_rank", **more),
    "density, restarts": lambda **more: vl.fit(Problem(normal, Y), "mean_field", num_restarts=3, **more),
    "density, in stages": lambda **more: vl.fit(Problem(normal, Y), "mixture", **more),
    "mode": lambda **more: vl.fit(Problem(normal, Y), "map", **more),
    "laplace": lambda **more: vl.fit(Problem(normal, Y), "laplace", **more),
    "fixed draws": lambda **more: vl.fit(Problem(normal, Y), "mean_field", optim="fixed_draws", **more),
    "batch and match": lambda **more: vl.fit(Problem(normal, Y), "full_rank", optim="batch_and_match", **more),
    "program": lambda **more: vl.fit(Problem(normal, Y), hand_written, **more),
    "batches": lambda **more: vl.fit(Problem(normal, Y, minibatch=3), "full_rank", **more),
    "conjugate": lambda **more: vl.fit(Problem(coins, (Y > 2).double()), "conjugate", lr=0.1, **more),
    "mixture": lambda **more: vl.fit(mixture(), "conjugate", num_restarts=2, **more),
    "mixture, batches": lambda **more: vl.fit(mixture(minibatch=50), "conjugate", **more),
    "epochs": lambda **more: vl.fit_epochs(Problem(normal, Y, minibatch=2), "mean_field", num_epochs=4, **more),
}


class Told(Callback):
    """Keeps what it was told, and ends the fit after some steps."""

    def __init__(self, most: float = math.inf) -> None:
        self.most = most
        self.steps: list[int] = []
        self.records: list[Mapping[str, float]] = []
        self.ends: list[Fit] = []

    def on_step(self, step: int, record: Mapping[str, float]) -> bool:
        self.steps.append(step)
        self.records.append(record)
        return len(self.steps) >= self.most

    def on_end(self, fit: Fit) -> None:
        self.ends.append(fit)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_tells_of_its_steps_and_can_be_ended(way: str) -> None:
    told = Told(most=3)
    fit = WAYS[way](callbacks=[told], seed=2, progress=False)
    assert told.steps in ([0, 1, 2], [1, 2, 3])
    assert fit.status is Status.OUT_OF_STEPS
    assert fit.message == f"stopped by Told after {fit.num_steps} steps, not converged"
    assert told.ends == [fit]
    # stages that had not begun are evaluated where they start
    assert 3 <= len(fit.history["seconds"]) < 8
    check_records(fit, told, "negative_log_density" if way in ("mode", "laplace") else "negative_elbo")
    if way == "mode":
        assert torch.isfinite(fit.point()["mean"])
    else:
        assert all(torch.isfinite(value).all() for value in fit.posterior(num_draws=20).draws.values())


def check_records(fit: Fit, told: Told, bound: str) -> None:
    """Records are rows of the history."""
    for record in told.records:
        assert {bound, "seconds"} <= record.keys()
        assert all(isinstance(value, (int, float)) for value in record.values())
        assert record.keys() - {"restart", "epoch"} <= fit.history.keys()
    if fit.num_restarts == 1:
        for name in told.records[0].keys() - {"restart", "epoch"}:
            told_of = [record[name] for record in told.records]
            np.testing.assert_array_equal(fit.history[name][:3], told_of)


def test_callbacks_change_no_number() -> None:
    told = Told()
    with_callback = vl.fit(Problem(normal, Y), seed=3, callbacks=[told], progress=False)
    without = vl.fit(Problem(normal, Y), seed=3, progress=False)
    np.testing.assert_array_equal(with_callback.history["negative_elbo"], without.history["negative_elbo"])
    assert with_callback.status is without.status is Status.CONVERGED
    assert with_callback.message == without.message
    assert told.steps == list(range(with_callback.num_steps + 1))


def test_a_fit_that_converges_in_the_step_that_ends_it_has_converged() -> None:
    last = vl.fit(Problem(normal, Y), seed=3, progress=False).num_steps
    fit = vl.fit(Problem(normal, Y), seed=3, callbacks=[Told(most=last + 1)], progress=False)
    assert fit.status is Status.CONVERGED


def test_all_callbacks_are_told_of_the_last_step_and_the_first_to_end_it_is_named() -> None:
    class Other(Told): ...

    first, second, third = Told(), Other(most=2), Told(most=2)
    fit = vl.fit(Problem(normal, Y), callbacks=[first, second, third], progress=False)
    assert first.steps == second.steps == third.steps == [0, 1]
    assert fit.message.startswith("stopped by Other after 1 step, ")
    assert [len(one.ends) for one in (first, second, third)] == [1, 1, 1]


def test_an_error_of_a_callback_is_the_users() -> None:
    class Broken(Callback):
        def on_step(self, step: int, record: Mapping[str, float]) -> bool | None:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        vl.fit(Problem(normal, Y), callbacks=[Broken()], progress=False)


@pytest.mark.parametrize(
    ("callbacks", "expected"),
    [
        (Told(), r"callbacks is a list: callbacks=\[Told\(...\)\]"),
        ([Told], "the class Told"),
        ([print], "no callback: give an object with on_step"),
    ],
)
def test_what_is_no_callback_is_named(callbacks: Any, expected: str) -> None:
    with pytest.raises(vl.LabError, match=expected):
        vl.fit(Problem(normal, Y), callbacks=callbacks, progress=False)


# --- TensorBoard ----------------------------------------------------------------------------------------------------


def curves(directory: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory)).Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_the_history(tmp_path: Path) -> None:
    fit = vl.fit(Problem(normal, Y), callbacks=[vl.TensorBoard(tmp_path / "run")], progress=False)
    found = curves(tmp_path / "run")
    assert found.keys() == fit.history.keys()
    np.testing.assert_allclose([value for _, value in found["negative_elbo"]], fit.history["negative_elbo"], rtol=1e-6)
    assert [step for step, _ in found["kl"]] == list(range(fit.num_steps + 1))


def test_tensorboard_takes_every_tenth_step_and_the_last(tmp_path: Path) -> None:
    told = Told(most=24)
    logger = vl.TensorBoard(tmp_path, every=10)
    vl.fit(Problem(normal, Y), hand_written, callbacks=[told, logger], progress=False)
    assert [step for step, _ in curves(tmp_path)["negative_elbo"]] == [1, 10, 20, 24]


def test_tensorboard_that_is_not_there_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(vl.LabError, match=re.escape("pip install 'pyro-vi-lab[tensorboard]'")):
        vl.fit(Problem(normal, Y), callbacks=[vl.TensorBoard(tmp_path)], progress=False)


def test_tensorboard_refuses_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(vl.LabError, match="every must be a positive whole number"):
        vl.TensorBoard(tmp_path, every=0)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(vl.LabError, match="cannot write to"):
        vl.fit(Problem(normal, Y), callbacks=[vl.TensorBoard(tmp_path / "file" / "x")], progress=False)


# --- progress -------------------------------------------------------------------------------------------------------


class Shown:
    """Keeps the texts."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.closed = False

    def show(self, text: str) -> None:
        self.texts.append(text)

    def close(self) -> None:
        self.closed = True


def test_the_line_has_bound_step_speed_and_what_happens_now(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, clock = Shown(), iter(np.arange(0.0, 10.0, 0.2))
    monkeypatch.setattr("pyro_vi_lab.fit_progress.time.perf_counter", lambda: float(next(clock)))
    line = ProgressLine("full_rank fit of schools", screen)
    line.on_phase("capturing the model")
    line.on_step(0, {"negative_elbo": 1234.5, "step_size": float("nan"), "num_particles": 64, "seconds": 0.1})
    line.on_phase("")
    line.on_step(80, {"negative_elbo": 31.2, "step_size": 0.5, "num_particles": 256, "seconds": 0.1})
    assert screen.texts[0] == "full_rank fit of schools: capturing the model"
    assert "step 0 · negative ELBO 1,234.50 · 64 particles · capturing the model" in screen.texts[1]
    assert re.search(r"step 80 · negative ELBO 31.20 · step size 0.5 · 256 particles · \d+ steps/s$", screen.texts[-1])


def test_a_capture_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Shown()
    monkeypatch.setattr("pyro_vi_lab.fit_progress._screen", lambda: screen)
    vl.fit(Problem(normal, Y))
    assert "full_rank fit of normal: capturing the model" in screen.texts
    assert screen.closed
    count = len(screen.texts)
    vl.fit(Problem(normal, Y), progress=False)
    assert len(screen.texts) == count


def test_nothing_is_shown_where_nobody_would_see_it() -> None:
    with fit_progress(True, "a fit") as callbacks:
        assert callbacks == ()  # pytest's stderr is no terminal
    assert not in_notebook()


def test_a_terminal_shows_long_work_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.progress import Progress

    starts: list[None] = []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(Progress, "start", lambda self: starts.append(None))
    with fit_progress(True, "a [bold]fit") as (line,):
        line.on_step(1, {"negative_elbo": 1.0, "seconds": 0.0})
    assert starts == []
    monkeypatch.setattr("pyro_vi_lab.fit_progress.BEGIN_SECONDS", 0.01)
    with fit_progress(True, "a [bold]fit"):
        time.sleep(0.2)
    assert starts == [None]


def test_a_notebook_shows_one_output_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Handle:
        def update(self, bundle: dict[str, str], *, raw: bool) -> None:
            shown.append("update " + bundle["text/plain"])

    def display(bundle: dict[str, str], *, raw: bool, display_id: bool) -> Handle:
        shown.append(bundle["text/plain"])
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr("pyro_vi_lab.fit_progress.in_notebook", lambda: True)
    monkeypatch.setattr("pyro_vi_lab.fit_progress.BEGIN_SECONDS", 0.0)
    monkeypatch.setattr("pyro_vi_lab.fit_progress.SECONDS", 0.0)
    with fit_progress(True, "a fit") as (line,):
        line.on_step(1, {"negative_elbo": 1.0, "seconds": 0.0})
        line.on_step(2, {"negative_elbo": 0.5, "seconds": 0.0})
    assert shown[0] == "a fit: step 1 · negative ELBO 1.00 · 0 s"
    assert shown[1].startswith("update a fit: step 2 · negative ELBO 0.50 · ")
    assert all(text.startswith("update ") for text in shown[1:])


def test_words_say_what_there_is() -> None:
    assert words({"negative_log_density": 2.0, "radius": 0.25, "seconds": 1.0}) == [
        "negative log density 2.00",
        "radius 0.25",
    ]
    assert words({"negative_elbo": math.nan, "epoch": 3}) == ["negative ELBO nan", "epoch 3"]
