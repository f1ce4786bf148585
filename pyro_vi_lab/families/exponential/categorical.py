"""The categorical and the Bernoulli family: choices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from pyro_vi_lab.families.exponential.family import Conditional, ExponentialFamily, Values


class Categorical(ExponentialFamily):
    r"""A choice of one of K: T = the first K - 1 indicators, :math:`\eta_k = \log p_k - \log p_K`.

    Args:
        dim: K, at least 2.
    """

    parameter_dims: ClassVar = {"logits": 1}
    is_discrete: ClassVar = True

    def __init__(self, dim: int) -> None:
        self.dim, self.num_parameters = dim, dim - 1

    def statistics(self, values: Values) -> Tensor:
        """One-hot but for the last."""
        (x,) = values
        return (x.unsqueeze(-1) == torch.arange(self.num_parameters, device=x.device)).to(torch.get_default_dtype())

    def log_prob(self, eta: Tensor, values: Values) -> Tensor:
        """Logarithm of the probability."""
        logits = self.logits(eta).log_softmax(-1)
        (x,) = values
        shape = torch.broadcast_shapes(logits.shape[:-1], x.shape)
        return logits.expand(*shape, self.dim).gather(-1, x.expand(shape).long().unsqueeze(-1)).squeeze(-1)

    def logits(self, eta: Tensor) -> Tensor:
        """K logits, the last zero."""
        return torch.cat([eta, torch.zeros_like(eta[..., :1])], -1)

    def log_normalizer(self, eta: Tensor) -> Tensor:
        """Log Σ exp."""
        return torch.logsumexp(self.logits(eta), -1)

    def mean(self, eta: Tensor) -> Tensor:
        """The first K - 1 probabilities."""
        return self.logits(eta).softmax(-1)[..., :-1]

    def natural(self, mean: Tensor, *, start: Tensor | None = None) -> Tensor:
        """In closed form."""
        if start is None:
            last = 1 - mean.sum(-1, keepdim=True)
        else:  # the same, without the rounding of the difference
            last = self.logits(start).softmax(-1)[..., -1:].detach() - (mean - mean.detach()).sum(-1, keepdim=True)
        return mean.log() - last.log()

    def entropy(self, eta: Tensor) -> Tensor:
        """-Σ p log p."""
        logits = self.logits(eta).log_softmax(-1)
        return -(logits.exp() * logits).sum(-1)

    def kl(self, eta: Tensor, other: Tensor) -> Tensor:
        """Σ p log(p / p')."""
        logits, others = self.logits(eta).log_softmax(-1), self.logits(other).log_softmax(-1)
        return (logits.exp() * (logits - others)).sum(-1).clamp_min(0)

    def cone(self, eta: Tensor) -> tuple[Tensor, Tensor | None]:
        """No constraint."""
        return eta[..., :0], None

    def unconstrain(self, eta: Tensor) -> Tensor:
        """η itself."""
        return eta * 1

    def constrain(self, u: Tensor) -> Tensor:
        """η itself."""
        return u * 1

    def standard(self, eta: Tensor) -> dict[str, Tensor]:
        """Log probabilities ("logits")."""
        return {"logits": self.logits(eta).log_softmax(-1)}

    def from_standard(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """From logits."""
        logits = parameters["logits"]
        return logits[..., :-1] - logits[..., -1:]

    def from_scores(self, scores: Tensor) -> Tensor:
        """From a log density, up to a constant, at each value, ``(*B, K)``."""
        return scores[..., :-1] - scores[..., -1:]

    def conditional(self, eta: Tensor, earlier: Values = ()) -> Conditional:
        """Categorical."""
        return Conditional("Categorical", self.standard(eta))


class Bernoulli(ExponentialFamily):
    r"""Zero or one: T = x, η = logit p."""

    num_parameters = 1
    parameter_dims: ClassVar = {"logits": 0}
    is_discrete: ClassVar = True
    dim = 2

    def statistics(self, values: Values) -> Tensor:
        """The value."""
        return values[0].unsqueeze(-1)

    def log_normalizer(self, eta: Tensor) -> Tensor:
        """Log(1 + exp η)."""
        return torch.nn.functional.softplus(eta[..., 0])

    def mean(self, eta: Tensor) -> Tensor:
        """The probability of one."""
        return eta.sigmoid()

    def natural(self, mean: Tensor, *, start: Tensor | None = None) -> Tensor:
        """Its logit."""
        rest = 1 - mean if start is None else (-start).sigmoid().detach() - (mean - mean.detach())
        return mean.log() - rest.log()

    def entropy(self, eta: Tensor) -> Tensor:
        """-Σ p log p."""
        softplus = torch.nn.functional.softplus
        return (eta.sigmoid() * softplus(-eta) + (-eta).sigmoid() * softplus(eta))[..., 0]

    def logits(self, eta: Tensor) -> Tensor:
        """Logits of zero and one."""
        return torch.cat([torch.zeros_like(eta), eta], -1)

    def cone(self, eta: Tensor) -> tuple[Tensor, Tensor | None]:
        """No constraint."""
        return eta[..., :0], None

    def unconstrain(self, eta: Tensor) -> Tensor:
        """η itself."""
        return eta * 1

    def constrain(self, u: Tensor) -> Tensor:
        """η itself."""
        return u * 1

    def standard(self, eta: Tensor) -> dict[str, Tensor]:
        """The logit ("logits")."""
        return {"logits": eta[..., 0]}

    def from_standard(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """From the logit."""
        return parameters["logits"].unsqueeze(-1)

    def from_scores(self, scores: Tensor) -> Tensor:
        """From a log density, up to a constant, at zero and at one, ``(*B, 2)``."""
        return scores[..., 1:] - scores[..., :1]

    def conditional(self, eta: Tensor, earlier: Values = ()) -> Conditional:
        """Bernoulli."""
        return Conditional("Bernoulli", self.standard(eta))
