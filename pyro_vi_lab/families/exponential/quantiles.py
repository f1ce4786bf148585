"""Centers and quantiles of the coordinates of members of exponential families."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_vi_lab.families.exponential.family import ExponentialFamily, Values


def center(family: ExponentialFamily, eta: Tensor) -> Values:
    """Medians of all coordinates; the mean of a Dirichlet or Wishart distribution, the likeliest of choices."""
    standard, name = family.standard(eta), type(family).__name__
    if name in ("Wishart", "NormalWishart"):
        tril = standard["scale_tril"]
        mean = standard["df"][..., None, None] * (tril @ tril.mT)
        return (mean, standard["loc"]) if name == "NormalWishart" else (mean,)
    if name == "Dirichlet":
        concentration = standard["concentration"]
        return (concentration / concentration.sum(-1, keepdim=True),)
    if name == "Categorical":
        return (standard["logits"].argmax(-1),)
    if name == "Bernoulli":
        return ((standard["logits"] > 0).to(eta.dtype),)
    return quantile(family, eta, 0.5)


def quantile(family: ExponentialFamily, eta: Tensor, probability: float) -> Values:
    """Quantiles of all coordinates of each variable.

    Raises:
        NotImplementedError: Of a Wishart distribution, whose coordinates have no known distribution.
    """
    from scipy import stats

    standard, name = family.standard(eta), type(family).__name__

    def of(distribution: Any, *parameters: Tensor, **named: Tensor) -> Tensor:
        arrays = [value.detach().cpu().numpy() for value in parameters]
        value = distribution.ppf(probability, *arrays, **{key: v.detach().cpu().numpy() for key, v in named.items()})
        return torch.as_tensor(value).to(eta)

    tables: dict[str, Callable[[], Values]] = {
        "Normal": lambda: (of(stats.norm, loc=standard["loc"], scale=standard["scale"]),),
        "MultivariateNormal": lambda: (
            of(stats.norm, loc=standard["loc"], scale=standard["scale_tril"].square().sum(-1).sqrt()),
        ),
        "Gamma": lambda: (of(stats.gamma, standard["concentration"], scale=1 / standard["rate"]),),
        "InverseGamma": lambda: (of(stats.invgamma, standard["concentration"], scale=standard["rate"]),),
        "Beta": lambda: (of(stats.beta, standard["concentration1"], standard["concentration0"]),),
        "Dirichlet": lambda: (
            of(
                stats.beta,
                standard["concentration"],
                standard["concentration"].sum(-1, keepdim=True) - standard["concentration"],
            ),
        ),
        "NormalGamma": lambda: (
            of(stats.gamma, standard["concentration"], scale=1 / standard["rate"]),
            of(
                stats.t,
                2 * standard["concentration"],
                loc=standard["loc"],
                scale=(standard["rate"] / (standard["concentration"] * standard["relative_precision"])).sqrt(),
            ),
        ),
        "Categorical": lambda: (_choice(standard["logits"].exp(), probability),),
        "Bernoulli": lambda: ((standard["logits"].sigmoid() > 1 - probability).to(eta.dtype),),
    }
    if name not in tables:
        raise NotImplementedError(f"the coordinates of {name} have no quantiles in closed form")
    return tables[name]()


def _choice(probabilities: Tensor, probability: float) -> Tensor:
    below: Tensor = (probabilities.cumsum(-1) < probability).sum(-1)
    return below.clamp_max(probabilities.shape[-1] - 1)
