"""Bayes by backprop: a prior on every weight of any network."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.func import functional_call

from pyro_vi_lab.errors import ArgumentError, LabWarning, ModelError, unknown_name
from pyro_vi_lab.isolation import seeded
from pyro_vi_lab.layer_noise import with_layer_noise
from pyro_vi_lab.models.design import positive, scikit_learn_data, standardized
from pyro_vi_lab.models.network_data import (
    LIKELIHOODS,
    NetworkLikelihood,
    check_outputs,
    network_inputs,
    network_outcome,
    one_output,
)
from pyro_vi_lab.models.prediction import ClassPrediction, NormalPrediction
from pyro_vi_lab.models.weight_priors import PriorScale, check_network, dtype_of, weight_priors
from pyro_vi_lab.posterior import Posterior
from pyro_vi_lab.problem import Problem

OWN_SITES = ("y", "noise_scale", "row")
DRAWS = 100
"""Draws of the weights for a prediction, unless told otherwise."""
CHUNK_NUMBERS = 2**24
"""Numbers of weights and inputs that one vectorized run may have: its activations are of that order."""


class HasPosterior(Protocol):
    """What :func:`pyro_vi_lab.fit` gives."""

    def posterior(self, num_draws: int = ..., seed: int = ...) -> Posterior:
        """Draws."""


class BayesianNeuralNetwork(PyroModule):
    r"""Any network with a normal prior on every weight, for regression and classification.

    .. math::
        w_i \sim \mathrm{Normal}(m_i, s_i), \qquad
        y_n \sim \mathrm{Normal}(f_w(x_n), \sigma) \ \text{ or }\ \mathrm{Categorical}(\mathrm{softmax} f_w(x_n))
        \ \text{ or }\ \mathrm{Bernoulli}(\mathrm{logit}^{-1} f_w(x_n))

    One site for each parameter of the network, by its name in the ``state_dict``, and ``noise_scale`` where σ is
    unknown. Fit it like any other model, best by :class:`~pyro_vi_lab.guides.NetworkNormal` on minibatches.

    **The loss.** With :math:`q(w) = \prod_i N(\mu_i, \sigma_i^2)`, a standard normal prior, a known noise s, and B of N
    rows in a batch, the negative ELBO is, but for the constant :math:`\tfrac N2 \log 2\pi s^2`,

    .. math::
        \underbrace{-\tfrac12 \sum_i \big[1 + \log\sigma_i^2 - \mu_i^2 - \sigma_i^2\big]}_{\mathrm{KL}(q \,\|\, p)}
        + \frac{N}{B} \sum_{n \in \text{batch}} \frac{(y_n - f_w(x_n))^2}{2 s^2}, \qquad w = \mu + \sigma \varepsilon .

    What is often written, :math:`-\sum_i [1 + \log\sigma_i^2 - \mu_i^2 - \sigma_i^2] + \sum_n (y_n - f_w(x_n))^2`, is
    twice that for :math:`s = 1` and B = N. With a mean over rows in place of the sum it is the loss for another noise,
    :math:`s^2 = N`, and with the sum over a batch and no N/B the prior counts N/B times.

    Args:
        net: The network; the model has a copy, and starts guides at its weights. Not with batch normalization or
            dropout. Buffers keep their values, and tied weights are one site. Inputs are taken to its type, float32
            or ``net.double()``.
        likelihood: ``"normal"`` (outputs are means), ``"categorical"`` or ``"bernoulli"`` (outputs are logits).
        prior_scale: Prior standard deviation of the weights: a number, ``"fan_in"`` for
            :math:`g/\sqrt{\text{fan-in}}`, or a dict by layer or parameter, ``{"0": 0.5, "2.weight": 1.0}``. A
            prior under which the network's outputs are too small for the data leaves the weights near it, and the ELBO
            of independent normals prefers such: choose it, too, by rows that are held out.
        bias_scale: Prior standard deviation of biases and of the gains of normalizing layers, whose mean is one.
        gain: g.
        noise_scale: σ where it is known, in units of y; of ``"normal"`` only. If ``None``, its logarithm has a standard
            normal prior, which suits outcomes that are standardized.
        temperature: T; the likelihood counts to the power 1/T. One is Bayes' rule. Below one ("cold") the result is a
            tempered posterior, and its ELBO no bound on the evidence of the data; for independent normals, whose ELBO
            keeps most weights of a network near their prior, it often predicts new rows better. Choose it by rows that
            are held out, as the weight decay of a plain network: :func:`pyro_vi_lab.choose_model`.

    Shape:
        X ``(N, ...)``, whatever the network takes, rows first; y ``(N,)``, or ``(N, K)`` of ``"normal"`` for a network
        with K > 1 outputs; plate ``row``.

    Raises:
        ArgumentError: A network that cannot be used, an unknown likelihood, or a scale that is not positive.

    References:
        Blundell, Cornebise, Kavukcuoglu & Wierstra 2015, "Weight uncertainty in neural networks", ICML.
        MacKay 1992, "A practical Bayesian framework for backpropagation networks", Neural Computation 4(3).
        Wenzel et al. 2020, "How good is the Bayes posterior in deep neural networks really?", ICML; Aitchison 2021, "A
        statistical theory of cold posteriors in deep neural networks", ICLR (temperatures, and curated labels).

    Example:
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch...>
        >>> X = torch.linspace(-1, 1, 50)[:, None]
        >>> y = X[:, 0].sin() + 0.1 * torch.randn(50)
        >>> net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> model = BayesianNeuralNetwork(net, noise_scale=0.1)
        >>> problem = model.problem(X, y, minibatch=25)
        >>> [name for name in problem.sites]
        ['0.weight', '0.bias', '2.weight', '2.bias', 'y']
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        likelihood: NetworkLikelihood = "normal",
        prior_scale: PriorScale = "fan_in",
        bias_scale: float = 1.0,
        gain: float = 1.0,
        noise_scale: float | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if likelihood not in LIKELIHOODS:
            raise unknown_name("likelihood", likelihood, LIKELIHOODS)
        if noise_scale is not None:
            if likelihood != "normal":
                raise ArgumentError(f"noise_scale is for likelihood='normal'; {likelihood!r} has none: leave it out")
            positive(noise_scale=noise_scale)
        positive(temperature=temperature)
        self.net = copy.deepcopy(check_network(net)).eval().requires_grad_(False)
        self.priors = weight_priors(self._net, prior_scale, bias_scale, gain)
        if taken := sorted(set(self.priors) & set(OWN_SITES)):
            raise ArgumentError(
                f"net has a parameter {taken[0]!r}, which is the name of a site of the model: rename it"
            )
        self.likelihood: NetworkLikelihood = likelihood
        self.noise_scale, self.temperature = noise_scale, temperature
        self.dtype = dtype_of(self._net)

    @property
    def _net(self) -> nn.Module:
        """The network as it is, not as Pyro's modules give it, which registers its weights as parameters."""
        net = self._modules["net"]
        assert net is not None
        return net

    def forward(self, X: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the model; returns the network's outputs, ``(N,)`` or ``(N, K)``."""
        if X.is_floating_point() and X.dtype != self.dtype:
            raise ModelError(f"X has dtype {X.dtype} and the network {self.dtype}: give it X.to({self.dtype})")
        parameters = dict(self._net.named_parameters())
        weights = {}
        for name, prior in self.priors.items():
            start = parameters[name]
            fn = dist.Normal(torch.full_like(start, prior.loc), prior.scale).to_event(start.dim())
            marks: Any = {"is_weight": True, "start": start}
            weights[name] = pyro.sample(name, fn, infer=marks)
        noise: Tensor | float = 1.0
        if self.likelihood == "normal":
            zero = X.new_zeros((), dtype=self.dtype)
            noise = (
                zero + self.noise_scale if self.noise_scale else pyro.sample("noise_scale", dist.LogNormal(zero, 1.0))
            )
        outputs, event_dim = self._outputs(X, weights)
        with pyro.plate("row", X.shape[0]), poutine.scale(scale=1 / self.temperature):
            pyro.sample("y", self._observation(outputs, event_dim, noise), obs=y)
        return outputs

    def _outputs(self, X: Tensor, weights: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """Outputs, and how many dimensions a row of them has; also for weights with particles along the left."""
        event_dims = {name: value.dim() for name, value in self._net.named_parameters()}
        shapes = [value.shape[: value.dim() - event_dims[name]] for name, value in weights.items()]
        batch = torch.broadcast_shapes(*shapes)
        if not batch:
            weights = dict(weights)

            def run() -> Any:
                return functional_call(self._net, weights, (X,))

            outputs = one_output(with_layer_noise(run, weights, len(X)), self.likelihood)
            return outputs, outputs.dim() - 1
        flat = {
            name: value.expand(*batch, *value.shape[len(shape) :]).flatten(0, len(batch) - 1)
            for (name, value), shape in zip(weights.items(), shapes, strict=True)
        }
        outputs = torch.vmap(lambda w: self._run(w, X))(flat)
        # the last of the dimensions on the left is that of the rows
        return outputs.reshape(*batch[:-1], *outputs.shape[1:]), outputs.dim() - 2

    def _run(self, weights: Mapping[str, Tensor], X: Tensor) -> Tensor:
        return one_output(functional_call(self._net, dict(weights), (X,)), self.likelihood)

    def _observation(self, outputs: Tensor, event_dim: int, noise: Tensor | float) -> Any:
        if self.likelihood == "categorical":
            return dist.Categorical(logits=outputs)
        if self.likelihood == "bernoulli":
            return dist.Bernoulli(logits=outputs)
        if isinstance(noise, Tensor) and noise.dim() and event_dim:
            noise = noise.unsqueeze(-1)
        return dist.Normal(outputs, noise).to_event(event_dim)

    # --- data ---------------------------------------------------------------------------------------------------------

    def problem(self, X: Any, y: Any, *, minibatch: int | None = None, name: str | None = None) -> Problem:
        """The model with checked data.

        Args:
            X: Inputs, rows first: a tensor, an array or a data frame.
            y: Outcome of each row; of ``"categorical"`` the number of its class, of ``"bernoulli"`` 0 or 1.
            minibatch: Rows in a batch, if a fit is to see some of the rows at a time.
            name: What to call the problem.

        Raises:
            DataError: Shapes that disagree, no rows, values that are missing or infinite, or labels out of range; the
                message names the row.
            ArgumentError: The network cannot take rows of such a shape, its outputs do not fit the likelihood, or those
                of a row depend on the other rows.
        """
        inputs = network_inputs(X, self._net, self.dtype)
        outcome = network_outcome(y, len(inputs), self.likelihood, self.dtype)
        check_outputs(self._net, inputs, outcome, self.likelihood)
        with warnings.catch_warnings():
            # it has the type that its user gave the network
            warnings.filterwarnings("ignore", message=".* tensors of its own, so it runs in", category=LabWarning)
            return Problem(self, inputs, outcome, minibatch=minibatch, name=name)

    # --- predictions --------------------------------------------------------------------------------------------------

    def network(self, point: Mapping[str, Tensor]) -> nn.Module:
        """A plain network with these weights, as a fit of ``"map"`` has found them: ``model.network(fit.point())``.

        Raises:
            ArgumentError: A weight is missing, or has another shape.
        """
        net = copy.deepcopy(self._net)
        state = net.state_dict(keep_vars=True)
        for name in self.priors:
            if name not in point or point[name].shape != state[name].shape:
                given = tuple(point[name].shape) if name in point else "missing"
                raise ArgumentError(f"weight {name!r} is {given}; expected {tuple(state[name].shape)}")
            state[name].data.copy_(point[name])
        return net.requires_grad_(True)

    def predictive(
        self, posterior: HasPosterior | Posterior, X: Any, *, num_draws: int | None = None, seed: int = 0
    ) -> NormalPrediction | ClassPrediction:
        """The posterior predictive distribution of the outcome of new rows, with its two kinds of uncertainty.

        Args:
            posterior: A fit, or draws: of a guide, of NUTS, of an ensemble.
            X: Inputs of the new rows.
            num_draws: Draws of the weights, S; of a fit 100 by default, of draws all. Fewer than there are are taken
                evenly.
            seed: Seed of the draws of a fit.

        Raises:
            ArgumentError: ``posterior`` lacks a weight, or is no posterior.
            DataError: As in :meth:`problem`.
        """
        inputs = network_inputs(X, self._net, self.dtype)
        check_outputs(self._net, inputs, None, self.likelihood)
        draws = self._draws(posterior, num_draws, seed)
        weights = {name: draws[name].to(self.dtype) for name in self.priors}
        per_draw = max(1, sum(value[0].numel() for value in weights.values()) + inputs.numel())
        with torch.no_grad(), seeded(None):
            run = torch.vmap(
                lambda w: self._run(w, inputs),
                chunk_size=max(1, CHUNK_NUMBERS // per_draw),
            )
            outputs = run(weights)
        if self.likelihood == "normal":
            known = self.noise_scale
            noise = outputs.new_full((len(outputs),), known) if known else draws["noise_scale"].to(outputs)
            return NormalPrediction(outputs, noise)
        if self.likelihood == "bernoulli":
            outputs = torch.stack([torch.zeros_like(outputs), outputs], -1)
        return ClassPrediction(outputs.log_softmax(-1))

    def predict(
        self, posterior: HasPosterior | Posterior, X: Any, *, num_draws: int | None = None, seed: int = 0
    ) -> Tensor:
        """Mean of the outcome of new rows, or the probability of each class; arguments of :meth:`predictive`.

        Shape:
            ``(N,)`` or ``(N, K)``; of classes ``(N, C)``, of ``"bernoulli"`` those of 0 and of 1.
        """
        return self.predictive(posterior, X, num_draws=num_draws, seed=seed).mean

    def _draws(self, posterior: Any, num_draws: int | None, seed: int) -> dict[str, Tensor]:
        if num_draws is not None and num_draws < 1:
            raise ArgumentError(f"num_draws must be at least 1, got {num_draws}")
        if not isinstance(posterior, Posterior):
            if not hasattr(posterior, "posterior"):
                raise ArgumentError(f"posterior must be a fit or a Posterior, got {type(posterior).__name__}")
            posterior = posterior.posterior(num_draws=num_draws or DRAWS, seed=seed)
        flat = posterior.flat()
        wanted = [*self.priors, *(["noise_scale"] if self.likelihood == "normal" and not self.noise_scale else [])]
        shapes = {name: value.shape for name, value in self._net.named_parameters()} | {"noise_scale": torch.Size()}
        for name in wanted:
            if name not in flat:
                raise ArgumentError(f"the posterior has no draws of {name!r}; it has {', '.join(flat)}")
            if flat[name].shape[1:] != shapes[name]:
                raise ArgumentError(
                    f"draws of {name!r} have shape {tuple(flat[name].shape[1:])}; expected {tuple(shapes[name])}"
                )
        total = len(flat[wanted[0]])
        if num_draws is not None and num_draws < total:
            index = torch.linspace(0, total - 1, num_draws).round().long()
            flat = {name: flat[name][index] for name in wanted}
        return {name: flat[name] for name in wanted}


def example() -> Problem:
    """Disease progression of 442 diabetes patients by a network of 8 hidden units; noise unknown.

    Raises:
        ExtraError: scikit-learn is not installed.
    """
    data = scikit_learn_data("diabetes")
    with seeded(0):
        net = nn.Sequential(nn.Linear(data.X.shape[1], 8), nn.Tanh(), nn.Linear(8, 1)).double()
    model = BayesianNeuralNetwork(net)
    return model.problem(standardized(data.X), standardized(data.y), name="bayesian_neural_network")
