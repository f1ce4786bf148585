"""Networks with random weights, a plain one, and its Laplace approximation: fitted to some rows, judged on others."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from benchmarks.channel import Channel
from pyro_vi_lab.models import BayesianNeuralNetwork, ClassPrediction, NormalPrediction

DRAWS = 200
PLAIN_LR, WEIGHT_DECAY = 1e-3, 5e-4
"""As in the examples of laplace-torch."""


def network(sizes: list[int], seed: int) -> nn.Module:
    """A multilayer perceptron with torch's own initial weights."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def judge(prediction: NormalPrediction | ClassPrediction, y: Tensor) -> dict[str, float]:
    """Log score of a row, calibration error, and the part of wrong classes or the root mean squared error."""
    if isinstance(prediction, ClassPrediction):
        error = (prediction.mean.argmax(-1) != y).double().mean()
    else:
        error = (prediction.mean - y).square().mean().sqrt()
    return {
        "score": float(prediction.log_density(y).mean()),
        "calibration": prediction.calibration_error(y),
        "error": float(error),
    }


def ours(
    channel: Channel,
    *,
    arrays: Mapping[str, Any],
    sizes: list[int],
    estimator: str,
    how: str,
    gain: float,
    seed: int,
    batch: int,
    max_steps: int,
) -> None:
    from pyro_vi_lab import FusedAdam, fit
    from pyro_vi_lab.guides import NetworkNormal

    pyro.clear_param_store()
    data = {name: torch.from_numpy(value) for name, value in arrays.items()}
    likelihood: Any = "categorical" if sizes[-1] > 1 else "normal"
    model = BayesianNeuralNetwork(network(sizes, seed), likelihood=likelihood, gain=gain)
    choice: Any = estimator
    began = time.process_time()
    problem = model.problem(data["x"], data["y"], minibatch=batch)
    optim = FusedAdam({"lr": 0.01}) if how == "Adam" else None
    guide = NetworkNormal(model, estimator=choice)
    result = fit(problem, guide, optim=optim, seed=seed, max_steps=max_steps, progress=False)
    seconds = time.process_time() - began
    elbo, _ = result.elbo(200)
    judged = judge(model.predictive(result, data["x_new"], num_draws=DRAWS), data["y_new"])
    channel.send({**judged, "seconds": seconds, "elbo": elbo, "steps": result.num_steps, "status": result.status.value})


def _trained(data: Mapping[str, Tensor], sizes: list[int], seed: int, batch: int, epochs: int) -> nn.Module:
    """By Adam with weight decay, the step size falling to zero as half a cosine."""
    net = network(sizes, seed)
    optim = torch.optim.Adam(net.parameters(), lr=PLAIN_LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, epochs)
    for _ in range(epochs):
        for index in torch.randperm(len(data["x"])).split(batch):
            optim.zero_grad()
            loss = _loss(net(data["x"][index]), data["y"][index])
            loss.backward()  # type: ignore[no-untyped-call]
            optim.step()
        schedule.step()
    return net.eval()


def _loss(outputs: Tensor, y: Tensor) -> Tensor:
    if outputs.shape[1] > 1:
        return nn.functional.cross_entropy(outputs, y)
    return nn.functional.mse_loss(outputs[:, 0], y)


def peers(
    channel: Channel,
    *,
    arrays: Mapping[str, Any],
    sizes: list[int],
    seed: int,
    batch: int,
    epochs: int,
) -> None:
    """The plain network, and Laplace around it: Kronecker-factored, prior precision and noise by marginal likelihood."""
    from laplace import Laplace

    data = {name: torch.from_numpy(value) for name, value in arrays.items()}
    began = time.process_time()
    net = _trained(data, sizes, seed, batch, epochs)
    trained = time.process_time() - began
    with torch.no_grad():
        outputs, fitted = net(data["x_new"]), net(data["x"])
    plain: NormalPrediction | ClassPrediction
    if sizes[-1] > 1:
        plain = ClassPrediction(outputs.log_softmax(-1)[None])
    else:
        residual = (fitted[:, 0] - data["y"]).square().mean().sqrt()
        plain = NormalPrediction(outputs.T, residual[None])
    found = {"plain network": {**judge(plain, data["y_new"]), "seconds": trained}}

    began = time.process_time()
    classifies = sizes[-1] > 1
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(data["x"], data["y"] if classifies else data["y"][:, None]), batch_size=256
    )
    kind = "classification" if classifies else "regression"
    approximation = Laplace(net, kind, subset_of_weights="all", hessian_structure="kron")
    approximation.fit(loader)
    if classifies:
        approximation.optimize_prior_precision(method="marglik")
        probabilities = approximation(data["x_new"], link_approx="probit").detach()
        prediction: NormalPrediction | ClassPrediction = ClassPrediction(probabilities.log()[None])
    else:
        # as in the regression example of laplace-torch; its Kronecker factors take the noise as a number, so that the
        # gradient is not whole, but a search of the same marginal likelihood on a grid predicts worse
        log_prior, log_noise = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
        optim = torch.optim.Adam([log_prior, log_noise], lr=0.1)
        for _ in range(100):
            optim.zero_grad()
            loss = -approximation.log_marginal_likelihood(log_prior.exp(), log_noise.exp())
            loss.backward()
            optim.step()
        noise = log_noise.detach().exp()
        mean, variance = (value.detach().reshape(-1) for value in approximation(data["x_new"]))
        generator = torch.Generator().manual_seed(0)
        draws = mean + variance.sqrt() * torch.randn(1000, len(mean), generator=generator)
        prediction = NormalPrediction(draws, noise.expand(1000))
    found["Laplace"] = {**judge(prediction, data["y_new"]), "seconds": trained + time.process_time() - began}
    for row in found.values():
        assert all(math.isfinite(value) for value in row.values())
    channel.send(found)


COMMANDS: dict[str, Callable[..., None]] = {"ours": ours, "peers": peers}
