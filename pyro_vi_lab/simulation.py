"""Parameters from the prior of a problem and data from its model, as new arguments of the model."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_vi_lab.agreement import agrees
from pyro_vi_lab.errors import ModelError
from pyro_vi_lab.isolation import model_run
from pyro_vi_lab.posterior import Posterior
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.user_errors import user_errors


class Simulation(NamedTuple):
    """R draws from the joint distribution of parameters and data.

    Args:
        parameters: Latent sites, and deterministic ones that are not made of the data, in one chain,
            ``(1, R, *site shape)``.
        observed: Data of the observed sites, ``(R, *site shape)``.
        data: The same as arguments of the model, ``(R, *shape of the argument)``.
        num_discarded: Data sets that were not finite and are left out.
    """

    parameters: Posterior
    observed: dict[str, Tensor]
    data: dict[str, Tensor]
    num_discarded: int


def simulate(problem: Problem, num_simulations: int, seed: int = 0) -> Simulation:
    """Draw parameters from the prior, and data given the parameters.

    Args:
        problem: Model and data; of the data, those of observed sites are replaced, all others stay.
        num_simulations: R.
        seed: Seed of the draws.

    Raises:
        ModelError: The model is not a distribution that can be drawn from (an improper prior, a factor, a scaled
            density), its data cannot be put in place of the observed ones, or it depends on its data other than by
            observing them; the message names the site.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("row", len(y)):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> simulation = simulate(Problem(model, torch.zeros(3)), 100)
        >>> simulation.parameters.draws["mean"].shape, simulation.data["y"].shape
        (torch.Size([1, 100]), torch.Size([100, 3]))
    """
    if problem.subsamples:
        raise ModelError(
            f"data of model {problem.name} cannot be simulated: it sees only some of its rows at a time; give all of "
            "them to a Problem without minibatch, loader or subsample_size"
        )
    for key, site in problem.sites.items():
        if site.kind == "factor":
            raise ModelError(
                f"data of model {problem.name} cannot be simulated: site {key!r} is a pyro.factor, from which nothing "
                "can be drawn; write it as a distribution of a site"
            )
    arguments = observed_arguments(problem)
    parameters = problem.prior(num_simulations, seed)  # refuses improper priors
    seeds = torch.Generator().manual_seed(seed)
    drawn = problem.predictive(parameters, seed=int(torch.randint(2**31, (), generator=seeds)))
    observed, draws = {key: drawn[key][0] for key in arguments}, dict(parameters.draws)
    finite = torch.stack([torch.isfinite(value).reshape(len(value), -1).all(1) for value in observed.values()]).all(0)
    if not bool(finite.any()):
        raise ModelError(f"all {num_simulations} simulated data sets of model {problem.name} have infinite values")
    if not bool(finite.all()):
        observed = {key: value[finite] for key, value in observed.items()}
        draws = {key: value[:, finite] for key, value in draws.items()}
    inputs = problem.inputs
    data = {
        name: observed[key].reshape(-1, *inputs[name].shape).to(inputs[name].dtype) for key, name in arguments.items()
    }
    for key in _made_of_data(problem, draws, observed, data):
        del draws[key]
    return Simulation(
        Posterior(draws, method="prior", info=parameters.info), observed, data, num_simulations - int(finite.sum())
    )


def observed_arguments(problem: Problem) -> dict[str, str]:
    """Observed site to the argument of the model that it observes.

    Raises:
        ModelError: There are no observed sites, or one observes no argument as it is.
    """
    observed = problem.observed
    if not observed:
        raise ModelError(f"data of model {problem.name} cannot be simulated: it observes nothing")
    found: dict[str, str] = {}
    for key, value in observed.items():
        same = [name for name, tensor in problem.inputs.items() if tensor is value]
        equal = same or [
            name
            for name, tensor in problem.inputs.items()
            if tensor.numel() == value.numel() and torch.equal(tensor.reshape(-1).to(value), value.reshape(-1))
        ]
        if not equal:
            raise ModelError(
                f"simulated data of observed site {key!r} of model {problem.name} cannot be put in place of the "
                f"observed ones: its values are those of no argument (the arguments: {', '.join(problem.inputs)}); "
                "give the model what it observes, as it is observed, as an argument of its own"
            )
        if len(equal) > 1 or equal[0] in found.values():
            others = ", ".join(equal) if len(equal) > 1 else f"{equal[0]}, which another site observes too"
            raise ModelError(
                f"it is not clear which argument of model {problem.name} holds the data of observed site {key!r}: "
                f"{others}; observe an argument as it is (obs=y), one for each site"
            )
        found[key] = equal[0]
    return found


def _made_of_data(
    problem: Problem, draws: dict[str, Tensor], observed: dict[str, Tensor], data: dict[str, Tensor]
) -> list[str]:
    """Deterministic sites that change with the observed data; refuses models whose distributions do.

    Latent and observed sites keep their values, while the arguments change from the data of the problem to simulated
    ones: where the model is generative, the log density of every site stays.
    """
    simulated = problem.each({name: value[:1] for name, value in data.items()})[0]
    for key, value in simulated.observed.items():
        if not torch.equal(value.reshape(-1).to(observed[key]), observed[key][0].reshape(-1)):
            raise ModelError(
                f"simulated data of observed site {key!r} of model {problem.name} do not reach it through its "
                "argument: the model changes them, or reads them from elsewhere; observe an argument as it is (obs=y)"
            )
    values = {key: value[0, 0] for key, value in draws.items() if problem.sites[key].kind == "latent"}
    values |= {key: value[0] for key, value in observed.items()}
    before, after = _sites(problem, values), _sites(simulated, values)
    changing = []
    for key, node in before.items():
        if key in observed and not bool((torch.as_tensor(node["scale"]) == 1).all()):
            raise ModelError(
                f"data of model {problem.name} cannot be simulated: the log density of observed site {key!r} is "
                "scaled (poutine.scale), so that it is not that of any data"
            )
        if problem.sites[key].kind == "deterministic":
            if not agrees(node["value"], after[key]["value"]):
                changing.append(key)
        elif not agrees(node["log_prob"], after[key]["log_prob"]):
            raise ModelError(
                f"data of model {problem.name} cannot be simulated: the distribution of site {key!r} depends on the "
                "observed data themselves (a prior or a mask made from them, a value before this one); such a model "
                "says how likely data are, and not how they arise"
            )
    return changing


def _sites(problem: Problem, values: dict[str, Tensor]) -> dict[str, Any]:
    """Every site of a run in which latent and observed ones have the given values."""
    run = poutine.condition(poutine.uncondition(problem.model), data=values)
    with (
        user_errors(problem.name),
        model_run(seed=0, dtype=problem.dtype, validate=False),
        torch.no_grad(),
        poutine.block(),
    ):
        trace = poutine.trace(run).get_trace(*problem.args, **problem.kwargs)
        trace.compute_log_prob()
    return {key: node for key, node in trace.nodes.items() if key in problem.sites}
