r"""Coordinate ascent for guides of exponential families, with exact expectations.

One sweep sets the factor of every site in turn to the best one given the others,

.. math:: \eta_i \leftarrow (1 - \rho) \eta_i + \rho\, E_{q_{-i}}[\eta_i^*(z_{-i}, x)],

where :math:`\eta_i^*` are the natural parameters of the site's distribution given all others and the data. They are
read off the model itself: where log p is linear in the sufficient statistics of the site, its gradients at a few points
are enough.

References:
    Bishop 2006, "Pattern Recognition and Machine Learning", Sections 10.1 and 10.4. Hoffman, Blei, Wang & Paisley 2013,
    "Stochastic variational inference", JMLR 14, eq. 22-27. Winn & Bishop 2005, "Variational message passing", JMLR 6.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError, FitError, ModelError
from pyro_vi_lab.expected_log_joint import LogJoint, Members
from pyro_vi_lab.families.exponential import Values, sign_design
from pyro_vi_lab.guides import Conjugate
from pyro_vi_lab.isolation import model_run, seeded
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.user_errors import user_errors

START_STRENGTH = 2
"""Signs that occur together in all combinations, at first."""
GENERIC_NOISE = 0.3
"""Standard deviation of what is added to all unconstrained parameters to have none with a special value."""
MAX_RUNS = 4096
"""Most runs of the model for one expectation."""
MAX_SINGLE_FLIPS = 8
"""Columns of signs up to which each is turned around on its own to see whether a table is good enough."""
NUM_FLIPS = 8
"""Random sets of columns that are turned around where there are more."""
CHECK_DRAWS = 3
"""Draws of each site at which the gradient has to be what its message says."""
CHECK_MEMBERS = 4
"""Members of a site that are moved one at a time to see whether only their dependence is in the way."""
STALLED_SWEEPS = 10
"""Sweeps without a shorter step after which rounding is all that is left."""
STALLED_STEP = 1e-8
"""Largest squared Fisher length, in nats, of a step that may be rounding."""


class Ascent(NamedTuple):
    """What a coordinate ascent did.

    Args:
        elbo: The ELBO before the first sweep and after each, exact up to rounding, ``(sweeps + 1,)``.
        converged: Whether the last sweep changed nothing.
        seconds: Since the start, at each of these.
    """

    elbo: Tensor
    converged: bool
    seconds: tuple[float, ...]


def coordinate_ascent(
    problem: Problem,
    guide: Conjugate,
    *,
    lr: float = 1.0,
    max_sweeps: int = 1000,
    tolerance: float = 1e-18,
    on_sweep: Callable[[int, float, float], bool | None] = lambda sweep, elbo, seconds: None,
) -> Ascent:
    r"""Fit a guide of exponential families by coordinate ascent with exact expectations; its parameters are changed.

    Every site has to be conditionally conjugate: given all others, log p is linear in the sufficient statistics of the
    site's family. This is checked, not assumed. Discrete sites are summed over exactly.

    Args:
        problem: The model and its data.
        guide: A guide of the same model.
        lr: Step size ρ in (0, 1]: 1 is coordinate ascent, whose ELBO never falls.
        max_sweeps: Most sweeps over all sites.
        tolerance: Squared Fisher length of a sweep's steps, in nats, below which it has converged; rounding of large
            data ends it before.
        on_sweep: Called with the number of each sweep, from 0 for the start, the ELBO and the seconds since the
            start; the ascent ends where it returns ``True``.

    Returns:
        The history of the ELBO.

    Raises:
        ModelError: A site is not conditionally conjugate; the message names it. Or the model sees some of its rows
            only.
        FitError: A site's distribution given the others is improper.
        ArgumentError: ``lr`` or ``max_sweeps`` is out of range.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def coin(y):
        ...     p = pyro.sample("p", dist.Beta(1.0, 1.0))
        ...     with pyro.plate("toss", len(y)):
        ...         pyro.sample("y", dist.Bernoulli(p), obs=y)
        >>> problem = Problem(coin, torch.tensor([1.0, 0.0, 1.0]))
        >>> guide = Conjugate(coin)
        >>> coordinate_ascent(problem, guide).converged
        True
        >>> {name: round(value.item(), 6) for name, value in guide.standard("p").items()}
        {'concentration1': 3.0, 'concentration0': 2.0}
    """
    if not 0 < lr <= 1:
        raise ArgumentError(f"lr is a step size in (0, 1], got {lr!r}")
    if max_sweeps < 1:
        raise ArgumentError(f"max_sweeps must be at least 1, got {max_sweeps!r}")
    if problem.subsamples:
        raise ModelError(
            f"model {problem.name} sees some of its rows at a time; fit it by SVI with NaturalGradient, or take a "
            "natural_sweep on each batch"
        )
    began = time.perf_counter()
    model, args, kwargs = problem.model, problem.args, problem.kwargs
    with user_errors(problem.name, args, kwargs), model_run(seed=0, dtype=problem.dtype, validate=False):
        set_up(guide, *args, **kwargs)
        joint = LogJoint(guide, model, args, kwargs)
        design = planned(joint).design(joint)
        history, best, since = [elbo(joint, design)], math.inf, 0
        seconds = [time.perf_counter() - began]
        converged, stopped = False, on_sweep(0, float(history[0]), seconds[0])
        for number in range(1, max_sweeps + 1):
            if stopped:
                break
            step = sweep(joint, design, lr=lr)
            history.append(elbo(joint, design))
            seconds.append(time.perf_counter() - began)
            stopped = on_sweep(number, float(history[-1]), seconds[-1])
            best, since = (step, 0) if step < best else (best, since + 1)
            if step <= tolerance or (since >= STALLED_SWEEPS and best <= STALLED_STEP):
                converged = True
                break
        if not averages_agree(joint, design):  # what was alike at the start need not be alike at the end
            raise FitError("the sites depend on each other in other ways than at the start; run it again from here")
        write(guide, joint)
    return Ascent(torch.stack(history), converged, tuple(seconds))


def natural_sweep(guide: Conjugate, *args: Any, lr: float = 1.0, check: bool = False, **kwargs: Any) -> Tensor:
    r"""One sweep on the rows that the model sees in this call: stochastic variational inference.

    Expectations are exact, only the choice of the rows is random. A site with a member for each row takes the full step
    for the rows that are seen; all others go the part ``lr`` of the way to what these rows, scaled to all of them, say.
    With :math:`\rho_t = (t + \tau)^{-\kappa}`,
    :math:`\kappa \in (\tfrac12, 1]`, the guide converges.

    Args:
        guide: The guide, whose parameters are changed.
        *args: Arguments of the model.
        lr: Step size ρ in (0, 1].
        check: Whether to check that all sites are conditionally conjugate; always done in the first call.
        **kwargs: Keyword arguments of the model.

    Returns:
        The ELBO before the sweep, estimated from these rows.

    Raises:
        ModelError: A site is not conditionally conjugate.
        FitError: A site's distribution given the others is improper.
        ArgumentError: ``lr`` is out of range.

    References:
        Hoffman, Blei, Wang & Paisley 2013, "Stochastic variational inference", JMLR 14, Figure 4.
    """
    if not 0 < lr <= 1:
        raise ArgumentError(f"lr is a step size in (0, 1], got {lr!r}")
    set_up(guide, *args, **kwargs)
    joint = LogJoint(guide, guide.model, args, kwargs)
    if check or not isinstance(guide.plan, Plan):
        guide.plan = planned(joint)
    design = guide.plan.design(joint)
    before = elbo(joint, design)
    local = [name for name, is_local in joint.is_local.items() if is_local]
    sweep(joint, design, lr=1.0, names=local)
    sweep(joint, design, lr=lr, names=[name for name in joint.members if name not in local])
    write(guide, joint)
    return before


def set_up(guide: Conjugate, *args: Any, **kwargs: Any) -> None:
    """Let a guide see its model, if it has not yet."""
    if guide.prototype_trace is None:
        guide._setup_prototype(*args, **kwargs)


def write(guide: Conjugate, joint: LogJoint) -> None:
    """Put the members of the rows that were seen into the guide."""
    for name, members in joint.members.items():
        eta, factor = guide.natural(name), guide.factors[name]
        for frame in factor.frames:
            if frame.name in joint.index:
                axis = frame.dim - factor.event_dims[0] - 1
                if eta.shape[axis] != members.eta.shape[axis]:
                    eta = eta.index_copy(axis, joint.index[frame.name].to(eta.device), members.eta)
                    break
        else:
            eta = members.eta
        guide.set_natural(name, eta)


def elbo(joint: LogJoint, design: Tensor) -> Tensor:
    """The ELBO at the present members."""
    value = joint.expectation(design)
    for name, members in joint.members.items():
        value = value + joint.row_scales[name] * members.family.entropy(members.eta).sum()
    return value


def sweep(joint: LogJoint, design: Tensor, *, lr: float, names: list[str] | None = None) -> float:
    """Update every factor in turn; returns the squared Fisher length of all steps together, in nats.

    The last site of the model is the first: those of single rows before those of all, which a guide can start at
    something better than the prior, and so in a mixture the choices before the components.
    """
    length = 0.0
    for name in reversed(list(joint.members) if names is None else names):
        members = joint.members[name]
        number = members.eta[..., 0].numel() if members.is_split else 1
        for k in range(number):
            target = joint.message(design, name) / joint.row_scales[name]
            if not bool(members.family.contains(target).all()):
                raise FitError(
                    f"the distribution of site {name!r} given the others is improper: it is no {_kind(members)}; give "
                    "it a proper prior"
                )
            moved = members.eta.lerp(target, lr)
            if members.is_split:
                only = torch.arange(number, device=moved.device).reshape(members.eta.shape[:-1]) == k
                moved = torch.where(only.unsqueeze(-1), moved, members.eta)
            change = (moved - members.eta) * (members.family.mean(moved) - members.family.mean(members.eta))
            length += float(change.sum())
            members.eta = moved
    return length


# --- is it conjugate? -------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How to take expectations of a model.

    Args:
        split: Factors whose members depend on each other.
        strength: Signs that have to occur in all combinations.
    """

    split: frozenset[str]
    strength: int

    def design(self, joint: LogJoint) -> Tensor:
        """The table of signs."""
        for name in self.split:
            joint.members[name].is_split = True
        return joint.design(self.strength)


