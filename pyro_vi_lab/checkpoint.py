"""Fits and posteriors read back from files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vi_lab.archive import part, read_archive
from pyro_vi_lab.density_engine import Status
from pyro_vi_lab.errors import ArgumentError, FileError
from pyro_vi_lab.families import Params
from pyro_vi_lab.fit_guide import name_by_content, prepared
from pyro_vi_lab.fitted import Fit
from pyro_vi_lab.guides import FAMILY_GUIDES, GUIDES, ContinuousGuide
from pyro_vi_lab.isolation import default_dtype, seeded
from pyro_vi_lab.posterior import Posterior
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.program_fit import instance_of, objective_of
from pyro_vi_lab.saved_fit import describe


def load(path: str | Path, problem: Problem | None = None, *, guide: Callable[..., Any] | None = None) -> Any:
    """Read what :meth:`Fit.save` or :meth:`Posterior.save` wrote.

    The fit gives the same draws for the same seed. Files hold numbers and plain values only; nothing in them is run.

    Args:
        path: The file.
        problem: Model and data of a fit, which are not in the file: the same as when it was saved.
        guide: The guide of a fit of a guide of your own, made in the same way: its parameters are set to those of
            the file, in Pyro's param store if it is a function. Ours are made anew.

    Returns:
        A :class:`Fit` or a :class:`Posterior`.

    Raises:
        FileError: There is no such file, it is something else, or the fit is of another problem.
        ArgumentError: The problem or the guide is needed, and was not given.

    Example:
        >>> import pyro.distributions as dist, tempfile
        >>> from pyro_vi_lab import fit
        >>> def model():
        ...     pyro.sample("x", dist.Normal(3.0, 2.0))
        >>> problem, path = Problem(model), Path(tempfile.mkdtemp()) / "x.fit"
        >>> fit(problem, progress=False).save(path)
        >>> load(path, problem).status.value
        'converged'
    """
    path = Path(path)
    header, arrays = read_archive(path)
    if header.get("kind") == "posterior":
        return _posterior(header, arrays)
    if header.get("kind") != "fit":
        raise FileError(f"{path} holds neither a fit nor a posterior")
    if problem is None:
        raise ArgumentError(f"{path} is a fit: give its model and data, load(path, problem)")
    _check_problem(path, header, problem)
    arrays = {name: value.to(_device(problem)) for name, value in arrays.items()}
    params = Params(**part(arrays, "params")) if part(arrays, "params") else None
    sampled = _posterior(header["sampled"], part(arrays, "sampled")) if header["sampled"] else None
    made = _guide(path, header, params, part(arrays, "state"), problem, guide)
    mode = part(arrays, "mode")
    by_program = params is None and not mode and sampled is None
    return Fit(
        problem=problem,
        method=header["method"],
        guide=made,
        params=params,
        statuses=tuple(Status(value) for value in header["statuses"]),
        message=header["message"],
        num_steps=header["num_steps"],
        num_gradients=header["num_gradients"],
        seconds=header["seconds"],
        seed=header["seed"],
        history={name: value.numpy(force=True) for name, value in part(arrays, "history").items()},
        objective=objective_of(problem, made, None, None, "auto") if by_program else None,
        mode=mode or None,
        sampled=sampled,
    )


def _posterior(header: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> Posterior:
    return Posterior(
        draws=part(arrays, "draws"),
        stats=part(arrays, "stats"),
        method=header["method"],
        unconstrained=arrays.get("unconstrained"),
        info=header["info"],
    )


def _device(problem: Problem) -> torch.device:
    return next((value.device for value in problem.inputs.values()), torch.device("cpu"))


def _check_problem(path: Path, header: Mapping[str, Any], problem: Problem) -> None:
    saved, given = header["problem"], describe(problem)
    for what, key in (("other data", "data_hash"), ("another model: its sites differ", "sites")):
        if saved[key] != given[key]:
            raise FileError(f"{path} is a fit of {saved['name']}, and {problem.name} as given here has {what}")


def _guide(
    path: Path,
    header: Mapping[str, Any],
    params: Params | None,
    state: Mapping[str, Tensor],
    problem: Problem,
    given: Callable[..., Any] | None,
) -> Any:
    name = header["guide"]
    if given is None and name is None and header["sampled"]:
        return None
    if given is None and name is None:
        raise ArgumentError(
            f"{path} is a fit of the guide {header['method']}, which is not one of ours: make it as it was made then, "
            "and give it: load(path, problem, guide=...)"
        )
    if given is None and name in FAMILY_GUIDES and params is not None:
        discrete = [site.name for site in problem.sites.values() if site.kind == "discrete"]
        model = poutine.block(problem.model, hide=discrete) if discrete else problem.model
        kind: Any = FAMILY_GUIDES[name]
        _, made = prepared(problem, kind(model, **header["options"]), header["seed"])
        made.params = Params(params.loc[0], params.scale[0])
        name_by_content(made)
        return made
    if given is None and issubclass(GUIDES[name], ContinuousGuide):
        _, made = prepared(problem, name, header["seed"])
    else:
        made = given if given is not None else instance_of(problem, name)
        _run(problem, made)
    if isinstance(made, nn.Module):
        try:
            made.load_state_dict(state)
        except RuntimeError as error:
            raise FileError(f"the guide given for {path} is not that of the file: {error}") from error
        return made
    store = pyro.get_param_store()
    for key, value in state.items():
        if key in store:
            store[key] = value
    missing = [key for key in store if key not in state]
    if missing:
        raise FileError(f"the guide given for {path} has the parameter {missing[0]!r}, which is not in the file")
    return made


def _run(problem: Problem, guide: Callable[..., Any]) -> None:
    """Run a guide once, so that its parameters are there."""
    example = problem.example
    args, kwargs = (problem.args, problem.kwargs) if example is None else (example.args, example.kwargs)
    with seeded(0), default_dtype(problem.dtype), poutine.block():
        if example is None:
            guide(*args, **kwargs)
        else:
            with problem.rows(example.index, example.size):
                guide(*args, **kwargs)
