"""The benchmark of networks measures what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from benchmarks.contenders import bbb as contender
from benchmarks.tables import bbb

STANDARD_ERRORS = 5


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_bound_is_that_of_the_objective(outputs: int) -> None:
    """Of a guide so narrow that its draws hardly differ, but for log q."""
    network = contender.Network([2, 4, outputs])
    x = torch.randn(6, 2)
    y = torch.arange(6) % 3 if outputs > 1 else torch.randn(6)
    guide = AutoNormal(network.model, init_scale=1e-4)
    guide(x, y, 6)
    judged = network.judge(guide, {"x": x, "y": y, "x_new": x[:3], "y_new": y[:3]})
    losses = torch.tensor([-Trace_ELBO().loss(network.model, guide, x, y, 6) for _ in range(100)])
    assert abs(losses.mean() - judged["elbo"]) < STANDARD_ERRORS * losses.std() / 10
    values = {name: getattr(guide.locs, name).detach() for name in network.priors}
    exact = network.likelihood(values, x[:3]).log_prob(y[:3]).mean()
    assert judged["score"] == pytest.approx(float(exact), abs=1e-2)


@pytest.mark.parametrize("how", bbb.RATES)
def test_a_contender_fits(how: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(60, 2)
    arrays = {"x": x[:40].numpy(), "y": x[:40, 0].numpy(), "x_new": x[40:].numpy(), "y_new": x[40:, 0].numpy()}
    sent: list[Any] = []
    channel: Any = type("Channel", (), {"send": lambda _, message: sent.append(message)})()
    options = {"sizes": [2, 3, 1], "seed": 0, "epochs": 12, "batch": 20, "looks": 3}
    pyro_settings = pyro.settings.get()
    contender.run(channel, arrays=arrays, how=how, lr=bbb.RATES[how][-1], **options)
    contender.cost(channel, dim=5, how=how, repeats=2)
    pyro.settings.set(**pyro_settings)
    (fit, cost) = sent
    assert fit["dim"] == 1 + 2 * 3 + 3 + 3 + 1
    assert [look["epoch"] for look in fit["path"]] == [4, 8, 12]
    assert fit["path"][-1]["elbo"] > fit["path"][0]["elbo"]
    assert len(cost["gradient"]) == len(cost["step"]) == 2


def row(how: str, lr: float, *paths: list[tuple[float, float]]) -> dict[str, Any]:
    looks = [
        [{"epoch": i + 1, "seconds": s, "elbo": e, "score": e / 100, "error": 0.1} for i, (s, e) in enumerate(path)]
        for path in paths
    ]
    return {"data": "digits", "how": how, "lr": lr, "dim": 7, "runs": looks}


def test_the_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [
        row("online Newton", 0.2, [(1.0, -3.0), (4.0, -1.0)]),
        row("online Newton", bbb.RECOMMENDED, [(1.0, -30.0), (4.0, -10.0)], [(1.0, -30.0), (5.0, -20.0)]),
        row("FusedAdam", 0.01, [(1.0, -40.0), (2.0, -25.0)], [(1.0, -40.0), (2.0, -25.0)]),
        row("FusedAdam", 0.1, [(1.0, -50.0), (2.0, -45.0)], [(1.0, -50.0), (2.0, -45.0)]),
    ]
    assert bbb.best(rows, "FusedAdam") is rows[2]
    assert bbb.best(rows, "online Newton") is rows[1]
    assert bbb.mean(rows[1], "elbo") == -15
    assert bbb.half_range(rows[1], "elbo") == 5
    assert bbb.mean(rows[1], "elbo", within=2.0) == -30
    monkeypatch.setattr(bbb, "measure", lambda quick: iter(rows))
    costs = [{"dim": 1000, "how": "online Newton", "gradient": [2e-3], "step": [1e-3]}]
    monkeypatch.setattr(bbb, "measure_cost", lambda quick: iter(costs))
    bbb.main(tmp_path, quick=True)
    page = (tmp_path / "bayes_by_backprop.md").read_text()
    assert "| online Newton | 0.1 | -15.0 ± 5.0 |" in page
    assert "ELBO after 2.0 s" in page
    assert "| 1,000 | online Newton | 2.00 | 1.00 | 0.50 |" in page
    assert "smoke run" in page
    assert json.loads((tmp_path / "bayes_by_backprop.json").read_text())["rows"] == rows
