"""Networks with random weights, a plain one, and its Laplace approximation: fitted to some rows, judged on others.

What each has to choose, a temperature or a weight decay, it chooses by the same rows, held out of those that it may see.
"""

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
PLAIN_LR = 1e-3


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


def tensors(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


def model_of(sizes: list[int], seed: int, temperature: float) -> BayesianNeuralNetwork:
    likelihood: Any = "categorical" if sizes[-1] > 1 else "normal"
    return BayesianNeuralNetwork(network(sizes, seed), likelihood=likelihood, temperature=temperature)


def fitted(problem: Any, *, max_steps: int, seed: int = 0) -> Any:
    """A fit with all defaults."""
    from pyro_vi_lab import fit
    from pyro_vi_lab.guides import NetworkNormal

    pyro.clear_param_store()
    return fit(problem, NetworkNormal, seed=seed, max_steps=max_steps, progress=False)


def choose(
    channel: Channel,
    *,
    arrays: Mapping[str, Any],
    sizes: list[int],
    temperatures: list[float],
    num_splits: int,
    batch: int,
    max_steps: int,
) -> None:
    """Score of every temperature on the rows that are held out."""
    from pyro_vi_lab import choose_model

    data = tensors(arrays)
    models = {temperature: model_of(sizes, 0, temperature) for temperature in temperatures}
    choice = choose_model(
        models,
        data["x"],
        data["y"],
        fit=lambda problem: fitted(problem, max_steps=max_steps),
        num_splits=num_splits,
        minibatch=batch,
    )
    send_choice(channel, choice)


def send_choice(channel: Channel, choice: Any) -> None:
    scores = {name: float(score.mean()) for name, score in choice.scores.items()}
    channel.send({"scores": scores, "chosen": choice.name})


def ours(
    channel: Channel,
    *,
    arrays: Mapping[str, Any],
    sizes: list[int],
    temperature: float,
    seed: int,
    batch: int,
    max_steps: int,
) -> None:
    data, model = tensors(arrays), model_of(sizes, seed, temperature)
    began = time.process_time()
    result = fitted(model.problem(data["x"], data["y"], minibatch=batch), max_steps=max_steps, seed=seed)
    seconds = time.process_time() - began
    judged = judge(model.predictive(result, data["x_new"], num_draws=DRAWS), data["y_new"])
    channel.send({**judged, "seconds": seconds, "steps": result.num_steps, "status": result.status.value})


def decays(
    channel: Channel,
    *,
    arrays: Mapping[str, Any],
    sizes: list[int],
    weight_decays: list[float],
    num_splits: int,
    batch: int,
    epochs: int,
) -> None:
    """Score of the plain network with every weight decay, on the rows that are held out of ours too."""
    from pyro_vi_lab import choose_model

    data = tensors(arrays)

    class Plain:
        def __init__(self, weight_decay: float) -> None:
            self.weight_decay = weight_decay

        def problem(self, x: Tensor, y: Tensor, *, minibatch: int | None = None) -> Any:
            seen = {"x": x, "y": y}
            return seen, _trained(seen, sizes, 0, batch, epochs, self.weight_decay)

        def predictive(self, trained: Any, x: Tensor) -> NormalPrediction | ClassPrediction:
            return plain_prediction(trained[1], trained[0], x)

    models = {weight_decay: Plain(weight_decay) for weight_decay in weight_decays}
    choice = choose_model(models, data["x"], data["y"], fit=lambda trained: trained, num_splits=num_splits)
    send_choice(channel, choice)


@torch.no_grad()
def plain_prediction(net: nn.Module, seen: Mapping[str, Tensor], x: Tensor) -> NormalPrediction | ClassPrediction:
    """What a network predicts whose weights are taken as known; the noise is that of the rows it was trained on."""
    outputs = net(x)
    if outputs.shape[1] > 1:
        return ClassPrediction(outputs.log_softmax(-1)[None])
    residual = (net(seen["x"])[:, 0] - seen["y"]).square().mean().sqrt()
    return NormalPrediction(outputs.T, residual[None])


def _trained(
    data: Mapping[str, Tensor], sizes: list[int], seed: int, batch: int, epochs: int, weight_decay: float
) -> nn.Module:
    """By Adam with weight decay, the step size falling to zero as half a cosine."""
    net = network(sizes, seed)
    optim = torch.optim.Adam(net.parameters(), lr=PLAIN_LR, weight_decay=weight_decay)
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
    weight_decay: float,
) -> None:
    """The plain network, and Laplace around it: Kronecker-factored, prior precision and noise by marginal likelihood."""
    from laplace import Laplace

    data = tensors(arrays)
    began = time.process_time()
    net = _trained(data, sizes, seed, batch, epochs, weight_decay)
    trained = time.process_time() - began
    plain = plain_prediction(net, data, data["x_new"])
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


COMMANDS: dict[str, Callable[..., None]] = {"choose": choose, "ours": ours, "decays": decays, "peers": peers}
