"""Results in the form other tools open: ArviZ trees, and directories of files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import singledispatch
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from pyro.infer import MCMC
from torch import Tensor

from pyro_vi_lab import arviz_bridge
from pyro_vi_lab.arviz_bridge import SAMPLE_DIMS, Variable
from pyro_vi_lab.checks import importance
from pyro_vi_lab.errors import ArgumentError, DataError, FileError
from pyro_vi_lab.fit import Fit
from pyro_vi_lab.posterior import Posterior
from pyro_vi_lab.problem import Problem

Group = dict[str, Variable]

PACKAGES = ("pyro-vi-lab", "pyro-ppl", "torch", "numpy", "arviz", "nutpie")
"""Packages whose versions are kept with every result."""


@singledispatch
def to_arviz(
    result: Any,
    *,
    problem: Problem | None = None,
    num_draws: int = 1000,
    seed: int = 0,
    prior: bool = False,
    predictive: bool = True,
    log_likelihood: bool = True,
) -> Any:
    """A result as ArviZ's own object: ``InferenceData`` with ArviZ 0.2x, a ``DataTree`` with 1.x.

    The groups are ``posterior``, ``sample_stats`` and ``unconstrained_posterior``; where the problem is known also
    ``posterior_predictive``, ``log_likelihood``, ``observed_data`` and ``constant_data`` (arguments of the model that
    are not observed), and on request ``prior``. Dimensions and labels come from the problem.

    Args:
        result: A ``Fit``, a ``Posterior``, a ``pyro.infer.MCMC`` that was run, or a ``Comparison``, which gives a
            dict: a tree for the reference and one for every candidate that has a posterior.
        problem: What a ``Posterior`` or an ``MCMC`` is the posterior of; a ``Fit`` and a ``Comparison`` know it.
        num_draws: Draws taken from a ``Fit``.
        seed: Seed of the draws taken here.
        prior: Add the group ``prior``, of ``num_draws`` draws.
        predictive: Add the group ``posterior_predictive``.
        log_likelihood: Add the group ``log_likelihood``, with one value per observed row. Models with discrete latent
            sites have none.

    Raises:
        ArgumentError: ``result`` is something else, an ``MCMC`` that was not run, or a point (a fit of ``"map"`` or
            ``"mle"``), whose intervals of no width would pass for those of a posterior.
        FitError: The fit diverged, so that it has no posterior.

    Example:
        >>> draws = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
        >>> tree = to_arviz(Posterior({"mu": draws}, method="exact"))
        >>> tree["posterior"]["mu"].dims
        ('chain', 'draw')
    """
    raise ArgumentError(
        f"to_arviz takes a Fit, a Posterior, a Comparison or a pyro.infer.MCMC, got {type(result).__name__}"
    )


@to_arviz.register
def _(posterior: Posterior, *, problem: Problem | None = None, **options: Any) -> Any:
    return _tree(posterior, problem, **options)


@to_arviz.register
def _(fit: Fit, *, problem: Problem | None = None, num_draws: int = 1000, seed: int = 0, **options: Any) -> Any:
    posterior = fit.posterior(num_draws=num_draws, seed=seed)
    return _tree(posterior, problem or fit.problem, num_draws=num_draws, seed=seed, **options)


@to_arviz.register
def _(mcmc: MCMC, *, problem: Problem | None = None, **options: Any) -> Any:
    return _tree(from_mcmc(mcmc), problem, **options)


def from_mcmc(mcmc: MCMC) -> Posterior:
    """The draws of Pyro's own sampler.

    Raises:
        ArgumentError: It was not run.
    """
    if mcmc._samples is None:
        raise ArgumentError("this MCMC has no draws yet: call its run(...) first")
    draws = mcmc.get_samples(group_by_chain=True)
    diverging = torch.zeros(next(iter(draws.values())).shape[:2], dtype=torch.bool)
    found: list[Any] = mcmc._diagnostics
    for chain, values in enumerate(found):
        diverging[chain, list(values.get("divergences", []) if values else [])] = True
    method = type(mcmc.kernel).__name__.lower()
    return Posterior(draws, {"diverging": diverging}, method=method, info={"num_warmup": mcmc.warmup_steps})


def save_arviz(tree: Any, path: Path) -> None:
    """Write one tree as NetCDF, which plain ``arviz.from_netcdf(path)`` opens."""
    arviz_bridge.save(tree, path)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def data_hash(problem: Problem) -> str:
    """SHA-256 of the observed values and the model's tensor arguments: the same data give the same text."""
    digest = hashlib.sha256()
    for kind, values in (("observed", problem.observed), ("input", problem.inputs)):
        for name, value in sorted(values.items()):
            array = value.detach().cpu().contiguous()
            digest.update(f"{kind} {name} {array.dtype} {tuple(array.shape)}\n".encode())
            digest.update(array.flatten().view(torch.uint8).numpy().tobytes() if array.numel() else b"")
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """Nested dicts and lists of plain Python values, with ``None`` for what JSON has no word for."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# --- groups ---------------------------------------------------------------------------------------------------------


def _tree(
    posterior: Posterior,
    problem: Problem | None,
    *,
    num_draws: int = 1000,
    seed: int = 0,
    prior: bool = False,
    predictive: bool = True,
    log_likelihood: bool = True,
) -> Any:
    if posterior.info.get("point"):
        raise ArgumentError(
            f"the draws of {posterior.method} are all one point and no posterior: take the point from fit.point(), or "
            "fit 'laplace', the normal at the mode"
        )
    groups: dict[str, Group] = {"posterior": _drawn(posterior.draws, problem)}
    if posterior.stats:
        groups["sample_stats"] = _stats(posterior)
    if posterior.unconstrained is not None:
        values = posterior.unconstrained.numpy(force=True)
        groups["unconstrained_posterior"] = {"z": (values, (*SAMPLE_DIMS, "coordinate"))}
    coords: dict[str, Any] = {}
    if problem is not None:
        coords |= {"coordinate": problem.density().labels, **problem.coords}
        if predictive:
            groups["posterior_predictive"] = _drawn(problem.predictive(posterior, seed=seed), problem)
        if log_likelihood and not any(site.kind == "discrete" for site in problem.sites.values()):
            groups["log_likelihood"] = _drawn(problem.log_likelihood(posterior), problem)
        if prior:
            groups["prior"] = _drawn(problem.prior(num_draws=num_draws, seed=seed).draws, problem)
        groups["observed_data"] = {
            name: (value.numpy(force=True), _dims(problem, name, value.dim()))
            for name, value in problem.observed.items()
        }
        groups["constant_data"] = _constant_data(problem)
    attrs: dict[str, Any] = {"created_by": "pyro-vi-lab", "method": posterior.method}
    attrs |= {key: value for key, value in posterior.info.items() if isinstance(value, str | int | float)}
    attrs["versions"] = json.dumps(versions())
    if problem is not None:
        attrs["problem"] = problem.name
    return arviz_bridge.tree({name: group for name, group in groups.items() if group}, coords, attrs)


def _drawn(values: Mapping[str, Tensor], problem: Problem | None) -> Group:
    return {
        name: (value.numpy(force=True), (*SAMPLE_DIMS, *_dims(problem, name, value.dim() - len(SAMPLE_DIMS))))
        for name, value in values.items()
    }


def _stats(posterior: Posterior) -> Group:
    stats = {name: value.numpy(force=True) for name, value in posterior.stats.items()}
    if "diverging" in stats:
        stats["diverging"] = stats["diverging"].astype(bool)
    if "log_p" in stats and "log_q" in stats:
        with suppress(DataError):  # log weights that are not finite, or too few, have no smooth form
            check = importance(posterior.stats["log_p"], posterior.stats["log_q"])
            stats["log_weights"] = check.smoothed_log_weights.numpy(force=True)
    return {name: (value, SAMPLE_DIMS) for name, value in stats.items()}


def _dims(problem: Problem | None, site: str, num_axes: int) -> tuple[str, ...]:
    """Names of the first ``num_axes`` axes of a site; a log likelihood has no event axes."""
    if problem is not None and site in problem.sites and num_axes <= len(problem.sites[site].shape):
        return problem.dims(site)[:num_axes]
    return tuple(f"{site}_dim_{i}" for i in range(num_axes))


def _constant_data(problem: Problem) -> Group:
    """The model's tensor arguments but for the observed ones, with the dimensions of the rows that they go with."""
    group: Group = {}
    for name, value in problem.inputs.items():
        if any(value.shape == data.shape and bool((value == data).all()) for data in problem.observed.values()):
            continue
        rows: tuple[str, ...] = ()
        for site in problem.observed:
            pairs = zip(value.shape, problem.sites[site].batch_shape, problem.dims(site), strict=False)
            shared = takewhile(lambda pair: pair[0] == pair[1], pairs)
            rows = max(rows, tuple(dim for *_, dim in shared), key=len)
        own = tuple(f"{name}_dim_{i}" for i in range(len(rows), value.dim()))
        group[name] = (value.numpy(force=True), rows + own)
    return group


# --- files ----------------------------------------------------------------------------------------------------------


def check_writable(directory: Path) -> None:
    """See whether files can be put into ``directory``, and leave nothing behind.

    Raises:
        FileError: It is a file, or it cannot be written to or created.
    """
    _staging(directory).rmdir()


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """An empty folder whose files move into ``directory`` when the block ends, unless it ends with an error.

    Raises:
        FileError: ``directory`` cannot be written to.
    """
    folder = _staging(directory)
    try:
        yield folder
        directory.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.iterdir()):
            os.replace(file, directory / file.name)
    except FileError:
        raise
    except OSError as error:
        raise _unwritable(directory, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _staging(directory: Path) -> Path:
    """A new empty folder on the file system of ``directory``: inside it, or inside its nearest parent that exists."""
    try:
        place = next(path for path in (directory, *directory.absolute().parents) if path.exists())
        if not place.is_dir():
            raise NotADirectoryError(f"{place} is a file")
        return Path(tempfile.mkdtemp(prefix=".pyro-vi-lab-", dir=place))
    except OSError as error:
        raise _unwritable(directory, error) from error


def _unwritable(directory: Path, error: OSError) -> FileError:
    return FileError(f"cannot write to {directory}: {error.strerror or error}; choose another directory")