def planned(joint: LogJoint) -> Plan:
    """Find out whether each site is conditionally conjugate, and which sites depend on each other.

    Raises:
        ModelError: A site is not, or too many depend on each other at a time.
    """
    split = set()
    with seeded(0):
        base = {
            site: value.detach()
            for members in joint.members.values()
            if not members.family.is_discrete
            for site, value in zip(members.sites, draw(members), strict=True)
        }
        for name, members in joint.members.items():
            if members.family.is_discrete or _is_linear(joint, name, base, None):
                continue
            number = members.eta[..., 0].numel()
            some = torch.randperm(number)[:CHECK_MEMBERS].tolist()
            if number == 1 or not all(_is_linear(joint, name, base, k) for k in some):
                raise ModelError(
                    f"site {name!r} is not conditionally conjugate: given the others, log p is not linear in the "
                    f"sufficient statistics of the {_kind(members)} family; fit the guide by SVI with NaturalGradient"
                )
            split.add(name)
    return Plan(frozenset(split), _sufficient_strength(joint, frozenset(split)))


def _sufficient_strength(joint: LogJoint, split: frozenset[str]) -> int:
    """The smallest strength that is enough at members without anything special, such as a mean of zero."""
    present = {name: members.eta for name, members in joint.members.items()}
    with seeded(1):
        for members in joint.members.values():
            eta = members.eta
            if not members.family.is_discrete:
                eta = members.family.moved(eta, draw(members))
            u = members.family.unconstrain(eta)
            members.eta = members.family.constrain(u + GENERIC_NOISE * torch.randn(u.shape).to(u))
    try:
        for strength in itertools.count(START_STRENGTH):
            design = Plan(split, strength).design(joint)
            if len(design) > MAX_RUNS:
                raise ModelError(
                    f"the expectation of log p needs all combinations of more than {strength - 1} of "
                    f"{joint.num_columns} signs: too many sites depend on each other at a time; fit the guide by SVI "
                    "with NaturalGradient"
                )
            if averages_agree(joint, design):
                return strength
    finally:
        for name, eta in present.items():
            joint.members[name].eta = eta
    raise AssertionError


