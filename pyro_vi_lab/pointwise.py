"""Log densities of single rows in a trace of a model whose discrete latent sites are enumerated."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_vi_lab.errors import ModelError

MAX_STATES = 2**12
"""Joint states of the discrete sites of one row that are summed over one by one."""


class _Factor(NamedTuple):
    """A term of the log joint density: its values, the axes along which states are enumerated, and plates."""

    log_prob: Tensor
    states: frozenset[int]
    plates: frozenset[int]


def pointwise(trace: Any, names: list[str], nesting: int | None) -> dict[str, Tensor]:
    r"""Log density of every row of the sites ``names``, with the discrete sites summed out.

    A row that depends on discrete sites gets its density given all other data that depend on them too,

    .. math:: \log p(y_i \mid y_{-i}, \theta) = \log \sum_z p(z, y \mid \theta) - \log \sum_z p(z, y_{-i} \mid \theta)

    which is :math:`\log \sum_z p(z) p(y_i \mid z, \theta)` where each row has a discrete site of its own, and what
    leave-one-out cross-validation needs where rows share one. A latent site that depends on discrete ones has no log
    density of its own and is left out.

    Args:
        trace: The trace, whose continuous latent sites have their values.
        names: Sites whose log densities are asked for.
        nesting: Number of batch dimensions that plates use, to whose left enumerated states lie; ``None`` if none are.

    Shape:
        each result has the batch shape of its site; zero where masked.

    Raises:
        ModelError: The discrete sites of a row are a Markov chain, lie in different plates, or have too many states.

    References:
        Bürkner, Gabry & Vehtari 2021, "Efficient leave-one-out cross-validation for Bayesian non-factorized normal and
        Student-t models", Computational Statistics 36, eq. 2.
    """
    if nesting is None:
        return {name: _log_prob(trace.nodes[name]) for name in names}
    nodes = {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not isinstance(node["fn"], _Subsample)
    }
    factors = {name: _factor(node, nesting) for name, node in nodes.items()}
    result = {}
    for name in names:
        if not factors[name].states:
            result[name] = factors[name].log_prob
        elif nodes[name]["is_observed"]:
            result[name] = _given_the_rest(name, nodes, factors, nesting)
    return result


def _log_prob(node: Any) -> Tensor:
    # not node["log_prob"], which is scaled where a plate sees some of its rows; rows that are masked say nothing
    log_prob: Tensor = scale_and_mask(node["fn"].log_prob(node["value"]), mask=node["mask"])
    return log_prob


def _factor(node: Any, nesting: int) -> _Factor:
    log_prob = _log_prob(node)
    states = frozenset(axis for axis in range(-log_prob.dim(), -nesting) if log_prob.shape[axis] > 1)
    plates = frozenset(frame.dim for frame in node["cond_indep_stack"] if frame.vectorized)
    return _Factor(log_prob, states, plates)


def _given_the_rest(name: str, nodes: dict[str, Any], factors: dict[str, _Factor], nesting: int) -> Tensor:
    own = factors[name]
    states, joined = own.states, {name}
    while True:  # everything that depends on the same discrete sites, or on others that these depend on
        more = {key for key, factor in factors.items() if factor.states & states} - joined
        if not more:
            break
        joined |= more
        states = states.union(*(factors[key].states for key in more))
    discrete = {key: nodes[key]["infer"].get("_enumerate_dim") for key in joined if not nodes[key]["is_observed"]}
    discrete = {key: axis for key, axis in discrete.items() if axis is not None}
    plates = _common_plates(name, discrete, factors)
    total = sum((_summed(factors[key], plates) for key in joined if key != name), torch.zeros(()).to(own.log_prob))
    axes = sorted(states)
    sizes = {
        axis: factor.log_prob.shape[axis] for factor in map(factors.get, joined) if factor for axis in factor.states
    }
    count = math.prod(sizes.values())
    if count > MAX_STATES:
        raise ModelError(
            f"each row of site {name!r} depends on {len(discrete)} discrete sites with {count:,} states together, of "
            f"which at most {MAX_STATES:,} are summed over row by row"
        )
    extra = tuple(axis for axis in own.plates if axis not in plates and -axis <= own.log_prob.dim())
    with_all = torch.logsumexp(total + _summed(own, plates), axes, keepdim=True)
    without = torch.logsumexp(total + _sum_of_others(own.log_prob, extra), axes, keepdim=True)
    value = with_all - without
    return value.reshape(value.shape[value.dim() - nesting :] if nesting else ())


def _common_plates(name: str, discrete: dict[str, int], factors: dict[str, _Factor]) -> frozenset[int]:
    if len(set(discrete.values())) < len(discrete):
        raise ModelError(
            f"the discrete sites that site {name!r} depends on ({', '.join(discrete)}) are a Markov chain: the log "
            "likelihood of a single row given the others is not available for these"
        )
    first, *others = discrete
    for other in others:
        if factors[other].plates != factors[first].plates:
            raise ModelError(
                f"the discrete sites {first!r} and {other!r}, which site {name!r} depends on, lie in different plates: "
                "the log likelihood of a single row given the others is not available for these"
            )
    return factors[first].plates


def _summed(factor: _Factor, plates: frozenset[int]) -> Tensor:
    """Log density summed over the plates that the discrete sites are not in."""
    axes = [axis for axis in factor.plates - plates if -axis <= factor.log_prob.dim()]
    return factor.log_prob.sum(axes, keepdim=True) if axes else factor.log_prob


def _sum_of_others(log_prob: Tensor, axes: tuple[int, ...]) -> Tensor:
    """For every row the sum over all other rows; of a state that is impossible only by this row the finite rest."""
    if not axes:
        return torch.zeros_like(log_prob)
    impossible = torch.isneginf(log_prob)
    finite = log_prob.masked_fill(impossible, 0.0)
    rest = finite.sum(axes, keepdim=True) - finite
    others = impossible.sum(axes, keepdim=True) - impossible.long()
    return rest.masked_fill(others > 0, -math.inf)
