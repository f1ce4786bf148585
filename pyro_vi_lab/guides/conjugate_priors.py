"""Which exponential family a prior belongs to, and its natural parameters there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_vi_lab.change_of_variables import distribution_name
from pyro_vi_lab.errors import ArgumentError, ModelError, unknown_name
from pyro_vi_lab.families.exponential import (
    Bernoulli,
    Beta,
    Categorical,
    Dirichlet,
    ExponentialFamily,
    Gamma,
    InverseGamma,
    MultivariateNormal,
    Normal,
    NormalGamma,
    NormalWishart,
    Wishart,
)
from pyro_vi_lab.families.family import MAX_DENSE

Member = tuple[ExponentialFamily, Tensor]
"""A family, and members of it."""


def member_of_prior(name: str, fn: Any, *, asked: str | None = None) -> Member:
    """The family of a prior and the prior as members of it, one for each element along its batch.

    Args:
        name: Name of the site.
        fn: Its prior.
        asked: Name of the family, where it is not to be chosen by the prior.

    Raises:
        ModelError: The prior belongs to no family, or not to the one that was asked for.
    """
    prior = innermost(fn)
    for kinds, readers in _PRIORS.items():
        if type(prior).__name__ in kinds:
            names = list(readers)
            if asked is None:
                asked = _default(names, fn)
            if asked not in _NAMES:
                raise unknown_name("family", asked, _NAMES)
            if asked not in readers:
                raise ModelError(
                    f"site {name!r} has the prior {distribution_name(fn)}, which is not conjugate to {asked!r}; "
                    f"families={{{name!r}: ...}} may be {' or '.join(map(repr, names))}"
                )
            return readers[asked](name, prior, fn)
    raise ModelError(
        f"site {name!r} has the prior {distribution_name(fn)}, which has no conjugate family here; Conjugate takes "
        f"{', '.join(kind for kinds in _PRIORS for kind in kinds)}. Hide the site from it (poutine.block) and give it "
        "another guide in an AutoGuideList, or use a guide on the unconstrained scale (MeanFieldNormal)"
    )


def member_of_priors(family: str, names: tuple[str, str], fns: tuple[Any, Any], precision: Tensor) -> Member:
    """The normal-gamma or normal-Wishart distribution of a mean and a precision together.

    Args:
        family: "normal_gamma" or "normal_wishart".
        names: Names of the sites, the precision first.
        fns: Their priors, that of the mean at ``precision``.
        precision: A value of the precision.

    Raises:
        ModelError: The priors are of other kinds, or have other shapes.
    """
    priors = tuple(innermost(fn) for fn in fns)
    kinds = tuple(type(prior).__name__ for prior in priors)
    expected = _JOINT_PRIORS[family]
    if not all(kind in allowed for kind, allowed in zip(kinds, expected, strict=True)):
        raise ModelError(
            f"sites {names[0]!r} ({distribution_name(fns[0])}) and {names[1]!r} ({distribution_name(fns[1])}) cannot "
            f"be {family!r}: that takes a precision with the prior {' or '.join(expected[0])} and a mean with the "
            f"prior {' or '.join(expected[1])}"
        )
    first, second = (torch.Size(fn.batch_shape) for fn in fns)
    if first != second or fns[0].shape()[: len(first)] != second:
        raise ModelError(
            f"sites {names[0]!r} and {names[1]!r} cannot be {family!r}: there has to be a precision for each mean, but "
            f"the batch shapes are {tuple(first)} and {tuple(second)}; leave them independent (joint={{}}), or put "
            "them in the same plates"
        )
    if family == "normal_gamma":
        if fns[0].shape() != fns[1].shape():
            raise ModelError(
                f"sites {names[0]!r} and {names[1]!r} cannot be 'normal_gamma': there has to be a precision for each "
                f"mean, but the shapes are {tuple(fns[0].shape())} and {tuple(fns[1].shape())}"
            )
        shape = fns[1].shape()
        a, b = _gamma_parameters(priors[0], shape)
        loc, scale = priors[1].loc.expand(shape), priors[1].scale.expand(shape)
        parameters = {"concentration": a, "rate": b, "loc": loc, "relative_precision": 1 / (scale**2 * precision)}
        return NormalGamma(), NormalGamma().from_standard(parameters)
    dim = fns[1].event_shape[-1]
    loc = priors[1].loc.expand(fns[1].shape())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(precision))
    relative = (priors[1].precision_matrix * inverse).sum((-2, -1)) / dim
    parameters = {
        "df": priors[0].df.expand(first),
        "scale_tril": priors[0].scale_tril.expand(*first, dim, dim),
        "loc": loc,
        "relative_precision": relative.expand(first),
    }
    return NormalWishart(dim), NormalWishart(dim).from_standard(parameters)


def joint_family(names: Any, joint: str, fns: Mapping[str, Any]) -> tuple[str, str]:
    """The two sites of a joint family, the precision first.

    Raises:
        ArgumentError: There are not two, one of them is no latent site, or there is no such family.
    """
    if joint not in _JOINT_PRIORS:
        raise unknown_name("joint family", joint, _JOINT_PRIORS)
    if isinstance(names, str) or len(names) != 2:
        raise ArgumentError(f"joint= takes pairs of sites, {{('mu', 'tau'): {joint!r}}}, got {names!r}")
    for name in names:
        if name not in fns:
            raise unknown_name("site", name, fns)
    precisions = [name for name in names if type(innermost(fns[name])).__name__ in _JOINT_PRIORS[joint][0]]
    if len(precisions) == 1:
        (first,) = precisions
        return first, next(name for name in names if name != first)
    return names[1], names[0]


def joint_family_of_priors(precision: Any, mean: Any) -> str | None:
    """Name of the joint family that two priors may form; ``None`` if they do not."""
    kinds = type(innermost(precision)).__name__, type(innermost(mean)).__name__
    same = precision.batch_shape == mean.batch_shape
    for name, allowed in _JOINT_PRIORS.items():
        if same and all(kind in names for kind, names in zip(kinds, allowed, strict=True)):
            return name if name == "normal_wishart" or precision.shape() == mean.shape() else None
    return None


def innermost(fn: Any) -> Any:
    """A distribution without what wraps it: independent dimensions, a mask, an expansion."""
    while hasattr(fn, "base_dist") and type(fn).__name__ in _WRAPPERS:
        fn = fn.base_dist
    return fn


_WRAPPERS = ("Independent", "MaskedDistribution", "ExpandedDistribution")


def _default(names: list[str], fn: Any) -> str:
    if len(names) == 1:
        return names[0]
    # an event is one random vector: its elements are dependent in the posterior
    return "multivariate_normal" if fn.event_dim == 1 and fn.event_shape[0] <= MAX_DENSE else "normal"


def _normal(name: str, prior: Any, fn: Any) -> Member:
    shape = fn.shape()
    if type(prior).__name__ == "Normal":
        parameters = {"loc": prior.loc.expand(shape), "scale": prior.scale.expand(shape)}
    else:
        parameters = {"loc": prior.loc.expand(shape), "scale": prior.variance.sqrt().expand(shape)}
    return Normal(), Normal().from_standard(parameters)


def _multivariate_normal(name: str, prior: Any, fn: Any) -> Member:
    shape = fn.shape()
    if fn.event_dim != 1:
        raise ModelError(
            f"site {name!r} has {fn.event_dim} event dimensions; 'multivariate_normal' takes a vector (.to_event(1))"
        )
    if type(prior).__name__ == "Normal":
        tril = torch.diag_embed(prior.scale.expand(shape))
    elif type(prior).__name__ == "MultivariateNormal":
        tril = prior.scale_tril
    else:
        tril = torch.linalg.cholesky(prior.covariance_matrix)
    family = MultivariateNormal(shape[-1])
    tril = tril.expand(*shape, shape[-1])
    return family, family.from_standard({"loc": prior.loc.expand(shape), "scale_tril": tril})


def _gamma_parameters(prior: Any, shape: torch.Size) -> tuple[Tensor, Tensor]:
    rate = prior.rate.expand(shape)
    return (torch.ones_like(rate) if type(prior).__name__ == "Exponential" else prior.concentration.expand(shape)), rate


def _gamma(name: str, prior: Any, fn: Any) -> Member:
    a, b = _gamma_parameters(prior, fn.shape())
    return Gamma(), Gamma().from_standard({"concentration": a, "rate": b})


def _inverse_gamma(name: str, prior: Any, fn: Any) -> Member:
    parameters = {key: getattr(prior, key).expand(fn.shape()) for key in InverseGamma.parameter_dims}
    return InverseGamma(), InverseGamma().from_standard(parameters)


def _beta(name: str, prior: Any, fn: Any) -> Member:
    parameters = {key: getattr(prior, key).expand(fn.shape()) for key in Beta.parameter_dims}
    return Beta(), Beta().from_standard(parameters)


def _dirichlet(name: str, prior: Any, fn: Any) -> Member:
    family = Dirichlet(fn.event_shape[-1])
    return family, family.from_standard({"concentration": prior.concentration.expand(fn.shape())})


def _wishart(name: str, prior: Any, fn: Any) -> Member:
    batch, dim = fn.shape()[:-2], fn.event_shape[-1]
    family = Wishart(dim)
    tril = prior.scale_tril.expand(*batch, dim, dim)
    return family, family.from_standard({"df": prior.df.expand(batch), "scale_tril": tril})


def _categorical(name: str, prior: Any, fn: Any) -> Member:
    family = Categorical(prior.logits.shape[-1])
    return family, family.from_standard({"logits": prior.logits.expand(*fn.shape(), -1)})


def _bernoulli(name: str, prior: Any, fn: Any) -> Member:
    return Bernoulli(), Bernoulli().from_standard({"logits": prior.logits.expand(fn.shape())})


_PRIORS: dict[tuple[str, ...], dict[str, Callable[[str, Any, Any], Member]]] = {
    ("Normal", "MultivariateNormal", "LowRankMultivariateNormal"): {
        "normal": _normal,
        "multivariate_normal": _multivariate_normal,
    },
    ("Gamma", "Exponential", "Chi2"): {"gamma": _gamma},
    ("InverseGamma",): {"inverse_gamma": _inverse_gamma},
    ("Beta",): {"beta": _beta},
    ("Dirichlet",): {"dirichlet": _dirichlet},
    ("Wishart",): {"wishart": _wishart},
    ("Categorical",): {"categorical": _categorical},
    ("Bernoulli",): {"bernoulli": _bernoulli},
}
"""Priors by name, and the families that each may be in."""
_JOINT_PRIORS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "normal_gamma": (("Gamma", "Exponential", "Chi2"), ("Normal",)),
    "normal_wishart": (("Wishart",), ("MultivariateNormal",)),
}
"""Priors of the precision and of the mean of each joint family."""
_NAMES = [name for readers in _PRIORS.values() for name in readers]