def draw(members: Members) -> Values:
    """A draw that stays away from the edge of the support."""
    return members.family.sample(members.family.tamed(members.eta))


def _is_linear(joint: LogJoint, name: str, base: Mapping[str, Tensor], member: int | None) -> bool:
    """Whether gradients at draws of a site are those of the message from its points; of all its members, or one."""
    members = joint.members[name]
    family = members.family
    probabilities = {key: m.probabilities() for key, m in joint.members.items() if m.family.is_discrete}
    here = tuple(base[site] for site in members.sites)
    batch = members.eta.shape[:-1]
    number = members.eta[..., 0].numel()
    only = torch.ones(batch, dtype=torch.bool, device=members.eta.device)
    if member is not None:
        only = torch.arange(number, device=members.eta.device).reshape(batch) == member

    def at(values: Values) -> tuple[Values, Values]:
        """Values of which only the chosen members are new, and the gradient there."""
        mixed = tuple(
            torch.where(only.reshape((*batch, *([1] * (new.dim() - len(batch))))), new, old)
            .detach()
            .requires_grad_(True)
            for new, old in zip(values, here, strict=True)
        )
        with torch.enable_grad():
            value = joint.value({**base, **dict(zip(members.sites, mixed, strict=True))}, probabilities)
            grads = torch.autograd.grad(value, mixed, allow_unused=True)
        filled = tuple(torch.zeros_like(x) if g is None else g for x, g in zip(mixed, grads, strict=True))
        return tuple(x.detach() for x in mixed), filled

    tame = family.tamed(members.eta)
    design = sign_design(family.num_signs, 2).to(tame)
    signs = design.reshape(len(design), *([1] * len(batch)), family.num_signs)
    runs = [at(family.point(tame, row)) for row in signs]
    points, grads = (tuple(torch.stack(parts) for parts in zip(*(run[k] for run in runs), strict=True)) for k in (0, 1))
    message = family.message(tame, signs, points, grads)
    tolerance = 100 * math.sqrt(torch.finfo(tame.dtype).eps)
    size = [g.abs().amax(0) for g in family.tangent(points, grads)]
    for _ in range(CHECK_DRAWS):
        values, actual = at(draw(members))
        leaves = tuple(value.requires_grad_(True) for value in values)
        with torch.enable_grad():
            predicted = torch.autograd.grad((family.statistics(leaves) * message).sum(), leaves)
        for one, two, scale in zip(
            family.tangent(values, actual), family.tangent(values, predicted), size, strict=True
        ):
            wrong = (one - two).abs() > tolerance * (one.abs() + two.abs() + scale + scale.mean())
            if bool((wrong & _like(only, one)).any()):
                return False
    return True


def averages_agree(joint: LogJoint, table: Tensor) -> bool:
    """Whether a table of signs has the same average with other signs in some columns.

    What the averages over too weak a table have in excess changes its sign with them.
    """
    number = table.shape[1]
    if len(table) >= 2**number:
        return True
    if number <= MAX_SINGLE_FLIPS:
        flips = 1 - 2 * torch.eye(number)
    else:
        flips = 2.0 * torch.randint(2, (NUM_FLIPS, number), generator=torch.Generator().manual_seed(0)) - 1
    value = joint.expectation(table)
    tolerance = math.sqrt(torch.finfo(value.dtype).eps) * value.abs().clamp_min(1)
    return all(bool((joint.expectation(table * flip) - value).abs() <= tolerance) for flip in flips)


def _like(mask: Tensor, value: Tensor) -> Tensor:
    """With ones for the event dimensions."""
    return mask.reshape((*mask.shape, *([1] * (value.dim() - mask.dim()))))


def _kind(members: Members) -> str:
    return type(members.family).__name__
